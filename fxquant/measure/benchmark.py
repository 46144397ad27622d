"""Latency of several callables, measured in turns so that drift hits all of them alike."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxquant.arguments import checked
from fxquant.errors import InputError
from fxquant.measure.tables import table
from fxquant.timing import in_turns
from fxquant.version import __version__

VNNI_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")


@dataclass(frozen=True)
class Timing:
    """The latency of one callable.

    Attributes:
        name: what it is called.
        median_ms, lower_quartile_ms, upper_quartile_ms: of the measured calls, in milliseconds.
        calls: how many calls were measured.
        ratio: the median divided by that of the first callable.
    """

    name: str
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    calls: int
    ratio: float


@dataclass(frozen=True)
class Machine:
    """What the figures hold for.

    Attributes:
        cpu: the processor's model name.
        int8_instructions: which of avx512_vnni, avx_vnni and amx_int8 it has.
        threads: how many threads torch used inside an operator.
        versions: of Python, torch and fxquant.
    """

    cpu: str
    int8_instructions: tuple[str, ...]
    threads: int
    versions: Mapping[str, str]

    @property
    def vnni(self) -> bool:
        """Whether u8 × s8 products are summed in 32 bits by one instruction."""
        return bool(self.int8_instructions)

    @classmethod
    def here(cls) -> Machine:
        """This machine and process."""
        cpu, flags = _cpu()
        return cls(
            cpu=cpu,
            int8_instructions=tuple(flag for flag in VNNI_FLAGS if flag in flags),
            threads=torch.get_num_threads(),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "fxquant": __version__,
            },
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        kinds = ", ".join(self.int8_instructions) or "no VNNI"
        plural = "" if self.threads == 1 else "s"
        return f"{self.cpu} ({kinds}), {self.threads} thread{plural}, {versions}"


@dataclass(frozen=True)
class Benchmark:
    """The timings of one interleaved run, in the order in which the callables were given."""

    timings: tuple[Timing, ...]
    machine: Machine
    rounds: int

    def __getitem__(self, name: str) -> Timing:
        return next(timing for timing in self.timings if timing.name == name)

    def to_json(self) -> dict[str, Any]:
        """Timings, machine and rounds, ready for ``json.dumps``."""
        return asdict(self) | {"machine": asdict(self.machine) | {"vnni": self.machine.vnni}}

    def __str__(self) -> str:
        rows = [
            (
                timing.name,
                f"{timing.median_ms:.3f} ms",
                f"{timing.lower_quartile_ms:.3f} .. {timing.upper_quartile_ms:.3f}",
                f"{timing.ratio:.3f}",
                f"{1 / timing.ratio:.2f} x",
            )
            for timing in self.timings
        ]
        first = self.timings[0].name
        headers = ("", "median", "quartiles", f"time / {first}", "faster")
        about = f"{self.timings[0].calls} calls each in {self.rounds} turns; {self.machine}"
        return f"{table(rows, headers)}\n{about}"


@checked()
def benchmark(
    candidates: Mapping[str, Callable[..., Any]],
    inputs: Tensor | Sequence[Any] | None = None,
    *,
    threads: int | None = None,
    warmup: int = 5,
    rounds: int = 20,
    calls: int = 5,
    progress: bool = False,
) -> Benchmark:
    """Time several callables on the same inputs in one process, under ``torch.inference_mode``.

    In every round each candidate has one turn: one call that warms its weights up in the caches
    after the others have used them, then `calls` measured ones. The order of the turns rotates.

    Args:
        candidates: name → callable; ratios are to the first.
        inputs: a tensor, or the sequence of arguments; None calls without arguments.
        threads: torch's threads inside an operator while measuring; by default as they are.
        warmup: calls of each before anything is measured.
        rounds, calls: how many turns each gets, and how many measured calls in a turn.
        progress: show a bar on stderr after two seconds.

    Raises:
        InputError: no candidates, something that cannot be called, or a number below one.
    """
    _check(candidates, threads, rounds, calls)
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
    names = list(candidates)
    with torch.inference_mode(), _threads(threads):
        machine = Machine.here()
        for name in names:
            for _ in range(warmup):
                candidates[name](*arguments)
        turns = range(rounds)
        bar = tqdm(turns, "benchmark", delay=2, disable=None if progress else True, leave=False)
        milliseconds = in_turns(candidates, arguments, bar, calls)
    first = statistics.median(milliseconds[names[0]])
    return Benchmark(
        tuple(_timing(name, milliseconds[name], first) for name in names), machine, rounds
    )


def _timing(name: str, milliseconds: list[float], first: float) -> Timing:
    median = statistics.median(milliseconds)
    lower = upper = median
    if len(milliseconds) > 1:
        lower, _, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(name, median, lower, upper, len(milliseconds), median / first)


def _check(
    candidates: Mapping[str, Callable[..., Any]], threads: int | None, rounds: int, calls: int
) -> None:
    if not candidates:
        raise InputError("there is nothing to benchmark; give name → callable")
    for name, candidate in candidates.items():
        if not callable(candidate):
            raise InputError(f"{name!r} is a {type(candidate).__name__}, which cannot be called")
    for name, value in (("threads", threads), ("rounds", rounds), ("calls", calls)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu() -> tuple[str, frozenset[str]]:
    """The model name and the feature flags; no flags where the system does not tell them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    return fields.get("model name", platform.machine()), frozenset(fields.get("flags", "").split())
