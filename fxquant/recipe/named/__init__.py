"""The named recipes: one small TOML file each, opened by `Recipe.named`."""

from __future__ import annotations

from importlib import resources

from fxquant.recipe.recipe import GRAMMAR, METHODS, Recipe

__all__ = ["describe", "grammar", "names"]

_ROUNDINGS = {
    "gptq": "closed form: the Hessian of a layer's inputs, column by column",
    "adaround": "learned: the output of each layer",
    "brecq": "learned: the output of each block; then the activations' step sizes",
    "qdrop": "learned: as brecq, while activation quantization is dropped at random",
    "pdquant": "learned: as qdrop, and the network's prediction",
}


def names() -> tuple[str, ...]:
    """The names of all recipes in this folder, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name[:-5] for file in files if file.name.endswith(".toml")))


def describe() -> dict[str, str]:
    """Every name with the sentence that its file opens with."""
    return {name: _first_sentence(name) for name in names()}


def grammar() -> str:
    """How the names of further recipes are made, as text of a few lines."""
    width = max(map(len, METHODS))
    return "\n".join(
        [
            "Others follow from their names:",
            f"  {GRAMMAR}[_METHOD]    as in w2a4_head_stem8_qdrop",
            "  NAME_METHOD, with a NAME from above    as in vit_w4a8_integer_gptq",
            "METHOD is how weights are rounded; without one, to nearest:",
            *(f"  {method:{width}}  {_ROUNDINGS[method]}" for method in METHODS),
        ]
    )


def _first_sentence(name: str) -> str:
    text = (resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    Recipe.named(name)  # a list must not offer what cannot be opened
    return " ".join(comment).split(". ")[0].rstrip(".")
