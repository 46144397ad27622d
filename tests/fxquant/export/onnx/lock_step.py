"""An integer graph as ONNX in every form, operator by operator beside the reference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
from torch import Tensor, fx

from fxquant.export.onnx.model import build_model
from fxquant.export.onnx.options import OnnxOptions
from fxquant.export.onnx.report import OnnxCheck
from fxquant.export.onnx.runtimes import onnxruntime_run
from fxquant.export.onnx.shapes import find_shapes
from fxquant.export.onnx.validate import check_integers, record

EXACT = OnnxOptions("qoperator", exact=True)
NEUTRAL = OnnxOptions("qdq", exact=True)
OPERATORS = OnnxOptions("qoperator")
PORTABLE = OnnxOptions("qdq")
UNSIGNED = OnnxOptions("qoperator", exact=True, weights="uint8")
UNSIGNED_PORTABLE = OnnxOptions("qdq", weights="uint8")


def model_of(graph: fx.GraphModule, example: Tensor, options: OnnxOptions) -> ir.Model:
    return build_model(graph, find_shapes(graph, (example,)), options)


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def lock_step(
    graph: fx.GraphModule, x: Tensor, options: OnnxOptions, *, optimize: bool = True
) -> OnnxCheck:
    """Every operator on the reference's integers, in ONNX Runtime."""
    shapes = find_shapes(graph, (x,))
    assert shapes.symbolic
    model = build_model(graph, shapes, options, observe="lock_step")
    values, _ = record(graph, (x,))
    run = onnxruntime_run(model, optimize=optimize)
    check = check_integers(run, graph, values, "", "", 0)
    assert check.values
    return check


def exact_everywhere(graph: fx.GraphModule, x: Tensor) -> None:
    """The exact forms give the reference's integers; the others are at most one step away."""
    for optimize in (True, False):
        for options in (EXACT, UNSIGNED):
            found = lock_step(graph, x, options, optimize=optimize)
            assert found.differing == 0, found.operations
        for options in (OPERATORS, PORTABLE, UNSIGNED_PORTABLE):
            found = lock_step(graph, x, options, optimize=optimize)
            assert found.largest <= 1, found.operations
    found = lock_step(graph, x, NEUTRAL)
    assert found.differing == 0, found.operations


def seen(graph: fx.GraphModule, x: Tensor, name: str) -> Any:
    """A value of the reference: a test whose codes are all clamped says nothing."""
    return record(graph, (x,))[0][name]
