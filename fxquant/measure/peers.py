"""Other tools' 8-bit networks, to be timed beside ours: what the extra ``[peers]`` installs.

Each takes a float model and quantizes it as its maker does by default.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PEERS", "peers", "quantize_static", "versions"]


def openvino(model: nn.Module, batches: Sequence[Tensor], threads: int) -> Callable[[Tensor], Any]:
    """OpenVINO's CPU plugin on a network that NNCF quantized with its defaults for the kind."""
    nncf, ov = import_module("nncf"), import_module("openvino")
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
    ort = import_module("onnxruntime")
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
    tools = import_module("onnxruntime.quantization")
    shapes = import_module("onnxruntime.quantization.shape_inference")

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
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
        shapes.quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        tools.quantize_static(
            prepared,
            str(path),
            Reader(),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
        )


def pt2e(model: nn.Module, batches: Sequence[Tensor], threads: int) -> Callable[[Tensor], Any]:
    """PT2E with X86InductorQuantizer's default configuration, compiled by inductor with freezing.

    `threads` are torch's own, which `benchmark` sets.
    """
    config: Any = import_module("torch._inductor.config")
    steps = import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    exported = torch.export.export(copy.deepcopy(model), (batches[0],), strict=True).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = steps.prepare_pt2e(exported, quantizer)
    for batch in batches:
        prepared(batch)
    converted = steps.convert_pt2e(prepared)
    # Inductor finds the quantized layers, and packs their weights, while it freezes the graph.
    compiled: Callable[[Tensor], Any] = torch.compile(converted)
    with torch.inference_mode(), config.patch(freezing=True):
        compiled(batches[0])
    return compiled


PEERS: dict[str, Callable[[nn.Module, Sequence[Tensor], int], Callable[[Tensor], Any]]] = {
    "openvino": openvino,
    "onnxruntime": onnxruntime,
    "pt2e": pt2e,
}


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
        except ImportError as error:
            refused[name] = f"{error}: pip install 'fxquant[peers]'"
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found, refused


def versions(names: Sequence[str]) -> dict[str, str]:
    """The peers' versions, as far as they are installed."""
    found = {}
    for name in (*names, "nncf", "torchao"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
