"""What passes note at nodes: one table of the keys, and the one function that copies them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

__all__ = ["KEYS", "MetaKey", "copy_meta", "key_table", "origins"]


@dataclass(frozen=True)
class MetaKey:
    """One key of ``node.meta``.

    Attributes:
        name: the key.
        kind: what is copied together, see `copy_meta`.
        meaning: the value and its type.
        writer: who notes it.
        readers: who asks for it.
    """

    name: str
    kind: str
    meaning: str
    writer: str
    readers: str


def key_table(*keys: MetaKey) -> dict[str, MetaKey]:
    """The keys by name."""
    return {key.name: key for key in keys}


KEYS: Mapping[str, MetaKey] = key_table(
    MetaKey(
        "module_path",
        "place",
        "str: the path of the module that the node came from, '' for the root",
        "the front end; passes that make a module of their own",
        "`module_path`; selectors of recipes, reports, the names of blocks",
    ),
    MetaKey(
        "val",
        "export",
        "FakeTensor, or what else the node yields",
        "torch.export",
        "what spells its graphs as any other",
    ),
    MetaKey(
        "origin",
        "place",
        "tuple of str: the traced nodes whose work the node does",
        "the front end; `Rewriter` joins those of merged nodes",
        "the JSON form of a graph",
    ),
    MetaKey(
        "stack_trace",
        "place",
        "str: the line of the model's source",
        "the front end",
        "error messages about the model",
    ),
    MetaKey(
        "tensor",
        "shape",
        "TensorInfo, or tuples and dicts of it: shape and dtype on the probe inputs",
        "`run_and_annotate` after every pass; passes for the nodes that they ask about themselves",
        "`tensor_info`: all that depends on shapes",
    ),
    MetaKey(
        "range",
        "range",
        "Interval: the bounds that hold for every element, with their proof",
        "`InferRanges`",
        "`range_of`, `is_non_negative`: `AssignOneSided`",
    ),
)
"""The keys that passes know. Whoever notes more has a table of their own."""


def copy_meta(
    source: fx.Node, target: fx.Node, *kinds: str, table: Mapping[str, MetaKey] = KEYS
) -> None:
    """Note at `target` what `table` calls one of `kinds` and `source` has; others stay.

    "place": where the node came from; it holds for all that stands for `source`.
    "shape", "range": they hold where `target` yields the values of `source`.
    """
    for key in table.values():
        if key.kind in kinds and key.name in source.meta:
            target.meta[key.name] = source.meta[key.name]


def origins(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The traced nodes that `nodes` stand for, each once; a node without origin is its own."""
    names: dict[str, None] = {}
    for node in nodes:
        names.update(dict.fromkeys(node.meta.get("origin", (node.name,))))
    return tuple(names)
