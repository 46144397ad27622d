"""What each stage promises beyond running, as checks that name the node that breaks it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fxquant.errors import CompileError
from fxquant.plan.integers_only import between_integers, refuse_floats
from fxquant.plan.plan import Plan
from fxquant.simulate.quantizers import ActivationQuantizer
from passes import tensor_info

__all__ = [
    "check_float_graph",
    "check_integer_graph",
    "check_integers_only",
    "check_simulated_graph",
]


def check_float_graph(graph: fx.GraphModule) -> None:
    """A float or fused graph: nothing is quantized, and every node knows what it stands for.

    There is no quantizer and no operator on integers, and every operation has `origin` and
    `module_path` in its meta. Raises CompileError naming the node.
    """
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        lost = [key for key in ("origin", "module_path") if key not in node.meta]
        if lost:
            raise CompileError(f"{node.name} lost its {' and '.join(lost)}")
        if _quantizer(graph, node) is not None or str(node.target).startswith("fxquant."):
            raise CompileError(f"{node.name} is quantized in a float graph")


def check_simulated_graph(simulated: fx.GraphModule, plan: Plan) -> None:
    """A simulated graph: one quantizer for each quantized value, and that of the plan.

    Every planned node is there. A quantizer reads one value that the plan gives to it, and never
    another quantizer's; all quantizers of a value are one. Raises CompileError naming the node.
    """
    plan.check(simulated.graph)
    planned = {name: site.path for site in plan.values for name in site.nodes}
    found: dict[str, str] = {}
    for node in simulated.graph.nodes:
        if _quantizer(simulated, node) is None:
            continue
        source = node.all_input_nodes[0]
        if _quantizer(simulated, source) is not None:
            raise CompileError(f"{node.name} quantizes {source.name}, which is quantized")
        if planned.get(source.name) != node.target:
            raise CompileError(
                f"{source.name} passes {node.target}, the plan has {planned.get(source.name)}"
            )
        if found.setdefault(source.name, node.name) != node.name:
            raise CompileError(
                f"{source.name} is quantized twice, by {found[source.name]} and {node.name}"
            )


def _quantizer(root: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, ActivationQuantizer) else None


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
