"""Writes the tables of README and docs from benchmarks/results/, between their markers.

    python -m benchmarks.tables [--check]

A table stands between ``<!-- table NAME -->`` and ``<!-- end of table -->``. `TABLES` says what is
in each; every figure is one of the newest result file that has it. `--check` writes nothing and
fails where a page and its files differ.

More than 300 lines, because every table is a function here.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any

from benchmarks import coverage as covering
from benchmarks import deployment, low_bit
from benchmarks.peers import NETWORKS
from benchmarks.results import FOLDER

ROOT = Path(__file__).parents[1]
PAGES = (
    *("README.md", "docs/low_bit.md", "docs/native.md", "docs/onnx.md", "docs/studies.md"),
    *("docs/coverage.md", "docs/transformers.md"),
)


NAMES = {
    "mobilenet_v2": "MobileNetV2",
    "squeezenet1_1": "SqueezeNet 1.1",
    "resnet18_10": "ResNet-18, Imagenette",
    "shufflenet_v2_10": "ShuffleNetV2 1.0, Imagenette",
    "cifar_resnet20": "ResNet-20, CIFAR-10",
    "cifar_resnet56": "ResNet-56, CIFAR-10",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "shufflenet_v2_x1_0": "ShuffleNetV2 1.0",
    "mobilenet_v3_large": "MobileNetV3-L",
    "efficientnet_b0": "EfficientNet-B0",
    "regnet_y_400mf": "RegNetY-400MF",
    "densenet121": "DenseNet-121",
    "convnext_tiny": "ConvNeXt-T",
    "vit_b_16": "ViT-B/16",
    "vit_tiny": "ViT-Tiny",
}
"""What readers call a network."""

PEERS = {
    "AMX for all": "batch1-threads2",
    "AMX, one thread": "batch1-threads1",
    "held to AVX-512 VNNI": "batch1-threads2-avx512vnni",
}
"""The result files of `benchmarks.peers`, by what is measured."""

METHODS = {
    "nearest": "",
    "GPTQ": "_gptq",
    "AdaRound": "_adaround",
    "BRECQ": "_brecq",
    "QDrop": "_qdrop",
    "PD-Quant": "_pdquant",
}
"""What readers call a way of rounding, and how a recipe's name ends for it."""

_RESNET20 = {
    "w4a32": "W4A32",
    "w4a8": "W4A8",
    "w4a4_head_stem8": "W4A4",
    "w2a32_head_stem8": "W2A32",
    "w2a4_head_stem8": "W2A4",
}
_TRANSFORMERS = ("vit_w8a8", "vit_w8a8_integer", "vit_w4a8_integer")


def newest(kind: str) -> Any:
    """The results of the newest file of a kind. Raises FileNotFoundError where there is none."""
    found = sorted(path for path in FOLDER.glob("*.json") if path.stem[11:] == kind)
    if not found:
        raise FileNotFoundError(f"no file of {kind} in {FOLDER}")
    return json.loads(found[-1].read_text())["results"]


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    rule = ["---", *["--:" for _ in headers[1:]]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows))


def resnet20() -> str:
    """ResNet-20 below 8 bits: top-1 in percent and the logits' SQNR in dB."""
    measured = rows_of_files()
    rows = []
    for title, ending in METHODS.items():
        found = [measured.get(("cifar_resnet20", f"{name}{ending}"), ()) for name in _RESNET20]
        if any(found):
            rows.append([title, *(_over_seeds(runs) for runs in found)])
    return markdown(("", *_RESNET20.values()), rows)


def low_bits() -> str:
    """The larger networks below 8 bits, row by row."""
    rows = []
    for (network, recipe), runs in sorted(rows_of_files().items()):
        if network == "cifar_resnet20":
            continue
        iterations = runs[0].get("iterations") or ""
        floats = _points(runs[0]["float_top1"])
        rows.append([NAMES[network], f"`{recipe}`", f"{iterations}", floats, _over_seeds(runs)])
    return markdown(("network", "recipe", "iterations", "float", "top-1, SQNR"), rows)


def _over_seeds(runs: Sequence[Mapping[str, Any]]) -> str:
    """Top-1 and SQNR, of several seeds the mean and the standard deviation of the top-1."""
    if not runs:
        return ""
    tops = [100 * run["top1"] for run in runs]
    spread = f" ± {stdev(tops):.2f}" if len(tops) > 1 else ""
    return f"{fmean(tops):.2f}{spread}, {fmean(run['sqnr_db'] for run in runs):.1f}"


def accuracy() -> str:
    """Networks with real weights in 8 bits."""
    rows = [
        [
            NAMES[row["network"]],
            *_reached(row),
            f"{row['int8_share']:.0%}",
            f"{row['size_mb']:.2f}",
        ]
        for row in newest("accuracy-w8a8")
    ]
    headers = ("float top-1", "top-1", "agreement", "SQNR", "MACs in int8", "MB")
    return markdown(("network", *headers), rows)


