"""Arguments of public functions that are of a wrong type, or that nobody knows: one clear error."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, TypeVar, Union

from torch import nn

from fxquant.errors import FxquantError, InputError, nearest

__all__ = ["checked", "checked_class"]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


def checked(
    *,
    but: Collection[str] = (),
    **kinds: type[FxquantError],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that holds the arguments of each call against the function's annotations.

    Elements of containers are not looked at, but for sequences of texts and of integers; what has
    no plain type (``Any``, protocols) is taken as it is, and so are flags and the parameters in
    `but`. `kinds` are the errors for single parameters; all others raise InputError, and so do
    calls that lack an argument or name one that does not exist.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        name = function.__qualname__.removesuffix(".__init__")

        @functools.cache
        def hints() -> dict[str, Any]:
            # At the first call: what annotations name need not be there at import, or at all.
            found = {}
            for key, annotation in inspect.get_annotations(function).items():
                try:
                    text = isinstance(annotation, str)
                    space = getattr(function, "__globals__", {})
                    found[key] = eval(annotation, space) if text else annotation
                except NameError:
                    found[key] = Any
            return found

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                unknown = [key for key in kwargs if key not in signature.parameters]
                near = nearest(unknown[0], signature.parameters) if unknown else ""
                raise InputError(f"{name}: {error}{near}") from None
            for key, value in given.items():
                hint = hints().get(key, Any)
                named = signature.parameters[key].kind not in (
                    inspect.Parameter.VAR_POSITIONAL,
                    inspect.Parameter.VAR_KEYWORD,
                )
                if named and key not in but and not _fits(value, hint):
                    kind = kinds.get(key, InputError)
                    raise kind(f"{name}: {key} is {_shown(value)}, expected {_words(hint)}")
            return function(*args, **kwargs)

        return call

    return decorate


def checked_class(made: C) -> C:
    """A decorator that holds what a class is made of against the annotations, as `checked` does."""
    constructor = vars(made)["__init__"]
    made.__init__ = checked()(constructor)  # type: ignore[misc]
    return made


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    base = origin or hint
    if base is Any:
        return True
    if base is None or base is type(None):
        return value is None
    if base is collections.abc.Callable:
        return callable(value)
    if not isinstance(base, type) or base is bool or getattr(base, "_is_protocol", False):
        return True
    if base in (int, float):
        return isinstance(value, Integral if base is int else Real) and not isinstance(value, bool)
    if issubclass(base, os.PathLike):
        return isinstance(value, (str, os.PathLike))
    if base is collections.abc.Iterable:
        return hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if base is collections.abc.Sequence:
        if isinstance(value, (str, bytes)) or not isinstance(value, collections.abc.Sequence):
            return False
        return inner not in ((str,), (int,)) or all(_fits(each, inner[0]) for each in value)
    return isinstance(value, base)


def _shown(value: Any) -> str:
    empty = isinstance(value, (list, tuple, dict)) and not value
    plain = empty or isinstance(value, (str, int, float))
    return repr(value) if plain else f"a {type(value).__name__}"


def _words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(each) for each in inner))
    if origin is Literal:
        return " or ".join(repr(each) for each in inner)
    if hint is None or hint is type(None):
        return "None"
    base = origin or hint
    plain = {
        collections.abc.Callable: "a function",
        collections.abc.Iterable: "something to iterate over",
        collections.abc.Sequence: "a list",
        collections.abc.Mapping: "a dict",
        str: "a text",
        int: "an integer",
        float: "a number",
        nn.Module: "an nn.Module",
    }
    return plain.get(base, f"a {getattr(base, '__name__', base)}")
