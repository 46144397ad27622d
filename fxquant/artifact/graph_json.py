"""An integer graph as plain JSON, and back, with operations from a closed table only.

More than 300 lines, because what writes and what reads a value are held against each other.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
import operator
from collections import namedtuple
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import get_overridable_functions

from fxquant.artifact.float_modules import build_module, describe_module
from fxquant.frontend.detection import OPERATORS as DETECTION
from fxquant.frontend.prepare import FloatLeaf
from fxquant.frontend.structure import Names, Structure
from fxquant.kernels import OPERATORS
from fxquant.to_integer import Grid
from fxquant.to_integer.functional import pair
from passes import (
    add_relu,
    masked_softmax,
    scaled_matmul,
    softmax_numerators,
    weighted_mean,
)
from passes.canonical.functionalize import with_item
from passes.infra.stored import module_of, set_module

__all__ = ["GraphFormatError", "decode_graph", "encode_graph", "why_not_saved"]

_META = ("module_path", "simulated")
_NAMEDTUPLE, _DATACLASS = "namedtuple:", "dataclass:"
_OPERATORS = (
    "getitem", "add", "sub", "mul", "floordiv", "truediv", "neg", "mod", "pow",
    "eq", "ne", "lt", "le", "gt", "ge", "not_", "and_", "or_", "xor", "invert",
)  # fmt: skip
_MATH = ("ceil", "floor", "sqrt", "trunc")  # of sizes
# Functions that no tensor is handed to, or numbers alone.
_FACTORIES = (
    "arange", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros",
    "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not",
)  # fmt: skip
_NO_OPERATIONS = (
    "Optional", "assert_int_or_pair", "boolean_dispatch", "handle_torch_function",
    "has_torch_function", "has_torch_function_unary", "has_torch_function_variadic",
)  # fmt: skip
_METHODS_ALONE = frozenset({
    "bool", "byte", "char", "contiguous", "dim", "double", "expand", "expand_as", "float", "half",
    "int", "int_repr", "item", "long", "new_full", "new_ones", "new_zeros", "numel", "repeat",
    "reshape_as", "short", "size", "stride", "to", "type_as", "unfold", "view", "view_as",
})  # fmt: skip
_ATTRIBUTES = ("device", "dtype", "T", "mT", "H", "mH", "real", "imag")
"""Of tensors, which a graph may read by `getattr`."""
_TORCHVISION: Mapping[str, tuple[str, ...]] = {
    "models.swin_transformer": (
        "shifted_window_attention", "_get_relative_position_bias", "_patch_merging_pad",
    ),
    "models.video.swin_transformer": (
        "shifted_window_attention_3d", "_get_relative_position_bias", "_compute_pad_size_3d",
        "_compute_attention_mask_3d", "_get_window_and_shift_size",
    ),
    "models.video.mvit": ("_unsqueeze", "_squeeze"),
}  # fmt: skip
"""Functions that torchvision wraps, so that symbolic tracing stops at them."""
_ENUMS: dict[str, Any] = {
    name: getattr(torch, name)
    for name in ("channels_last", "contiguous_format", "preserve_format", "channels_last_3d")
}
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


class GraphFormatError(Exception):
    """A graph holds what the format cannot, or a file what no graph can be made of."""


# -- encoding ----------------------------------------------------------------------------


def encode_graph(graph_module: fx.GraphModule) -> dict[str, Any]:
    """The graph as JSON-able data; tensors are named, not included.

    Raises GraphFormatError for module calls and for functions outside the table.
    """
    nodes = []
    for node in graph_module.graph.nodes:
        entry: dict[str, Any] = {
            "name": node.name,
            "op": node.op,
            "target": _encode_target(node),
            "args": [_encode(argument) for argument in node.args],
            "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
        }
        meta = {key: node.meta[key] for key in _META if node.meta.get(key)}
        grid = node.meta.get("grid")
        if grid is not None:
            meta["grid"] = [
                grid.scale, grid.zero_point, grid.qmin, grid.qmax, _encode(grid.dtype)["dtype"],
            ]  # fmt: skip
        if node.op == "call_module":
            entry["module"] = _encode_module(node, graph_module)
        nodes.append(entry | ({"meta": meta} if meta else {}))
    names = graph_module.meta.get("names")
    if names is None:
        return {"nodes": nodes}
    return {"nodes": nodes, "inputs": {key: s.to_json() for key, s in names.structures.items()}}


def why_not_saved(graph_module: fx.GraphModule) -> str:
    """What of a float graph no file can hold, or ""; layers that plain functions replace can."""
    for node in graph_module.graph.nodes:
        try:
            if node.op == "call_function":
                _encode_target(node)
            elif isinstance(module_of(node), FloatLeaf):
                _encode_module(node, graph_module)
        except GraphFormatError as error:
            return str(error)
    return ""


def _encode_module(node: fx.Node, graph_module: fx.GraphModule) -> dict[str, Any]:
    module = graph_module.get_submodule(str(node.target))
    described = describe_module(module)
    if described is None:
        kind = type(module.module if isinstance(module, FloatLeaf) else module).__name__
        raise GraphFormatError(
            f"module {node.target!r} ({kind}) runs in float as code of its own, and a file holds "
            "no code: write its forward so that torch.fx can trace it"
        )
    arguments = {name: _encode(value) for name, value in described["arguments"].items()}
    return described | {"arguments": arguments}


def _decode_module(path: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    arguments = {_word(name): _decode(value, {}) for name, value in entry["arguments"].items()}
    below = {
        name.removeprefix(f"{path}."): value
        for name, value in tensors.items()
        if name.startswith(f"{path}.")
    }
    return build_module({**entry, "arguments": arguments}, below)


def _encode_target(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    name = _names().get(node.target) or _class_name(node.target)
    if node.target is getattr and node.args[1] not in _ATTRIBUTES:
        name = ""
    if not name:
        raise GraphFormatError(
            f"operation {getattr(node.target, '__name__', node.target)!r} of node {node.name!r} "
            "is not in the file's table of operations: functions of torch and torchvision are"
        )
    return name


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {str(key): _encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for name, member in _ENUMS.items():
        if value is member:
            return {"enum": name}
    raise GraphFormatError(f"an argument of type {type(value).__name__} cannot be saved")


def _class_name(target: Any) -> str:
    """A named tuple or dataclass that the model returns, by its fields; "" for anything else."""
    if not isinstance(target, type):
        return ""
    if issubclass(target, tuple) and hasattr(target, "_fields"):
        return _NAMEDTUPLE + ",".join([target.__name__, *target._fields])
    if dataclasses.is_dataclass(target):
        fields = [field.name for field in dataclasses.fields(target)]
        return _DATACLASS + ",".join([target.__name__, *fields])
    return ""


# -- decoding ----------------------------------------------------------------------------


def decode_graph(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The GraphModule of `encode_graph`'s data. Raises GraphFormatError."""
    root = nn.Module()
    for path, tensor in tensors.items():
        # torch.fx makes Python of graphs, where names stand in quotes: none may end them.
        if not path.isprintable() or '"' in path or "\\" in path or "" in path.split("."):
            raise GraphFormatError(f"{path!r} is no name of a tensor")
        *parents, leaf = path.split(".")
        owner = root
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            child = owner._modules[part]
            assert child is not None
            owner = child
        owner.register_buffer(leaf, tensor)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        if entry["op"] == "call_module":
            path = entry["target"]
            if "module" not in entry:
                raise GraphFormatError(f"module {path!r} is not described")
            _set_module(root, path, _decode_module(path, entry["module"], tensors))
        op, target = entry["op"], _decode_target(entry["op"], entry["target"], tensors)
        args = tuple(_decode(argument, nodes) for argument in entry["args"])
        kwargs = {_word(key): _decode(value, nodes) for key, value in entry["kwargs"].items()}
        if op == "output":
            graph.output(args[0])
            continue
        if target is getattr and args[1:] not in [(attribute,) for attribute in _ATTRIBUTES]:
            raise GraphFormatError(f"{args[1:]} is no attribute that a graph reads")
        node = graph.create_node(op, target, args, kwargs, name=entry["name"])
        meta = dict(entry.get("meta", {}))
        if "grid" in meta:
            scale, zero_point, qmin, qmax, dtype = meta.pop("grid")
            node.meta["grid"] = Grid(scale, zero_point, qmin, qmax, _dtype(dtype))
        node.meta.update(meta)
        nodes[entry["name"]] = node
    graph.lint()
    integer = fx.GraphModule(root, graph, "IntegerGraph")
    if "inputs" in data:
        integer.meta["names"] = Names(
            {_word(name): Structure.from_json(value) for name, value in data["inputs"].items()}
        )
    return integer


