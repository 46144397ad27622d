"""Do exported ONNX files compute the reference's integers, and how fast are they?

    python -m benchmarks.onnx_export integers [NAME ...] [--images 100] [--write]
    python -m benchmarks.onnx_export prepare [NAME ...]
    python -m benchmarks.onnx_export speed [NAME ...] [--threads 1] [--write]

`integers`: real weights and images. An exact file runs on its own in ONNX Runtime, and every
integer is compared with the reference's; a portable one (QDQ) in lock-step, where every operator
gets the reference's integers, in ONNX Runtime and OpenVINO, and its top-1 on its own.

`speed`: our QDQ files in ONNX Runtime over ONNX Runtime's own static quantization (QDQ, u8 x s8,
per channel, the same calibration images), in turns in one process. `prepare` writes these files
into the folder of temporary files and measures their accuracy, which is the longer part.

OpenVINO comes with the extra ``[peers]``; without it its rows are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxquant
from benchmarks import results
from benchmarks.names import one_of
from benchmarks.real import NETWORKS, RealNetwork
from fxquant.compiled import CompiledModel
from fxquant.export.onnx.model import build_model
from fxquant.export.onnx.network import OnnxNetwork
from fxquant.export.onnx.options import OnnxOptions
from fxquant.export.onnx.runtimes import Run, onnxruntime_run, openvino_run
from fxquant.export.onnx.shapes import find_shapes
from fxquant.export.onnx.validate import check_integers, has_openvino, record
from fxquant.measure.benchmark import benchmark
from fxquant.measure.evaluate import collect_logits, evaluate
from fxquant.measure.peers import quantize_static
from fxquant.metrics import Accuracy

CNNS = ("cifar_resnet20", "resnet18_10", "mobilenet_v2", "shufflenet_v2_10", "squeezenet1_1")
PAIRS = (
    *((name, "w8a8") for name in CNNS),
    ("vit_tiny", "vit_w8a8_integer"),
    ("vit_tiny", "vit_w8a8"),
)
BATCH = 5
LABELS = ("onnxruntime", "w8a8_onnx", "w8a8")
FILES = Path(tempfile.gettempdir()) / "fxquant-onnx-speed"


def compiled(network: RealNetwork, recipe: str) -> tuple[nn.Module, CompiledModel]:
    model = network.load()
    calibration = network.calibration_batches()
    return model, fxquant.compile(model, recipe, calibration=calibration, target="reference")


def digests(name: str, images: int | None) -> dict[str, str]:
    """Of the images that calibrate a network, and of those that it is measured on."""
    network = NETWORKS[name]
    return {
        f"{name}: calibration": results.digest(network.calibration_batches()),
        f"{name}: validation": results.digest(network.validation_batches(images)),
    }


@dataclass
class _Comparison:
    """One form in one runtime; figures grow batch by batch, so that the reference runs once."""

    options: OnnxOptions
    runtime: str
    run: Run
    whole: Run
    values: int = 0
    differing: int = 0
    largest: int = 0
    equal: int = 0
    logits: int = 0
    accuracy: Accuracy = field(default_factory=Accuracy)

    @classmethod
    def of(cls, q: CompiledModel, options: OnnxOptions, runtime: str) -> _Comparison:
        integer = q.stages["integer"]
        shapes = find_shapes(integer, q.example)
        load = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}[runtime]
        observe = "outputs" if options.exact else "lock_step"
        run = load(build_model(integer, shapes, options, observe=observe))
        return cls(options, runtime, run, load(build_model(integer, shapes, options)))

    def add(self, q: CompiledModel, x: Tensor, labels: Tensor, recorded: Any, want: Tensor) -> None:
        check = check_integers(self.run, q.stages["integer"], recorded, "", "", None)
        self.values += check.values
        self.differing += check.differing
        self.largest = max(self.largest, check.largest)
        (array,) = self.whole({self.whole.inputs[0]: x.numpy()}).values()
        found = torch.from_numpy(array)
        self.equal += int((found == want).sum())
        self.logits += want.numel()
        self.accuracy.add(found, labels)

    def row(self, name: str, recipe: str, reference: Accuracy) -> dict[str, Any]:
        return {
            "network": name,
            "recipe": recipe,
            "form": self.options.form,
            "exact": self.options.exact,
            "runtime": self.runtime,
            "run": "on its own" if self.options.exact else "lock-step",
            "images": reference.images,
            "integers": self.values,
            "differing": self.differing,
            "largest": self.largest,
            "logits_equal": self.equal / self.logits,
            "top1": self.accuracy.top1,
            "top1_reference": reference.top1,
        }


def integers(name: str, recipe: str, images: int) -> list[dict[str, Any]]:
    """One row for each form and runtime."""
    network = NETWORKS[name]
    q = compiled(network, recipe)[1]
    forms = [OnnxOptions("qoperator", exact=True), OnnxOptions("qdq", exact=True)]
    comparisons = [
        _Comparison.of(q, options, "onnxruntime")
        for options in (forms[:1] if recipe == "vit_w8a8_integer" else forms)
        if recipe != "vit_w8a8"
    ]
    if recipe != "vit_w8a8_integer":
        runtimes = ["onnxruntime", *(["openvino"] if has_openvino() else [])]
        comparisons += [_Comparison.of(q, OnnxOptions("qdq"), runtime) for runtime in runtimes]
    reference = Accuracy()
    for batch in network.validation_batches(images, BATCH):
        x, labels = batch[0], batch[1]
        recorded, want = record(q.stages["integer"], (x,))
        reference.add(want, labels)
        for comparison in comparisons:
            comparison.add(q, x, labels, recorded, want)
    rows = [comparison.row(name, recipe, reference) for comparison in comparisons]
    print(table(rows), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            f"{row['network']}, {row['recipe']}",
            row["form"] + (", exact" if row["exact"] else ""),
            row["runtime"],
            row["run"],
            f"{row['integers']:,}",
            f"{row['differing']:,}",
            row["largest"],
            f"{row['logits_equal']:.2%}",
            f"{row['top1']:.2%}",
            f"{row['top1_reference']:.2%}",
        )
        for row in rows
    ]
    headers = ("", "form", "runtime", "run", "integers", "that differ", "largest")
    return tabulate(lines, (*headers, "equal logits", "top-1", "reference"), disable_numparse=True)


def prepare(name: str, images: int | None) -> None:
    """The files of one network, and what they reach on its validation images."""
    network = NETWORKS[name]
    FILES.mkdir(exist_ok=True)
    paths = {label: FILES / f"{name}-{label}.onnx" for label in LABELS}
    calibration = [batch[0] for batch in network.calibration_batches(batch_size=1)]
    model = network.load()
    quantize_static(model, calibration, paths["onnxruntime"])
    for recipe in LABELS[1:]:
        print(compiled(network, recipe)[1].export_onnx(paths[recipe]), flush=True)
    accuracy = {}
    batches = network.validation_batches(images, 1)
    logits = collect_logits(model, batches)
    for label, path in paths.items():
        accuracy[label] = evaluate(OnnxNetwork(path), batches, reference=logits).to_json()
    about = {
        "commit": results.commit(),
        "accuracy": accuracy,
        "images": digests(name, images),
    }
    (FILES / f"{name}.json").write_text(json.dumps(about))


def prepared(name: str) -> dict[str, Any]:
    """What `prepare` wrote of a network, with the code at hand."""
    found: dict[str, Any] = json.loads((FILES / f"{name}.json").read_text())
    if found["commit"] != results.commit():
        raise SystemExit(f"the files of {name} are of commit {found['commit']}: prepare them again")
    return found


def speed(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """Ratios of the medians to that of ONNX Runtime's quantization."""
    torch.set_num_threads(threads)
    found = {label: OnnxNetwork(FILES / f"{name}-{label}.onnx") for label in LABELS}
    (x, _), *_ = NETWORKS[name].validation_batches(1, 1)
    timed = benchmark(found, x, threads=threads, rounds=rounds)
    return {
        "network": name,
        "threads": threads,
        "over_onnxruntime": {t.name: t.ratio for t in timed.timings},
        "accuracy": prepared(name)["accuracy"],
        "timed": timed.to_json(),
    }


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            row["network"],
            label,
            f"{ratio:.2f}",
            f"{row['accuracy'][label]['top1']:.2%}",
            f"{row['accuracy'][label]['agreement']:.2%}",
            f"{row['accuracy'][label]['sqnr_db']:.1f} dB",
            f"{row['accuracy'][label]['reference']['top1']:.2%}",
        )
        for row in rows
        for label, ratio in row["over_onnxruntime"].items()
    ]
    headers = ("", "quantized by", "time", "top-1", "agreement", "SQNR", "float top-1")
    return tabulate(lines, headers, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("integers", "prepare", "speed"))
    parser.add_argument("names", nargs="*", metavar="NAME", type=one_of(NETWORKS))
    parser.add_argument("--images", type=int, help="default 100; of prepare all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    images: dict[str, str] = {}
    if arguments.what == "integers":
        for name, recipe in PAIRS:
            if not arguments.names or name in arguments.names:
                count = arguments.images or 100
                rows += integers(name, recipe, count)
                images |= digests(name, count)
        print(table(rows))
    elif arguments.what == "prepare":
        for name in arguments.names or CNNS:
            prepare(name, arguments.images)
    else:
        for name in arguments.names or CNNS:
            rows.append(speed(name, arguments.threads, arguments.rounds))
            images |= prepared(name)["images"]
        print(speed_table(rows))
    if arguments.write:
        kind = "-".join(["onnx", arguments.what, *arguments.names])
        print(results.write(kind, rows, images=images))


if __name__ == "__main__":
    main()
