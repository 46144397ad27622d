"""Compile the small network and measure it: what ``fxquant quickstart`` prints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import fxquant
from fxquant.cli.quickstart.data import CLASSES, draw
from fxquant.cli.quickstart.network import trained
from fxquant.measure.benchmark import Benchmark, benchmark
from fxquant.measure.evaluate import Evaluation, evaluate

CALIBRATION_IMAGES, CALIBRATION_SEED = 256, 2_000_000
EVALUATION_IMAGES, EVALUATION_SEED = 2000, 3_000_000
BATCH = 100
DIFF_LINES = 8


@dataclass(frozen=True)
class Quickstart:
    """What the quickstart did.

    Attributes:
        compiled: the quantized network, for ``x86``.
        evaluation: its accuracy beside that of the float network.
        benchmark: its latency beside that of the float network, for one image.
        seconds: how long all of it took.
    """

    compiled: fxquant.CompiledModel
    evaluation: Evaluation
    benchmark: Benchmark
    seconds: float

    def text(self, *, full_diffs: bool = False) -> str:
        """The whole story; diffs are shortened to their first changes unless `full_diffs`."""
        report = self.compiled.report
        diffs = [
            f"{record.name}: {record.created} nodes created, {record.erased} erased\n"
            + (record.diff if full_diffs else "\n".join(shorten(record.diff)))
            for record in report.passes
            if record.diff
        ]
        return "\n\n".join(
            (
                "A small residual network, trained to tell "
                f"{', '.join(CLASSES)}; compiled with the recipe w8a8 for x86.",
                *diffs,
                str(report),
                str(self.evaluation),
                f"size: {report.float_size_bytes / 1e3:.0f} kB in float32, "
                f"{report.size_bytes / 1e3:.0f} kB quantized",
                str(self.benchmark),
                f"done in {self.seconds:.1f} s. Next: fxquant compile --help",
            )
        )

    def to_json(self) -> dict[str, Any]:
        """Report, evaluation, latency and seconds, ready for ``json.dumps``."""
        return {
            "report": self.compiled.report.to_json(),
            "evaluation": self.evaluation.to_json(),
            "benchmark": self.benchmark.to_json(),
            "seconds": self.seconds,
        }


def quickstart(*, progress: bool = False) -> Quickstart:
    """Compile the embedded network to W8A8 on drawn images, and measure it beside float."""
    start = time.perf_counter()
    model = trained()
    calibration, _ = draw(CALIBRATION_IMAGES, CALIBRATION_SEED)
    images, labels = draw(EVALUATION_IMAGES, EVALUATION_SEED)
    compiled = fxquant.compile(
        model,
        fxquant.Recipe.named("w8a8"),
        calibration=torch.split(calibration, BATCH),
        progress=progress,
    )
    batches = list(zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True))
    evaluation = evaluate(compiled, batches, reference=model, progress=progress)
    # One thread: the network is too small for two to gain anything.
    latency = benchmark({"float": model, "w8a8": compiled}, images[:1], threads=1, rounds=10)
    return Quickstart(compiled, evaluation, latency, time.perf_counter() - start)


def shorten(diff: str, most: int = DIFF_LINES) -> Iterator[str]:
    """The first `most` removed or added lines of a unified diff, and how many more there are."""
    changed = [
        line
        for line in diff.splitlines()
        if line[:1] in ("+", "-") and not line.startswith(("+++", "---"))
    ]
    yield from changed[:most]
    if len(changed) > most:
        yield f"  ... and {len(changed) - most} more changed lines"
