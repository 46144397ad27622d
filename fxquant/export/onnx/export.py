"""Write a file, look at what it computes, and keep it only where that is what was promised."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxquant.errors import InputError, TargetError
from fxquant.export.onnx.floats import FLOATS, SINGLE_OPERATIONS
from fxquant.export.onnx.model import build_model
from fxquant.export.onnx.options import OnnxOptions
from fxquant.export.onnx.report import OnnxReport, checks_table, failures
from fxquant.export.onnx.shapes import Shape, Shapes, find_shapes
from fxquant.export.onnx.validate import has_openvino, validate
from passes.infra.listing import operation

__all__ = ["write_onnx"]

_SAMPLES = 2
_WIDE = (torch.int16, torch.int32, torch.int64)


def write_onnx(
    path: Path,
    integer: fx.GraphModule,
    example: Sequence[Any],
    options: OnnxOptions,
    metadata: Mapping[str, str],
) -> OnnxReport:
    """The file at `path`, which appears when every check has passed.

    Raises TargetError for operations that have no form in ONNX and where a check fails.
    """
    shapes = find_shapes(integer, example)
    if options.consumer == "openvino":
        _check_8_bits(integer, shapes)
    if options.exact:
        _check_float_islands(integer)
    model = build_model(integer, shapes, options, metadata=metadata)
    with _new_file(path) as temporary:
        ir.save(model, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)
        checks = validate(temporary, integer, shapes, options, _few(shapes, example))
        failed = failures(checks)
        if failed:
            raise TargetError(
                f"{path} is not kept, as it does not compute what was promised:\n"
                f"{checks_table(checks)}\n{failed}"
            )
        size = temporary.stat().st_size
    counted = Counter(node.op_type for node in model.graph)
    notes = [] if shapes.symbolic else ["the batch size is that of the example: it is fixed"]
    if options.consumer == "openvino" and not has_openvino():
        notes.append("OpenVINO is not installed here: nothing was compared in it")
    return OnnxReport(
        path, size, options.form, options.exact, dict(counted.most_common()), checks, tuple(notes)
    )


def _check_8_bits(integer: fx.GraphModule, shapes: Shapes) -> None:
    """Raise TargetError for integers that OpenVINO does not keep."""
    for node in integer.graph.nodes:
        found = shapes.values[node.name]
        ours = str(node.target).startswith("fxquant.")
        if ours and isinstance(found, Shape) and found.dtype in _WIDE:
            raise TargetError(
                f"OpenVINO drops quantizers of 16 bits and narrows int64, without a word, and "
                f"{node.name} is {found.dtype}: take a recipe of 8 bits with float multipliers"
            )


def _check_float_islands(integer: fx.GraphModule) -> None:
    """Raise InputError where integers depend on a float function, whose last bits are not fixed."""
    for node in integer.graph.nodes:
        if node.target is torch.ops.fxquant.quantize.default:
            inexact = _inexact_behind(node.all_input_nodes)
            if inexact is not None:
                raise InputError(
                    f"exact: {inexact.name} ({operation(inexact)}) is computed in float, with "
                    f"other last bits in every runtime, and {node.name} quantizes it: take a "
                    "recipe that computes it on integers, such as vit_w8a8_integer, or exact=False"
                )


def _inexact_behind(nodes: Sequence[fx.Node]) -> fx.Node | None:
    rest, seen = list(nodes), set(nodes)
    while rest:
        node = rest.pop()
        if node.target in FLOATS and node.target not in SINGLE_OPERATIONS:
            return node
        if not str(node.target).startswith("fxquant."):
            rest += [source for source in node.all_input_nodes if source not in seen]
            seen.update(node.all_input_nodes)
    return None


def _few(shapes: Shapes, example: Sequence[Tensor]) -> list[Tensor]:
    if not shapes.symbolic:
        return list(example)
    return [x[:_SAMPLES].contiguous() for x in example]


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to it where the block succeeds."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file, e.g. {path / 'm.onnx'}")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