def transformers() -> str:
    """ViT-Tiny with the recipes of transformers."""
    rows = []
    for recipe in _TRANSFORMERS:
        (row,) = newest(f"accuracy-{recipe}")
        figures = (f"{row['int8_share']:.0%}", f"{row['size_mb']:.2f}")
        steps = str(row["x86_largest_difference"])
        agrees = f"{row['x86_agrees_with_reference']:.0%}"
        rows.append([f"`{recipe}`", *_reached(row), *figures, steps, agrees])
    headers = ("float top-1", "top-1", "agreement", "SQNR", "MACs in int8", "MB")
    return markdown(("recipe", *headers, "largest step", "x86"), rows)


def latency() -> str:
    """Our x86 over FX graph mode and eager float."""
    measured = newest("latency")
    rows = []
    for title, peer in (
        ("time over FX graph mode, onednn engine", "fx graph mode, onednn"),
        ("time over FX graph mode, x86 engine", "fx graph mode, x86"),
        ("times faster than eager float", "eager float"),
    ):
        cells = []
        for network in measured.values():
            medians = {timing["name"]: timing["median_ms"] for timing in network["timings"]}
            share = medians["fxquant x86"] / medians[peer]
            cells.append(f"{1 / share:.1f}" if peer == "eager float" else f"{share:.2f}")
        rows.append([title, *cells])
    return markdown(("", *(NAMES[name] for name in measured)), rows)


def peers() -> str:
    """Target native over the best of OpenVINO and ONNX Runtime."""
    rows = []
    for title, kind in PEERS.items():
        measured = {
            row["network"]: row["over_best_peer"]["fxquant native"]
            for row in newest(f"peers-{kind}")["networks"]
        }
        cells = [f"{measured[name]:.2f}" if name in measured else "" for name in NETWORKS]
        rows.append([title, *cells, f"{geometric_mean(measured.values()):.2f}"])
    return markdown(("", *(NAMES[name] for name in NETWORKS), "geometric mean"), rows)


def without_vnni() -> str:
    """Target native over float torch, both held to AVX2."""
    rows = newest("without-vnni-batch1-threads2")["networks"]
    measured = {row["network"]: row["times_faster_than_float"] for row in rows}
    cells = [f"{measured[name]:.2f}" if name in measured else "" for name in NETWORKS]
    mean = f"{geometric_mean(measured.values()):.2f}"
    headers = ("", *(NAMES[name] for name in NETWORKS), "geometric mean")
    return markdown(headers, [["times faster than float", *cells, mean]])


def vit_latency() -> str:
    """ViT-B/16 on x86 beside PT2E and eager float."""
    timings = newest("vit-latency")["vit_b_16"]["timings"]
    medians = {timing["name"]: timing["median_ms"] for timing in timings}
    base, eager = medians["PT2E, inductor"], medians["eager float"]
    rows = [[name, f"{ms / base:.2f}", f"{eager / ms:.1f} x"] for name, ms in medians.items()]
    return markdown(("", "time over PT2E's", "faster than eager"), rows)


def deployed() -> str:
    """What an exported network takes beside ONNX Runtime and OpenVINO."""
    text = deployment.table(newest("deployment-mobilenet_v2"))
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


def coverage() -> str:
    """The transformers of torchvision one by one."""
    rows = [
        [
            f"`{row['network']}`",
            f"`{row['recipe']}`",
            f"{row['int8']:.1%}",
            str(row["x86_largest_difference"]),
            f"{row['sqnr_db']:.1f} dB",
        ]
        for row in newest("torchvision-transformers")
    ]
    headers = ("recipe", "MACs in int8", "largest difference, steps", "logits SQNR")
    return markdown(("network", *headers), rows)


def onnx_integers() -> str:
    """What ONNX files compute beside the reference, form by form."""
    runtimes = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    rows = [
        [
            f"{NAMES[row['network']]}, `{row['recipe']}`, "
            f"{row['form']}{', exact' if row['exact'] else ''}; "
            f"{runtimes[row['runtime']]} {row['run']}",
            f"{row['integers']:,}",
            f"{row['differing']:,}",
            f"{row['differing'] / row['integers']:.1e}" if row["differing"] else "0",
            str(row["largest"]),
            _points(row["top1"]),
            _points(row["top1_reference"]),
        ]
        for row in _of_networks("onnx-integers")
    ]
    return markdown(("", "integers", "that differ", "share", "largest", "top-1", "reference"), rows)


