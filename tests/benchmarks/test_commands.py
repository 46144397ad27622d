"""Every benchmark is importable and says how it is used; none is run."""

import pkgutil
import runpy
import sys

import pytest

import benchmarks

MODULES = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
SHARED = ("networks", "results")


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
