"""Which modules a line of a recipe speaks of."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from fxquant.errors import RecipeError, nearest

SelectorKind = Literal["modules", "regex", "type", "position"]
SELECTOR_KINDS: tuple[SelectorKind, ...] = ("modules", "regex", "type", "position")


@dataclass(frozen=True)
class Selector:
    """One way to name modules.

    Attributes:
        kind: ``modules``: a glob on the module path, which also takes in everything below a
            module that it names (``layer1`` holds ``layer1.0.conv1``; ``*`` crosses dots).
            ``regex``: a regular expression for the whole path. ``type``: the class name, as
            ``Conv2d``; it may be a glob. ``position``: ``first`` or ``last`` of the layers that
            have weights.
        pattern: the text to match.

    Raises:
        RecipeError: the kind is unknown, the pattern is empty or no regular expression.
    """

    kind: SelectorKind
    pattern: str

    def __post_init__(self) -> None:
        if self.kind not in SELECTOR_KINDS:
            raise RecipeError(f"unknown selector {self.kind!r}{nearest(self.kind, SELECTOR_KINDS)}")
        if not isinstance(self.pattern, str) or not self.pattern:
            raise RecipeError(f"selector {self.kind} must be a text, got {self.pattern!r}")
        if self.kind == "position" and self.pattern not in ("first", "last"):
            raise RecipeError(f"position must be 'first' or 'last', got {self.pattern!r}")
        if self.kind == "regex":
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise RecipeError(
                    f"regex {self.pattern!r} is no regular expression: {error}"
                ) from error

    @classmethod
    def parse(cls, text: str) -> Selector:
        """A selector in one word: ``layer1.*``, ``regex:.*conv[12]``, ``type:Linear``.

        Raises:
            RecipeError: the text is none of these, or ``position:`` is neither first nor last.
        """
        for kind in SELECTOR_KINDS:
            if text.startswith(f"{kind}:"):
                return cls(kind, text.removeprefix(f"{kind}:"))
        return cls("modules", text)

    def __str__(self) -> str:
        return self.pattern if self.kind == "modules" else f"{self.kind}:{self.pattern}"

    def matches(self, path: str, type_name: str = "", position: str | Collection[str] = "") -> bool:
        """Whether the selector speaks of a module.

        Args:
            path: the module's path, ``""`` for the root.
            type_name: its class name.
            position: ``"first"``, ``"last"``, both in a collection, or ``""``.
        """
        if self.kind == "type":
            return bool(type_name) and fnmatchcase(type_name, self.pattern)
        if self.kind == "regex":
            return re.fullmatch(self.pattern, path) is not None
        if self.kind == "position":
            return self.pattern in ((position,) if isinstance(position, str) else position)
        return any(fnmatchcase(name, self.pattern) for name in _with_parents(path))

    def check(self, where: str, names: Sequence[str], types: Mapping[str, str]) -> None:
        """Refuse a selector that speaks of nothing.

        Args:
            where: the recipe's key, for the message.
            names: the paths of all modules.
            types: the class names of those that have one, by path.

        Raises:
            RecipeError: no module matches; says the nearest names.
        """
        if self.kind == "position":
            matched = bool(names)
        else:
            paths = {*names, *types}
            matched = any(self.matches(path, types.get(path, "")) for path in paths)
        if matched:
            return
        if self.kind == "type":
            known = sorted(set(types.values()))
        else:
            known = sorted({parent for name in names for parent in _with_parents(name)} - {""})
        hint = nearest(self.pattern, known)
        if not hint:
            shown = ", ".join(known[:6]) + (", …" if len(known) > 6 else "")
            hint = f"; there are {shown}" if known else "; the model has no modules"
        raise RecipeError(f"{where}: {str(self)!r} matches no module{hint}")


def _with_parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
