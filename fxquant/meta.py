"""What fxquant notes at nodes, beside what passes note: the table of the keys."""

from __future__ import annotations

from collections.abc import Mapping

from passes.infra.meta import KEYS, MetaKey, key_table

__all__ = ["NODE_KEYS"]

NODE_KEYS: Mapping[str, MetaKey] = {
    **KEYS,
    **key_table(
        MetaKey(
            "front_end",
            "place",
            "str: of a graph as a whole, that torch.export made it",
            "the front end, of a model that was handed in as its graph",
            "the front end; the report",
        ),
        MetaKey(
            "simulated",
            "integers",
            "str: the node of the simulated graph that a node stands for",
            "to_integer",
            "the comparison of stages; invariants; saved files",
        ),
        MetaKey(
            "grid",
            "integers",
            "Grid: scale, zero point, bounds and dtype of the integers; absent on floats",
            "to_integer; the rewrites and the lowering of backends; loading a file",
            "backends, invariants, the comparison of stages, saved files",
        ),
        MetaKey(
            "channel_scale",
            "integers",
            "Tensor [C], float64: the scales of a value that has one for each channel",
            "to_integer",
            "the comparison of stages",
        ),
        MetaKey(
            "integer",
            "target",
            "str: the node of the integer graph that a node of a target's graph stands for",
            "the lowering of backends",
            "the check of a target against the reference",
        ),
        MetaKey(
            "kernel",
            "target",
            'str: "reference" where a target runs the reference operator',
            "the lowering of backends",
            "reports of what runs on which kernel",
        ),
        MetaKey(
            "rewritten",
            "target",
            "GraphModule: of a lowered graph as a whole, the integer graph that it was made from",
            "the lowering of backends",
            "the check of a target against the reference",
        ),
        MetaKey(
            "approximated",
            "target",
            "int: of a lowered graph as a whole, how many float operations it computes itself",
            "the lowering of native",
            "the check of a target against the reference, and the export",
        ),
        MetaKey(
            "names",
            "integers",
            "Names: of the graph as a whole, how inputs go by name and in parts; or None",
            "compile; loading a file",
            "compiled models, saved files",
        ),
        MetaKey(
            "split_outliers",
            "pass",
            "bool: a split made this layer, which is not split again",
            "even_out",
            "even_out",
        ),
    ),
}
"""All keys of ``node.meta`` in graphs of fxquant."""
