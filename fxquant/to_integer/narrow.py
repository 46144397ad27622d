"""What stays float in half the bits: products, and the float operations around them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes import scaled_matmul
from passes.infra.errors import VerificationError
from passes.infra.stored import drop_unread, get_tensor, stored_reads
from passes.infra.verify import flatten, run_and_annotate

__all__ = ["narrow_floats"]

_PRODUCTS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d,
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.einsum, scaled_matmul,
}  # fmt: skip
_OF_TORCH = ("torch", "_operator", "math", "passes")


def narrow_floats(
    graph_module: fx.GraphModule, dtype: torch.dtype, probe: Sequence[Any]
) -> tuple[fx.GraphModule, int]:
    """The integer graph with its float products in `dtype`, and how many there are.

        before                         after
        x = dequantize(q)              x = dequantize(q).to(bfloat16)
        y = relu(linear(x, W, b))      y = relu(linear(x, W.to(bfloat16), b.to(bfloat16)))
        z = quantize(y)                z = quantize(y.float())

    Float operations that are connected to a product compute in `dtype` too, so that nothing is
    converted in between; those without one, a layer norm between integers, stay float32: targets
    have kernels for them. Weights and other constants are rounded once. So do functions stay that
    torch has not in `dtype`, modules, and what asks for a type by itself. `graph_module` stays as
    it is; without a product in it, it is the result.
    """
    kinds = _Kinds(graph_module)
    with torch.no_grad():
        kinds.run(*probe)
    refused: set[str] = set()
    while chosen := _chosen(graph_module, kinds, refused):
        narrowed = _narrowed(graph_module, kinds, chosen, dtype)
        try:
            run_and_annotate(narrowed, probe, name="integer graph")
        except VerificationError as error:
            # A conversion fails for what is to be converted.
            node = getattr(error.__cause__, "fx_node", None)
            blamed = [] if node is None else [node, *node.all_input_nodes]
            found = next((n.name for n in blamed if n.name in chosen), None)
            if found is None:
                raise
            refused.add(found)
            continue
        return narrowed, sum(
            node.name in chosen and node.target in _PRODUCTS for node in narrowed.graph.nodes
        )
    return graph_module, 0


class _Kinds(fx.Interpreter):
    """The names of the nodes that yield float32 tensors only, and of those that yield several."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.floats: set[str] = set()
        self.several: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        dtypes = {value.dtype for _, value in flatten(result) if isinstance(value, Tensor)}
        if dtypes == {torch.float32} and n.op != "output":
            self.floats.add(n.name)
        if not isinstance(result, Tensor):
            self.several.add(n.name)
        return result


def _chosen(graph_module: fx.GraphModule, kinds: _Kinds, refused: set[str]) -> set[str]:
    """The names of the operations that compute in the narrow type."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        sources = [source for source in node.all_input_nodes if source.name in kinds.floats]
        outside = {source.name for source in sources if source not in groups}
        if not sources or node.name not in kinds.floats or node.name in refused:
            continue
        if outside & kinds.several or not _follows_its_inputs(node):
            continue
        group = groups[node] = [node]
        for source in sources:
            other = groups.get(source, group)
            if other is not group:
                group += other
                groups.update(dict.fromkeys(other, group))
    return {
        node.name
        for node, group in groups.items()
        if any(member.target in _PRODUCTS for member in group)
    }


def _follows_its_inputs(node: fx.Node) -> bool:
    """Whether a node is an operation of torch whose type is that of its inputs."""
    if node.op == "call_method":
        return node.target not in ("to", "type", "float", "double", "half", "bfloat16")
    package = str(getattr(node.target, "__module__", "")).partition(".")[0]
    ours = str(node.target).startswith("fxquant.")
    asks = any(isinstance(v, torch.dtype) for _, v in flatten((node.args, dict(node.kwargs))))
    return node.op == "call_function" and package in _OF_TORCH and not ours and not asks


def _narrowed(
    source: fx.GraphModule, kinds: _Kinds, chosen: set[str], dtype: torch.dtype
) -> fx.GraphModule:
    """A copy in which the chosen operations read and yield `dtype`, converted at its borders."""
    result = fx.GraphModule(source, copy.deepcopy(source.graph))
    graph, converted = result.graph, {}
    for node in list(graph.nodes):
        narrow = node.name in chosen
        for operand in node.all_input_nodes:
            if operand.name not in kinds.floats or (operand.name in chosen) == narrow:
                continue
            if operand not in converted:
                with graph.inserting_after(operand):
                    converted[operand] = _converted(result, operand, dtype if narrow else None)
                converted[operand].meta = dict(operand.meta)
            node.replace_input_with(operand, converted[operand])
    for operand in converted:
        if operand.op == "get_attr" and not operand.users:
            graph.erase_node(operand)
    drop_unread(result, stored_reads(source))
    graph.lint()
    result.recompile()
    return result


def _converted(result: fx.GraphModule, operand: fx.Node, dtype: torch.dtype | None) -> fx.Node:
    """`operand` in `dtype`, None for float32; constants are rounded here and stored."""
    graph = result.graph
    if dtype is None:
        return graph.call_method("float", (operand,))
    if operand.op != "get_attr":
        return graph.call_method("to", (operand, dtype))
    path = f"{operand.target}_{str(dtype).removeprefix('torch.')}"
    owner, _, leaf = path.rpartition(".")
    value = get_tensor(result, str(operand.target)).to(dtype)
    result.get_submodule(owner).register_buffer(leaf, value)
    return graph.get_attr(path)
