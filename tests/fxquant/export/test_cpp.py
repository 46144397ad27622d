"""An exported folder builds and runs by itself, and gives the reference's bits."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.native import executor
from fxquant.backends.native.build import compiler, why_unavailable
from fxquant.compiled import CompiledModel
from fxquant.errors import InputError, TargetError
from fxquant.export.whole import whole_program
from passes.infra.verify import flatten
from tests.fxquant.backends.native.kernels import instruction_sets

needs_tools = pytest.mark.skipif(
    bool(why_unavailable()) or shutil.which("cmake") is None, reason="needs a compiler and CMake"
)


class TwoOutputs(nn.Module):
    """Two inputs, one of them first read late; a dict of outputs, the later result first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.each = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.other = nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 4, 3)

    def forward(self, late: Tensor, x: Tensor) -> dict[str, Any]:
        features = nn.functional.max_pool2d(self.each(self.first(x).relu()), 3, 1, 1)
        both = features + self.other(late).relu()
        return {"classes": self.second(both), "features": [features]}


def compiled() -> CompiledModel:
    torch.manual_seed(0)
    example = (torch.randn(3, 8, 9, 9), torch.randn(3, 3, 9, 9))
    return fxquant.compile(TwoOutputs().eval(), "w8a8", calibration=[example], target="reference")


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, shared_cache: Path
) -> tuple[Path, CompiledModel]:
    """The folder, built, and the model that it was written from."""
    folder = tmp_path_factory.mktemp("exported") / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXQUANT_CACHE", str(shared_cache))
        q = compiled()
        q.export_cpp(folder, name="tiny")
    for command in (["-B", "build"], ["--build", "build"]):
        subprocess.run(["cmake", *command], cwd=folder, check=True, capture_output=True)
    return folder, q


def load(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 8, 9, 9, generator=random),
        torch.randn(batch, 3, 9, 9, generator=random),
    )


def assert_same(q: CompiledModel, model: Any, x: tuple[Tensor, ...]) -> None:
    expected = [value for _, value in flatten(q(*x))]
    found = model(*(value.numpy() for value in x))
    for want, got in zip(expected, found, strict=True):
        assert torch.equal(want, torch.from_numpy(got))


