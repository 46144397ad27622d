"""Every stage of a compile as files: text, JSON and Graphviz DOT."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from fxquant.errors import DataError
from passes.infra import listing

__all__ = ["dump_stage"]


def dump_stage(folder: Path, stage: str, graph_module: fx.GraphModule) -> None:
    """Write ``<stage>.txt``, ``.json`` and ``.dot`` into `folder`; raises DataError."""
    forms = {"txt": listing.to_text, "json": listing.to_json, "dot": listing.to_dot}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, form in forms.items():
            (folder / f"{stage}.{suffix}").write_text(form(graph_module))
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {error.strerror or error}") from error