def onnx_speed() -> str:
    """Our files in ONNX Runtime over those of its own quantization."""
    rows = [
        [
            f"{NAMES[row['network']]}, "
            + ("ONNX Runtime's own" if label == "onnxruntime" else f"`{label}`"),
            f"{ratio:.2f}",
            _points(row["accuracy"][label]["reference"]["top1"]),
            *_reached(row["accuracy"][label] | {"float_top1": 0.0})[1:],
        ]
        for row in _of_networks("onnx-speed")
        for label, ratio in row["over_onnxruntime"].items()
    ]
    return markdown(("", "time", "float top-1", "top-1", "agreement", "SQNR"), rows)


def _of_networks(kind: str) -> list[Any]:
    """The rows of the newest file of each network."""
    kinds = {path.stem[11:] for path in FOLDER.glob(f"*-{kind}-*.json")}
    return [row for name in sorted(kinds) for row in newest(name)]


def study(name: str) -> str:
    """A study of ResNet-20: the settings one by one."""
    rows = [
        [row["name"], _points(row["evaluation"]["top1"]), _decibels(row["evaluation"]["sqnr_db"])]
        for row in newest(f"study-cifar_resnet20-{name}")["rows"]
    ]
    return markdown(("setting", "top-1", "SQNR"), rows)


def landmarks() -> str:
    """The landmark example: ways to 8 bits by what they cost."""
    errors = ("error by eyes", "error by pupils")
    rows = [
        [
            row["way"],
            f"{row['loss']:.5f}",
            *(f"{row[error]:.2%}" for error in errors),
            _decibels(row["sqnr_db"] if row["way"] != "float" else None),
        ]
        for row in newest("landmarks")
    ]
    return markdown(("way", "loss", *errors, "SQNR"), rows)


_STUDIES = (
    "fusion",
    "start_at",
    "calibration_size",
    "random_calibration",
    "observers",
    "one_sided",
)
TABLES: Mapping[str, Callable[[], str]] = {
    "onnx_integers": onnx_integers,
    "onnx_speed": onnx_speed,
    "resnet20": resnet20,
    "low_bits": low_bits,
    "accuracy": accuracy,
    "transformers": transformers,
    "latency": latency,
    "peers": peers,
    "without_vnni": without_vnni,
    "vit_latency": vit_latency,
    "deployed": deployed,
    "coverage": coverage,
    "networks": covering.table,
    "landmarks": landmarks,
    **{f"study_{name}": partial(study, name) for name in _STUDIES},
}


def _reached(row: Mapping[str, Any]) -> list[str]:
    tops = [_points(row["float_top1"]), _points(row["top1"])]
    return [*tops, f"{row['agreement']:.1%}", f"{row['sqnr_db']:.1f} dB"]


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def _points(share: float) -> str:
    return f"{100 * share:.2f}"


def rows_of_files() -> dict[tuple[str, str], Sequence[Mapping[str, Any]]]:
    """The rows of `benchmarks.low_bit`, one a seed, by network and recipe; of several the newest.

    Raises:
        ValueError: the command of a file does not give its rows.
    """
    measured = {}
    for path in sorted(FOLDER.glob("*-low-bit-*.json")):
        content = json.loads(path.read_text())
        network, wanted = asked(content["command"])
        rows = content["results"]
        found = [(row["recipe"], row["seed"]) for row in rows]
        if found != list(wanted[: len(found)]) or not found:
            raise ValueError(f"{path.name}: holds {found}, its command asks for {wanted}")
        for recipe in {name for name, _ in found}:
            measured[network, recipe] = [row for row in rows if row["recipe"] == recipe]
    return measured


def asked(command: str) -> tuple[str, Sequence[tuple[str, int]]]:
    """Network, and recipes with seeds, of a `benchmarks.low_bit` command that writes its rows.

    Raises:
        ValueError: it is none, or one that writes nothing.
    """
    words = shlex.split(command)
    if words[:3] != ["python", "-m", "benchmarks.low_bit"]:
        raise ValueError(f"{command!r} is no command of benchmarks.low_bit")
    arguments = low_bit.parser().parse_args(words[3:])
    if not arguments.write:
        raise ValueError(f"{command!r} writes nothing: --write is missing")
    return arguments.name, list(product(arguments.recipes, arguments.seeds))


def generated(page: str) -> str:
    """The text of a page with every table as the files have it."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[4]}"

    pattern = r"(<!-- table (\w+) -->)\n(.*?)(<!-- end of table -->)"
    return re.sub(pattern, table, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name in PAGES:
        path = ROOT / name
        before = path.read_text()
        after = generated(before)
        if check and before != after:
            sys.exit(f"{name} differs from benchmarks/results: run python -m benchmarks.tables")
        if before != after:
            path.write_text(after)


if __name__ == "__main__":
    main()
