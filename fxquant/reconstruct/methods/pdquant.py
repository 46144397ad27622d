"""PD-Quant: Liu et al., Post-Training Quantization based on Prediction Difference Metric,
CVPR 2023.

As QDrop, and the prediction that the float rest of the network makes of a block's output is held
to that of the float network; the output is computed a second time for it, with nothing dropped.
The float inputs of a block are first moved to the statistics of the batch norms
(`fxquant.reconstruct.distribution`).
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import Tensor, fx

from fxquant.recipe import ReconstructionRecipe
from fxquant.reconstruct.block_in_training import on_device
from fxquant.reconstruct.caches import Rows
from fxquant.reconstruct.distribution import (
    Correction,
    NormStatistics,
    batch_norm_statistics,
)
from fxquant.reconstruct.method import PAPERS, Goal, Method, Objective
from fxquant.reconstruct.objectives import prediction_error, run_rest
from fxquant.reconstruct.subgraph import Subgraph
from fxquant.reconstruct.targets import corrected_values
from fxquant.reconstruct.values import Values

__all__ = ["PDQuant"]

_PREDICTION_WEIGHT = 10.0  # λ of the prediction difference is 1 / 0.1
_CORRECTION_STEPS, _CORRECTION_LEARNING_RATE = 500, 1e-3


class PDQuant(Method):
    """Block by block; activations stay float at random, and the prediction counts."""

    published = replace(
        PAPERS, learning_rate=3e-3, drop=0.5, temperature=4.0, correction_weight=0.02
    )
    published_depthwise = MappingProxyType(
        {"regularizer": 0.1, "temperature": 1.0, "correction_weight": 0.005}
    )
    sees_prediction = True

    def __init__(
        self,
        settings: ReconstructionRecipe,
        macs: float,
        *,
        depthwise: bool = False,
    ) -> None:
        super().__init__(settings, macs, depthwise=depthwise)
        self.statistics: dict[str, NormStatistics] = {}

    @property
    def correction(self) -> Correction:
        """Of the inputs: as many fewer steps as there are iterations, at least 10."""
        share = self.settings.iterations / self.published.iterations
        return Correction(
            steps=min(_CORRECTION_STEPS, max(10, round(_CORRECTION_STEPS * share))),
            learning_rate=_CORRECTION_LEARNING_RATE,
            weight=self.settings.correction_weight,
        )

    def prepare(self, float_graph: fx.GraphModule | None) -> list[str]:
        """Read the statistics of the batch norms."""
        if float_graph is not None:
            self.statistics = batch_norm_statistics(float_graph)
        if self.statistics:
            return []
        return [
            "reconstruction without distribution correction: there are no batch-norm statistics"
        ]

    def targets(
        self, values: Values, target: Subgraph, output: str
    ) -> tuple[dict[str, Rows], Rows, list[Rows]]:
        """Of inputs whose distribution is corrected."""
        if not self.statistics:
            return super().targets(values, target, output)
        return corrected_values(values, target, output, self.statistics, self.correction)

    def prediction_objective(self, goal: Goal) -> Objective | None:
        """The prediction difference, KL(float || quantized); equation 8."""
        logits, rest = goal.values.logits, goal.rest
        if rest is None or logits is None:
            return None
        module = on_device(rest.module, goal.values.device)
        position = rest.inputs.index(goal.output)
        others = [goal.floats[name] for name in rest.inputs if name != goal.output]
        temperature = self.settings.temperature

        def error(y: Tensor, rows: Tensor) -> Tensor:
            made = run_rest(module, y, position, [goal.take(each, rows) for each in others])
            kl = prediction_error(made, goal.take(logits, rows), temperature)
            return _PREDICTION_WEIGHT * kl

        return error
