"""The first parts of a graph: regions and layers, each with the nodes without weights around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import fx

from passes.blocks.flow import Flow, is_layer
from passes.blocks.paths import ancestors, common_path, path_depth
from passes.blocks.single_exit import find_regions
from passes.infra.base import module_path, tensor_info
from passes.infra.errors import UnsupportedGraphError
from passes.infra.stored import module_of

__all__ = ["ATTACHMENTS", "Attachment", "Part", "find_parts", "is_tensor", "named_parts"]


@dataclass(eq=False)
class Part:
    """Nodes with one output, on the way to a block; their quantizers are left out.

    `rule` made it: see `passes.blocks.rules`. `region`: it holds a region whose branches meet.
    """

    nodes: set[fx.Node]
    output: fx.Node
    rule: str
    region: bool = False
    children: list[Part] = field(default_factory=list)

    @property
    def named(self) -> bool:
        """Whether a selector picked its nodes: then it neither grows nor merges."""
        return self.rule == "named"

    def layers(self) -> list[fx.Node]:
        """Its layers in execution order."""
        order = {node: index for index, node in enumerate(self.output.graph.nodes)}
        return sorted(filter(is_layer, self.nodes), key=order.__getitem__)

    def paths(self) -> list[str]:
        """The module paths of its layers."""
        return [str(node.target) for node in self.layers()]


@dataclass(frozen=True)
class Attachment:
    """Which nodes without weights go with a part.

    Attributes:
        name: what such a node does for the part.
        behind: it alone reads the part's output; otherwise nothing but the part reads it.
        belongs: whether this node goes with this part.
    """

    name: str
    behind: bool
    belongs: Callable[[Part, fx.Node], bool]


def is_tensor(node: fx.Node) -> bool:
    """Whether a value of the flow is one tensor rather than several."""
    return node.meta.get("tensor") is None or tensor_info(node) is not None


def _completes(part: Part, node: fx.Node) -> bool:
    if not is_tensor(part.output):
        return True
    if tensor_info(part.output) != tensor_info(node):
        return False
    module = module_of(node)
    if module is None or next(module.parameters(), None) is None:
        return True
    # A norm stands in front of a layer or behind it: its module knows.
    paths = part.paths()
    near = common_path([str(node.target).rpartition(".")[0], paths[-1]])
    return path_depth(near) >= path_depth(common_path(paths)) - 1


def _prepares_layer(part: Part, node: fx.Node) -> bool:
    # In front of a region, a value of one tensor may as well complete the part before it.
    return not part.region or not is_tensor(node)


ATTACHMENTS = (
    Attachment("completes it in the same shape", True, _completes),
    Attachment("prepares a layer", False, _prepares_layer),
    Attachment("reshapes what it gives", True, lambda part, node: is_tensor(node)),
    Attachment("prepares a region", False, lambda part, node: True),
)
"""In this order: a node goes with the first part that it belongs to."""


def find_parts(
    flow: Flow, nodes: Sequence[fx.Node], fixed: Sequence[Part] = (), rules: Collection[str] = ()
) -> list[Part]:
    """The parts that `nodes` make up, and the `fixed` ones, in the order of their outputs.

    `rules` says which regions are parts, see `find_regions`. Any other layer is a part by the
    rule "layer".
    """
    nodes = [node for node in nodes if node.op != "placeholder"]
    owner: dict[fx.Node, Part] = {node: part for part in fixed for node in part.nodes}
    for region in find_regions(flow, set(nodes), rules) if rules else ():
        part = Part(set(region.members), region.exit, region.rule, region=True)
        owner.update(dict.fromkeys(part.nodes, part))
    for node in nodes:
        if node not in owner and is_layer(node):
            owner[node] = Part({node}, node, "layer")
    for attachment in ATTACHMENTS:
        attach = _attach_behind if attachment.behind else _attach_in_front
        attach(flow, nodes, owner, attachment.belongs)
    position = {node: index for index, node in enumerate(flow.reads)}
    unique = {id(part): part for part in owner.values()}.values()
    return sorted(unique, key=lambda part: position[part.output])


def _attach_behind(
    flow: Flow,
    nodes: Sequence[fx.Node],
    owner: dict[fx.Node, Part],
    belongs: Callable[[Part, fx.Node], bool],
) -> None:
    for node in nodes:
        if node in owner:
            continue
        source = flow.reads[node][0]
        part = owner.get(source)
        alone = len(flow.reads[node]) == 1 and len(flow.readers[source]) == 1
        if alone and part and part.output is source and not part.named and belongs(part, node):
            part.nodes.add(node)
            part.output = node
            owner[node] = part


def _attach_in_front(
    flow: Flow,
    nodes: Sequence[fx.Node],
    owner: dict[fx.Node, Part],
    belongs: Callable[[Part, fx.Node], bool],
) -> None:
    for node in reversed(nodes):
        if node in owner:
            continue
        readers = {id(owner.get(user)): user for user in flow.readers[node]}
        part = owner.get(next(iter(readers.values())))
        whole = all(is_tensor(source) for source in flow.reads[node])
        if len(readers) == 1 and part and not part.named and whole and belongs(part, node):
            part.nodes.add(node)
            owner[node] = part


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
            and any(predicate(path) for path in ancestors(module_path(node)))
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
        parts.append(Part(nodes, outputs[0], "named"))
    return parts
