"""What runs an ONNX model: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from fxquant.errors import TargetError

__all__ = ["Run", "onnxruntime_run", "onnxruntime_session", "openvino_run"]


@dataclass(frozen=True)
class Run:
    """A model that was loaded: the names of its inputs and outputs, and what calls it."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    call: Callable[[Mapping[str, Any]], list[Any]]

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, in their order."""
        return dict(zip(self.outputs, self.call(feeds), strict=True))


def onnxruntime_session(model: ir.Model | Path, *, optimize: bool = True, threads: int = 0) -> Any:
    """A session on the CPU; `threads` 0 leaves their number to the runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Workers that spin on take a core from whatever else is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        _content(model), options, providers=["CPUExecutionProvider"]
    )


def onnxruntime_run(model: ir.Model | Path, *, optimize: bool = True) -> Run:
    """ONNX Runtime with all optimizations, or none."""
    session = onnxruntime_session(model, optimize=optimize)
    inputs = tuple(value.name for value in session.get_inputs())
    outputs = tuple(value.name for value in session.get_outputs())
    return Run(inputs, outputs, lambda feeds: session.run(None, dict(feeds)))


def openvino_run(model: ir.Model | Path) -> Run:
    """OpenVINO in float32: it takes bfloat16 by default where the CPU has it.

    Raises TargetError for what it cannot load.
    """
    import openvino

    core = openvino.Core()
    try:
        read = core.read_model(_content(model))
        compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise TargetError(f"OpenVINO cannot load the network: {error}") from error
    inputs = tuple(port.any_name for port in compiled.inputs)
    outputs = tuple(port.any_name for port in compiled.outputs)

    def call(feeds: Mapping[str, Any]) -> list[Any]:
        found = compiled(dict(feeds))
        return [found[port] for port in compiled.outputs]

    return Run(inputs, outputs, call)


def _content(model: ir.Model | Path) -> Any:
    if isinstance(model, Path):
        return str(model)
    return ir.to_proto(model).SerializeToString()
