"""What quantization does to each operation: histograms, grids and errors, measured on inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.metrics import Closeness
from fxquant.plan.coverage import CoverageRow
from fxquant.report.values import real_bias, run_both
from fxquant.simulate.quantizers import ActivationQuantizer, WeightQuantizer
from fxquant.spec import QParams
from passes import FusedLayer, module_path
from passes.infra.listing import operation

__all__ = ["Histogram", "LayerPicture", "LayerSource", "TensorPicture"]

BINS = 64
IMAGES = 4
"""Of the first calibration batch: every value of both graphs is held at once."""


@dataclass(frozen=True)
class Histogram:
    """How often values lie in each of `BINS` equal intervals of [low, high].

    `grid_low` and `grid_high` are what the codes reach; `unit` says what the axis counts.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    grid_low: float
    grid_high: float
    unit: str


@dataclass(frozen=True)
class TensorPicture:
    """A tensor and its grid.

    Attributes:
        histogram: of the float values; of a weight with a scale a channel, in steps of these.
        codes: how many codes the grid has.
        scale: the smallest and the largest scale; equal where there is one.
        zero_point: the smallest and the largest zero point.
        clipped: the share in [0, 1] of the values beyond the grid.
        sqnr_db, max_error: of the grid's values against the float ones, rounded by themselves.
    """

    histogram: Histogram
    codes: int
    scale: tuple[float, float]
    zero_point: tuple[int, int]
    clipped: float
    sqnr_db: float
    max_error: float


@dataclass(frozen=True)
class LayerPicture:
    """One operation of the fused graph.

    `inputs` are names of other pictures; `kernel` is the target's operation, "" where several
    nodes are one; `accumulated_db` is the SQNR of what runs against float, with the errors of all
    operations before it; `bias_db` that of the bias in the accumulator's integers.
    """

    node: str
    path: str
    operation: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    runs_in: str
    kernel: str = ""
    reason: str = ""
    macs: int | None = None
    weight: TensorPicture | None = None
    bias_db: float | None = None
    value: TensorPicture | None = None
    accumulated_db: float | None = None


@dataclass(frozen=True)
class LayerSource:
    """The graphs of a compile and some inputs: pictures are measured only where they are shown."""

    inputs: tuple[Any, ...]
    stages: Mapping[str, fx.GraphModule]
    target: str
    exact: bool

    @classmethod
    def of_batch(cls, batch: Sequence[Any]) -> LayerSource:
        """The first images of a batch; the graphs come with `on`."""
        few = [
            value[:IMAGES] if isinstance(value, Tensor) and value.dim() else value
            for value in batch
        ]
        return cls(tuple(few), {}, "", True)

    def on(self, stages: Mapping[str, fx.GraphModule], target: str, *, exact: bool) -> LayerSource:
        """The same inputs for other graphs; `exact`: the target gives the integer graph's bits."""
        return replace(self, stages=stages, target=target, exact=exact)

    def measure(self, coverage: Sequence[CoverageRow]) -> tuple[LayerPicture, ...]:
        """A picture of every input, operation and output, in execution order."""
        fused, simulated = self.stages["fused"], self.stages["simulated"]
        runs = self.stages["integer" if self.exact else self.target]
        expected, found = run_both(fused, runs, self.inputs)
        rows = {row.node: row for row in coverage}
        grids = _value_grids(simulated)
        kernels = _kernels(self.stages[self.target])
        names = {node.name for node in fused.graph.nodes if node.op == "placeholder"} | set(rows)
        pictures = []
        for node in fused.graph.nodes:
            if node.name not in names and node.op != "output":
                continue
            row, value = rows.get(node.name), expected.get(node.name)
            got = found.get("output" if node.op == "output" else node.name)
            grid = grids.get(node.name)
            pictures.append(
                LayerPicture(
                    node.name,
                    module_path(node),
                    operation(node),
                    tuple(each.name for each in node.all_input_nodes if each.name in names),
                    () if value is None else tuple(value.shape),
                    "" if row is None else row.runs_in,
                    kernels.get(node.name, ""),
                    "" if row is None else row.reason,
                    None if row is None else row.macs,
                    _weight(simulated, node),
                    _bias(simulated, self.stages["integer"], node),
                    None if value is None or grid is None else picture(value, grid),
                    None if value is None else _sqnr(value, got),
                )
            )
        return tuple(pictures)


