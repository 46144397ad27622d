"""Tables: an elementwise function of one 8-bit tensor, evaluated once for each code."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.errors import CompileError


def build_table(
    function: Callable[[Tensor], Tensor],
    x_scale: float,
    x_zero_point: int,
    scale: float,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """The uint8[256] table of `lookup` for an elementwise ``function``.

    Entry q is ``clamp(round_half_even(f(s_x · (q − z_x)) / s_y) + z_y, qmin, qmax)``, all in
    float64: the correctly rounded result. An infinite value saturates, and a NaN counts as 0: the
    input's codes reach further than its values, so a function may leave its domain there.

    Raises CompileError where the function is not elementwise, or where the output's codes are no
    uint8.
    """
    if not 0 <= qmin <= qmax <= 255:
        raise CompileError(f"a table holds uint8 codes; [{qmin}, {qmax}] are none")
    codes = torch.arange(256, dtype=torch.float64)
    with torch.no_grad():
        values = function((codes - x_zero_point) * x_scale)
    if values.shape != codes.shape:
        raise CompileError(
            f"the function of a table must be elementwise; 256 values became a tensor of shape "
            f"{list(values.shape)}; keep the operation float"
        )
    values = values.to(torch.float64).nan_to_num(0.0, math.inf, -math.inf)
    rounded = (values / scale).round() + zero_point
    return rounded.clamp(qmin, qmax).to(torch.uint8)
