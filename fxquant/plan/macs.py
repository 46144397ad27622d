"""How many multiply-accumulates an operation takes."""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn

from fxquant.plan.dynamic import recurrent_input, recurrent_of
from fxquant.plan.operations import layer_of
from passes import is_plain, tensor_info

__all__ = ["images_of", "multiply_accumulates"]


def multiply_accumulates(node: fx.Node, root: nn.Module) -> int:
    """The multiply-accumulates of `node` on its annotated shapes, for one image.

    All of the probe's are counted and divided by its images: windows of one image lie in the
    first dimension like images.
    """
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if is_plain(module, nn.MultiheadAttention):
        return _attention(node, module)
    recurrent = recurrent_of(node, root)
    if recurrent is not None:
        return _recurrent(node, recurrent)
    return _of_the_probe(node, root) // images_of(node.graph)


def images_of(graph: fx.Graph) -> int:
    """How many images the graph was annotated with."""
    for node in graph.nodes:
        info = tensor_info(node) if node.op == "placeholder" else None
        if info is not None and info.shape:
            return max(1, info.shape[0])
    return 1


def _of_the_probe(node: fx.Node, root: nn.Module) -> int:
    output = tensor_info(node)
    left = tensor_info(node.all_input_nodes[0]) if node.all_input_nodes else None
    if output is None or left is None:
        return 0
    layer: Any = layer_of(node, root)
    if layer is not None:
        # Each output takes part of the weight once; in a transposed convolution each input does.
        transposed = type(layer).__name__.startswith("ConvTranspose")
        values = math.prod((left if transposed else output).shape)
        return values * int(layer.weight.numel() // layer.weight.shape[0])
    name = getattr(node.target, "__name__", "")
    if name in ("matmul", "scaled_matmul", "weighted_mean"):
        return math.prod(output.shape) * left.shape[-1]
    if name == "einsum":
        return _einsum(node)
    if name == "scaled_dot_product_attention":
        key = tensor_info(node.all_input_nodes[1])
        return 2 * math.prod(left.shape) * (key or left).shape[-2]
    if name.startswith("shifted_window_attention"):
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
    tokens, width = math.prod(shape[:-1]), shape[-1]
    window = next(
        (a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (list, tuple)) and a),
        (7, 7),
    )
    area = math.prod(value for value in window if isinstance(value, int))
    return 4 * tokens * width * width + 2 * tokens * area * width
