"""The parameters of a model's `forward`: which of them become inputs of the graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from fxquant.errors import CalibrationError, nearest
from fxquant.frontend.prepare import LayerRoot, unwrap
from fxquant.frontend.structure import Names

__all__ = ["arguments", "bind", "bind_by", "fed", "inputs_needed", "parameters"]

_Parameters = list[inspect.Parameter]


def bind(model: nn.Module, item: Any, where: str) -> dict[str, Any]:
    """What one batch of data feeds to `forward`: its parameters' names, each with its value.

    `item` is a value, a tuple or list of values, or a dict by the names of the parameters. Values
    behind the last that `forward` takes are labels. `where` names the batch in errors.

    Raises CalibrationError for too few values, for a key that `forward` does not know, and where
    a value may as well be a label as an optional input.
    """
    known = parameters(unwrap(model))
    if isinstance(item, Mapping):
        return _by_name(known, item, where)
    values = list(item) if isinstance(item, (tuple, list)) else [item]
    plain, rest, keywords = _kinds(known)
    needed = [p.name for p in (*plain, *keywords) if p.default is p.empty]
    optional = [p.name for p in plain if p.default is not p.empty]
    if not needed and not rest:
        needed, optional = optional[:1], optional[1:]
    if len(values) < len(needed):
        raise CalibrationError(f"{where} holds {len(values)} values, the model takes {len(needed)}")
    # A value that is no tensor is a label.
    tensors = sum(1 for _ in takewhile(lambda value: isinstance(value, Tensor), values))
    if rest:
        names = [p.name for p in plain]
        names += [f"{rest[0].name}_{index}" for index in range(max(tensors, 1) - len(names))]
        return dict(zip(names, values, strict=False))
    if tensors > len(needed) and optional:
        options = ", ".join(repr(name) for name in optional)
        example = ", ".join(f"{name!r}: ..." for name in (*needed, optional[0]))
        raise CalibrationError(
            f"{where} holds {tensors} tensors, and forward needs {len(needed)} and has the "
            f"optional {options}: is what comes behind the first {len(needed)} an input or a "
            f"label? Give each batch as a dict ({{{example}}}), or without its labels"
        )
    return dict(zip(needed, values, strict=False))


def _by_name(known: _Parameters, item: Mapping[Any, Any], where: str) -> dict[str, Any]:
    plain, _, keywords = _kinds(known)
    names = [p.name for p in (*plain, *keywords)]
    for key in item:
        if key not in names:
            raise CalibrationError(
                f"{where} has the key {key!r}, forward has no such parameter, it has "
                f"{', '.join(names)}{nearest(str(key), names)}; a dict that is an input itself "
                "goes into a tuple"
            )
    missing = [p.name for p in (*plain, *keywords) if p.default is p.empty and p.name not in item]
    if missing:
        raise CalibrationError(f"{where} lacks {', '.join(missing)}, which forward needs")
    return {name: item[name] for name in names if name in item}


def inputs_needed(model: nn.Module) -> int:
    """How many values of a batch `forward` cannot do without; one at least."""
    plain, _, _ = _kinds(parameters(unwrap(model)))
    return max(1, sum(p.default is p.empty for p in plain))


def bind_by(names: Names, item: Any, where: str) -> dict[str, Any]:
    """What a batch feeds to the parameters that `names` knows. Raises CalibrationError."""
    known = list(names.structures)
    if isinstance(item, Mapping) and set(known) <= set(item):
        return {name: item[name] for name in known}
    values = list(item) if type(item) in (tuple, list) else [item]
    if len(values) < len(known):
        raise CalibrationError(f"{where} holds {len(values)} values, the model takes {len(known)}")
    return dict(zip(known, values, strict=False))


def arguments(
    model: nn.Module, names: Sequence[str], values: Sequence[Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the keyword arguments that feed `values` to the parameters `names`."""
    if isinstance(names, Names):
        given = names.built(values)
        names, values = list(given), list(given.values())
    plain, _, _ = _kinds(parameters(unwrap(model)))
    order = [p.name for p in plain]
    # Behind a parameter that is left out, the others go by name; those of *args have no names.
    leading = 0
    while leading < len(names) and (leading >= len(order) or names[leading] == order[leading]):
        leading += 1
    keywords = {p.name for p in parameters(unwrap(model)) if p.kind is p.KEYWORD_ONLY}
    leading -= sum(name in keywords for name in names[:leading])
    return list(values[:leading]), dict(zip(names[leading:], values[leading:], strict=True))


def fed(
    known: _Parameters, inputs: int | Sequence[str] | None, name: str
) -> list[tuple[str, inspect.Parameter]]:
    """The names of the graph's inputs, each with the parameter of `forward` that it feeds."""
    plain, rest, keywords = _kinds(known)
    if isinstance(inputs, Sequence):
        named = {p.name: p for p in (*plain, *keywords)}
        return [(key, named.get(key) or rest[0]) for key in inputs]
    keywords = [p for p in keywords if p.default is p.empty]
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


def parameters(model: nn.Module) -> _Parameters:
    """Of `forward`, or of the layer that is the whole model."""
    if isinstance(model, LayerRoot):
        model = model.layer
    return list(inspect.signature(model.forward).parameters.values())


def _kinds(known: _Parameters) -> tuple[_Parameters, _Parameters, _Parameters]:
    """Those that take a value by position, ``*args``, and those that take one by name alone."""
    positional = [p for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = [p for p in known if p.kind is p.VAR_POSITIONAL]
    return positional, rest, [p for p in known if p.kind is p.KEYWORD_ONLY]
