"""Every benchmark is importable and says how it is used; none is run."""

import pkgutil
import runpy
import sys
from importlib import import_module

import pytest

import benchmarks

MODULES = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
SHARED = ("names", "networks", "networks_covered", "results")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # another test may have imported it
@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_says_how_it_is_used(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    if name in SHARED:
        runpy.run_module(f"benchmarks.{name}")
        return
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] in ("benchmarks", "fxquant", "passes"):
            raise
        pytest.skip(f"{name} needs {missing.name}: pip install '.[peers]'")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize(
    "name", ["accuracy", "latency", "qat", "real", "reconstruction_memory", "vit_latency"]
)
def test_an_unknown_network_is_told_with_the_nearest_one(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "mobilenetv2"])
    with pytest.raises(SystemExit) as stopped:
        import_module(f"benchmarks.{name}").main()
    assert stopped.value.code == 2
    assert "no network mobilenetv2; did you mean 'mobilenet_v2'" in capsys.readouterr().err
