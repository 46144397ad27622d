"""Tables: an elementwise function of one 8-bit tensor, evaluated once for each code."""

from __future__ import annotations

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
    float64: the correctly rounded result. An infinite value saturates.

    Raises CompileError where the function is not elementwise, is NaN somewhere, or where the
    output's codes are no uint8.
    """
    if not 0 <= qmin <= qmax <= 255:
        raise CompileError(f"a table holds uint8 codes; [{qmin}, {qmax}] are none")
    codes = torch.arange(256, dtype=torch.float64)
    values = function((codes - x_zero_point) * x_scale)
    if values.shape != codes.shape or bool(values.isnan().any()):
        found = "NaN" if values.shape == codes.shape else f"a tensor of shape {list(values.shape)}"
        raise CompileError(
            f"the function of a table must be elementwise and finite on the input's range "
            f"({(0 - x_zero_point) * x_scale:g} to {(255 - x_zero_point) * x_scale:g}); "
            f"it gave {found}; keep the operation float"
        )
    rounded = (values.to(torch.float64) / scale).round() + zero_point
    return rounded.clamp(qmin, qmax).to(torch.uint8)
