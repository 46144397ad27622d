"""Several processes, as ``torchrun`` starts them: all compute, the first one prints and saves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

__all__ = ["joined"]


@contextmanager
def joined(device: str) -> Iterator[bool]:
    """Meet the other processes, where there are any; yields whether this is the first one.

    Sums go over gloo on the CPU and over NCCL on GPUs, of which each process takes its own.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield True
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
