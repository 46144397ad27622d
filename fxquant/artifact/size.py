"""How long the file of a compiled model will be, before it is written."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.artifact.file import METADATA_KEY, contents, golden_inputs
from fxquant.artifact.graph_json import GraphFormatError, encode_graph
from fxquant.artifact.packing import tensor_bytes
from fxquant.recipe import Recipe
from fxquant.report.report import Report
from passes import TensorInfo
from passes.infra.verify import flatten

__all__ = ["file_bytes"]

_DIGEST = "0" * 64
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
    torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
"""How safetensors calls them, in the reverse of the order in which it writes tensors of each."""


def file_bytes(
    integer: fx.GraphModule, recipe: Recipe, report: Report, example: tuple[Any, ...]
) -> int:
    """The length of what `save_artifact` would write, which does not run the graph for it.

    Its nodes know what they give for `example`. Of a graph that no file can hold it is that of its
    tensors.
    """
    try:
        graph = encode_graph(integer)
    except GraphFormatError:
        return tensor_bytes(integer)
    outputs = [
        torch.empty(info.shape, dtype=info.dtype)
        for node in _given(integer.graph.output_node().args[0])
        if isinstance(info := node.meta.get("tensor"), TensorInfo)
    ]
    tensors, metadata = contents(graph, integer, golden_inputs(example), outputs, recipe, report)
    whole = json.dumps({**metadata, "digest": _DIGEST}, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: whole}}
    end = 0
    rank = {dtype: -place for place, dtype in enumerate(_NAMES)}
    for name in sorted(tensors, key=lambda name: (rank.get(tensors[name].dtype, 1), name)):
        value = tensors[name]
        header[name] = _entry(value, end)
        end += value.numel() * value.element_size()
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    # The file holds the report, and with it this number.
    length += len(str(_padded(length) + end)) - len(str(report.size_bytes))
    return _padded(length) + end


def _given(outputs: Any) -> list[fx.Node]:
    """The nodes of an output; those that a class is made of in its place."""
    found: list[fx.Node] = []
    for _, value in flatten(outputs):
        if not isinstance(value, fx.Node):
            continue
        makes = value.op == "call_function" and isinstance(value.target, type)
        found += _given((value.args, value.kwargs)) if makes else [value]
    return found


def _padded(header: int) -> int:
    """Eight bytes say how long the header is, which spaces fill up to a multiple of eight."""
    return 8 + (header + 7) // 8 * 8


def _entry(value: Tensor, start: int) -> dict[str, Any]:
    end = start + value.numel() * value.element_size()
    return {
        "dtype": _NAMES.get(value.dtype, "F8_E4M3"),
        "shape": list(value.shape),
        "data_offsets": [start, end],
    }
