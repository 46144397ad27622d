"""What a block's output is held against: Fisher weights, and targets of corrected inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.reconstruct.block_in_training import on_device
from fxquant.reconstruct.caches import Rows
from fxquant.reconstruct.distribution import Correction, NormStatistics, correct_inputs
from fxquant.reconstruct.objectives import average_fisher, scaled_fisher, squared_gradient
from fxquant.reconstruct.subgraph import Subgraph
from fxquant.reconstruct.values import CHUNK, Values

__all__ = ["corrected_values", "fisher_weights"]


def fisher_weights(
    values: Values, part: Subgraph, rest: Subgraph, output: str, *, average: bool
) -> Rows | Tensor:
    """Weights of a block's squared errors: one for each value of every image, or on average.

    Args:
        values: cached so far, the float network's logits among them.
        part: the block in the simulated graph, nearest rounding still in it.
        rest: what follows it in the float network.
        output: the block's output.
        average: one weight for each value of a token block, the mean over a sample of images.
    """
    assert values.logits is not None
    device = values.device
    block, tail = on_device(part.module, device), on_device(rest.module, device)
    position = rest.inputs.index(output)
    others = [values.floats[name] for name in rest.inputs if name != output]
    total = torch.zeros(1, device=device)
    rows: Rows | None = None
    for chunk in values.chunks(values.sample() if average else None):
        with torch.no_grad():
            y = block(*(values.sims[n].take(chunk).to(device) for n in part.inputs))
        read = [each.take(chunk).to(device) for each in others]
        logits = values.logits.take(chunk).to(device)
        squared = squared_gradient(tail, y, position, read, logits)
        if average:
            total = total + squared.sum(0, keepdim=True)
        else:
            squared = squared.cpu()
            count = chunk.stop - chunk.start
            rows = rows or values.caches.make(values.held, count, squared, output)
            rows.write(chunk.start, squared)
    if average:
        values.share.sum([total])
        return average_fisher(total)
    assert rows is not None
    return scaled_fisher(rows, values.held, values.share, CHUNK)


def corrected_values(
    values: Values,
    target: Subgraph,
    output: str,
    statistics: Mapping[str, NormStatistics],
    correction: Correction,
) -> tuple[dict[str, Rows], Rows, list[Rows]]:
    """A block's float inputs and its target after distribution correction.

    Returns:
        The float values by name with the corrected ones in their place, the target, and what has
        been cached for it: nothing where no layer of the block has statistics.
    """
    module = on_device(target.module, values.device)
    paths = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    layers = {path: found for path, found in statistics.items() if path in paths}
    floating = [name for name in target.inputs if values.floats[name].tensor.is_floating_point()]
    made = dict(values.floats)
    if not layers or not floating:
        return made, values.floats[output], []
    for name in floating:
        like = values.floats[name].take(slice(0, 1))
        made[name] = values.caches.make(values.held, 1, like, name)
    for chunk in values.chunks():
        inputs = {n: values.floats[n].take(chunk).to(values.device) for n in target.inputs}
        moved = correct_inputs(module, inputs, floating, layers, correction)
        for name in floating:
            made[name].write(chunk.start, moved[name].cpu())
    goal = values.compute(target, made, output)
    return made, goal, [goal, *(made[name] for name in floating)]
