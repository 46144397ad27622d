"""Quantizers whose step is trained, through its logarithm.

So it stays positive and moves by a share of itself (Jain et al. 2019, "Trained Quantization
Thresholds"), with the gradient of LSQ.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.simulate.quantizers import ActivationQuantizer, WeightQuantizer
from fxquant.simulate.quantizers.straight_through import straight_through
from fxquant.spec import LARGEST_SCALE, SMALLEST_SCALE, QParams

__all__ = ["TrainableActivation", "TrainableWeight"]

_FINEST = 256  # a channel's step is at most this many times finer than the tensor's


class _Trainable(nn.Module):
    """A grid whose step is trained or follows something; codes and zero point stay."""

    start: Tensor

    def __init__(self, qparams: QParams, *, learn: bool) -> None:
        super().__init__()
        self.take(qparams)
        self.log_step = nn.Parameter(torch.zeros_like(self.start), requires_grad=learn)

    def take(self, qparams: QParams) -> None:
        """Stand on another grid of the same length."""
        device = self.start.device if hasattr(self, "start") else "cpu"
        self.grid = qparams
        self.register_buffer("start", qparams.scale.to(device), persistent=False)
        zeros = qparams.zero_point.float()
        self.zeros = zeros if bool((zeros != zeros[0]).any()) else float(zeros[0])

    def quantize(self, x: Tensor, step: Tensor, count: int) -> Tensor:
        """x on the grid of `step`; `count` of its values share a step."""
        zeros: Any = self.zeros
        if isinstance(zeros, Tensor):
            zeros = self.grid.aligned(zeros, x.dim()).to(x.device)
        low, high = self.grid.qmin - zeros, self.grid.qmax - zeros
        scale = 1 / math.sqrt(max(1, count) * self.grid.qmax)
        return straight_through(x, self.grid.aligned(step, x.dim()), low, high, scale)

    def _found(self, step: Tensor) -> QParams:
        scale = step.detach().float().cpu().clamp(SMALLEST_SCALE, LARGEST_SCALE)
        return replace(self.grid, scale=scale)


class TrainableWeight(_Trainable):
    """The quantizer of a weight during training.

    A step that is not learned follows the weight: its ratio to the root mean square of its
    channel stays what it was.
    """

    def __init__(self, inner: WeightQuantizer, weight: Tensor, *, learn: bool) -> None:
        super().__init__(inner.qparams, learn=learn)
        self.follow = not learn
        self.register_buffer("start_size", self._size(weight.detach()), persistent=False)

    start_size: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid, of its shape."""
        return self.quantize(weight, self._step(weight), weight.numel() // len(self.start))

    def qparams(self, weight: Tensor) -> QParams:
        """The grid that was found."""
        return self._found(self._step(weight))

    def _step(self, weight: Tensor) -> Tensor:
        step = self.start * self.log_step.exp()
        if self.follow:
            step = step * (self._size(weight.detach()) / self.start_size)
        return step

    def _size(self, weight: Tensor) -> Tensor:
        axis = self.grid.axis
        dims = [dim for dim in range(weight.dim()) if dim != axis]
        squares = weight.float().square().mean(dims if axis is not None else None).reshape(-1)
        return squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)


class TrainableActivation(_Trainable):
    """The quantizer of a value during training: it learns its step, or observes and quantizes."""

    def __init__(self, inner: ActivationQuantizer, *, learn: bool) -> None:
        super().__init__(inner.qparams, learn=learn)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """x on its grid; while `inner` observes it sees x, too."""
        if self.inner.observing:
            self.inner(x.detach().cpu())
        if not self.inner.enabled:
            return x
        count = x[:1].numel() // len(self.start) if x.dim() else 1
        return self.quantize(x, self.start * self.log_step.exp(), count)

    def refit(self) -> None:
        """The grid for what was observed; nothing changes where nothing was."""
        if self.inner.observing and self.inner.observer.minimum is not None:
            self.inner.freeze()
            self.take(self.inner.qparams)

    def frozen(self) -> ActivationQuantizer:
        """The plain quantizer with the grid that was found."""
        found = self._found(self.start * self.log_step.exp())
        found = replace(found, scale=found.scale.clamp(min=float(found.scale.amax()) / _FINEST))
        state = {name: getattr(found, name) for name in ("scale", "zero_point", "qmin", "qmax")}
        dtype = str(found.dtype).removeprefix("torch.")
        self.inner.set_extra_state({**state, "dtype": dtype, "axis": found.axis})
        return self.inner
