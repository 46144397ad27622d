"""Closed-form rounding: column by column, each error made good by the columns that follow.

The layers are taken in execution order, each on the inputs that the layers before it give after
they were rounded: the graph is run once, node by node, for all images side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxquant.errors import CalibrationError
from fxquant.reconstruct.columns import Columns, round_columns
from fxquant.simulate.quantizers import RoundedWeightQuantizer, WeightQuantizer
from passes import FusedLayer, tensor_info

__all__ = ["gptq"]

# Of the memory, for activations. Fixed, not what the process leaves: the same images every time.
_SHARE = 0.5


@torch.no_grad()
def gptq(
    simulated: fx.GraphModule,
    data: Iterable[tuple[Any, ...]],
    *,
    damping: float = 0.01,
    block_size: int = 128,
    activation_order: bool = True,
    memory_gib: float = 4.0,
    progress: bool = False,
) -> list[str]:
    """Round the weights of a calibrated graph so that the outputs of each layer change least.

    Linear layers and 1d and 2d convolutions, grouped ones with a Hessian for each group; their
    weight quantizers become `RoundedWeightQuantizer`s on the same grid. An output channel whose
    error would grow keeps its nearest codes. Deterministic.

    Args:
        simulated: its layers have weight quantizers, its activation quantizers are frozen.
        data: batches of positional arguments; read once.
        damping: added to the diagonal of the Hessian, in units of its mean.
        block_size: columns whose corrections are applied to the rest at once.
        activation_order: round the columns with the largest inputs first.
        memory_gib: of the process; half of it for activations. Where not all images fit, the
            first are used.
        progress: show a bar.

    Returns:
        Notes for the report.

    Raises:
        CalibrationError: there are no data.
    """
    targets = {node: layer for node, layer in _layers(simulated) if _supported(layer.layer)}
    notes = [
        f"{node.target}: rounded to nearest, gptq has no form for {type(layer.layer).__name__}"
        for node, layer in _layers(simulated)
        if node not in targets
    ]
    if not targets:
        return [*notes, "gptq: there is no layer to round"]
    run = _SideBySide(simulated, data, list(targets)[-1], memory_gib * 2**30)
    gains = []
    steps = tqdm(targets.items(), desc="gptq", disable=not progress, unit="layer", delay=2)
    for node, fused in steps:
        layer: Any = fused.layer
        quantizer = cast(WeightQuantizer, fused.weight_quantizer)
        columns = Columns(layer, quantizer.qparams)
        run.up_to(node)
        hessian = columns.hessian(run.inputs(node), run.images)
        codes, gain = round_columns(
            columns.split(layer.weight.detach()),
            hessian,
            columns.grid,
            damping=damping,
            block_size=block_size,
            activation_order=activation_order,
        )
        fused.weight_quantizer = RoundedWeightQuantizer(quantizer.qparams, columns.join(codes))
        gains.append(gain)
    gains.sort()
    notes.append(
        f"gptq: {len(targets)} layers on {run.images} images, squared output error "
        f"{gains[len(gains) // 2]:.2f} of nearest rounding's (median)"
    )
    if run.left_out:
        notes.append(
            f"gptq: {run.left_out} images left out, {memory_gib:g} GiB hold the activations of "
            f"{run.images}"
        )
    return notes


# -- the graph ---------------------------------------------------------------------------


def _layers(simulated: fx.GraphModule) -> Iterator[tuple[fx.Node, FusedLayer]]:
    for node in simulated.graph.nodes:
        if node.op == "call_module":
            module = simulated.get_submodule(str(node.target))
            if isinstance(module, FusedLayer) and isinstance(
                module.weight_quantizer, WeightQuantizer
            ):
                yield node, module


def _supported(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))


class _SideBySide:
    """Runs a graph node by node, for all batches at once."""

    def __init__(
        self,
        simulated: fx.GraphModule,
        data: Iterable[tuple[Any, ...]],
        last: fx.Node,
        memory: float,
    ) -> None:
        self.interpreter = fx.Interpreter(simulated, garbage_collect_values=False)
        self.interpreter.extra_traceback = False
        nodes = list(simulated.graph.nodes)
        self.nodes = nodes[: nodes.index(last) + 1]
        self.position = 0
        self.dies: dict[fx.Node, list[fx.Node]] = {}
        place = {node: index for index, node in enumerate(self.nodes)}
        for node in self.nodes:
            readers = [user for user in node.users if user in place]
            final = max(readers, key=place.__getitem__, default=node)
            self.dies.setdefault(final, []).append(node)
        self.images, self.left_out = 0, 0
        fit = max(1, int(memory * _SHARE / max(1, self._bytes_an_image())))
        inputs = [node for node in nodes if node.op == "placeholder"]
        self.values: list[dict[fx.Node, Any]] = []
        for batch in data:
            count = len(batch[0]) if batch[0].dim() else 1
            if self.images and self.images + count > fit:
                self.left_out += count
                continue
            self.images += count
            given = [
                *batch,
                *(node.args[0] if node.args else None for node in inputs[len(batch) :]),
            ]
            self.values.append(dict(zip(inputs, given, strict=True)))
        if not self.values:
            raise CalibrationError("gptq needs calibration data: there is no batch")

    def up_to(self, node: fx.Node) -> None:
        """Run everything before `node` that has not been run."""
        while self.nodes[self.position] is not node:
            current = self.nodes[self.position]
            for values in self.values:
                if current.op != "placeholder":
                    self.interpreter.env = values
                    values[current] = self.interpreter.run_node(current)
                for dead in self.dies.get(current, ()):
                    values.pop(dead, None)
            self.position += 1

    def inputs(self, node: fx.Node) -> Iterator[Tensor]:
        """The first operand of `node`, batch by batch."""
        for values in self.values:
            yield values[cast(fx.Node, node.args[0])]

    def _bytes_an_image(self) -> float:
        """The most that the live values of one image take."""
        live, most = 0.0, 0.0
        size: dict[fx.Node, float] = {}
        for node in self.nodes:
            info = tensor_info(node)
            if info is not None and node.op != "get_attr" and info.shape and info.shape[0]:
                elements = torch.Size(info.shape).numel() / info.shape[0]
                size[node] = elements * info.dtype.itemsize
            live += size.get(node, 0.0)
            most = max(most, live)
            live -= sum(size.get(dead, 0.0) for dead in self.dies.get(node, ()))
        return most
