"""Quantizers without a zero point where the values are provably non-negative."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import fx

from passes.infer_ranges import InferRanges, is_non_negative
from passes.infra.base import Pass, PassResult
from passes.insert_quant_dequant import InsertQuantDequant

__all__ = ["AssignOneSided", "OneSidedQuantizer"]


@runtime_checkable
class OneSidedQuantizer(Protocol):
    """A quantizer that can be told that its values are never negative."""

    one_sided: bool

    def make_one_sided(self) -> None:
        """Use an unsigned grid that starts at zero."""


class AssignOneSided(Pass):
    """Make the quantizers one-sided whose values `InferRanges` proved non-negative.

        before                          after
        y = relu(x)      ∈ [0, ∞)       y = relu(x)
        q = u8 affine(y)                q = u8 one-sided(y)     zero point 0

    A quantizer that several values share becomes one-sided if all of them are non-negative.
    """

    exact = True
    after = (InferRanges, InsertQuantDequant)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Assign; the notes name each proof."""
        calls: dict[str, list[fx.Node]] = {}
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        modified, notes = False, []
        for path, nodes in calls.items():
            module = graph_module.get_submodule(path)
            if not isinstance(module, OneSidedQuantizer) or module.one_sided:
                continue
            values = [node.all_input_nodes[0] for node in nodes]
            if all(is_non_negative(value) for value in values):
                module.make_one_sided()
                modified = True
                notes.append(f"{path}: {values[0].meta['range'].proof}")
        return PassResult(modified, notes=tuple(notes))
