"""For every operation: integers or float and why, and its share of the multiply-accumulates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxquant.plan.dynamic import recurrent_input, recurrent_of
from fxquant.plan.operations import layer_of
from fxquant.plan.plan import Plan
from passes import module_path, tensor_info
from passes.infra.listing import operation

__all__ = ["CoverageRow", "coverage", "multiply_accumulates"]


@dataclass(frozen=True)
class CoverageRow:
    """One operation: `macs` are for one image.

    `runs_in` is int8, int16, dynamic int8, weight-only or float.
    """

    node: str
    path: str
    operation: str
    runs_in: str
    macs: int
    reason: str = ""


def coverage(fused: fx.GraphModule, plan: Plan) -> tuple[CoverageRow, ...]:
    """One row for each operation of the fused graph, in execution order."""
    bits = {name: site.spec.bits for site in plan.values for name in site.nodes}
    rows = []
    for node in fused.graph.nodes:
        if node.name not in plan.kinds:
            continue
        reason = plan.reasons.get(node.name, "")
        runs_in = "float"
        if node.name in plan.dynamic:
            runs_in = "dynamic int8"
        elif not reason:
            operands = [bits[source.name] for source in node.all_input_nodes if source.name in bits]
            runs_in = "int16" if max([8, *operands]) > 8 else "int8"
        elif node.name in plan.weights:
            runs_in = "weight-only"
        macs = multiply_accumulates(node, fused)
        rows.append(
            CoverageRow(node.name, module_path(node), operation(node), runs_in, macs, reason)
        )
    return tuple(rows)


def multiply_accumulates(node: fx.Node, root: nn.Module) -> int:
    """The multiply-accumulates of `node` on its annotated shapes, for one image."""
    output = tensor_info(node)
    layer: Any = layer_of(node, root)
    if layer is not None and output is not None:
        values = math.prod(output.shape[1:])
        if isinstance(layer, nn.Linear):
            return values * int(layer.in_features)
        taps: int = math.prod(layer.kernel_size) * layer.in_channels // layer.groups
        if type(layer).__name__.startswith("ConvTranspose"):
            source = tensor_info(node.all_input_nodes[0])
            inputs = math.prod(source.shape[1:]) if source else 0
            outputs: int = int(layer.out_channels) // layer.groups * math.prod(layer.kernel_size)
            return inputs * outputs
        return values * taps
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, nn.MultiheadAttention):
            return _attention(node, module)
        recurrent = recurrent_of(node, root)
        return _recurrent(node, recurrent) if recurrent is not None else 0
    name = getattr(node.target, "__name__", "")
    left = tensor_info(node.all_input_nodes[0]) if node.all_input_nodes else None
    if (
        name in ("matmul", "scaled_matmul", "weighted_mean")
        and output is not None
        and left is not None
    ):
        return math.prod(output.shape) * left.shape[-1] // max(1, left.shape[0])
    if name == "einsum":
        return _einsum(node)
    if name == "scaled_dot_product_attention" and left is not None:
        key = tensor_info(node.all_input_nodes[1])
        keys = key.shape[-2] if key is not None else left.shape[-2]
        # Windows lie in the leading dimensions together with the batch, which is 1 here.
        return 2 * math.prod(left.shape) * keys
    if name.startswith("shifted_window_attention") and left is not None:
        return _window_attention(node, left.shape)
    return 0


def _recurrent(node: fx.Node, layer: nn.LSTM | nn.GRU) -> int:
    """One sequence, of the length that the probe has."""
    info = recurrent_input(node)
    if info is None:
        return 0
    steps = info.shape[1 if layer.batch_first and len(info.shape) == 3 else 0]
    weights = (v.numel() for name, v in layer.named_parameters() if name.startswith("weight"))
    return int(steps) * sum(weights)


def _attention(node: fx.Node, module: nn.MultiheadAttention) -> int:
    query = tensor_info(node.all_input_nodes[0])
    if query is None or len(query.shape) != 3:
        return 0
    length = query.shape[1] if module.batch_first else query.shape[0]
    width = int(module.embed_dim)
    return 4 * length * width * width + 2 * length * length * width


def _einsum(node: fx.Node) -> int:
    """One product for every combination of the indices of a sum over two operands."""
    equation = next((a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str)), "")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    operands = [tensor_info(source) for source in node.all_input_nodes]
    if len(terms) != 2 or len(operands) != 2 or "." in equation:
        return 0
    sizes: dict[str, int] = {}
    for term, info in zip(terms, operands, strict=True):
        sizes |= dict(zip(term, info.shape if info else (), strict=False))
    return math.prod(sizes.values())


def _window_attention(node: fx.Node, shape: tuple[int, ...]) -> int:
    # Swin: four projections of every token, and each token against its window, twice.
    tokens, width = math.prod(shape[1:-1]), shape[-1]
    window = next(
        (a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (list, tuple)) and a),
        (7, 7),
    )
    area = math.prod(value for value in window if isinstance(value, int))
    return 4 * tokens * width * width + 2 * tokens * area * width
