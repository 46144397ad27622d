"""What a quantized value looks like: `QuantSpec` before its range is known, `QParams` after.

More than 300 lines, because a spec, the observers that it names and the numbers that it becomes
are one contract that is read at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fxquant.errors import RecipeError, nearest

Scheme = Literal["symmetric", "affine"]
Granularity = Literal["per_tensor", "per_channel"]
Kind = Literal["activation", "weight"]
Options = tuple[tuple[str, float], ...]

SMALLEST_SCALE = 2.0**-60  # the product of two of them is still a normal float32
LARGEST_SCALE = 2.0**126  # its reciprocal is still a normal float32


@dataclass(frozen=True)
class ObserverOption:
    """One parameter of a range estimator: its default, its bounds, and what it means."""

    default: float
    low: float
    high: float
    meaning: str
    integer: bool = False
    power_of_two: bool = False

    def complaint(self, value: object) -> str | None:
        """What is wrong with a value, as the end of a sentence, or None."""
        if isinstance(value, bool) or not isinstance(value, int if self.integer else (int, float)):
            return f"must be {'an integer' if self.integer else 'a number'}, got {value!r}"
        if not self.low <= value <= self.high:
            return f"must lie between {self.low:g} and {self.high:g}, got {value!r}"
        if self.power_of_two and int(value) & (int(value) - 1):
            return f"must be a power of two, got {value!r}"
        return None


_MOMENTUM = ObserverOption(0.9, 0.0, 0.9999, "share of the running range that a batch keeps")
_BINS = ObserverOption(4096, 256, 65536, "bins of the histogram", integer=True, power_of_two=True)
_CANDIDATES = ObserverOption(100, 4, 1000, "ranges compared before refinement", integer=True)
_PERCENTILE = ObserverOption(99.99, 50.0, 100.0, "percentage of the values at or below the bound")
_CAP = ObserverOption(
    1.75,
    0.0,
    1000.0,
    "how many mean extremes of an image a range may span where more is rare; 0 lifts it",
)
_P = ObserverOption(2.4, 0.1, 16.0, "exponent of the error norm")

OBSERVERS: Mapping[str, Mapping[str, ObserverOption]] = MappingProxyType(
    {
        "abs_max": {},
        "min_max": {},
        "moving_average_abs_max": {"momentum": _MOMENTUM},
        "moving_average_min_max": {"momentum": _MOMENTUM},
        "histogram": {"bins": _BINS, "candidates": _CANDIDATES, "cap": _CAP},
        "percentile": {"bins": _BINS, "percentile": _PERCENTILE},
        "entropy": {"bins": _BINS, "candidates": _CANDIDATES},
        "mse": {"bins": _BINS, "candidates": _CANDIDATES, "cap": _CAP},
        "p_norm": {"bins": _BINS, "candidates": _CANDIDATES, "cap": _CAP, "p": _P},
    }
)
"""Every range estimator and its options. ``p_norm_2.4`` is short for ``p_norm`` with p = 2.4."""


def split_observer(name: str) -> tuple[str, Options]:
    """The estimator and the options that a name stands for: ``p_norm_2.4`` is (p_norm, p = 2.4).

    Raises:
        RecipeError: no estimator has this name.
    """
    shorthand = re.fullmatch(r"p_norm_(\d+(?:\.\d+)?)", name)
    if shorthand:
        return "p_norm", (("p", float(shorthand[1])),)
    if name not in OBSERVERS:
        hint = nearest(name, OBSERVERS) or f"; known are {', '.join(OBSERVERS)}, p_norm_2.4"
        raise RecipeError(f"unknown observer {name!r}{hint}")
    return name, ()


def check_options(observer: str, options: Mapping[str, object], where: str = "options") -> None:
    """Refuse an option that the estimator does not have, or a value outside its bounds.

    Raises:
        RecipeError: names the option, where it stands and what would be right.
    """
    base, implied = split_observer(observer)
    known = OBSERVERS[base]
    for name, value in [*implied, *options.items()]:
        if name not in known:
            hint = nearest(name, known) or f"; it knows {', '.join(known) or 'none'}"
            raise RecipeError(f"{where}: observer {observer!r} has no option {name!r}{hint}")
        complaint = known[name].complaint(value)
        if complaint:
            raise RecipeError(f"{where}.{name} {complaint}")
    for name, value in implied:
        if name in options:
            raise RecipeError(f"{where}.{name}: {observer!r} already says {name} = {value:g}")


@dataclass(frozen=True)
class QuantSpec:
    """How one value is quantized, before its range is known.

    Weights are signed: ``[-(2^(b-1) - 1), 2^(b-1) - 1]`` when symmetric, the full signed range
    when affine. Activations of 2 to 8 bits are unsigned, ``[0, 2^b - 1]``; of 16 bits they are
    int16, symmetric, ``[-32767, 32767]``.

    Attributes:
        bits: 2 to 8, or 16 for activations.
        scheme: ``symmetric`` fixes the zero point in the middle of the codes; ``affine`` fits it.
        granularity: one scale for the tensor, or one for each output channel (weights only).
        observer: the range estimator, a name of `OBSERVERS` or ``p_norm_<p>``.
        options: the estimator's parameters; a mapping is accepted and stored as sorted pairs.
        reduce_range: fit the scale to one bit less. An activation keeps the full range of codes
            as headroom, as torch does; a weight's codes stay inside the smaller range, which is
            what proves that u8 x s8 pair sums fit into 16 bits.
        one_sided: the value is never negative: zero point 0, only the upper bound is searched.
        kind: what the spec is for.

    Raises:
        RecipeError: a field has a value outside its range, or two fields contradict each other.
    """

    bits: int = 8
    scheme: Scheme = "affine"
    granularity: Granularity = "per_tensor"
    observer: str = "mse"
    options: Options = ()
    reduce_range: bool = False
    one_sided: bool = False
    kind: Kind = "activation"

    def __post_init__(self) -> None:
        options = dict(self.options)
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        if self.kind not in ("activation", "weight"):
            raise RecipeError(f"kind must be 'activation' or 'weight', got {self.kind!r}")
        if self.scheme not in ("symmetric", "affine"):
            raise RecipeError(f"scheme must be 'symmetric' or 'affine', got {self.scheme!r}")
        if self.granularity not in ("per_tensor", "per_channel"):
            raise RecipeError(
                f"granularity must be 'per_tensor' or 'per_channel', got {self.granularity!r}"
            )
        allowed = range(2, 9) if self.kind == "weight" else (*range(2, 9), 16)
        if isinstance(self.bits, bool) or self.bits not in allowed:
            wide = "" if self.kind == "weight" else " or 16"
            raise RecipeError(f"{self.kind} bits must be 2 to 8{wide}, got {self.bits!r}")
        if self.bits == 16 and self.scheme == "affine":
            raise RecipeError("16-bit activations are symmetric: set scheme = 'symmetric'")
        if self.kind == "activation" and self.granularity == "per_channel":
            raise RecipeError("activations are quantized per_tensor, got granularity per_channel")
        if self.kind == "weight" and self.one_sided:
            raise RecipeError("one_sided is for activations: weights are signed")
        if self.reduce_range and self.bits == 2:
            raise RecipeError("reduce_range needs at least 3 bits, got 2")
        check_options(self.observer, options)

    @property
    def signed(self) -> bool:
        """Whether the codes are signed: weights, and 16-bit activations."""
        return self.kind == "weight" or self.bits == 16

    @property
    def dtype(self) -> torch.dtype:
        """The integer type that holds the codes: int8, uint8 or int16."""
        if self.bits == 16:
            return torch.int16
        return torch.int8 if self.signed else torch.uint8

    @property
    def qmin(self) -> int:
        """The smallest code that a value may take."""
        return self.fit_qmin if self.kind == "weight" else self._limits(self.bits)[0]

    @property
    def qmax(self) -> int:
        """The largest code that a value may take."""
        return self.fit_qmax if self.kind == "weight" else self._limits(self.bits)[1]

    @property
    def fit_qmin(self) -> int:
        """The smallest code that the range is fitted to: one bit less under reduce_range."""
        return self._limits(self.bits - self.reduce_range)[0]

    @property
    def fit_qmax(self) -> int:
        """The largest code that the range is fitted to: one bit less under reduce_range."""
        return self._limits(self.bits - self.reduce_range)[1]

    @property
    def estimator(self) -> str:
        """The estimator's name in `OBSERVERS`, with a shorthand such as p_norm_2.4 resolved."""
        return split_observer(self.observer)[0]

    def per_tensor(self) -> QuantSpec:
        """The same spec with one scale for the whole tensor."""
        return replace(self, granularity="per_tensor")

    def has_option(self, name: str) -> bool:
        """Whether the estimator knows an option of this name."""
        return name in OBSERVERS[self.estimator]

    def option(self, name: str) -> float:
        """An option of the estimator: as set, as its shorthand implies, or by default."""
        base, implied = split_observer(self.observer)
        return dict((*implied, *self.options)).get(name, OBSERVERS[base][name].default)

    def _limits(self, bits: int) -> tuple[int, int]:
        if not self.signed:
            return 0, 2**bits - 1
        top = 2 ** (bits - 1) - 1
        return (-top - 1 if self.scheme == "affine" else -top), top


