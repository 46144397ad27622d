"""The canonical text of a graph, its JSON and DOT forms, and the diff of two texts."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from typing import Any

import torch
from torch import fx

from passes.infra.base import TensorInfo
from passes.infra.stored import module_of

__all__ = ["count_operations", "diff", "operation", "to_dot", "to_json", "to_text"]

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
    torch.quint8: "qu8",
    torch.qint8: "qi8",
}


def operation(node: fx.Node) -> str:
    """The name of what a node does: ``conv2d``, ``relu``, ``quantize``, ``.size``."""
    module = module_of(node)
    if module is not None:
        return str(getattr(module, "operation", None) or type(module).__name__.lower())
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            namespace, _, name = node.target._schema.name.partition("::")
            return name if namespace == "aten" else f"{namespace}.{name}"
        return str(getattr(node.target, "__name__", node.target))
    if node.op == "call_method":
        return f".{node.target}"
    return {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op)


def to_text(graph_module: fx.GraphModule) -> str:
    """One line a node: ``conv = conv2d(x)   f32[1,4,8,8]``; the last line returns."""
    rows: list[tuple[str, str]] = []
    for node in graph_module.graph.nodes:
        if node.op == "output":
            rows.append((f"return {_argument(node.args[0])}", ""))
            continue
        if node.op == "placeholder":
            right = "input"
        elif node.op == "get_attr":
            right = f"constant({node.target})"
        else:
            arguments = [_argument(argument) for argument in node.args]
            arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
            detail = ""
            if node.op == "call_module":
                detail = getattr(graph_module.get_submodule(str(node.target)), "detail", "")
            right = f"{operation(node)}({', '.join(arguments)}){f' {detail}' if detail else ''}"
        rows.append((f"{node.name} = {right}", _info(node.meta.get("tensor"))))
    width = min(100, max((len(left) for left, info in rows if info), default=0))
    return "\n".join(f"{left:<{width}}   {info}".rstrip() for left, info in rows) + "\n"


def to_json(graph_module: fx.GraphModule) -> str:
    """The graph as JSON for tools: a list of nodes with operation, arguments, shape, origin."""
    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "operation": operation(node),
            "target": str(node.target) if isinstance(node.target, str) else operation(node),
            "args": [_argument(argument) for argument in node.args],
            "kwargs": {key: _argument(value) for key, value in node.kwargs.items()},
            "tensor": _info(node.meta.get("tensor")),
            "module_path": node.meta.get("module_path", ""),
            "origin": list(node.meta.get("origin", ())),
        }
        for node in graph_module.graph.nodes
    ]
    return json.dumps({"nodes": nodes}, indent=1) + "\n"


def to_dot(graph_module: fx.GraphModule) -> str:
    """The graph in Graphviz' DOT language."""
    lines = ["digraph {", '  node [shape=box, fontname="monospace"];']
    for node in graph_module.graph.nodes:
        label = f"{node.name}\\n{operation(node)}\\n{_info(node.meta.get('tensor'))}"
        escaped = label.replace('"', '\\"')
        lines.append(f'  "{node.name}" [label="{escaped}"];')
        lines += [f'  "{source.name}" -> "{node.name}";' for source in node.all_input_nodes]
    return "\n".join([*lines, "}"]) + "\n"


def count_operations(graph_module: fx.GraphModule) -> Counter[str]:
    """How many nodes of each operation there are, inputs, constants and output left out."""
    skipped = ("placeholder", "output", "get_attr")
    return Counter(operation(node) for node in graph_module.graph.nodes if node.op not in skipped)


def diff(before: str, after: str, *, name: str = "", context: int = 1) -> str:
    """The unified diff of two listings; equal listings give ""."""
    lines = difflib.unified_diff(
        _unpadded(before),
        _unpadded(after),
        f"before {name}",
        f"after {name}",
        n=context,
        lineterm="",
    )
    return "\n".join(lines)


def _unpadded(text: str) -> list[str]:
    # Column widths depend on the longest line: a diff must not show that as a change.
    return [" ".join(line.split()) for line in text.splitlines()]


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple):
        inner = ", ".join(_argument(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(_argument(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_argument(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        parts = ("" if part is None else _argument(part) for part in (value.start, value.stop))
        step = "" if value.step is None else f":{_argument(value.step)}"
        return ":".join(parts) + step
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    if value is Ellipsis:
        return "..."
    return repr(value) if isinstance(value, (str, int, bool, type(None))) else str(value)


def _info(info: Any) -> str:
    if isinstance(info, TensorInfo):
        return f"{_DTYPES.get(info.dtype, str(info.dtype))}[{','.join(map(str, info.shape))}]"
    if isinstance(info, (tuple, list)) and info:
        return f"({', '.join(_info(item) for item in info)})"
    return ""
