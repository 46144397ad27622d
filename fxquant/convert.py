"""A float model in half the bits: bfloat16 or float16 inside, float32 outside."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.compiled import CompiledModel
from fxquant.errors import InputError, ModelError, nearest
from fxquant.frontend.prepare import check_kind

__all__ = ["DTYPES", "Converted", "convert"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Converted(nn.Module):
    """Runs a model in another float type; inputs and outputs are float32 like the model's.

    Floating inputs are rounded to `dtype` on the way in, images are laid out channels-last, as
    the kernels of oneDNN want them, and floating outputs are float32 again.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.dtype = dtype
        self.eval()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's outputs, in float32."""
        with torch.no_grad():
            narrow = [self._narrowed(value) for value in inputs]
            output = self.model(*narrow, **{k: self._narrowed(v) for k, v in named.items()})
        return _widened(output)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return str(self.dtype).removeprefix("torch.")

    def _narrowed(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        layout = torch.channels_last if value.dim() == 4 else torch.preserve_format
        return value.to(self.dtype, memory_format=layout)


def convert(model: nn.Module, dtype: str = "bfloat16") -> Converted:
    """A copy of a float model that computes in ``bfloat16`` or ``float16``, to stand beside int8.

    `model` is in eval mode and stays as it is. For a compiled model its fused float graph is
    converted, whose batch norms are folded: that is the fastest float there is of it. bfloat16
    keeps float32's range with 8 bits of precision, float16 has 11 bits and overflows beyond
    65,504. Both are fast only where the CPU multiplies them (AVX-512 BF16 or FP16, AMX).

    Raises InputError for another type, ModelError for a model in training mode, on a meta device,
    or loaded from a file, which holds no float network.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected {' or '.join(DTYPES)}{_near(dtype)}")
    if isinstance(model, CompiledModel):
        if "fused" not in model.stages:
            raise ModelError("a loaded artefact holds no float network: convert the float model")
        return Converted(copy.deepcopy(model.stages["fused"]).eval(), DTYPES[dtype])
    check_kind(model)
    if model.training:
        raise ModelError("the model is in training mode; call model.eval() before converting it")
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{path} is on the meta device, without values: load the weights")
    return Converted(copy.deepcopy(model), DTYPES[dtype])


def _widened(output: Any) -> Any:
    """Nested tuples, lists and dicts with every floating tensor in float32."""
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_widened, output))
    if isinstance(output, (list, tuple)):
        return type(output)(map(_widened, output))
    if isinstance(output, dict):
        return type(output)((key, _widened(value)) for key, value in output.items())
    return output


def _near(dtype: object) -> str:
    return nearest(dtype, DTYPES) if isinstance(dtype, str) else ""
