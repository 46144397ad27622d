"""What all kernels of a layer share: its integers, and how its sums become what is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.planner import Planner
from fxquant.backends.native.values import Value
from fxquant.integer.bounds import products_bound, shifted_weight, weight_reach
from fxquant.integer.rounding import channel_factors, rescale_factor

__all__ = [
    "CODES",
    "FLOATS",
    "GELU",
    "SUMS",
    "Layer",
    "by_panels",
    "image_fields",
    "may_be_fast",
    "output_fields",
    "residual_value",
]

OPS: Any = torch.ops.fxquant
CODES, FLOATS, SUMS, GELU = 0, 2, 1, 3
"""What a kernel writes: the numbers are those of ``kernels/``."""
_LARGEST_REAL = 2.0**30
_INT32 = 2.0**31 - 1
_MANY_PANELS = 8


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's call, its weight as integers without a zero point, and what follows its sums."""

    arguments: dict[str, Any]
    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    kind: int
    transposed: bool

    @classmethod
    def of(cls, planner: Planner, node: fx.Node) -> Layer:
        """The layer that a node of the integer graph calls."""
        arguments = planner.arguments(node)
        transposed = node.target is OPS.conv_transpose.default
        groups = int(arguments.get("groups", 1))
        zero = arguments["weight_zero_point"]
        weight = shifted_weight(
            planner.tensor(arguments["weight"]),
            None if zero is None else planner.tensor(zero),
            transposed=transposed,
            groups=groups,
        ).to(torch.int16)
        outputs = weight.shape[1] * groups if transposed else weight.shape[0]
        bias = arguments["bias"]
        wide = torch.zeros(outputs, dtype=torch.int64)
        if bias is not None:
            wide = planner.tensor(bias).to(torch.int64)
        kind = SUMS
        multiplier = torch.ones(outputs)
        if "scale" in arguments:
            kind = FLOATS if arguments["dtype"] == torch.float32 else CODES
            scale = None if kind == FLOATS else arguments["scale"]
            factors = channel_factors(
                arguments["x_scale"], planner.tensor(arguments["weight_scale"]), scale
            )
            multiplier = factors.reshape(-1).expand(outputs).contiguous()
        return cls(arguments, weight, wide, multiplier, kind, transposed)

    @property
    def zero_point(self) -> int:
        """Of the input."""
        return int(self.arguments["x_zero_point"])

    def fits_int32(self) -> bool:
        """Whether sums of the codes themselves stay in int32, and reals where they round."""
        rows = self.weight.to(torch.float64).flatten(1)
        shift = self.bias - self.zero_point * rows.sum(1).to(torch.int64)
        if float((rows.abs().sum(1) * 255 + shift.abs()).max()) > _INT32:
            return False
        reach = products_bound(torch.uint8, self.zero_point, weight_reach(rows))
        real = (reach + self.bias.abs()) * self.multiplier.abs()
        extra = 0.0
        if self.arguments.get("residual") is not None and self.kind == CODES:
            extra = 255 * self.residual_multiplier
        return self.kind != CODES or float(real.max()) + extra < _LARGEST_REAL

    @property
    def residual_multiplier(self) -> float:
        """From steps of what is added to steps of the output."""
        arguments = self.arguments
        return float(rescale_factor(arguments["residual_scale"], arguments["scale"]))

    def start(self) -> Tensor:
        """What accumulators begin with: ``b_q − z_x · Σ w`` as int32."""
        sums = self.weight.to(torch.int64).flatten(1).sum(1)
        return (self.bias - self.zero_point * sums).to(torch.int32)

    def halves(self) -> list[Tensor] | None:
        """The weight as int8 tensors that sum up to it: two where it had a zero point."""
        low = self.weight.clamp(-128, 127)
        rest = self.weight - low
        if not bool(rest.any()):
            return [low.to(torch.int8)]
        if int(rest.max()) > 127 or int(rest.min()) < -128:
            return None
        return [low.to(torch.int8), rest.to(torch.int8)]


def output_fields(planner: Planner, layer: Layer) -> dict[str, Any]:
    """What the fast kernels are told about the codes that they write."""
    arguments = layer.arguments
    if layer.kind != CODES:
        return {"zero_point": 0, "lo": 0, "hi": 0}
    table = planner.table_behind()
    fields: dict[str, Any] = {
        "zero_point": int(arguments["zero_point"]),
        "lo": int(arguments["qmin"]),
        "hi": int(arguments["qmax"]),
        "table": None if table is None else planner.data(table),
    }
    if arguments["residual"] is not None:
        fields["residual_zero_point"] = int(arguments["residual_zero_point"])
        fields["residual_multiplier"] = layer.residual_multiplier
    return fields


def by_panels(weight: Tensor, image: float) -> int:
    """Whether threads share a packed weight rather than one sample's input of so many bytes.

    Each of them then reads its part of the weight and the whole input. A few panels too many for
    some of the threads must not count.
    """
    groups, panels = weight.shape[:2]
    return int(weight.nbytes > image and groups == 1 and panels >= _MANY_PANELS)


def may_be_fast(planner: Planner, layer: Layer, x: Value) -> bool:
    """Whether types and bounds are those of the fast kernels."""
    residual = layer.arguments.get("residual")
    codes = layer.kind != CODES or layer.arguments["dtype"] == torch.uint8
    return (
        x.dtype == torch.uint8
        and codes
        and (layer.kind != SUMS or planner.shapes[planner.current].dtype == torch.int32)
        and (residual is None or planner.value(residual).dtype == torch.uint8)
        and math.prod(planner.shapes[planner.current].shape) > 0
        and layer.fits_int32()
    )


def image_fields(name: str, strides: list[int]) -> dict[str, int]:
    """Strides over samples, rows and pixels, as parameters."""
    batch, row, pixel = strides
    return {f"{name}_batch": batch, f"{name}_row": row, f"{name}_pixel": pixel}


def residual_value(planner: Planner, layer: Layer) -> Value | None:
    """What is added to the sums, where anything is."""
    node = layer.arguments.get("residual")
    return None if node is None else planner.value(node)
