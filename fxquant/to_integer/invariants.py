"""What each stage promises beyond running, as checks that name the node that breaks it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fxquant.errors import CompileError
from fxquant.plan.integers_only import between_integers, refuse_floats
from passes import tensor_info

__all__ = ["check_integer_graph", "check_integers_only"]


def check_integer_graph(integer: fx.GraphModule) -> None:
    """No float tensor lies between a quantize and its dequantize.

    Every `torch.ops.fxquant` operator and every movement of integers reads integers and
    constants only, apart from `quantize`, and yields integers, apart from the operators that
    end in float by their dtype. Raises CompileError naming the node.
    """
    for node in integer.graph.nodes:
        if "grid" not in node.meta:
            continue
        info = tensor_info(node)
        if info is not None and info.dtype.is_floating_point:
            raise CompileError(f"integer graph: {node.name} yields {info.dtype}, not integers")
        if node.target is torch.ops.fxquant.quantize.default:
            continue
        for source in node.all_input_nodes:
            found = tensor_info(source)
            constant = source.op == "get_attr"
            if found is not None and not constant and found.dtype.is_floating_point:
                raise CompileError(
                    f"integer graph: {node.name} reads the float value {source.name}"
                )


def check_integers_only(integer: fx.GraphModule, reasons: Mapping[str, str]) -> None:
    """Nothing but integers lies between the quantizers of the inputs and the last integers.

    Neither a value nor a constant that is read in between is a float tensor: only what turns the
    inputs into integers reads one, and only what ends in float yields one. Raises CompileError
    naming every operation in between that stayed float; `reasons` says why, by simulated node.
    """
    between = between_integers(integer.graph, lambda node: "grid" in node.meta)
    refuse_floats((str(node.meta.get("simulated", node.name)) for node in between), reasons)
    for node in integer.graph.nodes:
        if "grid" not in node.meta or node.target is torch.ops.fxquant.quantize.default:
            continue
        for source in node.all_input_nodes:
            if _is_float(source):
                raise CompileError(
                    f"integer graph: {node.name} reads the float tensor {source.name}, although "
                    "integers alone were asked for"
                )


def _is_float(node: fx.Node) -> bool:
    info = tensor_info(node)
    return info is not None and info.dtype.is_floating_point
