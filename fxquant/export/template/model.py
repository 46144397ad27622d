"""The exported network from Python: ctypes and numpy, nothing else.

model = Model()          # the library from build/, weights.bin from beside this file
logits = model(images)   # numpy arrays in, an array or a tuple of arrays out
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

NAME = "@NAME@"
HERE = Path(__file__).resolve().parent
TYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.float32, np.bool_]


class Tensor(ctypes.Structure):
    """As in model.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 8),
    )


class Model:
    """The network; several threads may call it at once. `threads` is of each call, 0: all."""

    def __init__(self, library: Path | None = None, weights: Path | None = None, threads: int = 0):
        found = library or next(iter(sorted((HERE / "build").glob(f"lib{NAME}.*"))), None)
        if found is None:
            raise FileNotFoundError(f"no library in {HERE / 'build'}: run cmake there first")
        self._library, self.threads = ctypes.CDLL(str(found)), threads
        error, room = ctypes.create_string_buffer(1024), ctypes.c_int64(1024)
        path = str(weights or HERE / "weights.bin").encode()
        self._first = ctypes.c_void_p(self._call("create", path, error, room, kind=ctypes.c_void_p))
        if not self._first:
            raise RuntimeError(error.value.decode())
        self._idle, self._all = [self._first], [self._first]
        self.isa: str = self._call("isa", self._first, kind=ctypes.c_char_p).decode()
        self.inputs, self.outputs = self._ports("input"), self._ports("output")
        self._any_batch = self._call("any_batch", self._first)

    def __del__(self) -> None:
        for context in self.__dict__.get("_all", ()):
            self._call("destroy", context)

    def __call__(self, *arrays: Any) -> Any:
        """Raises ValueError for arrays that do not fit."""
        dense = [np.ascontiguousarray(array) for array in arrays]
        batch = dense[0].shape[0] // self.inputs[0][1][0] if dense and self._any_batch else 1
        results: list[Any] = [
            np.empty((shape[0] * batch, *shape[1:]) if shape else (), kind)
            for kind, shape in self.outputs
        ]
        ins, outs = ((Tensor * len(some))(*map(_view, some)) for some in (dense, results))
        try:
            context = self._idle.pop()
        except IndexError:
            context = ctypes.c_void_p(self._call("clone", self._first, kind=ctypes.c_void_p))
            if not context:
                raise MemoryError("no memory for another context") from None
            self._all.append(context)
        try:
            if not self._call("run", context, ins, len(ins), outs, len(outs), self.threads):
                raise ValueError(self._call("error", context, kind=ctypes.c_char_p).decode())
        finally:
            self._idle.append(context)
        return results[0] if len(results) == 1 else tuple(results)

    def _ports(self, kind: str) -> list[tuple[type, tuple[int, ...]]]:
        ports = [Tensor() for _ in range(self._call(f"{kind}_count", self._first))]
        for index, port in enumerate(ports):
            self._call(kind, self._first, index, ctypes.byref(port))
        return [(TYPES[port.type], tuple(port.shape[: port.rank])) for port in ports]

    def _call(self, name: str, *arguments: Any, kind: Any = ctypes.c_int) -> Any:
        function = self._library[f"{NAME}_{name}"]
        function.restype = kind
        return function(*arguments)


def _view(array: np.ndarray) -> Tensor:
    if array.dtype.type not in TYPES or array.ndim > 8:
        raise ValueError(f"{array.dtype} of {array.ndim} dimensions is nothing a network takes")
    shape = (ctypes.c_int64 * 8)(*array.shape)
    return Tensor(array.ctypes.data, TYPES.index(array.dtype.type), array.ndim, shape)