def _decode_target(op: str, target: str, tensors: Mapping[str, Tensor]) -> Any:
    if op in ("placeholder", "output"):
        return _word(target)
    if op == "get_attr":
        if target not in tensors:
            raise GraphFormatError(f"tensor {target!r} is missing")
        return target
    if op == "call_module":
        return target
    if op == "call_method":
        if target not in _methods():
            raise GraphFormatError(f"method {target!r} is not in the table of operations")
        return target
    if op == "call_function" and target.startswith(_NAMEDTUPLE):
        name, *fields = target.removeprefix(_NAMEDTUPLE).split(",")
        return namedtuple(_word(name), [_word(field) for field in fields])
    if op == "call_function" and target.startswith(_DATACLASS):
        name, *fields = target.removeprefix(_DATACLASS).split(",")
        return dataclasses.make_dataclass(_word(name), [_word(field) for field in fields])
    if op == "call_function":
        for function, name in _names().items():
            if name == target:
                return function
    raise GraphFormatError(f"{op} {target!r} is not in the table of operations")


def _set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    _word(path.replace(".", "_"))
    set_module(root, path, module)


def _word(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise GraphFormatError(f"{name!r} is no name of an argument")
    return name


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        if content not in nodes:
            raise GraphFormatError(f"node {content!r} is used before it is made")
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if kind == "dict":
        return {key: _decode(item, nodes) for key, item in content.items()}
    if kind == "slice":
        return slice(*(_decode(part, nodes) for part in content))
    simple: dict[str, Callable[[], Any]] = {
        "dtype": lambda: _dtype(content),
        "ellipsis": lambda: Ellipsis,
        "float": lambda: float(content),
        "enum": lambda: _ENUMS[content],
    }
    if kind not in simple:
        raise GraphFormatError(f"an argument of kind {kind!r} is not known")
    return simple[kind]()


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise GraphFormatError(f"dtype {name!r} is not known")
    return _DTYPES[name]


# -- the table ---------------------------------------------------------------------------


@cache
def _names() -> dict[Any, str]:
    """Every function that a file may name. All take tensors; none reads files or runs code."""
    names: dict[Any, str] = {}
    namespaces = ((torch, "torch"), (F, "functional"), (torch.fft, "torch.fft"))
    for namespace, prefix in namespaces:
        for function in get_overridable_functions().get(namespace, ()):
            name = getattr(function, "__name__", "")
            short = name.removeprefix("fft_") if namespace is torch.fft else name
            if getattr(namespace, short, None) is function:
                names.setdefault(function, f"{prefix}.{name}")
    for name in dir(torch.linalg):
        function = getattr(torch.linalg, name)
        if isinstance(function, type(torch.linalg.vector_norm)) and not name.startswith("_"):
            names.setdefault(function, f"linalg.{name}")
    for name in dir(F):
        function = getattr(F, name)
        is_function = callable(function) and not isinstance(function, type)
        if is_function and not name.startswith("_") and name not in _NO_OPERATIONS:
            names.setdefault(function, f"functional.{name}")
    for name in _FACTORIES:
        names[getattr(torch, name)] = f"torch.{name}"
    for name in _OPERATORS:
        names[getattr(operator, name)] = f"operator.{name}"
    for name in _MATH:
        names[getattr(math, name)] = f"math.{name}"
    for op in OPERATORS:
        names[getattr(torch.ops.fxquant, op.name).default] = f"fxquant.{op.name}"
    for name, operator_of_detectors in DETECTION.items():
        names[operator_of_detectors] = f"detection.{name}"
    names[add_relu] = "fxquant.add_relu_float"
    names[masked_softmax] = "fxquant.masked_softmax_float"
    names[scaled_matmul] = "fxquant.scaled_matmul_float"
    names[softmax_numerators] = "fxquant.softmax_numerators_float"
    names[weighted_mean] = "fxquant.weighted_mean_float"
    names[with_item] = "fxquant.with_item_float"
    names[pair] = "fxquant.pair"
    names[getattr] = "builtins.getattr"
    # torchvision takes longer to import than all of fxquant; its import registers its operators.
    for module, functions in _TORCHVISION.items():
        short = module.removeprefix("models.").replace("swin_transformer", "swin")
        for name in functions:
            found = getattr(import_module(f"torchvision.{module}"), name)
            names[found] = f"torchvision.{short}.{name}"
    for name in ("nms", "roi_align", "deform_conv2d"):
        names[getattr(torch.ops.torchvision, name).default] = f"torchvision.{name}"
    return names


@cache
def _methods() -> frozenset[str]:
    """Tensor methods that torch has as functions too, and a few more; none takes a callable."""
    functions = get_overridable_functions().get(torch.Tensor, ())
    names = {getattr(function, "__name__", "") for function in functions} | {"unflatten"}
    known = {
        name
        for name in names
        if name and not name.startswith("_") and hasattr(torch, name.removesuffix("_"))
    }
    return frozenset(known) | _METHODS_ALONE
