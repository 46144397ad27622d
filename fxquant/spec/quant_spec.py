"""How one value is quantized, before its range is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from fxquant.errors import RecipeError
from fxquant.spec.observers import OBSERVERS, Options, check_options, split_observer

__all__ = ["Granularity", "Kind", "QuantSpec", "Scheme"]

Scheme = Literal["symmetric", "affine"]
Granularity = Literal["per_tensor", "per_channel"]
Kind = Literal["activation", "weight"]


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
