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
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxquant
from benchmarks import results
from benchmarks.names import one_of
from benchmarks.peers import quantize_static
from benchmarks.real import NETWORKS, RealNetwork
from fxquant.compiled import CompiledModel
from fxquant.export.onnx.model import build_model
from fxquant.export.onnx.network import OnnxNetwork
from fxquant.export.onnx.options import OnnxOptions
from fxquant.export.onnx.runtimes import Run, onnxruntime_run, openvino_run
from fxquant.export.onnx.shapes import find_shapes
from fxquant.export.onnx.validate import check_integers, record
from fxquant.measure.benchmark import benchmark
from fxquant.measure.evaluate import evaluate
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


def batches_of(network: RealNetwork, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in network.validation_batches(images, BATCH):
        yield batch[0], batch[1]


def integers(name: str, recipe: str, images: int) -> list[dict[str, Any]]:
    """One row for each form and runtime."""
    network = NETWORKS[name]
    _, q = compiled(network, recipe)
    rows = []
    forms = [OnnxOptions("qdq")]
    if recipe != "vit_w8a8":
        forms = [OnnxOptions("qoperator", exact=True), OnnxOptions("qdq", exact=True), *forms]
    if recipe == "vit_w8a8_integer":
        forms = forms[:1]
    for options in forms:
        runtimes = ["onnxruntime"]
        if not options.exact and importlib.util.find_spec("openvino"):
            runtimes.append("openvino")
        for runtime in runtimes:
            rows.append(_compare(network, q, options, runtime, images))
            print(table([rows[-1]]), flush=True)
    return rows


def _compare(
    network: RealNetwork, q: CompiledModel, options: OnnxOptions, runtime: str, images: int
) -> dict[str, Any]:
    integer = q.stages["integer"]
    shapes = find_shapes(integer, q.example)
    observe = "outputs" if options.exact else "lock_step"
    load = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}[runtime]
    run: Run = load(build_model(integer, shapes, options, observe=observe))
    whole: Run = load(build_model(integer, shapes, options))
    values = differing = largest = equal = logits = 0
    theirs, ours = Accuracy(), Accuracy()
    for x, labels in batches_of(network, images):
        recorded, expected = record(integer, (x,))
        check = check_integers(run, integer, recorded, runtime, observe, None)
        values += check.values
        differing += check.differing
        largest = max(largest, check.largest)
        (found,) = whole({whole.inputs[0]: x.numpy()}).values()
        found = torch.from_numpy(found)
        equal += int((found == expected).sum())
        logits += expected.numel()
        theirs.add(found, labels)
        ours.add(expected, labels)
    return {
        "network": network.name,
        "recipe": q.recipe.name,
        "form": options.form,
        "exact": options.exact,
        "runtime": runtime,
        "run": "on its own" if options.exact else "lock-step",
        "images": images,
        "integers": values,
        "differing": differing,
        "largest": largest,
        "logits_equal": equal / logits,
        "top1": theirs.top1,
        "top1_reference": ours.top1,
    }


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
    for label, path in paths.items():
        batches = network.validation_batches(images, 1)
        accuracy[label] = evaluate(OnnxNetwork(path), batches, reference=model).to_json()
    (FILES / f"{name}.json").write_text(json.dumps(accuracy))


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
        "accuracy": json.loads((FILES / f"{name}.json").read_text()),
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
    if arguments.what == "integers":
        for name, recipe in PAIRS:
            if not arguments.names or name in arguments.names:
                rows += integers(name, recipe, arguments.images or 100)
        print(table(rows))
    elif arguments.what == "prepare":
        for name in arguments.names or CNNS:
            prepare(name, arguments.images)
    else:
        for name in arguments.names or CNNS:
            rows.append(speed(name, arguments.threads, arguments.rounds))
        print(speed_table(rows))
    if arguments.write:
        kind = "-".join(["onnx", arguments.what, *arguments.names])
        print(results.write(kind, rows))


if __name__ == "__main__":
    main()
