"""How far I-ViT's shift-exp may be from exp: the bound that the tests of its users share.

With X = −x0 and u = −p/X = q + ρ, E/2^n is X · (1 − ρ/2) · 2^-q without its floor: 2^-u drawn
as lines, which is at most `BEND` too large (at ρ = 2 − 1/ln 2). The two shifts of p are floors: −p
is within [23d/16 − 15/16, 23d/16 + 1/2]. 1/S ≤ X < 1/S + 1, u ≤ n, and the last floor takes less
than 1 of E(0) = X · 2^n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BEND = (1 - (2 - 1 / math.log(2)) / 2) * 2 ** (2 - 1 / math.log(2))


def shift_exp_range(distances: Tensor, x0: int, n: int) -> tuple[Tensor, Tensor]:
    """The least and the largest E(−d)/E(0) that the derivation allows."""
    t = 1.4375 * distances.double()
    most, least = ((t + 0.5) / -x0).clamp(0, n), ((t - 15 / 16) / -x0).clamp(0, n)
    low, high = torch.exp2(-most) - 2.0**-n / -x0, BEND * torch.exp2(-least)
    return low.clamp(min=0), torch.where(distances == 0, 1.0, high)
