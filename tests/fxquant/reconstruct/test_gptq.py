from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.errors import CalibrationError
from fxquant.reconstruct import columns
from fxquant.reconstruct.columns import ColumnGrid, Columns, round_columns
from fxquant.reconstruct.gptq import gptq
from fxquant.simulate.quantizers import RoundedWeightQuantizer, WeightQuantizer
from fxquant.spec import QParams
from passes import FusedLayer
from passes.infra import verify


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_of(weight: Tensor, bits: int = 3) -> ColumnGrid:
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(2, keepdim=True) / top
    return ColumnGrid(scale, torch.zeros_like(scale), -top, top)


def qparams_of(weight: Tensor, bits: int = 3, *, affine: bool = False) -> QParams:
    top = 2 ** (bits - 1) - 1
    flat = weight.detach().flatten(1)
    if not affine:
        zero_point = torch.zeros(len(flat), dtype=torch.int32)
        return QParams(flat.abs().amax(1) / top, zero_point, -top, top, torch.int8, axis=0)
    low, high = flat.amin(1), flat.amax(1)
    scale = (high - low) / (2 * top + 1)
    zero_point = (-top - 1 - low / scale).round().clamp(-top - 1, top).to(torch.int32)
    return QParams(scale, zero_point, -top - 1, top, torch.int8, axis=0)


def correlated(rows: int, width: int, groups: int = 1, seed: int = 1) -> Tensor:
    """Inputs with a few strong directions, f32[groups, width, rows]."""
    mixing = random(groups, width, width, seed=seed) * torch.logspace(0, -2, width)
    return torch.bmm(mixing, random(groups, width, rows, seed=seed + 1))


def hessian_of(x: Tensor) -> Tensor:
    return torch.bmm(x, x.transpose(1, 2))


def output_error(weight: Tensor, codes: Tensor, grid: ColumnGrid, x: Tensor) -> float:
    return float(torch.bmm(weight - grid.values(codes), x).square().sum())


def fused(layer: nn.Module, **options: Any) -> FusedLayer:
    weight: Any = layer.weight
    return FusedLayer(layer, weight_quantizer=WeightQuantizer(qparams_of(weight, **options)))


def network(*layers: nn.Module) -> fx.GraphModule:
    """A chain of calls, as a simulated graph."""
    root, graph = nn.Module(), fx.Graph()
    node = graph.placeholder("x")
    for index, layer in enumerate(layers):
        root.add_module(f"layer{index}", layer)
        node = graph.call_module(f"layer{index}", (node,))
    graph.output(node)
    return fx.GraphModule(root, graph)


def codes_of(graph_module: fx.GraphModule, index: int = 0) -> Tensor:
    quantizer: Any = graph_module.get_submodule(f"layer{index}").weight_quantizer
    assert isinstance(quantizer, RoundedWeightQuantizer)
    return quantizer.codes


# -- rounding ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation_order", [False, True])
def test_the_output_error_is_below_that_of_nearest_rounding(activation_order: bool) -> None:
    weight, x = random(1, 16, 24), correlated(400, 24)
    grid = grid_of(weight)
    codes, share = round_columns(weight, hessian_of(x), grid, activation_order=activation_order)
    nearest = output_error(weight, grid.codes(weight), grid, x)
    assert output_error(weight, codes, grid, x) < 0.3 * nearest
    assert share == pytest.approx(output_error(weight, codes, grid, x) / nearest, rel=1e-3)


def test_uncorrelated_inputs_give_nearest_rounding() -> None:
    weight = random(2, 5, 6)
    grid = grid_of(weight)
    codes, share = round_columns(weight, torch.eye(6).expand(2, 6, 6), grid)
    assert torch.equal(codes, grid.codes(weight))
    assert share == 1.0


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_agrees_with_optimal_brain_surgeon_step_by_step(block_size: int) -> None:
    weight, x = random(1, 8, 12), correlated(200, 12)
    hessian, grid = hessian_of(x), grid_of(weight)
    damped = hessian[0].double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(12)
    inverse, rest = torch.linalg.inv(damped), weight[0].double().clone()
    expected = torch.empty(8, 12)
    for i in range(12):
        chosen = grid.codes(rest[None, :, i : i + 1].float())
        expected[:, i] = chosen[0, :, 0]
        error = (rest[:, i] - grid.values(chosen)[0, :, 0]) / inverse[i, i]
        rest -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[:, i], inverse[i] = 0, 0
    codes, _ = round_columns(weight, hessian, grid, block_size=block_size, activation_order=False)
    better = [
        output_error(weight[:, r : r + 1], each[None, r : r + 1], _row(grid, r), x)
        for r in range(8)
        for each in (expected, grid.codes(weight)[0])
    ]
    for r in range(8):
        if better[2 * r] < better[2 * r + 1]:
            assert torch.equal(codes[0, r], expected[r])