@dataclass(frozen=True, eq=False)
class QParams:
    """The numbers that quantize a value: x = scale * (q - zero_point).

    Attributes:
        scale: float32 ``[1]``, or ``[C]`` along `axis`; positive and finite.
        zero_point: int32 of the same shape, within ``[qmin, qmax]``.
        qmin: the smallest code.
        qmax: the largest code.
        dtype: the integer type of the codes.
        axis: the channel dimension, or None for one scale for the whole tensor.

    Raises:
        ValueError: the parts contradict each other.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    dtype: torch.dtype
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            raise ValueError(
                "scale must be float32 and zero_point int32, "
                f"got {self.scale.dtype} and {self.zero_point.dtype}"
            )
        if self.scale.dim() != 1 or self.scale.shape != self.zero_point.shape:
            raise ValueError(
                "scale and zero_point must be vectors of one length, "
                f"got {tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
            )
        if self.axis is None and self.scale.numel() != 1:
            raise ValueError(f"{self.scale.numel()} scales need an axis, got None")
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise ValueError("every scale must be positive and finite")
        info = torch.iinfo(self.dtype)
        if not info.min <= self.qmin < self.qmax <= info.max:
            raise ValueError(f"codes [{self.qmin}, {self.qmax}] do not fit into {self.dtype}")
        low, high = torch.aminmax(self.zero_point)
        if not self.qmin <= int(low) <= int(high) <= self.qmax:
            raise ValueError(
                f"zero points [{int(low)}, {int(high)}] lie outside [{self.qmin}, {self.qmax}]"
            )

    def __repr__(self) -> str:
        if self.scale.numel() == 1:
            values = f"scale={self.scale.item():.6g}, zero_point={int(self.zero_point)}"
        else:
            low, high = torch.aminmax(self.scale)
            values = f"scale[{self.scale.numel()}]={low.item():.4g}..{high.item():.4g}"
        return f"QParams({values}, codes=[{self.qmin}, {self.qmax}], {self.dtype})"

    @property
    def inverse_scale(self) -> Tensor:
        """float32(1) / scale: what a value is multiplied by, of the shape of `scale`."""
        return torch.reciprocal(self.scale)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of a float tensor: clamp(round_half_even(x * (1 / scale)) + zero_point)."""
        return self._codes(x).to(self.dtype)

    def dequantize(self, q: Tensor) -> Tensor:
        """The float32 values of codes: (q - zero_point) * scale."""
        steps = q.to(torch.float32) - self.aligned(self.zero_point, q.dim())
        return steps * self.aligned(self.scale, q.dim())

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``dequantize(quantize(x))`` without leaving float; of x's dtype, no gradient."""
        steps = self._codes(x).sub_(self.aligned(self.zero_point, x.dim()))
        return steps.mul_(self.aligned(self.scale, x.dim())).to(x.dtype)

    def range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that the codes reach, float32 shaped as `scale`."""
        low = (self.qmin - self.zero_point).to(torch.float32) * self.scale
        return low, (self.qmax - self.zero_point).to(torch.float32) * self.scale

    def to(self, device: torch.device | str) -> QParams:
        """The same parameters on another device."""
        return QParams(
            self.scale.to(device),
            self.zero_point.to(device),
            self.qmin,
            self.qmax,
            self.dtype,
            self.axis,
        )

    def _codes(self, x: Tensor) -> Tensor:
        scaled = x.detach().to(torch.float32) * self.aligned(self.inverse_scale, x.dim())
        scaled.round_().add_(self.aligned(self.zero_point, x.dim()))
        return scaled.clamp_(self.qmin, self.qmax)

    def aligned(self, values: Tensor, dims: int) -> Tensor:
        """A vector shaped as `scale`, viewed so that it broadcasts over a tensor of `dims`."""
        if self.axis is None or dims == 0:
            return values.reshape(()) if dims == 0 else values
        shape = [1] * dims
        shape[self.axis] = -1
        return values.view(shape)
