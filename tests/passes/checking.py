"""What every pass promises, asserted on one graph: `check`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes import Decline, Pass, PassResult
from passes.infra import listing, verify

__all__ = ["Checked", "Function", "check", "float_graph"]


@dataclass(frozen=True)
class Checked:
    """What the pass left, for assertions that go beyond those of `check`."""

    graph_module: fx.GraphModule
    result: PassResult
    outputs: Any

    @property
    def declines(self) -> tuple[Decline, ...]:
        return self.result.declines

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(decline.reason for decline in self.result.declines)

    @property
    def operations(self) -> dict[str, int]:
        return dict(listing.count_operations(self.graph_module))

    def nodes(self, operation: str) -> list[fx.Node]:
        return [
            node
            for node in self.graph_module.graph.nodes
            if node.op not in ("placeholder", "output", "get_attr")
            and listing.operation(node) == operation
        ]


class Function(nn.Module):
    """A model whose forward is `function` of itself and its input."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def check(
    pass_: Pass,
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    *,
    expect: str | None = None,
    modified: bool | None = None,
    first: Sequence[Pass] = (),
) -> Checked:
    """Run `pass_` on `model` (traced here unless it is a GraphModule) and assert its promises.

    The graph lints and runs; its listing is `expect`, where that is given; an exact pass leaves
    the outputs as they were; `modified` is truthful (and is `modified`, where that is given);
    a second run changes nothing; every node keeps its origin and module path. The passes in
    `first` run before, unchecked.
    """
    example = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    graph_module = float_graph(model)
    before = _run(graph_module, example, "before")
    for step in first:
        step.run(graph_module)
        before = _run(graph_module, example, step.name)
    origins = {name for node in graph_module.graph.nodes for name in node.meta.get("origin", ())}
    fingerprint = _fingerprint(graph_module)

    result = pass_.run(graph_module)

    verify.check_well_formed(graph_module, name=pass_.name)
    changed = _fingerprint(graph_module) != fingerprint
    assert result.modified == changed, f"says modified={result.modified}, the graph says {changed}"
    if modified is not None:
        assert result.modified == modified
    outputs = _run(graph_module, example, pass_.name)
    if pass_.exact:
        verify.check_equivalent(before, outputs, name=pass_.name)
    if expect is not None:
        found = listing.to_text(graph_module)
        assert _lines(found) == _lines(expect), f"the listing is\n{found}"
    _check_meta(graph_module, origins)

    fingerprint = _fingerprint(graph_module)
    again = pass_.run(graph_module)
    assert not again.modified, "a second run says that it changed something"
    assert _fingerprint(graph_module) == fingerprint, "a second run changed something"
    return Checked(graph_module, result, outputs)


def float_graph(model: nn.Module) -> fx.GraphModule:
    """`model` traced with `torch.nn` modules as leaves and with provenance in every node's meta."""
    if isinstance(model, fx.GraphModule):
        graph_module = model
    else:
        tracer = fx.Tracer()
        graph = tracer.trace(model.eval())
        for node in graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            paths = [str(path) for path, _ in stack.values()]
            node.meta["module_path"] = paths[-1] if paths else ""
        graph_module = fx.GraphModule(model, graph)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            node.meta["module_path"] = str(node.target)
        node.meta.setdefault("module_path", "")
        node.meta.setdefault("origin", (node.name,))
    return graph_module


def _run(graph_module: fx.GraphModule, example: tuple[Any, ...], name: str) -> Any:
    # A model may write into its input.
    return verify.run_and_annotate(graph_module, copy.deepcopy(example), name=name)


def _check_meta(graph_module: fx.GraphModule, origins: set[str]) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "output":
            continue
        assert isinstance(node.meta.get("module_path"), str), f"{node.name} lost its module path"
        assert node.meta.get("origin"), f"{node.name} lost its origin"
        assert set(node.meta["origin"]) <= origins, f"{node.name} invented its origin"


def _fingerprint(graph_module: fx.GraphModule) -> tuple[Any, ...]:
    structure = [(path, repr(module)) for path, module in graph_module.named_modules() if path]
    tensors = [
        (path, tensor.dtype, tuple(tensor.shape), tensor.detach().double().sum().item())
        for path, tensor in sorted(graph_module.state_dict().items())
        if isinstance(tensor, torch.Tensor)
    ]
    types = [
        (node.op, node.target if isinstance(node.target, str) else id(node.target))
        for node in graph_module.graph.nodes
    ]
    return _lines(listing.to_text(graph_module)), types, structure, tensors


def _lines(text: str) -> list[str]:
    # Column widths are for readers.
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]
