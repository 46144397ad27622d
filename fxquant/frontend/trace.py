"""The front end: a model in eval mode becomes a float graph, and what cannot stays a leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxquant.errors import CalibrationError, ModelError, TraceError
from fxquant.frontend.doctor import diagnose
from fxquant.frontend.prepare import (
    FloatLeaf,
    check_kind,
    check_mode,
    check_weights,
    prepare,
    unwrap,
)
from fxquant.frontend.tracer import Tracer
from passes.infra.stored import set_module

__all__ = ["Traced", "trace"]


@dataclass(frozen=True)
class Traced:
    """A float graph, and for every submodule that stays a leaf because it has to, the reason.

    The keys of `leaf_reasons` are module paths in `graph_module`.
    """

    graph_module: fx.GraphModule
    leaf_reasons: Mapping[str, str]


def trace(model: nn.Module, inputs: int | Sequence[str] | None = None) -> Traced:
    """Trace `model`, which is left as it is: modules are copied, tensors are shared.

    Modules of `torch.nn` are leaves; containers are traced through. The parameters of `forward`
    that `inputs` names, or counts, become inputs of the graph (None: those without a default); the
    others keep their defaults. A submodule that cannot be traced becomes a FloatLeaf, with the
    reason in `leaf_reasons`. Hooks of the model, and a ``__call__`` of its own, are traced too.
    Every node has `module_path`, `origin` and `stack_trace` in its meta.

    Raises ModelError for a model in training mode or with weights that are not finite, TraceError
    where the root module itself cannot be traced, CalibrationError where `forward` takes another
    number of inputs.
    """
    check_kind(model)
    model = unwrap(model)
    check_mode(model)
    check_weights(model)
    root, reasons = prepare(model)
    name = type(model).__name__
    while True:
        tracer = Tracer(frozenset(reasons), inputs)
        try:
            graph = tracer.trace(root)
            break
        except (ModelError, CalibrationError):
            raise
        except Exception as error:
            diagnosis = diagnose(error)
            if not tracer.failed:
                raise TraceError(f"{name} cannot be traced: {diagnosis}") from error
            reasons[tracer.failed] = f"cannot be traced: {diagnosis.reason}"
    _check_dropout(graph)
    graph_module = fx.GraphModule(root, graph, class_name=name)
    graph_module.eval()
    _give_constants_their_own_names(graph_module)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    reasons = {path: why for path, why in reasons.items() if path in called}
    for path, why in reasons.items():
        module = graph_module.get_submodule(path)
        if not isinstance(module, FloatLeaf):
            # A subclass of a layer would be taken for the layer.
            set_module(graph_module, path, FloatLeaf(module, why).eval())
    return Traced(graph_module, reasons)


def _give_constants_their_own_names(graph_module: fx.GraphModule) -> None:
    """A tensor of a layer that is also read as a plain value gets a second name at the root.

    Passes replace layers, and with them the tensors at their names.
    """
    nodes = graph_module.graph.nodes
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    for node in nodes:
        owner, _, leaf = str(node.target).rpartition(".")
        if node.op != "get_attr" or owner not in called:
            continue
        tensor = getattr(graph_module.get_submodule(owner), leaf)
        name = f"{owner}_{leaf}".replace(".", "_")
        while hasattr(graph_module, name) and getattr(graph_module, name) is not tensor:
            name += "_"
        if not hasattr(graph_module, name):
            if isinstance(tensor, nn.Parameter):
                graph_module.register_parameter(name, tensor)
            else:
                graph_module.register_buffer(name, tensor)
        node.target = name
    graph_module.recompile()


def _check_dropout(graph: fx.Graph) -> None:
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or "dropout" not in name:
            continue
        if node.kwargs.get("training", node.args[2:3] != (False,)) is True:
            where = " ".join(str(node.meta.get("stack_trace", "")).split())
            raise ModelError(
                f"F.{name} drops at random even in eval mode: pass training=self.training ({where})"
            )