@needs_tools
@pytest.mark.parametrize("isa", [None, *instruction_sets()])
def test_self_test_passes_with_an_empty_environment(exported: Any, isa: str | None) -> None:
    environment = {} if isa is None else {"FXQUANT_ISA": isa}
    done = subprocess.run(
        [exported[0] / "build" / "selftest"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "every bit" in done.stdout
    assert isa is None or f"({isa}," in done.stdout


@needs_tools
def test_sanitizers_find_nothing_on_any_instruction_set(exported: Any, tmp_path: Path) -> None:
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    sources = (exported[0] / "model.cpp", exported[0] / "selftest.cpp")
    folders = (f"-I{exported[0]}", f"-I{exported[0] / 'kernels'}", f'-DFOLDER="{exported[0]}"')
    language = ("-std=c++17", "-ffp-contract=off", "-pthread", "-w")
    subprocess.run(
        [compiler(), *language, *flags, *folders, *sources, "-o", tmp_path / "selftest"], check=True
    )
    for isa in instruction_sets():
        done = subprocess.run(
            [tmp_path / "selftest"], env={"FXQUANT_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"passed ({isa}," in done.stdout


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["Haswell", "Nehalem"])
def test_self_test_passes_on_a_processor_without_avx512(exported: Any, cpu: str) -> None:
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("needs qemu-user, which emulates other processors (apt install qemu-user)")
    done = subprocess.run(
        [emulator, "-cpu", cpu, exported[0] / "build" / "selftest"], capture_output=True, text=True
    )
    if "AVX" in done.stderr and done.returncode:
        pytest.skip(f"this qemu cannot emulate {cpu}: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    isa = {"Haswell": "avx2", "Nehalem": "portable"}[cpu]
    assert f"passed ({isa}," in done.stdout


@needs_tools
def test_self_test_fails_where_an_output_has_another_bit(exported: Any, tmp_path: Path) -> None:
    for name in ("weights.bin", "golden.bin"):
        shutil.copy(exported[0] / name, tmp_path)
    golden = bytearray((tmp_path / "golden.bin").read_bytes())
    golden[-1] ^= 1
    (tmp_path / "golden.bin").write_bytes(golden)
    done = subprocess.run(
        [exported[0] / "build" / "selftest", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "output 1 is not that of the reference" in done.stderr


@needs_tools
def test_python_module_gives_the_reference_s_bits_for_any_batch(exported: Any) -> None:
    folder, q = exported
    model = load(folder).Model()
    assert [shape for _, shape in model.inputs] == [(1, 8, 9, 9), (1, 3, 9, 9)]
    assert [shape for _, shape in model.outputs] == [(1, 4, 7, 7), (1, 8, 9, 9)]
    for batch in (1, 2, 5):
        assert_same(q, model, inputs(batch))


@needs_tools
def test_python_module_imports_numpy_and_the_standard_library_alone(exported: Any) -> None:
    text = (exported[0] / "model.py").read_text()
    assert len(text.splitlines()) < 100
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported <= {"__future__", "ctypes", "pathlib", "typing", "numpy"}


@needs_tools
def test_runs_where_torch_cannot_be_imported(exported: Any) -> None:
    lines = (
        "import sys; sys.modules['torch'] = None",
        "import numpy; from model import Model",
        "one = Model(threads=1)",
        "a, b = (numpy.zeros((2, *shape[1:]), kind) for kind, shape in one.inputs)",
        "print(*(y.shape for y in one(a, b)))",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=exported[0],
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(2, 4, 7, 7) (2, 8, 9, 9)", done.stderr


@needs_tools
def test_threads_may_call_one_model_at_once(exported: Any) -> None:
    folder, q = exported
    model = load(folder).Model(threads=2)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(20):
                assert_same(q, model, inputs(1 + seed % 3, seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_tools
@pytest.mark.parametrize(
    ("shapes", "kinds", "says"),
    [
        ([(1, 8, 9, 9)], "f", "has 2 inputs, found 1"),
        ([(1, 8, 9, 9), (1, 3, 9, 8)], "ff", r"input 1 is float32\[1, 3, 9, 8\], expected float32"),
        ([(1, 8, 9, 9), (2, 3, 9, 9)], "ff", r"\[any, 3, 9, 9\] for a batch of 1"),
        ([(1, 8, 9, 9), (1, 3, 81)], "ff", r"input 1 is float32\[1, 3, 81\]"),
        ([(1, 8, 9, 9), (1, 3, 9, 9)], "fB", r"input 1 is uint8\[1, 3, 9, 9\]"),
        ([(1, 8, 9, 9), (1, 3, 9, 9)], "fd", "float64 of 4 dimensions is nothing a network takes"),
    ],
)
def test_inputs_that_do_not_fit_are_errors_with_a_text(
    exported: Any, shapes: list[tuple[int, ...]], kinds: str, says: str
) -> None:
    model = load(exported[0]).Model()
    arrays = [numpy.zeros(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    with pytest.raises(ValueError, match=says):
        model(*arrays)


@needs_tools
def test_no_data_and_crooked_data_are_errors_with_a_text(exported: Any) -> None:
    module = load(exported[0])
    model = module.Model()
    arrays = [numpy.zeros(shape, kind) for kind, shape in (*model.inputs, *model.outputs)]
    views = [module._view(array) for array in arrays]
    for address, says in ((None, "has no data"), (arrays[1].ctypes.data + 1, "is not aligned")):
        views[1].data = address
        ins, outs = (module.Tensor * 2)(*views[:2]), (module.Tensor * 2)(*views[2:])
        assert model._call("run", model._first, ins, 2, outs, 2, 1) == 0
        text = model._call("error", model._first, kind=module.ctypes.c_char_p)
        assert says in text.decode()


@needs_tools
def test_damaged_weights_are_an_error_with_a_text(exported: Any, tmp_path: Path) -> None:
    data = bytearray((exported[0] / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 0x80
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(RuntimeError, match=r"weights\.bin is damaged: its checksum is wrong"):
        load(exported[0]).Model(weights=tmp_path / "weights.bin")


@needs_tools
def test_header_and_the_example_of_the_readme_are_plain_c(exported: Any, tmp_path: Path) -> None:
    c = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if c is None:
        pytest.skip("needs a C compiler")
    example = (exported[0] / "README.md").read_text().partition("```c\n")[2].partition("```")[0]
    lines = (
        "#include <stdio.h>",
        '#include "model.h"',
        "int main(void) { float pixels[1], results[1];",
        example,
        "return 0; }",
    )
    (tmp_path / "use.c").write_text("\n".join(lines))
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"]
    subprocess.run([c, *flags, f"-I{exported[0]}", "use.c"], cwd=tmp_path, check=True)


@needs_tools
def test_library_shows_its_own_functions_alone(exported: Any) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    library = exported[0] / "build" / "libtiny.so"
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in listed.stdout.splitlines() if " T " in line}
    assert names
    assert all(name.startswith("tiny_") for name in names), names


# -- the folder ----------------------------------------------------------------------------


@pytest.fixture
def q(native: None) -> CompiledModel:
    return compiled().to_target("native")


def test_a_folder_with_other_things_in_it_is_left_alone(q: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="is not empty"):
        q.export_cpp(tmp_path)
    with pytest.raises(InputError, match="holds other things than an exported network"):
        q.export_cpp(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_an_exported_folder_is_replaced_where_that_is_asked_for(
    q: CompiledModel, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    q.export_cpp(folder)
    (folder / "build").mkdir()
    with pytest.raises(InputError, match="not empty: allow to overwrite it"):
        q.export_cpp(folder)
    q.export_cpp(folder, overwrite=True)
    assert not (folder / "build").exists()
    assert os.listdir(tmp_path) == ["m"]


def test_what_fails_leaves_nothing_behind(
    q: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot write .*m: No space left on device"):
        q.export_cpp(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "2d", "my-model", "selftest", "a b"])
def test_a_name_that_c_has_no_use_for_is_refused(
    q: CompiledModel, tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match="cannot be the name"):
        q.export_cpp(tmp_path / "m", name=name)


# -- what can be exported ------------------------------------------------------------------


def test_the_program_has_the_model_s_inputs_and_outputs_in_their_order(q: CompiledModel) -> None:
    whole = whole_program(q.stages["native"], q.example)
    x = inputs(2)
    expected = [value for _, value in flatten(q.to_target("reference")(*x))]
    for want, got in zip(expected, whole(*x), strict=True):
        assert torch.equal(want, got)


class Sorting(nn.Module):
    """Something that no kernel computes stands between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sort(self.first(x), dim=-1).values)


def test_operations_without_a_kernel_are_named(native: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    q = fxquant.compile(Sorting().eval(), "w8a8", calibration=x, target="native")
    with pytest.raises(TargetError, match=r"cannot be exported: native has no kernel for 1 x sort"):
        q.export_cpp(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_the_unit_of_an_export_holds_the_kernels_of_the_network_alone(
    q: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxquant.backends.native.unit import unit_text

    monkeypatch.setattr(executor, "unit_text", unit_text)
    q.export_cpp(tmp_path / "m")
    text = (tmp_path / "m" / "model.cpp").read_text()
    assert "F(conv, ConvParams, " in text
    assert "avg_pool" not in text
