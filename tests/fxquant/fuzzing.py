"""Seeded wrong uses: arguments that are right, with some of them replaced by anything else."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

import fxquant
from fxquant.errors import FxquantError

__all__ = ["command_lines", "junk_values", "raw_error", "uses"]


def junk_values() -> list[Any]:
    """Things of all types, shapes and sizes."""
    return [
        None, 0, -1, 7, 10**12, 0.5, -0.5, float("nan"), float("inf"), True, "", "x", "w8a8",
        "native", "../..", "\0", "é" * 40, b"bytes", (), [], {}, set(), {"a": 1}, {1: 2}, [None],
        ["x"], [[]], object(), int, len, lambda: None, lambda x: x, lambda x, y: x,
        iter([]), range(3), Path("nowhere/m.fxq"), Path("."), numpy.zeros((2, 3, 8, 8)),
        torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(3, 8, 8),
        torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 1, 1),
        torch.zeros(2, 3, 8, 8, 2), torch.zeros(0, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan),
        torch.zeros(2, 3, 8, 8, dtype=torch.int64), torch.zeros(2, 3, 8, 8, dtype=torch.float16),
        torch.zeros(2, 3, 8, 8, dtype=torch.complex64), torch.zeros(2, 3, 8, 8, device="meta"),
        torch.eye(4).to_sparse(), [torch.zeros(2, 3, 8, 8)], [torch.zeros(3, 8, 8)],
        [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 99]))],
        [(torch.zeros(2, 3, 8, 8), torch.tensor([0.5, 0.5]))],
        [(torch.zeros(2, 3, 8, 8), torch.tensor([1]))], [{"input": torch.zeros(2, 3, 8, 8)}],
        [{"nothing": torch.zeros(2, 3, 8, 8)}], nn.Identity().eval(), nn.Identity(),
        nn.Linear(2, 2).eval(), nn.Sequential().eval(), nn.Conv2d(3, 4, 3).eval().half(),
        nn.Conv2d(3, 4, 3, device="meta").eval(), fxquant.Drop(1), torch.float16,
        torch.device("cpu"), fxquant.Recipe(), fxquant.Recipe.named("w4a8"),
        {"weights.bits": 4}, {"weights.bits": 99}, {"weights": 5}, {"name": None},
        {"overrides": [{"modules": "x", "weights": {"bits": 3}}]}, {"overrides": 3},
        {"float": ["type:Nothing"]}, {"calibration.source": "nowhere"},
    ]  # fmt: skip


Use = tuple[str, Callable[..., Any], Sequence[Any], Mapping[str, Any]]


def uses(count: int, seed: int, right: Sequence[Use]) -> list[Use]:
    """`count` uses that differ from one of `right` in one to three arguments."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        name, function, args, kwargs = right[number % len(right)]
        positional, named = list(args), dict(kwargs)
        for _ in range(chance.choice((1, 1, 2, 3))):
            junk = chance.choice(junk_values())
            what = chance.random()
            if what < 0.05:
                positional = positional[:-1]
            elif what < 0.1:
                positional.append(junk)
            elif what < 0.15:
                named[chance.choice(("recipes", "calib", "x", "bitz"))] = junk
            elif positional and (what < 0.65 or not named):
                positional[chance.randrange(len(positional))] = junk
            elif named:
                named[chance.choice(list(named))] = junk
        made.append((f"{number}: {name}", function, positional, named))
    return made


_WORDS = (
    "", "x", "-1", "0", "nan", "1e9", "--help-me", "w8a9", "native", "nowhere", "nowhere.fxq", ".",
    "images", "images/00.png", "m.fxq", "w.safetensors", "weights.bits=99", "weights.bits", "=",
    "torchvision:", "torchvision:resnet", "os:getcwd", "os:path", "json:loads", ":", "3,0,3", "3",
    "3,12,12", "imagenet,resize=x", "none", "auto", "fusion", "\0", "é", "mine.toml", "net.py",
    "/dev/null", "[]", "cuda", "reference", "1", "2", "12",
)  # fmt: skip


def command_lines(count: int, seed: int, right: Sequence[Sequence[str]]) -> list[list[str]]:
    """`count` command lines that differ from one of `right` in one to three words."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        words = list(right[number % len(right)])
        for _ in range(chance.choice((1, 1, 2, 3))):
            place, what = chance.randrange(1, len(words) + 1), chance.random()
            if what < 0.15 and len(words) > 1:
                del words[min(place, len(words) - 1)]
            elif what < 0.3:
                words.insert(place, chance.choice(_WORDS))
            else:
                words[min(place, len(words) - 1)] = chance.choice(_WORDS)
        made.append(words)
    return made


def raw_error(call: Callable[[], Any]) -> str:
    """What `call` raises beside an FxquantError of one line, or ""."""
    try:
        call()
    except FxquantError as error:
        return f"several lines: {error}" if "\n" in str(error) else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
