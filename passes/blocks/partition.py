"""The parts of a network that reconstruction optimizes one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from passes.blocks.flow import Flow, data_flow
from passes.blocks.parts import Part, find_parts, named_parts
from passes.blocks.paths import common_path, path_depth
from passes.blocks.rules import GRANULARITIES, RULES, Granularity
from passes.infra.walk import reached

__all__ = ["Block", "Granularity", "format_tree", "partition_blocks"]


@dataclass(frozen=True)
class Block:
    """A part of a graph with one output.

    `nodes` is complete: with the `inputs` it is all that computing the output takes. Constants
    and sizes that several blocks read are among the nodes of each of them; every other node
    belongs to one block at most, and every layer that sees data to exactly one.

    Attributes:
        name: from the paths of its layers: "layer1.0", "conv1..layer1".
        nodes: names in execution order.
        inputs: names of the tensor nodes outside that it reads.
        output: name of the one node that is read outside: the quantizer behind the block's
            value, or the value where somebody reads it as it is.
        layers: paths of the modules with weight matrices, in execution order.
        rule: the name of the rule that made it, one of `passes.blocks.rules.RULES`.
        children: the blocks of the next finer granularity; none in a block of one layer.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    layers: tuple[str, ...]
    rule: str
    children: tuple[Block, ...] = ()


def partition_blocks(
    graph_module: fx.GraphModule,
    granularity: Granularity = "block",
    named: Sequence[Callable[[str], bool]] = (),
) -> tuple[Block, ...]:
    """Split a fused or a simulated graph into blocks, in execution order.

    - "layer": one layer with the activation behind it.
    - "block": what lies around a residual addition (the activation behind it included): a
      residual block, the attention or the MLP of a transformer's layer; also branches that are
      concatenated, and a few layers in a row that make up one module. Other layers (stem, head)
      are blocks of their own.
    - "stage": blocks in a row with the same output resolution; in transformers one layer, from
      one attention up to the next.
    - "model": everything up to the last single output.

    Quantizers belong to the block of their value; that of an input, or of an output that others
    read as it is, to the one block that reads it. So the fused and the simulated graph have the
    same blocks. What has no weights and stands between blocks may belong to none.

    `named` holds predicates on module paths: the nodes below the modules that one of them picks
    become one block, at any granularity.

    Shapes are read from ``node.meta["tensor"]``.

    Raises:
        UnsupportedGraphError: a predicate picks no layer, or nodes that another one has picked,
            or nodes that have more than one output.
        ValueError: there is no such granularity.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {(*GRANULARITIES,)}, got {granularity!r}")
    rules = GRANULARITIES[granularity]
    flow = data_flow(graph_module.graph)
    fixed = named_parts(flow, named)
    taken = {node for part in fixed for node in part.nodes}
    free = [node for node in flow.reads if node not in taken and node.op != "output"]
    parts = find_parts(flow, free, fixed, rules)
    for rule in rules:
        merge = RULES[rule].merge
        if merge is not None:
            parts = merge(flow, parts)
    return _blocks(flow, parts)


def format_tree(blocks: Sequence[Block]) -> str:
    """The blocks as a tree, one line each: name, layers, rule, what it reads and yields."""
    rows = list(_tree_rows(blocks, ""))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {rest}" for name, rest in rows) + "\n" if rows else ""


def _tree_rows(blocks: Sequence[Block], indent: str) -> Iterable[tuple[str, str]]:
    for block in blocks:
        count = f"{len(block.layers)} layer{'s' if len(block.layers) > 1 else ''}"
        reads = ", ".join(block.inputs)
        yield indent + block.name, f"{count:<10} {block.rule:<10} {reads} -> {block.output}"
        yield from _tree_rows(block.children, indent + "  ")


# -- blocks ------------------------------------------------------------------------------


def _blocks(flow: Flow, parts: Sequence[Part]) -> tuple[Block, ...]:
    names, quantizers = _names(parts), _quantizers(flow, parts)
    return tuple(_block(flow, part, names[id(part)], quantizers[id(part)]) for part in parts)


def _block(flow: Flow, part: Part, name: str, quantizers: set[fx.Node]) -> Block:
    order = {node: index for index, node in enumerate(part.output.graph.nodes)}
    inside, inputs = _complete(flow, part.nodes | quantizers)
    outputs = [part.output, *(quantizers & {*flow.images.get(part.output, ())})]
    read = [node for node in outputs if any(user not in inside for user in node.users)]
    children = part.children
    if not children and len(part.layers()) > 1:
        nodes = [node for node in flow.reads if node in part.nodes]
        children = find_parts(flow, nodes)
    return Block(
        name,
        tuple(node.name for node in sorted(inside, key=order.__getitem__)),
        tuple(node.name for node in sorted(inputs, key=order.__getitem__)),
        (read or outputs)[0].name,
        tuple(part.paths()),
        part.rule,
        _blocks(flow, children),
    )


def _quantizers(flow: Flow, parts: Sequence[Part]) -> dict[int, set[fx.Node]]:
    """The quantizers of each part."""
    owner = {node: part for part in parts for node in part.nodes}
    found: dict[int, set[fx.Node]] = {id(part): set() for part in parts}
    for value, images in flow.images.items():
        part = owner.get(value)
        # Read both as it is and quantized, the value has to be the output of its part.
        escapes = part is None or (
            value is part.output
            and any(user not in part.nodes and user not in images for user in value.users)
        )
        for image in images:
            readers = {id(reader): reader for reader in map(owner.get, image.users)}
            reader = next(iter(readers.values())) if len(readers) == 1 else None
            home = reader if escapes and reader is not None else part
            if home is not None:
                found[id(home)].add(image)
    return found


def _complete(flow: Flow, members: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The members with the constants and sizes that they read; and the values that they read."""
    values = set(flow.reads).union(*flow.images.values())
    inside = set(
        reached(members, lambda node: [s for s in node.all_input_nodes if s not in values])
    )
    return inside, {source for node in inside for source in node.all_input_nodes} - inside


def _names(parts: Sequence[Part]) -> dict[int, str]:
    """Names from the paths of the layers, made unique."""
    paths = {id(part): part.paths() for part in parts}
    names = {key: common_path(found) for key, found in paths.items()}
    for spell in (_first_to_last(1), _first_to_last(math.inf)):
        found = list(names.values())
        for key, name in names.items():
            if not name or found.count(name) > 1:
                names[key] = spell(paths[key])
    used: dict[str, int] = {}
    for key, name in names.items():
        used[name] = used.get(name, 0) + 1
        names[key] = name if used[name] == 1 else f"{name}#{used[name]}"
    return names


def _first_to_last(depth: float) -> Callable[[list[str]], str]:
    def spell(paths: list[str]) -> str:
        prefix = common_path(paths)
        skip = path_depth(prefix)
        ends = [
            ".".join(path.split(".")[skip:][: None if depth == math.inf else int(depth)])
            for path in (paths[0], paths[-1])
        ]
        span = ends[0] if ends[0] == ends[1] else "..".join(ends)
        return ".".join(filter(None, (prefix, span)))

    return spell