def _row(grid: ColumnGrid, r: int) -> ColumnGrid:
    return ColumnGrid(grid.scale[:, r : r + 1], grid.zero_point[:, r : r + 1], grid.qmin, grid.qmax)


def test_groups_are_rounded_each_by_itself() -> None:
    weight, hessian = random(3, 4, 9), hessian_of(correlated(100, 9, groups=3))
    grid = grid_of(weight)
    together, _ = round_columns(weight, hessian, grid)
    for g in range(3):
        alone = ColumnGrid(grid.scale[g : g + 1], grid.zero_point[g : g + 1], grid.qmin, grid.qmax)
        codes, _ = round_columns(weight[g : g + 1], hessian[g : g + 1], alone)
        assert torch.equal(codes[0], together[g])


def test_inputs_that_are_always_zero_leave_their_columns_at_nearest() -> None:
    weight, x = random(1, 4, 8), correlated(100, 8)
    x[:, 3] = 0
    grid = grid_of(weight)
    codes, _ = round_columns(weight, hessian_of(x), grid)
    assert torch.equal(codes[:, :, 3], grid.codes(weight)[:, :, 3])
    silent, share = round_columns(weight, torch.zeros(1, 8, 8), grid)
    assert torch.equal(silent, grid.codes(weight))
    assert share == 1.0


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_inputs_than_columns_are_no_obstacle(damping: float) -> None:
    weight, x = random(1, 4, 32), correlated(3, 32)
    grid = grid_of(weight)
    codes, _ = round_columns(weight, hessian_of(x), grid, damping=damping)
    nearest = output_error(weight, grid.codes(weight), grid, x)
    assert output_error(weight, codes, grid, x) <= nearest


def test_a_hessian_that_is_no_number_leaves_nearest_rounding() -> None:
    weight = random(1, 4, 8)
    codes, share = round_columns(weight, torch.full((1, 8, 8), torch.nan), grid_of(weight))
    assert torch.equal(codes, grid_of(weight).codes(weight))
    assert share == 1.0


@pytest.mark.parametrize("affine", [False, True])
def test_the_codes_stay_on_the_grid(affine: bool) -> None:
    layer = fused(nn.Linear(12, 6), bits=2, affine=affine)
    gptq(graph := network(layer), [(correlated(50, 12)[0].T.contiguous(),)])
    quantizer: Any = layer.weight_quantizer
    assert quantizer.qparams.qmin <= codes_of(graph).min()
    assert codes_of(graph).max() <= quantizer.qparams.qmax
    assert codes_of(graph).dtype == torch.int8


# -- inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"padding": (0, 2)}],
)
def test_the_hessian_of_a_convolution_is_that_of_its_patches(options: Any) -> None:
    layer, x = nn.Conv2d(3, 4, 3, **options), random(2, 3, 9, 8)
    padded = F.pad(x, layer._reversed_padding_repeated_twice)
    patches = F.unfold(padded, 3, dilation=layer.dilation, stride=layer.stride)
    expected = torch.einsum("nip,njp->ij", patches, patches)
    hessian = Columns(layer, qparams_of(layer.weight)).moments([((x, None), None)], 2).hessian
    torch.testing.assert_close(hessian[0], expected)


def test_the_hessian_of_a_1d_convolution() -> None:
    layer, x = nn.Conv1d(3, 4, 3, stride=2), random(2, 3, 9)
    patches = x.unfold(2, 3, 2).permute(0, 1, 3, 2).reshape(2, 9, -1)
    hessian = Columns(layer, qparams_of(layer.weight)).moments([((x, None), None)], 2).hessian
    torch.testing.assert_close(hessian[0], torch.einsum("nip,njp->ij", patches, patches))


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_convolution_is_its_groups(groups: int) -> None:
    layer, x = nn.Conv2d(4, 8, 3, groups=groups), random(6, 4, 8, 8)
    gptq(graph := network(fused(layer)), [(x,)])
    inner, outer = 4 // groups, 8 // groups
    for g in range(groups):
        part = nn.Conv2d(inner, outer, 3)
        part.weight = nn.Parameter(layer.weight[g * outer : (g + 1) * outer])
        gptq(alone := network(fused(part)), [(x[:, g * inner : (g + 1) * inner],)])
        assert torch.equal(codes_of(alone), codes_of(graph)[g * outer : (g + 1) * outer])


