"""The tables of canonical forms: which targets mean the same operation, and its parameters."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["FUNCTIONS", "METHODS", "REQUIRED", "UNKNOWN_METHODS", "Spelling"]

REQUIRED: Any = object()
"""A parameter without a default."""

ABSENT: Any = object()
"""A parameter that is left out of the canonical form where it is not given."""


@dataclass(frozen=True)
class Spelling:
    """One way to call `function`: the names of its operands, then of its parameters.

    `parameters` maps names in this spelling's order to defaults; what is in `dropped` is not
    part of the canonical form, and what is in `optional` only where it differs from the default.
    `variadic`: all arguments behind the operands are the items of the first parameter.
    `per_axis`: parameters that hold one number for each of `axes` dimensions.
    """

    function: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    operands: tuple[str, ...] = ("input",)
    dropped: tuple[str, ...] = ("inplace", "_stacklevel", "out")
    optional: tuple[str, ...] = ("dtype", "alpha", "rounding_mode")
    variadic: bool = False
    per_axis: tuple[str, ...] = ()
    axes: int = 0


FUNCTIONS: dict[Any, Spelling] = {}
METHODS: dict[str, Spelling] = {}


def _also(
    function: Callable[..., Any],
    parameters: Mapping[str, Any],
    targets: Sequence[Any],
    **options: Any,
) -> None:
    """Enter `targets`, functions or names of methods, as spellings of `function`."""
    spelling = Spelling(function, parameters, **options)
    for target in targets:
        if isinstance(target, str):
            METHODS[target] = spelling
        else:
            FUNCTIONS[target] = spelling


def _add(
    function: Callable[..., Any],
    parameters: Mapping[str, Any] | None = None,
    also: Sequence[Any] = (),
    **options: Any,
) -> None:
    """Enter `function` itself, and what is called in the same way."""
    _also(function, parameters or {}, (function, *also), **options)


# -- activations -----------------------------------------------------------------------------

_INPLACE = {"inplace": False}
_add(F.relu, _INPLACE, (torch.relu, "relu"), dropped=())
_add(F.relu6, _INPLACE, dropped=())
_add(F.hardtanh, {"min_val": -1.0, "max_val": 1.0, **_INPLACE}, dropped=())
_add(F.hardsigmoid, _INPLACE, dropped=())
_add(F.hardswish, _INPLACE, dropped=())
_add(F.silu, _INPLACE, dropped=())
_add(F.mish, _INPLACE, dropped=())
_add(F.selu, _INPLACE, (torch.selu,), dropped=())
_add(F.leaky_relu, {"negative_slope": 0.01, **_INPLACE}, dropped=())
_add(F.elu, {"alpha": 1.0, **_INPLACE}, dropped=())
_add(F.celu, {"alpha": 1.0, **_INPLACE}, (torch.celu,), dropped=())
_LIMIT = {"threshold": REQUIRED, "value": REQUIRED, **_INPLACE}
_add(F.threshold, _LIMIT, (torch.threshold,), dropped=())
_add(F.gelu, {"approximate": "none"})
_add(F.softplus, {"beta": 1, "threshold": 20})
_add(F.softsign)
_add(F.logsigmoid)
_add(F.glu, {"dim": -1})
_add(torch.sigmoid, {}, (F.sigmoid, torch.special.expit, "sigmoid"))
_add(torch.tanh, {}, (F.tanh, "tanh"))
for _function, _other in ((F.softmax, torch.softmax), (F.log_softmax, torch.log_softmax)):
    _add(_function, {"dim": None, "_stacklevel": 3, "dtype": None})
    _also(_function, {"dim": REQUIRED, "dtype": None}, (_other, _other.__name__))
_add(torch.neg, {}, (torch.negative, operator.neg, "neg", "negative"))
_add(torch.abs, {}, (torch.absolute, operator.abs, abs, "abs", "absolute"))
for _name in ("exp", "log", "sqrt", "rsqrt", "square", "sin", "cos", "floor", "ceil", "erf"):
    _add(getattr(torch, _name), {}, (_name,))
_BOUNDS = {"min": None, "max": None}
_add(torch.clamp, _BOUNDS, (torch.clip, "clamp", "clip"))
_also(torch.clamp, {"min": REQUIRED, "max": None}, (torch.clamp_min, "clamp_min"))
_also(torch.clamp, {"max": REQUIRED, "min": None}, (torch.clamp_max, "clamp_max"))

# -- two operands ----------------------------------------------------------------------------

_BOTH = ("input", "other")
_ALPHA = {"alpha": 1}
_add(torch.add, _ALPHA, (operator.add, "add"), operands=_BOTH)
_add(torch.sub, _ALPHA, (torch.subtract, operator.sub, "sub", "subtract"), operands=_BOTH)
_add(torch.mul, {}, (torch.multiply, operator.mul, "mul", "multiply"), operands=_BOTH)
_add(
    torch.div,
    {"rounding_mode": None},
    (torch.divide, torch.true_divide, operator.truediv, "div", "divide", "true_divide"),
    operands=_BOTH,
)
_add(torch.pow, {}, (operator.pow, pow, "pow"), operands=("input", "exponent"))
_add(torch.matmul, {}, (operator.matmul, "matmul"), operands=_BOTH)
_also(torch.matmul, {}, (torch.bmm, torch.mm, "bmm", "mm"), operands=("input", "mat2"))
_add(torch.maximum, {}, ("maximum",), operands=_BOTH)
_add(torch.minimum, {}, ("minimum",), operands=_BOTH)

# -- moving data -----------------------------------------------------------------------------

_add(torch.cat, {"dim": 0}, (torch.concat, torch.concatenate), operands=("tensors",))
_add(torch.stack, {"dim": 0}, operands=("tensors",))
_add(torch.flatten, {"start_dim": 0, "end_dim": -1}, ("flatten",))
_add(torch.unflatten, {"dim": REQUIRED, "sizes": REQUIRED}, ("unflatten",))
_add(torch.reshape, {"shape": REQUIRED}, ("reshape", "view"), variadic=True)
_add(torch.permute, {"dims": REQUIRED}, ("permute",), variadic=True)
_add(torch.flip, {"dims": REQUIRED}, ("flip",), variadic=True)
_TWO_DIMS = {"dim0": REQUIRED, "dim1": REQUIRED}
_TRANSPOSES = (torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims")
_add(torch.transpose, _TWO_DIMS, _TRANSPOSES)
_add(torch.unsqueeze, {"dim": REQUIRED}, ("unsqueeze",))
_add(torch.squeeze, {"dim": ABSENT}, ("squeeze",))
_add(torch.chunk, {"chunks": REQUIRED, "dim": 0}, ("chunk",))
_SECTIONS = {"split_size_or_sections": REQUIRED, "dim": 0}
_add(torch.split, _SECTIONS, operands=("tensor",))
_also(torch.split, {"split_size": REQUIRED, "dim": 0}, ("split",))
_add(torch.unbind, {"dim": 0}, ("unbind",))
_add(torch.select, {"dim": REQUIRED, "index": REQUIRED}, ("select",))
_add(torch.narrow, {"dim": REQUIRED, "start": REQUIRED, "length": REQUIRED}, ("narrow",))
_add(torch.roll, {"shifts": REQUIRED, "dims": ()}, ("roll",))
_add(F.pad, {"pad": REQUIRED, "mode": "constant", "value": None})
_add(F.channel_shuffle, {"groups": REQUIRED})
_add(F.pixel_shuffle, {"upscale_factor": REQUIRED})
_add(F.pixel_unshuffle, {"downscale_factor": REQUIRED})
_RESIZE = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
_add(F.interpolate, {**_RESIZE, "recompute_scale_factor": None, "antialias": False})

# -- pooling and reductions ------------------------------------------------------------------

_WINDOW = {"kernel_size": REQUIRED, "stride": None, "padding": 0}
_WINDOWS = ("kernel_size", "stride", "padding", "dilation")
for _axes in (1, 2, 3):
    _options: dict[str, Any] = {"axes": _axes, "per_axis": _WINDOWS}
    _max_pool = getattr(F, f"max_pool{_axes}d")
    _parameters = {**_WINDOW, "dilation": 1, "ceil_mode": False}
    _other = getattr(torch, f"max_pool{_axes}d")
    _add(_max_pool, {**_parameters, "return_indices": False}, (_other,), **_options)
    _parameters = {**_WINDOW, "ceil_mode": False, "count_include_pad": True}
    _parameters |= {"divisor_override": None} if _axes > 1 else {}
    _add(getattr(F, f"avg_pool{_axes}d"), _parameters, **_options)
    _options = {"axes": _axes, "per_axis": ("output_size",)}
    _size = {"output_size": REQUIRED}
    _add(getattr(F, f"adaptive_avg_pool{_axes}d"), _size, **_options)
    _size = {"output_size": REQUIRED, "return_indices": False}
    _add(getattr(F, f"adaptive_max_pool{_axes}d"), _size, **_options)
FUNCTIONS[torch.avg_pool1d] = FUNCTIONS[F.avg_pool1d]
FUNCTIONS[torch.adaptive_avg_pool1d] = FUNCTIONS[F.adaptive_avg_pool1d]
_OVER = {"dim": None, "keepdim": False, "dtype": None}
_add(torch.mean, _OVER, ("mean",))
_add(torch.sum, _OVER, ("sum",))

UNKNOWN_METHODS = frozenset({"where", "size", "dim", "numel", "detach"})
"""Methods that share a name with a function of `torch` and are left alone all the same."""
