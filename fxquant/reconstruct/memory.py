"""What the process's memory costs in time: large tensors that come and go in every iteration."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["give_back_memory", "reused_memory"]

# Of glibc's malloc.h, with their defaults.
_TRIM_THRESHOLD, _TRIM_DEFAULT = -1, 128 * 1024
_MMAP_MAX, _MMAP_DEFAULT = -4, 65536


@contextmanager
def reused_memory() -> Iterator[None]:
    """Inside, memory that tensors leave stays with the process for the next ones.

    By default glibc gives every large block back to the system, which hands it out page by page,
    zeroed: half of the time of an elementwise operation on a large tensor. Elsewhere than on
    glibc nothing happens.
    """
    malloc = _glibc()
    if malloc is None:
        yield
        return
    malloc.mallopt(_MMAP_MAX, 0)
    malloc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        malloc.mallopt(_MMAP_MAX, _MMAP_DEFAULT)
        malloc.mallopt(_TRIM_THRESHOLD, _TRIM_DEFAULT)
        give_back_memory()


def give_back_memory() -> None:
    """Return what no tensor holds: between two blocks, whose tensors differ in size."""
    malloc = _glibc()
    if malloc is not None:
        malloc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
