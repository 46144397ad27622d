"""How weights may be rounded: the methods that a recipe can name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["METHODS", "RoundingMethod", "learned_methods"]


@dataclass(frozen=True)
class RoundingMethod:
    """A method by what a recipe needs to know of it.

    Attributes:
        meaning: a phrase for lists.
        learner: for a rounding that is learned by gradient descent, where
            `fxquant.reconstruct` finds the object that says how, as ``module:name``.
    """

    meaning: str
    learner: str = ""


METHODS: dict[str, RoundingMethod] = {
    "gptq": RoundingMethod("closed form: the Hessian of a layer's inputs, column by column"),
    "adaround": RoundingMethod(
        "learned: the output of each layer", "fxquant.reconstruct.methods.adaround:AdaRound"
    ),
    "brecq": RoundingMethod(
        "learned: the output of each block; then the activations' step sizes",
        "fxquant.reconstruct.methods.brecq:Brecq",
    ),
    "qdrop": RoundingMethod(
        "learned: as brecq, while activation quantization is dropped at random",
        "fxquant.reconstruct.methods.qdrop:QDrop",
    ),
    "pdquant": RoundingMethod(
        "learned: as qdrop, and the network's prediction",
        "fxquant.reconstruct.methods.pdquant:PDQuant",
    ),
}
"""What may stand at the end of a recipe's name; without one, weights are rounded to nearest."""


def learned_methods() -> tuple[str, ...]:
    """The names of the methods that learn a rounding."""
    return tuple(name for name, method in METHODS.items() if method.learner)
