"""The parameter structs of the kernels, read from their headers: one source for both languages."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["KERNELS_FOLDER", "params_layout", "params_type", "params_types"]

KERNELS_FOLDER = Path(__file__).parent / "kernels"
_STRUCT = re.compile(r"^struct (\w+)Params \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^\s*(?:const )?(\w+)(\*?) (\w+);", re.MULTILINE)
_NUMBERS: Mapping[str, type] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


@functools.cache
def _structs() -> dict[str, tuple[str, str]]:
    """Name and text of every kernel's struct, by the kernel's name."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(KERNELS_FOLDER.glob("*.h")):
        for struct, body in _STRUCT.findall(path.read_text()):
            found[re.sub(r"(?<!^)([A-Z])", r"_\1", struct).lower()] = struct, body
    return found


@functools.cache
def params_types() -> dict[str, type[ctypes.Structure]]:
    """By the kernel's name: ``conv`` has ``ConvParams``."""
    found: dict[str, type[ctypes.Structure]] = {}
    for kernel, (struct, body) in _structs().items():
        fields = [
            (name, ctypes.c_uint64 if pointer else _NUMBERS[kind])
            for kind, pointer, name in _FIELD.findall(body)
        ]
        found[kernel] = type(f"{struct}Params", (ctypes.Structure,), {"_fields_": fields})
    return found


def params_type(kernel: str) -> type[ctypes.Structure]:
    """The struct that a kernel is told what to do by."""
    return params_types()[kernel]


def params_layout(kernel: str) -> str:
    """A hash of a kernel's struct, with the comments that say what its fields mean.

    A program and a library that have another one do not belong together.
    """
    return hashlib.sha256(_structs()[kernel][1].encode()).hexdigest()[:16]
