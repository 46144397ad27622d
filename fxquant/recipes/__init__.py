"""The named recipes: one small TOML file each, opened by `Recipe.named`."""

from __future__ import annotations

from importlib import resources

from fxquant.recipe import Recipe

__all__ = ["describe", "names"]


def names() -> tuple[str, ...]:
    """The names of all recipes in this folder, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name[:-5] for file in files if file.name.endswith(".toml")))


def describe() -> dict[str, str]:
    """Every name with the sentence that its file opens with."""
    return {name: _first_sentence(name) for name in names()}


def _first_sentence(name: str) -> str:
    text = (resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    Recipe.named(name)  # a list must not offer what cannot be opened
    return " ".join(comment).split(". ")[0].rstrip(".")
