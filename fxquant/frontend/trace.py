"""The front end: a model in eval mode becomes a float graph, and what cannot stays a leaf."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from fxquant.errors import CalibrationError, ModelError, TraceError
from fxquant.frontend.doctor import diagnose, guarded_outcome, user_line
from fxquant.frontend.prepare import (
    LayerRoot,
    check_mode,
    check_weights,
    drops_or_learns,
    is_leaf,
    prepare,
    unwrap,
)

__all__ = ["Traced", "count_inputs", "trace"]


@dataclass(frozen=True)
class Traced:
    """A float graph, and for every submodule that stays a leaf because it has to, the reason.

    The keys of `leaf_reasons` are module paths in `graph_module`.
    """

    graph_module: fx.GraphModule
    leaf_reasons: Mapping[str, str]


def count_inputs(model: nn.Module) -> tuple[int, int | None]:
    """How many positional inputs the model's `forward` needs, and how many it takes at most.

    None for the second where `forward` takes ``*args``.
    """
    parameters = _parameters(unwrap(model))
    positional = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    needed = sum(parameter.default is parameter.empty for parameter in positional)
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return needed, None
    return needed, len(positional)


def trace(model: nn.Module, inputs: int | None = None) -> Traced:
    """Trace `model`, which is left as it is: modules are copied, tensors are shared.

    Modules of `torch.nn` are leaves; containers are traced through. The first `inputs`
    parameters of `forward` become inputs of the graph (None: those without a default); the
    others keep their defaults. A submodule that cannot be traced becomes a leaf, with the reason
    in `leaf_reasons`. Every node has `module_path`, `origin` and `stack_trace` in its meta.

    Raises ModelError for a model in training mode or with weights that are not finite, TraceError
    where the root module itself cannot be traced, CalibrationError where `forward` takes another
    number of inputs.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is an nn.Module, found {type(model).__name__}")
    model = unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("the model is a TorchScript module: hand in the nn.Module it came from")
    check_mode(model)
    check_weights(model)
    root, reasons = prepare(model)
    name = type(model).__name__
    while True:
        tracer = _Tracer(frozenset(reasons), inputs)
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
    return Traced(graph_module, {path: why for path, why in reasons.items() if path in called})


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


class _Proxy(fx.Proxy):
    """Records writes in place as such: torch.fx takes ``x += y`` for ``x = x + y``."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        length = _known_length(self.node)
        if length is None:
            # A TypeError lets `list` and `*` go on to iterate.
            raise TypeError("'len' of a value that is known only when the model runs")
        return length

    def _write(self, target: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._write(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._write(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._write(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._write(operator.itruediv, other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._write(operator.ifloordiv, other)


class _Tracer(fx.Tracer):
    """Leaves at `torch.nn` and at `leaves`; remembers in which submodule tracing failed."""

    # A buffer that is sliced by a size, as a causal mask is, must be a value of the graph.
    proxy_buffer_attributes = True

    def __init__(self, leaves: frozenset[str], inputs: int | None) -> None:
        super().__init__()
        self.leaves = leaves
        self.inputs = inputs
        self.failed = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or is_leaf(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            path = self.path_of_module(m)
        except NameError:
            path = self._install(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            # A leaf fails on what it is handed, which is its caller's doing.
            if not self.failed and not self.is_leaf_module(m, path):
                self.failed = path
            raise

    def _install(self, module: nn.Module) -> str:
        # Made inside forward, or kept in a plain list: `model.eval()` did not reach it.
        for part in module.modules():
            if drops_or_learns(part):
                raise ModelError(
                    f"a {type(part).__name__} that is no registered submodule is in training "
                    "mode: make it in __init__ and assign it to self"
                )
        number = sum(name.startswith("made_in_forward") for name in self.root._modules)
        path = f"made_in_forward_{number}"
        self.root.add_module(path, module)
        paths = cast(dict[nn.Module, str], self.submodule_paths)
        for name, submodule in module.named_modules(prefix=path):
            paths.setdefault(submodule, name)
        return path

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta.pop("nn_module_stack", None)
        stack = list(self.module_stack.values())
        node.meta["module_path"] = stack[-1][0] if stack else ""
        node.meta["origin"] = (node.name,)
        line = user_line(sys._getframe(1))
        if line:
            node.meta["stack_trace"] = line
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        bool_frame = sys._getframe(1)  # Proxy.__bool__, which the user's code called
        outcome = guarded_outcome(bool_frame.f_back)
        return super().to_bool(obj) if outcome is None else outcome

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        length = _known_length(obj.node)
        if length is None:
            return super().iter(obj)
        items: Any = obj
        return iter([items[index] for index in range(length)])

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: Any = None,
    ) -> tuple[Any, list[Any]]:
        parameters = _parameters(self.root)
        fed = _fed(parameters, self.inputs, type(self.root).__name__)
        positional: list[Any] = [self.root]
        named: dict[str, Any] = {}
        for name, parameter in fed:
            proxy = self.create_proxy("placeholder", name, (), {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[name] = proxy
            else:
                positional.append(proxy)

        def call(*args: Any) -> Any:
            return root_fn(*args, **named)

        return call, positional


def _fed(
    parameters: list[inspect.Parameter], inputs: int | None, name: str
) -> list[tuple[str, inspect.Parameter]]:
    """The names of the graph's inputs, each with the parameter of `forward` that it feeds."""
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = [p for p in parameters if p.kind is p.VAR_POSITIONAL]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    needed = sum(p.default is p.empty for p in plain)
    if inputs is None:
        inputs = needed or min(1, len(plain) + len(rest))
    else:
        inputs -= len(keywords)
    if inputs < needed or (inputs > len(plain) and not rest):
        takes = f"at least {needed}" if rest else f"{needed} to {len(plain)}"
        takes = str(needed) if needed == len(plain) and not rest else takes
        raise CalibrationError(f"forward of {name} takes {takes} inputs, {inputs} are fed")
    fed = [(p.name, p) for p in plain[:inputs]]
    fed += [(f"{rest[0].name}_{i}", rest[0]) for i in range(inputs - len(plain))]
    return fed + [(p.name, p) for p in keywords]


def _known_length(node: fx.Node) -> int | None:
    """How many items iterating over the value of `node` gives, where the graph alone says it."""
    if node.target in (torch.chunk, "chunk"):
        chunks = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
        return chunks if isinstance(chunks, int) else None
    if node.target in (torch.split, "split"):
        sizes = node.args[1] if len(node.args) > 1 else None
        return len(sizes) if isinstance(sizes, (tuple, list)) else None
    if node.target is operator.getitem and isinstance(node.args[1], slice):
        source, part = node.args[0], node.args[1]
        is_shape = isinstance(source, fx.Node) and (
            source.target == "size" or (source.target is getattr and source.args[1:] == ("shape",))
        )
        if not is_shape or part.step is not None:
            return None
        start, stop = part.start or 0, part.stop
        if isinstance(stop, int) and stop >= start >= 0:
            return stop - start
        if start < 0 and stop is None:
            return -int(start)
    return None


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    if isinstance(model, LayerRoot):
        model = model.layer
    return list(inspect.signature(model.forward).parameters.values())


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
