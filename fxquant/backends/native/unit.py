"""The C++ translation unit: the kernels that a network uses, and the runtime."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fxquant.backends.native.params import params_layout

__all__ = ["unit_text"]


def unit_text(kernels: Iterable[str]) -> str:
    """C++17 that a compiler turns into a library with the C ABI of `kernels/runtime.h`."""
    entries = "".join(
        f' \\\n    F({kernel}, {_struct(kernel)}, "{params_layout(kernel)}")'
        for kernel in sorted(set(kernels))
    )
    return f"""// Written by fxquant: the kernels that a network uses, and what runs its program.
#include "all.h"
#include "plain.h"
#include "plain_products.h"
#include "plain_windows.h"
#include "plain_rows.h"
#include "floats.h"

#define FXQUANT_KERNELS(F){entries}

#include "runtime.h"
"""


def _struct(kernel: str) -> str:
    return re.sub(r"(?:^|_)([a-z])", lambda found: found[1].upper(), kernel) + "Params"
