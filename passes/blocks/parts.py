"""What goes together in a block: regions, layers, and the nodes without weights around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from passes.blocks.single_exit import Flow, is_layer, residual_blocks
from passes.infra.base import module_path, tensor_info
from passes.infra.errors import UnsupportedGraphError
from passes.infra.fused_layer import FUSIBLE_LAYERS, FusedLayer

__all__ = [
    "Part",
    "common_path",
    "find_parts",
    "merge_modules",
    "merge_rows",
    "named_parts",
    "path_depth",
    "same_resolution",
]

_PRODUCTS = ("matmul", "bmm", "scaled_matmul", "scaled_dot_product_attention")
_MOST_PARTS = 4  # a module of more parts in a row is a sequence of blocks rather than one


@dataclass(eq=False)
class Part:
    """Nodes with one output, on the way to a block; their quantizers are left out."""

    nodes: set[fx.Node]
    output: fx.Node
    region: bool = False
    residual: bool = False
    named: bool = False
    children: list[Part] = field(default_factory=list)

    def layers(self) -> list[fx.Node]:
        """Its layers in execution order."""
        order = {node: index for index, node in enumerate(self.output.graph.nodes)}
        return sorted(filter(is_layer, self.nodes), key=order.__getitem__)

    def paths(self) -> list[str]:
        """The module paths of its layers."""
        return [str(node.target) for node in self.layers()]


def find_parts(
    flow: Flow, nodes: Sequence[fx.Node], fixed: Sequence[Part] = (), *, regions: bool = False
) -> list[Part]:
    """The parts that `nodes` make up, and the `fixed` ones, in the order of their outputs.

    Each layer is a part or, with `regions`, belongs to one that `residual_blocks` finds.
    """
    found = _Parts(flow, nodes, fixed, regions=regions)
    position = {node: index for index, node in enumerate(flow.reads)}
    unique = {id(part): part for part in found.owner.values()}.values()
    return sorted(unique, key=lambda part: position[part.output])


class _Parts:
    """Regions and single layers, and the nodes without weights each with what they go with."""

    def __init__(
        self, flow: Flow, nodes: Sequence[fx.Node], fixed: Sequence[Part], *, regions: bool
    ) -> None:
        self.flow = flow
        self.nodes = [node for node in nodes if node.op != "placeholder"]
        self.owner: dict[fx.Node, Part] = {}
        for part in fixed:
            self._own(part)
        for region in residual_blocks(flow, set(self.nodes)) if regions else ():
            self._own(Part(set(region.members), region.exit, True, region.residual))
        self._follow(self._belongs_to)
        self._precede(lambda node, part: not part.region or not _is_tensor(node))
        self._follow(lambda part, node: _is_tensor(node))
        self._precede(lambda node, part: True)

    def _own(self, part: Part) -> None:
        self.owner.update(dict.fromkeys(part.nodes, part))

    def _follow(self, belongs: Callable[[Part, fx.Node], bool]) -> None:
        """Let layers be parts, and what alone reads the output of a part belong to it."""
        for node in self.nodes:
            if node in self.owner:
                continue
            if is_layer(node):
                self._own(Part({node}, node))
                continue
            source = self.flow.reads[node][0]
            part = self.owner.get(source)
            alone = len(self.flow.reads[node]) == 1 and len(self.flow.readers[source]) == 1
            if alone and part and part.output is source and not part.named and belongs(part, node):
                part.nodes.add(node)
                part.output = node
                self.owner[node] = part

    def _precede(self, belongs: Callable[[fx.Node, Part], bool]) -> None:
        """Let what only one part reads belong to it."""
        for node in reversed(self.nodes):
            if node in self.owner:
                continue
            readers = {id(self.owner.get(user)): user for user in self.flow.readers[node]}
            part = self.owner.get(next(iter(readers.values())))
            whole = all(_is_tensor(source) for source in self.flow.reads[node])
            if len(readers) == 1 and part and not part.named and whole and belongs(node, part):
                part.nodes.add(node)
                self.owner[node] = part

    def _belongs_to(self, part: Part, node: fx.Node) -> bool:
        """Whether `node` completes the part before it, rather than begins the next one."""
        if not _is_tensor(part.output):
            return True
        if tensor_info(part.output) != tensor_info(node):
            return False
        if node.op != "call_module":
            return True
        root = node.graph.owning_module
        assert root is not None
        if not any(True for _ in root.get_submodule(str(node.target)).parameters()):
            return True
        # A norm stands in front of a layer or behind it: its module knows.
        paths = part.paths()
        near = common_path([str(node.target).rpartition(".")[0], paths[-1]])
        return path_depth(near) >= path_depth(common_path(paths)) - 1


def named_parts(flow: Flow, named: Sequence[Callable[[str], bool]]) -> list[Part]:
    """One part for each predicate on module paths.

    Raises:
        UnsupportedGraphError: what a predicate picks is no part.
    """
    parts: list[Part] = []
    for number, predicate in enumerate(named):
        nodes = {
            node
            for node in flow.reads
            if node.op not in ("placeholder", "output")
            and any(predicate(path) for path in _ancestors(module_path(node)))
        }
        where = f"named block {number + 1}"
        if not any(map(is_layer, nodes)):
            raise UnsupportedGraphError(f"{where} holds no layer: no module path matches")
        for part in parts:
            twice = sorted(node.name for node in nodes & part.nodes)
            if twice:
                raise UnsupportedGraphError(f"{where} shares {twice[0]} with another named block")
        outputs = flow.outputs(nodes)
        if len(outputs) != 1:
            found = ", ".join(sorted(node.name for node in outputs))
            raise UnsupportedGraphError(
                f"{where} has {len(outputs)} outputs ({found}): a block needs a single one"
            )
        parts.append(Part(nodes, outputs[0], named=True))
    return parts


# -- merging -----------------------------------------------------------------------------


def _union(flow: Flow, parts: Sequence[Part], among: Sequence[Part]) -> Part | None:
    """The parts as one, with what lies between them, if that has a single output."""
    nodes = set().union(*(part.nodes for part in parts))
    taken = set().union(*(part.nodes for part in among))
    for node in reversed(flow.reads):
        computes = node.op not in ("placeholder", "output")
        if computes and node not in taken and set(flow.readers[node]) <= nodes:
            nodes.add(node)
    outputs = flow.outputs(nodes)
    if len(outputs) != 1 or not _is_tensor(outputs[0]):
        return None
    return Part(nodes, outputs[0], any(part.region for part in parts), children=list(parts))


def merge_modules(flow: Flow, parts: list[Part]) -> list[Part]:
    """Make one part of the few in a row that a module consists of."""
    count = sum(len(part.layers()) for part in parts)
    paths = {id(part): part.paths() for part in parts}
    modules = {path for found in paths.values() for each in found for path in _ancestors(each)[1:]}
    for module in sorted(modules, key=lambda path: (path_depth(path), path)):
        group = [part for part in parts if any(_below(path, module) for path in paths[id(part)])]
        inside = [path for part in group for path in paths[id(part)]]
        regions = sum(part.region for part in group)
        if (
            2 <= len(group) <= _MOST_PARTS
            and len(inside) < count
            and all(_below(path, module) for path in inside)
            and regions <= 1
            and not any(part.residual or part.named for part in group)
        ):
            union = _union(flow, group, parts)
            if union is not None:
                union.children = []
                parts = [part for part in parts if part not in group[:-1]]
                parts[parts.index(group[-1])] = union
                paths[id(union)] = inside
    return parts


def merge_rows(
    flow: Flow, parts: Sequence[Part], joins: Callable[[Part, Part], bool]
) -> list[Part]:
    """Make one part of those in a row of which each joins the one before it."""
    rows: list[list[Part]] = []
    for part in parts:
        row = rows[-1] if rows else []
        near = row and not row[-1].named and not part.named and joins(row[-1], part)
        if near and _union(flow, [*row, part], parts):
            row.append(part)
        else:
            rows.append([part])
    return [row[0] if len(row) == 1 else _union(flow, row, parts) or row[0] for row in rows]


def same_resolution(previous: Part, part: Part) -> bool:
    """Whether `part` goes on where `previous` ends, at its resolution, without attention."""
    return not _attends(part) and _resolution(previous) == _resolution(part)


def _resolution(part: Part) -> tuple[int, ...]:
    info = tensor_info(part.output)
    shape = info.shape if info is not None else ()
    layers = part.layers()
    root = part.output.graph.owning_module
    assert root is not None
    layer = root.get_submodule(str(layers[-1].target)) if layers else None
    layer = layer.layer if isinstance(layer, FusedLayer) else layer
    convolves = isinstance(layer, FUSIBLE_LAYERS) and not isinstance(layer, nn.Linear)
    return shape[2:] if convolves else shape[1:-1]


def _attends(part: Part) -> bool:
    """Whether the part multiplies two of its values, or calls a module that does."""
    root = part.output.graph.owning_module
    assert root is not None
    return any(
        getattr(node.target, "__name__", "") in _PRODUCTS and len(set(node.all_input_nodes)) > 1
        for node in part.nodes
    ) or any(
        isinstance(root.get_submodule(str(node.target)), nn.MultiheadAttention)
        for node in part.layers()
    )


def common_path(paths: Sequence[str]) -> str:
    """The module that all paths lie in."""
    parts = [path.split(".") for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _ancestors(path: str) -> list[str]:
    """The path itself and those of the modules around it, the root left out."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _below(path: str, module: str) -> bool:
    return path.startswith(f"{module}.")


def path_depth(path: str) -> int:
    """How many names a path consists of."""
    return path.count(".") + 1 if path else 0


def _is_tensor(node: fx.Node) -> bool:
    return node.meta.get("tensor") is None or tensor_info(node) is not None