def test_a_1x1_convolution_is_a_linear_layer() -> None:
    conv, linear = nn.Conv2d(6, 4, 1), nn.Linear(6, 4)
    linear.weight = nn.Parameter(conv.weight.flatten(1))
    x = random(5, 6, 4, 4)
    gptq(first := network(fused(conv)), [(x,)])
    gptq(second := network(fused(linear)), [(x.permute(0, 2, 3, 1),)])
    assert torch.equal(codes_of(first).flatten(1), codes_of(second))


def test_large_maps_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(2, 4, 1), random(3, 2, 16, 16)
    seen = [((x, None), None)]
    whole = Columns(layer, qparams_of(layer.weight)).moments(seen, 3).hessian / x[:, 0].numel()
    monkeypatch.setattr(columns, "_FEWEST_ROWS", 300)
    some = Columns(layer, qparams_of(layer.weight)).moments(seen, 3).hessian / 300
    torch.testing.assert_close(some, whole, atol=0.2, rtol=0)
    assert not torch.equal(some, whole)


@pytest.mark.parametrize("affine", [False, True])
def test_a_wide_linear_layer_is_taken_in_pieces(
    affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = nn.Linear(12, 5), correlated(200, 12)[0].T.contiguous()
    monkeypatch.setattr(columns, "_WIDEST", 4)
    gptq(graph := network(fused(layer, affine=affine)), [(x,)])
    for start in (0, 4, 8):
        part = nn.Linear(4, 5)
        part.weight = nn.Parameter(layer.weight[:, start : start + 4])
        piece = FusedLayer(part, weight_quantizer=fused(layer, affine=affine).weight_quantizer)
        gptq(alone := network(piece), [(x[:, start : start + 4],)])
        assert torch.equal(codes_of(alone), codes_of(graph)[:, start : start + 4])


# -- the graph ---------------------------------------------------------------------------


def two_layers() -> fx.GraphModule:
    torch.manual_seed(0)
    return network(fused(nn.Conv2d(3, 6, 3)), nn.ReLU(), fused(nn.Conv2d(6, 4, 3)))


def test_a_layer_sees_the_inputs_that_the_rounded_layers_before_it_give() -> None:
    graph, x = two_layers(), random(8, 3, 8, 8)
    gptq(graph, [(x[:4],), (x[4:],)])
    rounded = graph.get_submodule("layer0")
    later: Any = two_layers().get_submodule("layer2")
    with torch.no_grad():
        inputs = F.relu(rounded(x))
    gptq(alone := network(later), [(inputs,)])
    assert torch.equal(codes_of(graph, 2), codes_of(alone))


def test_the_network_comes_closer_to_float() -> None:
    x = F.avg_pool2d(random(16, 3, 24, 24), 5, 2, 1)
    graph = two_layers()
    with torch.no_grad():
        nearest = graph(x)
        gptq(graph, [(x,)])
        rounded = graph(x)
        for index in (0, 2):
            graph.get_submodule(f"layer{index}").weight_quantizer = None
        float_ = graph(x)
    assert (rounded - float_).square().mean() < 0.7 * (nearest - float_).square().mean()


def test_the_weights_stay_as_they_are_and_runs_repeat() -> None:
    first, second = two_layers(), two_layers()
    before = {name: value.clone() for name, value in first.named_parameters()}
    for graph in (first, second):
        gptq(graph, [(random(8, 3, 8, 8),)])
    assert all(torch.equal(before[name], value) for name, value in first.named_parameters())
    assert torch.equal(codes_of(first, 2), codes_of(second, 2))


def test_values_read_later_are_kept_and_others_let_go() -> None:
    root, graph = nn.Module(), fx.Graph()
    root.first, root.second = fused(nn.Conv2d(3, 3, 1)), fused(nn.Conv2d(3, 3, 1))
    x = graph.placeholder("x")
    first = graph.call_module("first", (x,))
    relu = graph.call_function(F.relu, (first,))
    second = graph.call_module("second", (relu, x))
    graph.output(graph.call_function(torch.exp, (second,)))
    graph_module = fx.GraphModule(root, graph)
    notes = gptq(graph_module, [(random(4, 3, 4, 4),)])
    assert notes[0].startswith("gptq: 2 layers on 4 images, squared output error")


def test_images_beyond_the_memory_are_left_out() -> None:
    graph, x = two_layers(), random(8, 3, 8, 8)
    verify.run_and_annotate(graph, (x[:1],), name="test")
    # The input and the first convolution's output live side by side: 408 floats an image.
    budget = 2 * 5 * 408 * 4 / 2**30
    notes = gptq(graph, [(batch,) for batch in x.split(2)], memory_gib=budget)
    assert "on 4 images" in notes[0]
    assert notes[1].startswith("gptq: 4 images left out")
    few = two_layers()
    gptq(few, [(batch,) for batch in x[:4].split(2)])
    assert torch.equal(codes_of(graph, 2), codes_of(few, 2))


# -- the float network -------------------------------------------------------------------


class Coarse(nn.Module):
    """Rounds to the grid of a few bits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(2).round().div(2)


def with_residual(coarse: bool) -> fx.GraphModule:
    """conv(q(x)) + q(x), the quantizer there or not; the same names."""
    torch.manual_seed(0)
    root, graph = nn.Module(), fx.Graph()
    root.layer = fused(nn.Conv2d(4, 4, 3, padding=1))
    root.quantize = Coarse() if coarse else nn.Identity()
    x = graph.placeholder("x")
    y = graph.call_module("quantize", (x,))
    graph.output(graph.call_module("layer", (y, y)))
    return fx.GraphModule(root, graph)


def error_of_residual_network(**options: Any) -> float:
    x = F.avg_pool2d(random(64, 4, 20, 20), 5, 1)
    simulated, floats = with_residual(True), with_residual(False)
    floats.get_submodule("layer").weight_quantizer = None
    given = {"fused": floats} if options.pop("sees_float", True) else {}
    gptq(simulated, [(part,) for part in x.split(16)], **given, **options)
    with torch.no_grad():
        return float((simulated(x) - floats(x)).square().mean())


def test_a_layer_makes_up_for_what_its_input_and_its_residual_lost() -> None:
    alone = error_of_residual_network(sees_float=False)
    assert error_of_residual_network() < 0.8 * alone


def test_a_bias_takes_the_mean_of_what_rounding_leaves() -> None:
    x = F.avg_pool2d(random(16, 3, 12, 12).exp(), 3, 2)
    graph, floats = two_layers(), two_layers()
    for index in (0, 2):
        floats.get_submodule(f"layer{index}").weight_quantizer = None
    notes = gptq(graph, [(x,)], fused=floats, move_biases=True)
    with torch.no_grad():
        y, target = graph(x), floats(x)
    # Float sums of some hundred values.
    torch.testing.assert_close(y.mean((0, 2, 3)), target.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    assert "bias correction: 2 layers, with their rounding" in notes
    before: Any = two_layers().get_submodule("layer0").layer
    kept: Any = floats.get_submodule("layer0").layer
    assert torch.equal(kept.bias, before.bias)


def test_the_bias_of_a_layer_that_is_called_twice_stays() -> None:
    layer, x = fused(nn.Linear(6, 6)), random(40, 6)
    root, graph = nn.Module(), fx.Graph()
    root.layer = layer
    node = graph.placeholder("x")
    for _ in range(2):
        node = graph.call_module("layer", (node,))
    graph.output(node)
    before: Any = layer.layer
    gptq(fx.GraphModule(root, graph), [(x,)], fused=fx.GraphModule(root, graph), move_biases=True)
    assert layer.layer is before


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2}])
def test_what_a_layer_is_held_to_is_the_float_layers_output(options: Any) -> None:
    layer, x = nn.Conv2d(4, 6, 3, **options), random(2, 4, 9, 9)
    other = x + 0.1 * random(2, 4, 9, 9, seed=1)
    with torch.no_grad():
        beyond = layer(other) - layer(x) + 0.5
    residual = torch.zeros_like(beyond)
    columns = Columns(layer, qparams_of(layer.weight))
    moments = columns.moments([((x, residual), (other, residual + 0.5))], 2)
    torch.testing.assert_close(columns.join_rows(moments.shift), beyond.mean((0, 2, 3)))


def test_says_which_layers_it_leaves_to_nearest_rounding() -> None:
    graph = network(fused(nn.ConvTranspose2d(3, 3, 2)))
    notes = gptq(graph, [(random(2, 3, 4, 4),)])
    assert notes == [
        "layer0: rounded to nearest, gptq has no form for ConvTranspose2d",
        "gptq: there is no layer to round",
    ]
    assert type(graph.get_submodule("layer0").weight_quantizer) is WeightQuantizer


def test_needs_data() -> None:
    with pytest.raises(CalibrationError, match="there is no batch"):
        gptq(two_layers(), [])
