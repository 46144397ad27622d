"""The whole network as an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import fx, nn

from fxquant.errors import TargetError
from fxquant.export.onnx.operators import EMITTERS
from fxquant.export.onnx.options import OnnxOptions
from fxquant.export.onnx.shapes import Shape, Shapes, has_tensors, without_plain_values
from fxquant.export.onnx.writer import Writer
from fxquant.version import __version__
from passes.infra.verify import flatten

__all__ = ["build_model"]

_IR_VERSION = 10


def build_model(
    integer: fx.GraphModule,
    shapes: Shapes,
    options: OnnxOptions,
    *,
    observe: str = "",
    metadata: Mapping[str, str] | None = None,
) -> ir.Model:
    """The integer graph as a model of opset 21; see `Writer` for `observe`.

    Raises TargetError naming a node that has no form in ONNX.
    """
    source = without_plain_values(integer, shapes)
    _check_no_bfloat16(source, shapes)
    w = Writer(source, shapes, options, observe=observe)
    for node in source.graph.nodes:
        w.node = node
        if node.op == "placeholder":
            w.values[node] = w.input(node, str(node.target))
        elif node.op == "output":
            for _, value in flatten(node.args[0]):
                if not isinstance(value, fx.Node):
                    raise TargetError(f"the network returns {value!r}, which is no tensor")
                w.output(value)
        elif node.op != "get_attr" and has_tensors(shapes.values[node.name]):
            emit = EMITTERS.get(node.target)
            if emit is None or node.op == "call_module":
                raise w.refusal(_no_form(source, node))
            w.bind(node, emit(w, node))
    return ir.Model(
        w.graph,
        ir_version=_IR_VERSION,
        producer_name="fxquant",
        producer_version=__version__,
        metadata_props={
            "fxquant.form": options.form,
            "fxquant.exact": str(options.exact).lower(),
            **(metadata or {}),
        },
    )


def _check_no_bfloat16(source: fx.GraphModule, shapes: Shapes) -> None:
    for node in source.graph.nodes:
        found = shapes.values[node.name]
        if isinstance(found, Shape) and found.dtype == torch.bfloat16:
            raise TargetError(
                f"{node.name} computes in bfloat16, which ONNX Runtime has not on CPUs: export "
                'with float_dtype = "float32"'
            )


def _no_form(source: fx.GraphModule, node: fx.Node) -> str:
    module = source.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.LSTM | nn.GRU):
        return "a recurrent layer in float has no form here; take recipe dynamic_w8a8"
    return "there is no ONNX form of it; keep it out of the network"
