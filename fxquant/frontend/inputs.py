"""The parameters of a model's `forward`: which of them become inputs of the graph."""

from __future__ import annotations

import inspect

from torch import nn

from fxquant.errors import CalibrationError
from fxquant.frontend.prepare import LayerRoot, unwrap

__all__ = ["count_inputs", "fed", "parameters"]


def count_inputs(model: nn.Module) -> tuple[int, int | None]:
    """How many positional inputs the model's `forward` needs, and how many it takes at most.

    None for the second where `forward` takes ``*args``.
    """
    found = parameters(unwrap(model))
    positional = [
        parameter
        for parameter in found
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    needed = sum(parameter.default is parameter.empty for parameter in positional)
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in found):
        return needed, None
    return needed, len(positional)


def fed(
    parameters: list[inspect.Parameter], inputs: int | None, name: str
) -> list[tuple[str, inspect.Parameter]]:
    """The names of the graph's inputs, each with the parameter of `forward` that it feeds."""
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = [p for p in parameters if p.kind is p.VAR_POSITIONAL]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    needed = sum(p.default is p.empty for p in plain)
    if inputs is None:
        inputs = needed or min(1, len(plain) + len(rest))
    else:
        inputs -= len(keywords)
    if inputs < needed or (inputs > len(plain) and not rest):
        takes = f"at least {needed}" if rest else f"{needed} to {len(plain)}"
        takes = str(needed) if needed == len(plain) and not rest else takes
        raise CalibrationError(f"forward of {name} takes {takes} inputs, {inputs} are fed")
    chosen = [(p.name, p) for p in plain[:inputs]]
    chosen += [(f"{rest[0].name}_{i}", rest[0]) for i in range(inputs - len(plain))]
    return chosen + [(p.name, p) for p in keywords]


def parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Of `forward`, or of the layer that is the whole model."""
    if isinstance(model, LayerRoot):
        model = model.layer
    return list(inspect.signature(model.forward).parameters.values())
