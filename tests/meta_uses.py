"""Which keys of `meta` the code of a package uses, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def meta_uses(package: str) -> dict[str, list[str]]:
    """For each key that a module of `package` names, where: ``path:line``.

    Subscripts, `in`, and the methods of dicts; a name stands for the constant of its module.
    """
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        constants = _constants(tree)
        for node in ast.walk(tree):
            for key in _keys(node):
                name = constants.get(key.id) if isinstance(key, ast.Name) else _text(key)
                if name is not None:
                    where = f"{path.relative_to(ROOT)}:{key.lineno}"
                    found.setdefault(name, []).append(where)
    return found


def _constants(tree: ast.Module) -> dict[str, str]:
    return {
        target.id: value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and (value := _text(statement.value)) is not None
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _keys(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Subscript) and _is_meta(node.value):
        yield node.slice
    elif isinstance(node, ast.Compare) and _is_meta(node.comparators[-1]):
        yield node.left
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("get", "pop", "setdefault")
        and _is_meta(node.func.value)
    ):
        yield node.args[0]


def _is_meta(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "meta"


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
