"""The kernels of `fxquant/backends/native/kernels` as functions that a test can call.

One shared library holds every kernel of every instruction set; its Params structs are read from the
header.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import fxquant

HEADERS = Path(fxquant.__file__).parent / "backends/native/kernels"
INSTRUCTION_SETS = {
    "portable": (),
    "avx2": ("avx2", "fma"),
    "avxvnni": ("avx2", "fma", "avx_vnni"),
    "avx512vnni": ("avx512_vnni", "avx512vbmi", "avx512bw", "avx512vl", "avx512dq"),
    "amx": ("avx512_vnni", "avx512vbmi", "amx_int8", "amx_tile"),
}
_FLOAT_FUNCTIONS = """
FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")
extern "C" void avx512vnni_exp_of(const float* x, float* y, int count) {
  for (int i = 0; i < count; i += 16)
    _mm512_storeu_ps(y + i, fxquant::avx512vnni::exp_of(_mm512_loadu_ps(x + i)));
}
extern "C" void avx512vnni_erf_of(const float* x, float* y, int count) {
  for (int i = 0; i < count; i += 16)
    _mm512_storeu_ps(y + i, fxquant::avx512vnni::erf_of(_mm512_loadu_ps(x + i)));
}
FXQUANT_TARGET_END
"""
_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_STRUCT = re.compile(r"struct (\w+)Params \{(.*?)\n\};", re.DOTALL)
_FIELD = re.compile(r"^\s*(?:const )?(\w+)(\*?) (\w+);", re.MULTILINE)
SLACK = 256
# Set by the slow test that runs these tests under the sanitizers of the compiler.
SANITIZERS = os.environ.get("FXQUANT_TEST_SANITIZERS", "").split()


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def instruction_sets() -> list[str]:
    """Those that this machine runs."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = set(text.split())
    return [name for name, needed in INSTRUCTION_SETS.items() if flags.issuperset(needed)]


@functools.cache
def structs() -> dict[str, type[ctypes.Structure]]:
    found = {}
    for name, body in _STRUCT.findall((HEADERS / "params.h").read_text()):
        fields = [
            (field, ctypes.c_void_p if star else _TYPES[kind])
            for kind, star, field in _FIELD.findall(body)
        ]
        function = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        found[function] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


@functools.cache
def library() -> ctypes.CDLL:
    """All kernels, each as ``ISA_NAME(params, parts)``, which runs its items in that many parts."""
    lines = ['#include "all.h"', "using namespace fxquant;"]
    for isa in INSTRUCTION_SETS:
        for function, struct in structs().items():
            lines.append(
                f'extern "C" void {isa}_{function}(const {struct.__name__}Params* p, int parts) {{'
                f"  const int items = {isa}::{function}_items(*p);"
                "  for (int i = 0; i < parts; ++i)"
                f"    {isa}::{function}(*p, int(int64_t(items) * i / parts),"
                "      int(int64_t(items) * (i + 1) / parts)); }"
            )
    lines.append(_FLOAT_FUNCTIONS)
    lines.append('extern "C" int start_amx() { return fxquant::start_amx(); }')
    folder = Path(tempfile.mkdtemp(prefix="fxquant_kernels_"))
    (folder / "kernels.cpp").write_text("\n".join(lines))
    chosen = compiler()
    assert chosen is not None
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra"]
    target = folder / "kernels.so"
    subprocess.run(
        [
            chosen,
            *flags,
            *(SANITIZERS or ["-Werror"]),
            f"-I{HEADERS}",
            "kernels.cpp",
            "-o",
            str(target),
        ],
        cwd=folder,
        # A compiler under the sanitizers takes ten times as long.
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        check=True,
    )
    return ctypes.CDLL(str(target))


def call(isa: str, function: str, parts: int = 1, **values: object) -> None:
    """Run a kernel; tensors become pointers, what is not given is 0."""
    rooms = {
        name: _with_slack(value)
        for name, value in values.items()
        if isinstance(value, Tensor) and (function, name) != ("quantize", "x")
    }
    given = {
        name: rooms.get(name, value).data_ptr() if isinstance(value, Tensor) else value
        for name, value in values.items()
        if value is not None
    }
    params = structs()[function](**given)
    loaded = library()
    if isa == "amx":
        assert loaded.start_amx() == 1
    getattr(loaded, f"{isa}_{function}")(ctypes.byref(params), parts)
    for name, room in rooms.items():
        values[name].copy_(room)  # type: ignore[attr-defined]


def _with_slack(values: Tensor) -> Tensor:
    """A copy behind which a kernel may read, as behind everything but the caller's tensors."""
    extra = SLACK // values.element_size()
    memory = torch.empty(values.numel() + extra, dtype=values.dtype)
    return memory[: values.numel()].view(values.shape).copy_(values)


class Image:
    """A uint8 image [N, C, H, W] as the kernels see it: channels last, in a border, between guards.

    The border holds ``fill``, everything around the channels random bytes.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], border: int = 0, extra: int = 0, fill: int = 0
    ) -> None:
        batch, channels, height, width = shape
        self.shape = shape
        self.pixel = channels + extra
        self.row = (width + 2 * border) * self.pixel
        self.batch = (height + 2 * border) * self.row
        self.memory = torch.randint(0, 256, (batch * self.batch + 2 * SLACK,), dtype=torch.uint8)
        self.inside = (
            self.memory[SLACK : SLACK + batch * self.batch]
            .view(batch, height + 2 * border, width + 2 * border, self.pixel)[..., :channels]
            .permute(0, 3, 1, 2)
        )
        self.inside.fill_(fill)
        self.values = self.inside[:, :, border : border + height, border : border + width]
        self.border = border
        self.before = self.memory.clone()

    @classmethod
    def of(cls, values: Tensor, border: int = 0, extra: int = 0, fill: int = 0) -> Image:
        image = cls(tuple(values.shape), border, extra, fill)  # type: ignore[arg-type]
        image.values.copy_(values)
        image.before = image.memory.clone()
        return image

    def address(self, row: int = 0, column: int = 0) -> int:
        """Of the first channel of a pixel of the first image."""
        offset = (row + self.border) * self.row + (column + self.border) * self.pixel
        return self.memory.data_ptr() + SLACK + offset

    def untouched_elsewhere(self) -> bool:
        """Whether nothing but the values was written."""
        now = self.values.clone()
        self.values.copy_(
            torch.as_strided(
                self.before, now.shape, self.values.stride(), self.values.storage_offset()
            )
        )
        same = torch.equal(self.memory, self.before)
        self.values.copy_(now)
        return same
