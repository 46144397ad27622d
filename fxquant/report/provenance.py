"""Where a compiled model comes from: the images that calibrated it, versions, the command."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from fxquant.data import Preprocessing
from fxquant.version import __version__

__all__ = ["Provenance", "versions"]


@dataclass(frozen=True)
class Provenance:
    """How many images calibrated a model, of what shape, and what was done to them before.

    `preprocessing` is None where the data were no images of a folder. `command` is what was typed.
    """

    images: int = 0
    input_shapes: tuple[tuple[int, ...], ...] = ()
    preprocessing: Preprocessing | None = None
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        """What `to_json` gave."""
        given = data["preprocessing"]
        if given is not None:
            pairs: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in given.items()
            }
            given = Preprocessing(**pairs)
        known = {each.name for each in fields(cls)}
        plain = {key: value for key, value in data.items() if key in known}
        shapes = tuple(tuple(shape) for shape in data["input_shapes"])
        return cls(**{**plain, "input_shapes": shapes, "preprocessing": given})

    def __str__(self) -> str:
        shapes = " and ".join("x".join(map(str, shape[1:])) for shape in self.input_shapes)
        prepared = f", {self.preprocessing}" if self.preprocessing else ""
        made = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"calibrated on {self.images} samples of {shapes or 'one value'}{prepared}", made]
        return "\n".join([*lines, self.command] if self.command else lines)


def versions() -> dict[str, str]:
    """Of what compiles here."""
    found = {"fxquant": __version__, "torch": str(torch.__version__)}
    return found | {"Python": platform.python_version()}
