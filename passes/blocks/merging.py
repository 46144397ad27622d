"""Parts in a row that become one: by their module, by their resolution, or all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx, nn

from passes.blocks.flow import Flow
from passes.blocks.parts import Part, is_tensor
from passes.blocks.paths import ancestors, is_below, path_depth
from passes.infra.base import tensor_info
from passes.infra.stored import module_of
from passes.layers.fused_layer import FUSIBLE_LAYERS
from passes.layers.replace import bare_layer

__all__ = ["merge_all", "merge_modules", "merge_resolutions"]

_PRODUCTS = ("matmul", "bmm", "scaled_matmul", "scaled_dot_product_attention")
_MOST_PARTS = 4  # a module of more parts in a row is a sequence of blocks rather than one


def merge_modules(flow: Flow, parts: list[Part]) -> list[Part]:
    """Make one part of the few in a row that a module consists of."""
    count = sum(len(part.layers()) for part in parts)
    paths = {id(part): part.paths() for part in parts}
    modules = {path for found in paths.values() for each in found for path in ancestors(each)[1:]}
    for module in sorted(modules, key=lambda path: (path_depth(path), path)):
        group = [part for part in parts if any(is_below(path, module) for path in paths[id(part)])]
        inside = [path for part in group for path in paths[id(part)]]
        regions = sum(part.region for part in group)
        if (
            2 <= len(group) <= _MOST_PARTS
            and len(inside) < count
            and all(is_below(path, module) for path in inside)
            and regions <= 1
            and not any(part.rule in ("residual", "named") for part in group)
        ):
            union = _union(flow, group, parts, "module")
            if union is not None:
                union.children = []
                parts = [part for part in parts if part not in group[:-1]]
                parts[parts.index(group[-1])] = union
                paths[id(union)] = inside
    return parts


def merge_resolutions(flow: Flow, parts: list[Part]) -> list[Part]:
    """Make one part of those in a row that have one resolution, without attention behind."""

    def goes_on(previous: Part, part: Part) -> bool:
        return not _attends(part) and _resolution(previous) == _resolution(part)

    return _merge_rows(flow, parts, "resolution", goes_on)


def merge_all(flow: Flow, parts: list[Part]) -> list[Part]:
    """Make one part of all that have a single output together."""
    return _merge_rows(flow, parts, "network", lambda previous, part: True)


def _merge_rows(
    flow: Flow, parts: Sequence[Part], rule: str, joins: Callable[[Part, Part], bool]
) -> list[Part]:
    """Make one part of those in a row of which each joins the one before it."""
    rows: list[list[Part]] = []
    for part in parts:
        row = rows[-1] if rows else []
        near = row and not row[-1].named and not part.named and joins(row[-1], part)
        if near and _union(flow, [*row, part], parts, rule):
            row.append(part)
        else:
            rows.append([part])
    return [row[0] if len(row) == 1 else _union(flow, row, parts, rule) or row[0] for row in rows]


def _union(flow: Flow, parts: Sequence[Part], among: Sequence[Part], rule: str) -> Part | None:
    """The parts as one, with what lies between them, if that has a single output."""
    nodes = set().union(*(part.nodes for part in parts))
    taken = set().union(*(part.nodes for part in among))
    for node in reversed(flow.reads):
        computes = node.op not in ("placeholder", "output")
        if computes and node not in taken and set(flow.readers[node]) <= nodes:
            nodes.add(node)
    outputs = flow.outputs(nodes)
    if len(outputs) != 1 or not is_tensor(outputs[0]):
        return None
    region = any(part.region for part in parts)
    return Part(nodes, outputs[0], rule, region, children=list(parts))


def _resolution(part: Part) -> tuple[int, ...]:
    info = tensor_info(part.output)
    shape = info.shape if info is not None else ()
    layers = part.layers()
    module = module_of(layers[-1]) if layers else None
    layer = None if module is None else bare_layer(module)
    convolves = isinstance(layer, FUSIBLE_LAYERS) and not isinstance(layer, nn.Linear)
    return shape[2:] if convolves else shape[1:-1]


def _attends(part: Part) -> bool:
    """Whether the part multiplies two of its values, or calls a module that does."""
    return any(_is_product(node) for node in part.nodes) or any(
        isinstance(module_of(node), nn.MultiheadAttention) for node in part.layers()
    )


def _is_product(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name in _PRODUCTS and len(set(node.all_input_nodes)) > 1
