"""The second front end: the graph of aten operators that `torch.export` makes of a model.

It is rewritten into calls of torch's functions, with the model's module paths, parameter names
and source lines, so that the passes make of it what they make of a symbolic trace.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from fxquant.errors import TraceError
from fxquant.frontend.detection import whole_operators
from fxquant.frontend.doctor import innermost_user_line
from fxquant.frontend.inputs import arguments
from fxquant.frontend.prepare import FloatLeaf, prepare
from fxquant.frontend.recurrent import recurrent_module
from passes.canonical.aten import AtenCall, spell_aten
from passes.infra.stored import get_tensor, set_module

_Dims = Callable[[Tensor], Mapping[int, Any] | None]

__all__ = ["export", "from_graph_module", "from_program"]


def export(
    model: nn.Module, names: Sequence[str], values: Sequence[Any]
) -> tuple[fx.GraphModule, str]:
    """The graph of `model`, fed with `values` by the parameters `names`, and what holds of it.

    The first dimension of every input is free, where the model allows that; what is returned
    beside the graph says otherwise. A batch of one is doubled for tracing, because torch.export
    takes a size of 1 for a constant.

    Raises TraceError with torch.export's own reason.
    """
    root, reasons = prepare(model)
    for path in reasons:
        leaf = root.get_submodule(path)
        if isinstance(leaf, FloatLeaf):
            set_module(root, path, leaf.module)  # torch.export runs it as Python would
    if all(isinstance(value, Tensor) and value.dim() and len(value) == 1 for value in values):
        doubled = [torch.cat([value, value]) for value in values]
    else:
        doubled = list(values)
    free = torch.export.Dim.AUTO
    attempts: tuple[tuple[Sequence[Any], _Dims | None], ...] = (
        (doubled, lambda value: {0: free} if value.dim() else None),
        (values, None),
    )
    problem = ""
    for fed, dims in attempts:
        positional, named = arguments(model, names, fed)
        dynamic = None if dims is None else _dynamic(positional, named, dims)
        try:
            with _quiet(), whole_operators():
                program = torch.export.export(
                    root, tuple(positional), named, dynamic_shapes=dynamic, strict=False
                )
        except Exception as error:
            problem = f"torch.export fails: {_first_sentence(error)}"
            continue
        fixed = _fixed(program)
        if not fixed or dims is None:
            return from_program(program, names, type(model).__name__), fixed
    raise TraceError(problem)


def _dynamic(positional: Sequence[Any], named: Mapping[str, Any], dims: _Dims) -> Any:
    def of(leaf: Any) -> Any:
        return dims(leaf) if isinstance(leaf, Tensor) else None

    return tuple(pytree.tree_map(of, value) for value in (*positional, *named.values()))


def from_program(
    program: torch.export.ExportedProgram, names: Sequence[str] | None = None, name: str = "Model"
) -> fx.GraphModule:
    """The GraphModule of an exported program: torch's functions on the program's tensors.

    The inputs are those of the program in their order, called as its placeholders are, or by
    `names`, of which there is one for each.
    """
    signature = program.graph_signature
    stored = {
        spec.arg.name: spec.target
        for spec in signature.input_specs
        if isinstance(spec.arg, TensorArgument) and spec.target is not None
    }
    tensors = {**program.state_dict, **program.constants}
    kinds = [spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs]
    tensors |= _graphs_within(program.graph_module)
    builder = _Builder(tensors, stored, kinds, program.call_spec.out_spec)
    return builder.build(program.graph, names, name)


def from_graph_module(exported: fx.GraphModule) -> fx.GraphModule:
    """The same of a GraphModule of aten operators, as ``ExportedProgram.module()`` gives it."""
    info = getattr(exported.graph._codegen, "pytree_info", None)
    tensors = dict(exported.named_parameters()) | dict(exported.named_buffers())
    tensors |= _graphs_within(exported)
    for node in exported.graph.nodes:
        if node.op == "get_attr" and node.target not in tensors:
            tensors[node.target] = get_tensor(exported, node.target)
    builder = _Builder(tensors, {}, None, info.out_spec if info is not None else None)
    return builder.build(exported.graph, None, type(exported).__name__)


def _graphs_within(graph_module: fx.GraphModule) -> dict[str, Any]:
    return {name: m for name, m in graph_module.named_children() if isinstance(m, fx.GraphModule)}


class _Builder:
    """One pass over a graph of aten operators, which gives the nodes of the float graph.

    `tensors` are what the graph reads, by their paths; `stored` the paths of those that come as
    placeholders; `kinds` which of the outputs are the model's; `spec` their structure.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        stored: Mapping[str, str],
        kinds: Sequence[bool] | None,
        spec: pytree.TreeSpec | None,
    ) -> None:
        self.tensors, self.stored, self.kinds, self.spec = tensors, stored, kinds, spec
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}

    def build(self, graph: fx.Graph, names: Sequence[str] | None, name: str) -> fx.GraphModule:
        free = iter(names or ())
        for node in graph.nodes:
            if node.op == "placeholder" and node.name not in self.stored:
                new = self.graph.placeholder(next(free, node.name))
                self.values[node] = self._note(node, new)
        self._go_through(graph)
        for node in graph.nodes:
            if node.op == "output":
                self.graph.output(self._outputs(node))
        return fx.GraphModule(self.root, self.graph, class_name=name).eval()

    def _go_through(self, graph: fx.Graph) -> None:
        """Make the nodes of `graph`, whose inputs have their values."""
        for node in graph.nodes:
            if node in self.values or node.op == "output":
                continue
            if node.op in ("placeholder", "get_attr") and not node.users:
                continue
            if node.op in ("placeholder", "get_attr"):
                self.values[node] = self._read(node, self.stored.get(node.name, str(node.target)))
            elif node.op != "call_module":  # torch.export's checks of its own guards
                self.values[node] = self._call(node)

    def _read(self, node: fx.Node, path: str) -> Any:
        value = self.tensors[path]
        if isinstance(value, fx.GraphModule):
            return value  # what `_in_a_context` runs
        parent, _, leaf = path.rpartition(".")
        if parent and parent not in dict(self.root.named_modules()):
            set_module(self.root, parent, nn.Module())
        owner = self.root.get_submodule(parent)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)
        return self._note(node, self.graph.get_attr(path))

    def _call(self, node: fx.Node) -> Any:
        args = pytree.tree_map(self._value, node.args)
        kwargs = pytree.tree_map(self._value, dict(node.kwargs))
        if node.target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]] if node.users else None
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._in_a_context(node, args)
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._note(
                node, self.graph.create_node("call_function", node.target, args, kwargs)
            )
        recurrent = recurrent_module(node, args, self.root)
        if recurrent is not None:
            module, operands = recurrent
            path = _module_path(node)
            set_module(self.root, path, module)
            called = self._note(node, self.graph.call_module(path, operands))
            return self._recurrent_outputs(node, called, module)
        found = spell_aten(node, args, kwargs)
        if not isinstance(found, AtenCall):
            return found
        op = "call_method" if isinstance(found.target, str) else "call_function"
        new = self.graph.create_node(op, found.target, found.args, dict(found.kwargs))
        self._note(node, new)
        return (new,) if found.first else new

    def _in_a_context(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """What stands under ``torch.no_grad()``, or an autocast that is off, has no such bracket.

        Raises TraceError for any other operator that takes a graph.
        """
        name = node.target.name()  # type: ignore[union-attr]
        at = next((i for i, a in enumerate(args) if isinstance(a, fx.GraphModule)), None)
        casts = name == "wrap_with_autocast" and args[2]
        if name not in ("wrap_with_autocast", "wrap_with_set_grad_enabled") or casts or at is None:
            raise TraceError(f"the graph holds {name}, which has no form without its bracket")
        inner = args[at].graph
        free = iter(args[at + 1 :])
        for each in inner.find_nodes(op="placeholder"):
            self.values[each] = next(free)
        self._go_through(inner)
        found = pytree.tree_map(self._value, inner.output_node().args[0])
        return tuple(found) if isinstance(found, (list, tuple)) else found

    def _recurrent_outputs(self, node: fx.Node, called: fx.Node, module: nn.Module) -> Any:
        def item(source: fx.Node, index: int) -> fx.Node:
            new = self.graph.call_function(operator.getitem, (source, index))
            return self._note(node, new)

        states = item(called, 1)
        if isinstance(module, nn.LSTM):
            return item(called, 0), item(states, 0), item(states, 1)
        return item(called, 0), states

    def _value(self, item: Any) -> Any:
        return self.values[item] if isinstance(item, fx.Node) else item

    def _outputs(self, node: fx.Node) -> Any:
        items: Any = node.args[0]
        if self.spec is None:
            return pytree.tree_map(self._value, items)
        kinds = self.kinds or [True] * len(items)
        outputs = [self._value(item) for item, kind in zip(items, kinds, strict=True) if kind]
        return pytree.tree_unflatten(outputs, self.spec)

    def _note(self, node: fx.Node, new: fx.Node) -> fx.Node:
        new.meta["module_path"] = _module_path(node)
        new.meta["origin"] = (new.name,)
        line = innermost_user_line(str(node.meta.get("stack_trace") or ""))
        if line:
            new.meta["stack_trace"] = line
        return new


def _module_path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # What torch.export inserts by itself names its own function there.
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path.partition("@")[0]


def _fixed(program: torch.export.ExportedProgram) -> str:
    """Which batch size the graph is for, where it is for one only."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, Tensor):
            # A size that the model's code depends on is a symbol with a value.
            if value.dim() and str(value.shape[0]).isdigit():
                shape = [int(size) for size in value.shape]
                return f"its graph is for inputs of exactly the shape {shape}"
            return ""
    return ""


def _first_sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if not line.startswith("(")), type(error).__name__)
    return text[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the graphs that torch.export logs on failure, and without fused attention.

    The fast path of `nn.TransformerEncoderLayer` is one operator, of which nothing is known.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        torch.backends.mha.set_fastpath_enabled(fast)
