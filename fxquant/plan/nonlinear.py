"""How softmax, GELU, layer norms and divisions by the norm compute on integers.

A form is written down once, as calls of integer operators: a function that executes them gives
the simulated value, and one that records them gives the integer graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant.kernels  # noqa: F401  (registers torch.ops.fxquant)
from fxquant import integer
from fxquant.plan.operations import Kind
from fxquant.recipe import OperationRecipe
from fxquant.spec import QParams

__all__ = ["Builder", "IntegerForm", "Produced", "execute", "form_of"]

OPS: Any = torch.ops.fxquant


@dataclass(frozen=True)
class Produced:
    """Integers of value ``scale · q``; `scale` is float64 [C] along the last dimension, or [1]."""

    value: Any
    scale: Tensor


@dataclass(frozen=True)
class Builder:
    """Where a form's calls go: `call(operator, *args)`, and `constant(name, tensor)`."""

    call: Callable[..., Any]
    constant: Callable[[str, Tensor], Any]


execute = Builder(call=lambda operator, *args: operator(*args), constant=lambda name, value: value)
"""Runs what a form records."""


@dataclass(frozen=True)
class IntegerForm:
    """One operation's way to compute on integers.

    `operation` is its name for reports, `method` the recipe's word for the way, `bits` those of
    a softmax's output.
    """

    operation: str
    method: str
    bits: int = 8

    @property
    def output(self) -> QParams | None:
        """The grid of the result where the form dictates it: a softmax of powers of two."""
        if self.operation != "softmax" or self.method not in ("i-vit", "log2"):
            return None
        eight = self.method == "i-vit" and self.bits == 8
        return QParams(
            torch.tensor([2.0**-7 if eight else 2.0**-15]),
            torch.zeros(1, dtype=torch.int32),
            0,
            255 if eight else 32767,
            torch.uint8 if eight else torch.int16,
        )

    def produce(
        self,
        build: Builder,
        x: Any,
        x_scale: float,
        x_zero_point: int,
        *,
        rows: int,
        mask: Any = None,
        norm: nn.LayerNorm | None = None,
        dim: int = -1,
        channel_shift: Tensor | None = None,
    ) -> Produced:
        """The integers of the result for the codes `x`.

        `rows` is the length of a row of a softmax or a GELU; `mask` a masked softmax's; `norm`
        the layer norm; `dim` what a division by the norm runs over; `channel_shift` the
        power-of-two factor of each channel.
        """
        if self.operation == "softmax":
            return self._softmax(build, x, x_scale, x_zero_point, rows, mask)
        if self.operation == "GELU":
            x0, n = integer.shift_gelu_constants(x_scale, rows)
            value = build.call(OPS.gelu_i_vit.default, x, x_zero_point, x0, n, 8)
            return Produced(value, torch.tensor([x_scale * 2.0**-7], dtype=torch.float64))
        if self.operation == "normalize":
            value = build.call(OPS.normalize_integer.default, x, x_zero_point, dim)
            return Produced(value, torch.tensor([integer.NORMALIZE_SCALE], dtype=torch.float64))
        assert norm is not None
        return self._layer_norm(build, x, x_zero_point, norm, channel_shift)

    def _softmax(
        self, build: Builder, x: Any, x_scale: float, x_zero_point: int, rows: int, mask: Any
    ) -> Produced:
        if self.method == "table":
            # The finest grid; where the grid of the result is known, `softmax_on` writes it.
            return Produced(
                self.softmax_on(build, x, x_scale, 2.0**-15, 0, 32767, torch.int16, mask),
                torch.tensor([2.0**-15], dtype=torch.float64),
            )
        output = self.output
        assert output is not None
        if self.method == "i-vit":
            x0, n = integer.shiftmax_constants(x_scale, rows)
            value = build.call(OPS.softmax_i_vit.default, x, x_zero_point, x0, n, self.bits, mask)
        else:
            x0, b, c, n = integer.log_softmax_constants(x_scale, rows)
            value = build.call(OPS.softmax_log2.default, x, x_zero_point, x0, b, c, n, 4, mask)
        return Produced(value, output.scale.double())

    @staticmethod
    def softmax_on(
        build: Builder,
        x: Any,
        x_scale: float,
        scale: float,
        qmin: int,
        qmax: int,
        dtype: torch.dtype,
        mask: Any,
    ) -> Any:
        """The codes of a table softmax on a grid without a zero point."""
        table = build.constant("exp_table", integer.exp_table(x_scale))
        numerator = round(256 / scale)
        return build.call(OPS.softmax_table.default, x, table, numerator, qmin, qmax, dtype, mask)

    def _layer_norm(
        self,
        build: Builder,
        x: Any,
        x_zero_point: int,
        norm: nn.LayerNorm,
        channel_shift: Tensor | None,
    ) -> Produced:
        size = 1
        for length in norm.normalized_shape:
            size *= length
        scale = integer.layer_norm_scale(self.method, size)
        gamma = torch.ones(norm.normalized_shape, dtype=torch.float64)
        if norm.weight is not None:
            gamma = integer.guarded_gamma(norm.weight.detach())
        bias = None
        if norm.bias is not None:
            integers = integer.layer_norm_bias(norm.bias.detach(), gamma, scale)
            bias = build.constant("bias", integers)
        dims = len(norm.normalized_shape)
        operators = {
            "i-vit": OPS.layer_norm_i_vit.default,
            "integer": OPS.layer_norm_integer.default,
        }
        if self.method == "power_of_two":
            assert channel_shift is not None
            shifts = build.constant("channel_shift", channel_shift)
            value = build.call(
                OPS.layer_norm_power_of_two.default, x, x_zero_point, shifts, bias, dims
            )
        else:
            value = build.call(operators[self.method], x, x_zero_point, bias, dims)
        return Produced(value, gamma.double() * scale)


def form_of(node: fx.Node, kind: Kind, operations: OperationRecipe) -> IntegerForm | None:
    """The form that a recipe's table gives to an operation; None for those without a choice."""
    if kind is Kind.SOFTMAX:
        return IntegerForm("softmax", operations.softmax, operations.softmax_bits)
    if kind is Kind.NORM:
        return IntegerForm("LayerNorm", operations.layer_norm)
    if kind is Kind.NORMALIZE:
        return IntegerForm("normalize", "float" if operations.layer_norm == "float" else "integer")
    if kind is Kind.TABLE and node.target is F.gelu:
        return IntegerForm("GELU", operations.gelu)
    return None
