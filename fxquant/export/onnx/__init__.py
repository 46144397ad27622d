"""A compiled model as an ONNX file. What needs the extra ``[onnx]`` is imported when it is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from fxquant.errors import TargetError
from fxquant.export.onnx.options import OnnxOptions

if TYPE_CHECKING:
    from fxquant.export.onnx.report import OnnxReport

__all__ = ["OnnxOptions", "export_onnx", "require_onnx"]

_PACKAGES = ("onnx", "onnx_ir", "onnxruntime")


def require_onnx(packages: Sequence[str] = _PACKAGES) -> None:
    """Raise TargetError where a package of the extra ``[onnx]`` is missing."""
    missing = [name for name in packages if not _installed(name)]
    if missing:
        raise TargetError(
            f"ONNX needs {', '.join(missing)}, which is not installed: pip install 'fxquant[onnx]'"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        return False


def export_onnx(
    path: Path,
    *,
    integer: fx.GraphModule,
    example: Sequence[Any],
    options: OnnxOptions,
    metadata: Mapping[str, str],
) -> OnnxReport:
    """Write what `CompiledModel.export_onnx` says, and return what was checked."""
    require_onnx()
    from fxquant.export.onnx.export import write_onnx

    return write_onnx(path, integer, example, options, metadata)
