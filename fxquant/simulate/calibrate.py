"""Calibration: one sweep in which quantizers observe, and whoever else wants to looks on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from fxquant.errors import CalibrationError
from fxquant.simulate.nonlinear import SimulatedForm
from fxquant.simulate.quantizers import ActivationQuantizer, WeightQuantizer
from fxquant.simulate.sweep import See, sweep

__all__ = ["calibrate"]


def calibrate(
    simulated: fx.GraphModule,
    data: Iterable[tuple[Any, ...]],
    *,
    inputs: Mapping[str, See] | None = None,
    batches: int | None = None,
    progress: bool = False,
) -> None:
    """Feed `data` through the float graph while its quantizers observe, then fix their grids.

    Afterwards the graph simulates: activations and weights are quantized. `inputs` see what
    modules read in the same sweep. Raises CalibrationError for data that do not fit.
    """
    observing = [
        module
        for module in simulated.modules()
        if isinstance(module, (ActivationQuantizer, SimulatedForm))
    ]
    for module in observing:
        module.observing = True
    sweep(simulated, data, inputs=inputs, label="calibrate", batches=batches, progress=progress)
    for name, module in simulated.named_modules():
        if isinstance(module, WeightQuantizer):
            module.enabled = True
        elif isinstance(module, SimulatedForm):
            module.observing = False
        elif isinstance(module, ActivationQuantizer):
            try:
                module.freeze()
            except CalibrationError as error:
                raise CalibrationError(f"{name}: {error}") from error
