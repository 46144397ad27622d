"""Simulated graph → integer graph: `torch.ops.fxquant.*` on plain integer tensors.

Each value of the simulated graph has up to two images in the integer graph: integers (with the
grid that they lie on) and floats. An operation is emitted on integers when the value behind it
passes a quantizer, because only then is its output grid known; that is why emission of an
operation waits for the quantizer that follows it.
"""

from fxquant.to_integer.checked import to_checked_integer
from fxquant.to_integer.convert import to_integer
from fxquant.to_integer.grid import Grid
from fxquant.to_integer.narrow import narrow_floats

__all__ = ["Grid", "narrow_floats", "to_checked_integer", "to_integer"]
