"""What each stage promises beyond running, as checks that name the node that breaks it."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.errors import CompileError
from passes import tensor_info

__all__ = ["check_integer_graph"]


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
