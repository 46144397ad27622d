"""Is a compiled network as fast as the best peer's int8 on this machine?

    python -m benchmarks.peers [NAME ...] [--targets native] [--batch 1] [--threads 2] [--write]

Random weights; medians of interleaved runs in one process. The peers are OpenVINO (int8 by NNCF's
post-training quantization) and ONNX Runtime (QDQ, u8 × s8, per channel), see
`fxquant.measure.peers`; one that cannot take a network is named with its reason and left out.
``--isa avx512vnni`` holds our kernels, and the peers that listen to oneDNN's variable, below AMX.

``--write``: a network's row is in benchmarks/results/ as soon as it is measured, with its commit.
What this commit has measured there is measured ``--again`` only, so that a long table may be made
in pieces.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate

import fxquant
from benchmarks import results
from benchmarks.latency import randomized
from fxquant.measure.benchmark import benchmark
from fxquant.measure.peers import PEERS, peers, versions

NETWORKS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "densenet121",
    "convnext_tiny",
    "vit_b_16",
)
DEFAULT = ("openvino", "onnxruntime")
TRANSFORMERS = ("convnext", "vit", "swin", "maxvit")

# Names of instruction sets: ours, and what oneDNN's ONEDNN_MAX_CPU_ISA calls the same.
ONEDNN_ISA = {"avx2": "AVX2", "avxvnni": "AVX2_VNNI", "avx512vnni": "AVX512_CORE_VNNI"}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median latency of each candidate, and the ratios to the best peer's."""
    model = randomized(name)
    torch.manual_seed(1)
    shape = (arguments.batch, 3, 224, 224)
    batches = [torch.randn(shape) for _ in range(max(1, 4 // arguments.batch))]
    recipe = "vit_w8a8" if name.startswith(TRANSFORMERS) else "w8a8"
    q = fxquant.compile(model, recipe, calibration=batches, target=arguments.targets[0])
    ours = {f"fxquant {q.target}": q}
    ours |= {f"fxquant {target}": q.to_target(target) for target in arguments.targets[1:]}
    found, refused = peers(model, batches, arguments.threads, arguments.peers)
    for peer, reason in refused.items():
        print(f"{name}: without {peer}: {reason}", file=sys.stderr, flush=True)
    candidates: dict[str, Callable[..., Any]] = {**ours, **found}
    if arguments.float:
        candidates["eager float, channels last"] = model.to(memory_format=torch.channels_last)
    timed = benchmark(candidates, batches[0], threads=arguments.threads, rounds=arguments.rounds)
    medians = {timing.name: timing.median_ms for timing in timed.timings}
    best = min((medians[peer] for peer in found), default=math.nan)
    return {
        "network": name,
        "recipe": recipe,
        "over_best_peer": {mine: medians[mine] / best for mine in ours},
        "over_first": {other: medians[other] / timed.timings[0].median_ms for other in medians},
        "refused": refused,
        "timed": timed.to_json(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a network, and the geometric mean over all."""
    names = list(rows[0]["over_best_peer"])
    lines = []
    for row in rows:
        others = ", ".join(f"{other} {ratio:.2f}" for other, ratio in row["over_first"].items())
        lines.append([row["network"], *(row["over_best_peer"][name] for name in names), others])
    means = [
        math.exp(sum(math.log(row["over_best_peer"][name]) for row in rows) / len(rows))
        for name in names
    ]
    headers = ("", *(f"{name} / best peer" for name in names), f"time / {names[0]}")
    return tabulate([*lines, ["geometric mean", *means, ""]], headers=headers, floatfmt=".2f")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--targets", nargs="+", default=["native", "x86"])
    parser.add_argument("--peers", nargs="*", default=DEFAULT, choices=list(PEERS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--isa", choices=list(ONEDNN_ISA), help="no instruction set above this one")
    parser.add_argument("--float", action="store_true", help="eager float beside them")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    if arguments.isa:
        os.environ["FXQUANT_ISA"] = arguments.isa
        os.environ["ONEDNN_MAX_CPU_ISA"] = ONEDNN_ISA[arguments.isa]
    kind = f"peers-batch{arguments.batch}-threads{arguments.threads}"
    kind += f"-{arguments.isa}" if arguments.isa else ""
    rows = rows_of_file(kind) if arguments.write else {}
    commit = results.commit()
    for name in arguments.names or NETWORKS:
        if rows.get(name, {}).get("commit") == commit and not arguments.again:
            continue
        rows[name] = {**measure(name, arguments), "commit": commit}
        print(table([rows[name]]), flush=True)
        if arguments.write:
            ordered = sorted(rows.values(), key=lambda row: order(row["network"]))
            data = {"isa": arguments.isa, "peers": versions(arguments.peers), "networks": ordered}
            print(results.write(kind, data), flush=True)
    print(table(list(rows.values())))


def rows_of_file(kind: str) -> dict[str, dict[str, Any]]:
    """The rows of the newest result file of a kind, by network."""
    files = sorted(results.FOLDER.glob(f"????-??-??-{kind}.json"))
    if not files:
        return {}
    whole = json.loads(files[-1].read_text())
    rows = whole["results"]["networks"]
    return {row["network"]: {"commit": whole["commit"], **row} for row in rows}


def order(name: str) -> int:
    return NETWORKS.index(name) if name in NETWORKS else len(NETWORKS)


if __name__ == "__main__":
    main()
