"""What an ONNX model computes against the reference, operator by operator and as a whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxquant.backends.check import OperationDifference
from fxquant.export.onnx.model import build_model
from fxquant.export.onnx.options import OnnxOptions
from fxquant.export.onnx.report import OnnxCheck
from fxquant.export.onnx.runtimes import Run, onnxruntime_run, openvino_run
from fxquant.export.onnx.shapes import Shapes
from fxquant.metrics import Closeness
from passes.infra.listing import operation
from passes.infra.verify import flatten

__all__ = ["check_integers", "check_outputs", "has_openvino", "record", "validate"]

LOCK_STEP, ALONE = "lock-step", "on its own"


def validate(
    path: Path,
    integer: fx.GraphModule,
    shapes: Shapes,
    options: OnnxOptions,
    inputs: Sequence[Tensor],
) -> tuple[OnnxCheck, ...]:
    """The file and its lock-step form in ONNX Runtime, as it is written and optimized.

    In lock-step every operator gets the reference's integers, so that a difference is its own.
    """
    values, outputs = record(integer, inputs)
    lock_step = build_model(integer, shapes, options, observe="lock_step")
    checks = []
    for optimize in (True, False):
        runtime = f"ONNX Runtime, {'optimized' if optimize else 'as written'}"
        # Between DQ and Q a layer is exact as the operator that the runtime makes of it.
        allowed = 0 if options.exact and (optimize or options.operators) else 1
        run = onnxruntime_run(lock_step, optimize=optimize)
        checks.append(check_integers(run, integer, values, runtime, LOCK_STEP, allowed))
        run = onnxruntime_run(path, optimize=optimize)
        checks.append(check_outputs(run, integer, inputs, outputs, runtime))
    if options.exact:
        tapped = build_model(integer, shapes, options, observe="outputs")
        run = onnxruntime_run(tapped)
        runtime = "ONNX Runtime, optimized"
        checks.append(check_integers(run, integer, values, runtime, ALONE, 0))
    if options.consumer == "openvino" and has_openvino():
        check = check_integers(openvino_run(lock_step), integer, values, "OpenVINO", LOCK_STEP, 1)
        checks.append(check)
        checks.append(check_outputs(openvino_run(path), integer, inputs, outputs, "OpenVINO"))
    return tuple(checks)


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[str(n.target) if n.op == "placeholder" else n.name] = result
        return result


def record(integer: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Every tensor of the reference by name (inputs by their own), and the outputs."""
    recorder = _Recorder(integer)
    with torch.no_grad():
        outputs = recorder.run(*inputs)
    return recorder.values, outputs


def check_integers(
    run: Run,
    integer: fx.GraphModule,
    values: Mapping[str, Tensor],
    runtime: str,
    what: str,
    allowed: int | None,
) -> OnnxCheck:
    """Every integer that a model gives away, against the reference's; inputs are taken from it."""
    feeds = {name: values[name.removesuffix("@ref")].numpy() for name in run.inputs}
    operations = {node.name: operation(node) for node in integer.graph.nodes}
    found = []
    for name, result in run(feeds).items():
        if name not in values or values[name].is_floating_point():
            continue
        want = values[name].numpy()
        largest = differing = 0
        if not np.array_equal(result, want):
            difference = np.abs(result.astype(np.int64) - want)
            largest, differing = int(difference.max()), int((difference > 0).sum())
        found.append(OperationDifference(name, operations[name], largest, differing, want.size))
    return OnnxCheck(runtime, what, tuple(found), allowed)


def check_outputs(
    run: Run, integer: fx.GraphModule, inputs: Sequence[Tensor], expected: Any, runtime: str
) -> OnnxCheck:
    """The network on its own against the reference's outputs."""
    results = run(dict(zip(run.inputs, (x.numpy() for x in inputs), strict=True)))
    closeness = Closeness()
    differing = count = 0
    for (_, want), got in zip(flatten(expected), results.values(), strict=True):
        found = torch.from_numpy(np.asarray(got))
        differing += int((found != want).sum())
        count += want.numel()
        closeness.add(want.float(), found.float())
    share = differing / count if count else 0.0
    return OnnxCheck(runtime, ALONE, output_differing=share, output_sqnr_db=closeness.sqnr_db)