def picture(values: Tensor, grid: QParams) -> TensorPicture:
    """A float tensor beside its grid."""
    values = values.detach().float()
    quantized = grid.fake_quantize(values)
    low, high = (bound.float() for bound in grid.range())
    # Values between two codes at the end of the grid are rounded to it, not clipped.
    half = grid.aligned(grid.scale / 2, values.dim())
    outside = (values < grid.aligned(low, values.dim()) - half) | (
        values > grid.aligned(high, values.dim()) + half
    )
    if grid.scale.numel() > 1:
        axis, unit = values / grid.aligned(grid.scale, values.dim()), "steps of the channel's scale"
        low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
    else:
        axis, unit = values, "value"
    return TensorPicture(
        _histogram(axis, float(low.min()), float(high.max()), unit),
        grid.qmax - grid.qmin + 1,
        (float(grid.scale.min()), float(grid.scale.max())),
        (int(grid.zero_point.min()), int(grid.zero_point.max())),
        float(outside.float().mean()) if values.numel() else 0.0,
        _sqnr(values, quantized) or 0.0,
        float((values - quantized).abs().max()) if values.numel() else 0.0,
    )


def _histogram(values: Tensor, grid_low: float, grid_high: float, unit: str) -> Histogram:
    finite = values.flatten()
    low = min(float(finite.min()), grid_low) if finite.numel() else grid_low
    high = max(float(finite.max()), grid_high) if finite.numel() else grid_high
    counts = torch.histc(finite, BINS, low, high).long().tolist()
    return Histogram(low, high, tuple(counts), grid_low, grid_high, unit)


def _sqnr(expected: Tensor, found: Tensor | None) -> float | None:
    if found is None or found.shape != expected.shape:
        return None
    closeness = Closeness()
    closeness.add(expected.detach(), found.detach())
    return closeness.sqnr_db


def _weight(simulated: fx.GraphModule, node: fx.Node) -> TensorPicture | None:
    if node.op != "call_module":
        return None
    module = simulated.get_submodule(str(node.target))
    if not isinstance(module, FusedLayer):
        return None
    quantizer: Any = module.weight_quantizer
    if not isinstance(quantizer, WeightQuantizer) or not quantizer.has_qparams:
        return None
    weight: Any = module.layer.weight
    shown = picture(weight, quantizer.qparams)
    # A learned or closed-form rounding takes other codes than the nearest.
    rounded = quantizer(weight).detach()
    return replace(
        shown,
        sqnr_db=_sqnr(weight.detach(), rounded) or 0.0,
        max_error=float((weight.detach() - rounded).abs().max()),
    )


def _value_grids(simulated: fx.GraphModule) -> dict[str, QParams]:
    """The grid of every quantized value, by the name of the node that makes it."""
    grids = {}
    for node in simulated.graph.nodes:
        if node.op != "call_module":
            continue
        module = simulated.get_submodule(str(node.target))
        if isinstance(module, ActivationQuantizer) and module.has_qparams:
            grids[node.all_input_nodes[0].name] = module.qparams
    return grids


def _bias(simulated: fx.GraphModule, integer: fx.GraphModule, node: fx.Node) -> float | None:
    if node.op != "call_module":
        return None
    module: Any = simulated.get_submodule(str(node.target))
    found = real_bias(integer, str(node.target)) if isinstance(module, FusedLayer) else None
    return None if found is None else _sqnr(module.layer.bias, found)


def _kernels(lowered: fx.GraphModule) -> dict[str, str]:
    """What the target calls for each node of the integer graph; the reference's marked as such."""
    kernels = {}
    for node in lowered.graph.nodes:
        integer = node.meta.get("integer")
        if integer is None or node.op == "get_attr":
            continue
        name = str(node.meta.get("simulated", integer))
        slow = node.meta.get("kernel") == "reference"
        kernels[name] = f"{operation(node)}{' (reference)' if slow else ''}"
    return kernels
