"""A built library and its contexts, called through ctypes, which gives the GIL away."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import TargetError

__all__ = ["Program", "thread_count"]

_ROOM = 4096


def thread_count() -> int:
    """``$FXQUANT_NUM_THREADS``, else what torch uses."""
    named = os.environ.get("FXQUANT_NUM_THREADS", "")
    return max(1, int(named)) if named.isdigit() else torch.get_num_threads()


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.fxquant_create.restype = ctypes.c_void_p
    library.fxquant_create.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
    library.fxquant_clone.restype = ctypes.c_void_p
    library.fxquant_clone.argtypes = [ctypes.c_void_p]
    library.fxquant_destroy.restype = None
    library.fxquant_destroy.argtypes = [ctypes.c_void_p]
    for name in ("fxquant_error", "fxquant_isa"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    for name in ("fxquant_step_count", "fxquant_arena_size"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    run: list[Any] = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    library.fxquant_run.restype, library.fxquant_run.argtypes = ctypes.c_int, run
    library.fxquant_profile.restype = ctypes.c_int
    library.fxquant_profile.argtypes = [*run, ctypes.c_void_p]
    return library


class Program:
    """A program in a file and the library that runs it; every calling thread has a context."""

    def __init__(self, library: Path, program: Path) -> None:
        self.library = library
        self._library = _load(library)
        error = ctypes.create_string_buffer(_ROOM)
        first = self._library.fxquant_create(str(program).encode(), error, _ROOM)
        if not first:
            raise TargetError(f"the native program cannot be loaded: {error.value.decode()}")
        self._first: int = first
        self._idle: list[int] = [first]
        self._all: list[int] = [first]
        self._lock = threading.Lock()

    def __del__(self) -> None:
        for handle in self.__dict__.get("_all", ()):
            self._library.fxquant_destroy(handle)

    @property
    def isa(self) -> str:
        """The instruction set that it runs on."""
        return str(self._library.fxquant_isa(self._first).decode())

    def run(self, batch: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Dense tensors in and out. Raises TargetError where the library says no."""
        sources = (ctypes.c_void_p * len(inputs))(*[x.data_ptr() for x in inputs])
        results = (ctypes.c_void_p * len(outputs))(*[y.data_ptr() for y in outputs])
        handle = self._take()
        try:
            failed = self._library.fxquant_run(handle, batch, sources, results, thread_count())
            if failed:
                raise TargetError(self._library.fxquant_error(handle).decode())
        finally:
            self._give_back(handle)

    def profile(self, batch: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[int]:
        """Run, and the nanoseconds of every step."""
        sources = (ctypes.c_void_p * len(inputs))(*[x.data_ptr() for x in inputs])
        results = (ctypes.c_void_p * len(outputs))(*[y.data_ptr() for y in outputs])
        handle = self._take()
        try:
            times = (ctypes.c_int64 * self._library.fxquant_step_count(handle))()
            if self._library.fxquant_profile(
                handle, batch, sources, results, thread_count(), times
            ):
                raise TargetError(self._library.fxquant_error(handle).decode())
            return list(times)
        finally:
            self._give_back(handle)

    def _take(self) -> int:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            handle: int | None = self._library.fxquant_clone(self._first)
            if not handle:
                raise TargetError("out of memory for another context of a native program")
            self._all.append(handle)
            return handle

    def _give_back(self, handle: int) -> None:
        with self._lock:
            self._idle.append(handle)
