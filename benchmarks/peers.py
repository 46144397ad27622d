"""Is a compiled network as fast as the best peer's int8 on this machine?

    python -m benchmarks.peers [NAME ...] [--target native] [--batch 1] [--threads 2] [--write]

Random weights; medians of interleaved runs in one process. The peers are OpenVINO (int8 by NNCF's
post-training quantization) and ONNX Runtime (QDQ, u8 × s8, per channel), from the extra
``[peers]``; one that cannot take a network is named with its reason and left out. ``--isa
avx512vnni`` holds our kernels, and the peers that listen to oneDNN's variable, below AMX.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxquant
from benchmarks import results
from fxquant.measure.benchmark import benchmark

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
TRANSFORMERS = ("convnext", "vit", "swin", "maxvit")

# Names of instruction sets: ours, and what oneDNN's ONEDNN_MAX_CPU_ISA calls the same.
ONEDNN_ISA = {"avx2": "AVX2", "avxvnni": "AVX2_VNNI", "avx512vnni": "AVX512_CORE_VNNI"}


def randomized(name: str) -> nn.Module:
    """The network with random weights and batch norms as different as trained ones."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def openvino(model: nn.Module, batches: Sequence[Tensor], threads: int) -> Callable[[Tensor], Any]:
    """OpenVINO's CPU plugin on a network that NNCF quantized with its defaults for the kind."""
    import nncf
    import openvino as ov

    x = batches[0]
    converted = ov.convert_model(model, example_input=x, input=[x.shape])
    attention = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    quantized = nncf.quantize(
        converted,
        nncf.Dataset([batch.numpy() for batch in batches]),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if attention else None,
        subset_size=len(batches),
    )
    compiled = ov.Core().compile_model(
        quantized,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        },
    )
    request = compiled.create_infer_request()
    return lambda x: request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)


def onnxruntime(
    model: nn.Module, batches: Sequence[Tensor], threads: int
) -> Callable[[Tensor], Any]:
    """ONNX Runtime's CPU provider on the QDQ network of its own static quantization."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Its workers may spin while it runs, and must not while others are measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(model, batches, path)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def quantize_static(model: nn.Module, batches: Sequence[Tensor], path: Path) -> None:
    """Write the QDQ network of ONNX Runtime's static quantization, u8 × s8, per channel."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
    )
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"x": batch.numpy()}

    # The fused attention of eval mode has no ONNX operator.
    torch.backends.mha.set_fastpath_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        exported, prepared = (str(Path(folder) / f"{stage}.onnx") for stage in ("float", "ready"))
        torch.onnx.export(
            model, (batches[0],), exported, input_names=["x"], opset_version=17, dynamo=False
        )
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        quantize(
            prepared,
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


PEERS = {"openvino": openvino, "onnxruntime": onnxruntime}


def peers(
    model: nn.Module, batches: Sequence[Tensor], threads: int, names: Sequence[str]
) -> tuple[dict[str, Callable[[Tensor], Any]], dict[str, str]]:
    """The peers that take the network, and for the others the reason why not."""
    found: dict[str, Callable[[Tensor], Any]] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                found[name] = PEERS[name](model, batches, threads)
                found[name](batches[0])
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found, refused


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


def versions(names: Sequence[str]) -> dict[str, str]:
    """The peers' versions, as far as they are installed."""
    found = {}
    for name in (*names, "nncf"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--targets", nargs="+", default=["native", "x86"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--isa", choices=list(ONEDNN_ISA), help="no instruction set above this one")
    parser.add_argument("--float", action="store_true", help="eager float beside them")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.isa:
        os.environ["FXQUANT_ISA"] = arguments.isa
        os.environ["ONEDNN_MAX_CPU_ISA"] = ONEDNN_ISA[arguments.isa]
    rows = []
    for name in arguments.names or NETWORKS:
        rows.append(measure(name, arguments))
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    if arguments.write:
        kind = f"peers-batch{arguments.batch}-threads{arguments.threads}"
        kind += f"-{arguments.isa}" if arguments.isa else ""
        data = {"isa": arguments.isa, "peers": versions(arguments.peers), "networks": rows}
        print(results.write(kind, data))


if __name__ == "__main__":
    main()
