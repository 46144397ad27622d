"""Dotted paths of modules: what lies in what, and what several have in common."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ancestors", "common_path", "is_below", "path_depth"]


def common_path(paths: Sequence[str]) -> str:
    """The module that all paths lie in."""
    parts = [path.split(".") for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def ancestors(path: str) -> list[str]:
    """The path itself and those of the modules around it, the root left out."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def is_below(path: str, module: str) -> bool:
    """Whether the module at `path` lies inside of `module`."""
    return path.startswith(f"{module}.")


def path_depth(path: str) -> int:
    """How many names a path consists of."""
    return path.count(".") + 1 if path else 0
