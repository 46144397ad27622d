from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.recipe import ReconstructionRecipe
from fxquant.reconstruct.distribution import (
    NormStatistics,
    batch_norm_statistics,
    correct_inputs,
)
from fxquant.reconstruct.methods.pdquant import PDQuant
from fxquant.reconstruct.subgraph import cut
from tests.fxquant.reconstruct.graphs import Graphs, graphs


def trained() -> nn.Module:
    """A convolution whose batch norm has seen data of mean 0.5 and deviation 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[1].weight, 0.5, 2)  # type: ignore[arg-type]
    nn.init.normal_(model[1].bias)  # type: ignore[arg-type]
    model.train()
    for _ in range(60):
        model(torch.randn(32, 3, 8, 8) * 2 + 0.5)
    return model.eval()


def test_the_output_of_a_folded_batch_norm_becomes_its_input_again() -> None:
    model = trained()
    found = graphs(model)
    ((path, norm),) = batch_norm_statistics(found.float_graph).items()
    layer: Any = found.fused.get_submodule(path)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        read = model[0](x)  # type: ignore[operator]
        y = layer.layer(x)
    column = (slice(None), None, None)
    undone = (y - norm.shift[column]) * norm.ratio[column] + norm.mean[column]
    torch.testing.assert_close(undone, read)


def test_the_statistics_are_those_of_each_image() -> None:
    norm = NormStatistics(torch.zeros(1), torch.ones(1), torch.zeros(1), torch.ones(1))
    # Two images, of means 1 and -1 and deviation 1: together they would have the mean 0.
    image = torch.tensor([0.0, 2.0]).repeat(50)
    images = torch.stack([image, image - 2]).view(2, 1, 10, 10)
    assert float(norm.distance(images)) == pytest.approx(2.0, abs=1e-3)


def test_a_channel_that_a_batch_norm_puts_out_has_no_statistics() -> None:
    zero = torch.zeros(1)
    norm = NormStatistics(zero, torch.ones(1), zero, zero)
    assert float(norm.distance(torch.randn(2, 1, 4, 4))) == 0.0


def test_a_batch_norm_that_changes_nothing_remembers_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    assert batch_norm_statistics(graphs(model).float_graph) == {}


def corrected(weight: float, **options: Any) -> tuple[Graphs, Tensor, Tensor, int]:
    """Graphs, images, the images corrected for the first layer, and the steps it took."""
    found = graphs(trained())
    settings = ReconstructionRecipe(method="pdquant", correction_weight=weight, **options)
    correction = PDQuant(settings, 1e6).correction
    (node,) = [n.name for n in found.fused.graph.nodes if n.op == "call_module"]
    part = cut(found.fused, node, ())
    part.module.requires_grad_(False)
    (name,) = part.inputs
    x = torch.randn(16, 3, 8, 8)
    statistics = batch_norm_statistics(found.float_graph)
    moved = correct_inputs(part.module, {name: x}, part.inputs, statistics, correction)
    return found, x, moved[name], correction.steps


def test_correction_moves_inputs_towards_the_statistics() -> None:
    found, x, moved, _ = corrected(10.0, schedule="published")
    ((path, norm),) = batch_norm_statistics(found.float_graph).items()
    layer: Any = found.fused.get_submodule(path)

    def distance(images: Tensor) -> float:
        with torch.no_grad():
            return float(norm.distance(layer.layer(images)))

    assert not moved.requires_grad
    assert distance(moved) < 0.5 * distance(x)


def test_correction_stays_close_to_the_images() -> None:
    _, x, moved, steps = corrected(0.02, iterations=1000)
    assert steps == 25
    assert 0 < float((moved - x).abs().max()) <= 1e-3 * steps * 1.01
