"""Which front end makes the float graph: symbolic tracing, and torch.export where that is better.

Symbolic tracing comes first: its graph is as short as the model's code. Where it fails, or leaves
a part in float that does much of the work, torch.export has its turn; its graph has to compute
what the model computes, or the symbolic one is taken as it is.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import TraceError
from fxquant.frontend.exported import export, from_graph_module, from_program
from fxquant.frontend.faithful import Compared, compared_on_one, difference
from fxquant.frontend.prepare import check_mode, check_weights, is_aten_graph, unwrap
from fxquant.frontend.run_counts import count_by_running
from fxquant.frontend.trace import trace
from passes import VerificationError, copy_sharing_tensors

__all__ = ["EXPORT", "SYMBOLIC", "Captured", "as_module", "capture"]

SYMBOLIC, EXPORT = "torch.fx", "torch.export"

_MUCH = 0.001
"""Which share of the multiply-accumulates in float leaves makes another attempt worth its time."""

_KNOWN_PACKAGES = ("torch.", "torchvision.ops", "torchvision.models.swin_transformer", "passes.")
"""Whose functions the passes know, or what takes them out is a pass of its own."""


@dataclass(frozen=True)
class Captured:
    """A float graph, the front end that made it, and why what is not in it is not.

    `leaf_reasons` are by module path in `graph_module`; `notes` say why a front end was taken.
    `compared` is what the graph and the model gave on one sample where they have been compared.
    """

    graph_module: fx.GraphModule
    leaf_reasons: Mapping[str, str]
    front_end: str = SYMBOLIC
    notes: tuple[str, ...] = ()
    compared: Compared | None = None


def as_module(model: Any) -> Any:
    """An ExportedProgram, or a GraphModule of aten operators, as a GraphModule of functions.

    Anything else is given back as it is.

    Raises TraceError where it computes something that has no such form.
    """
    if isinstance(model, torch.export.ExportedProgram):
        graph_module = from_program(model)
    elif is_aten_graph(model):
        graph_module = from_graph_module(model)
    else:
        return model
    graph_module.meta["front_end"] = EXPORT
    return graph_module


def capture(model: nn.Module, names: Sequence[str], values: Sequence[Any]) -> Captured:
    """The float graph of `model`, whose parameters `names` are fed with `values`.

    Raises ModelError and CalibrationError as `trace` does, and TraceError where no front end can
    make a graph of the model.
    """
    if isinstance(model, fx.GraphModule) and model.meta.get("front_end") == EXPORT:
        check_mode(model)
        check_weights(model)
        note = f"front end {EXPORT}: the model was handed in as its graph"
        return Captured(copy_sharing_tensors(model), {}, EXPORT, (note,))
    symbolic, failure, compared = None, None, None
    try:
        symbolic = trace(model, names)
        why = _heavy_leaves(symbolic.graph_module, symbolic.leaf_reasons, values)
        if not why:
            compared = compared_on_one(unwrap(model), names, symbolic.graph_module, values)
    except VerificationError as error:
        why = f"symbolic tracing goes wrong: {error}"
    except TraceError as error:
        failure, why = error, f"symbolic tracing fails: {error}"
    if symbolic is not None and not why:
        return Captured(symbolic.graph_module, symbolic.leaf_reasons, compared=compared)
    try:
        graph_module, shape = export(unwrap(model), names, values)
        problem = difference(unwrap(model), names, graph_module, values)
    except TraceError as error:
        problem = str(error)
    if not problem:
        notes = [f"front end {EXPORT}, because {why}", *([shape] if shape else [])]
        return Captured(graph_module, {}, EXPORT, tuple(notes))
    if symbolic is None:
        assert failure is not None
        raise TraceError(f"{failure}; the other front end: {problem}") from failure
    note = f"front end {SYMBOLIC}, although {why}: {problem}"
    return Captured(symbolic.graph_module, symbolic.leaf_reasons, SYMBOLIC, (note,))


def _is_wrapped(node: fx.Node) -> bool:
    """Whether it calls a Python function that no pass knows."""
    if node.op != "call_function" or not isinstance(node.target, types.FunctionType):
        return False
    return not node.target.__module__.startswith(_KNOWN_PACKAGES)


def _heavy_leaves(
    graph_module: fx.GraphModule, reasons: Mapping[str, str], values: Sequence[Any]
) -> str:
    """Which leaves of a symbolic trace hold much of the work, and why; "" for none."""
    leaves = {
        node.name: reasons[str(node.target)]
        for node in graph_module.graph.nodes
        if node.op == "call_module" and str(node.target) in reasons
    }
    leaves |= {
        node.name: "is a function that torch.fx.wrap keeps whole"
        for node in graph_module.graph.nodes
        if _is_wrapped(node)
    }
    if not leaves:
        return ""
    for node in graph_module.graph.nodes:
        if _is_wrapped(node) and not node.users:
            return f"{node.target.__name__} is called for what it writes into its arguments"
    try:
        everything = {node.name for node in graph_module.graph.nodes if node.op != "output"}
        counts = count_by_running(graph_module, everything, values)
    except Exception:
        return ""  # the model does not run on this: the pipeline says at which operation
    total = sum(count or 0 for count in counts.values())
    unknown = [name for name in leaves if counts[name] is None]
    known = sorted(leaves, key=lambda name: -(counts[name] or 0))
    if not unknown and sum(counts[name] or 0 for name in known) <= _MUCH * total:
        return ""
    heavy = unknown or [name for name in known if counts[name]]
    paths = {
        node.name: getattr(node.target, "__name__", str(node.target))
        for node in graph_module.graph.nodes
    }
    more = f" (and {len(heavy) - 1} more)" if len(heavy) > 1 else ""
    return f"{paths[heavy[0]]}{more} {leaves[heavy[0]]}"
