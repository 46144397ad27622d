"""Several processes, as ``torchrun`` starts them: all compute, the first one prints and saves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fxquant.errors import InputError

__all__ = ["check_device", "joined"]


def check_device(device: str) -> str:
    """`device`, if torch has it.

    Raises:
        InputError: it is no device's name, or there is none of this name.
    """
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: give cpu, cuda or cuda:N") from error
    if named.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: give cpu, cuda or cuda:N")
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


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
