"""Channels that reach far beyond all others are computed apart, exactly in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant.compiled import CompiledModel
from fxquant.errors import RecipeError
from fxquant.even_out.channel_ranges import measure_ranges
from fxquant.even_out.hidden_pairs import find_pairs
from fxquant.even_out.split_outliers import SplitOutliers
from fxquant.frontend.trace import trace
from fxquant.plan.residual import ResidualStream
from fxquant.recipe import Recipe
from passes import (
    Canonicalize,
    FuseConvBnRelu,
    InferRanges,
    PassRecord,
    Pipeline,
    copy_sharing_tensors,
    module_path,
)
from passes.infra.listing import to_text
from tests.fxquant.small_networks import images, module
from tests.passes.checking import check

C, HIDDEN = 8, 48  # of which a twentieth, 2, may be computed apart
UNIT = 2.0**-24


def tokens(count: int = 4, seed: int = 2) -> Tensor:
    return torch.randn(count, 6, C, generator=torch.Generator().manual_seed(seed))


def far(first: nn.Linear, second: nn.Linear, reach: float, *channels: int) -> None:
    """Let hidden channels reach further, and count for no more than before."""
    with torch.no_grad():
        for channel in channels or (3,):
            first.weight[channel] *= reach
            second.weight[:, channel] /= reach


def pair(reach: float = 40.0, *channels: int) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    layers = {"fc1": nn.Linear(C, HIDDEN), "fc2": nn.Linear(HIDDEN, C)}
    far(layers["fc1"], layers["fc2"], reach, *channels)
    return layers


def mlp(function: Callable[[Tensor], Tensor] = F.gelu, reach: float = 40.0, *channels: int) -> Any:
    return module(lambda self, x: self.fc2(function(self.fc1(x))), **pair(reach, *channels))


def fused(model: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    graph_module = trace(model.eval(), 1).graph_module
    example = tokens(1) if example is None else example
    Pipeline([Canonicalize(), FuseConvBnRelu(), InferRanges()]).run(graph_module, (example,))
    return copy_sharing_tensors(graph_module)


def run(graph_module: fx.GraphModule, data: Any, ratio: float = 4.0) -> PassRecord:
    """Measure, then run the pass with the proof that a pipeline asks for."""
    data = list(data)
    pairs = [pair.path for pair in find_pairs(graph_module)]
    ranges = measure_ranges(graph_module, pairs, data, of="inputs")
    probe = tuple(value[:1] for value in data[0])
    record, _ = Pipeline([SplitOutliers(ranges, ratio), InferRanges()]).run(graph_module, probe)
    return record


def split(model: nn.Module, ratio: float = 4.0) -> tuple[fx.GraphModule, list[str]]:
    graph_module = fused(model)
    return graph_module, list(run(graph_module, [(tokens(),)], ratio).notes)


def targets(graph_module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]


def rounding(model: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """How far two orders of summation lie apart: 2 n u Σ|w x| for each sum of n products.

    The functions of the tests have slopes of at most 1.2, and err by less than 8 u of themselves.
    """
    w1, w2 = model.fc1.weight.abs(), model.fc2.weight.abs()
    hidden = function(model.fc1(x)).abs()
    first = 2 * (C + 1) * UNIT * (x.abs() @ w1.T + model.fc1.bias.abs())
    second = 2 * (HIDDEN + 2) * UNIT * (hidden @ w2.T + model.fc2.bias.abs())
    return second + (1.2 * first + 8 * UNIT * hidden) @ w2.T


# -- the rewrite -------------------------------------------------------------------------


def test_a_far_channel_is_computed_apart() -> None:
    graph_module, notes = split(mlp())
    lines = [" ".join(line.split()) for line in to_text(graph_module).splitlines()]
    assert lines == [
        "x = input f32[1,6,8]",
        "fc1 = linear(x) f32[1,6,47]",
        "gelu = gelu(fc1, approximate='none') f32[1,6,47]",
        "fc1_outliers = linear(x) f32[1,6,1]",
        "gelu_outliers = gelu(fc1_outliers, approximate='none') f32[1,6,1]",
        "fc2_outliers = linear(gelu_outliers) f32[1,6,8]",
        "fc2_main = linear(gelu) f32[1,6,8]",
        "fc2 = add(fc2_main, fc2_outliers, alpha=1) f32[1,6,8]",
        "return fc2",
    ]
    assert len(notes) == 1
    assert notes[0].startswith("fc2: 1 of 48 channels reaches ")
    assert notes[0].endswith(": computed apart")


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "hardswish": F.hardswish,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "none": lambda x: x,
    "two functions": lambda x: F.silu(x) * 0.5,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_computes_the_same(name: str) -> None:
    model = mlp(FUNCTIONS[name])
    graph_module, notes = split(model)
    x = tokens(8, seed=5)
    with torch.no_grad():
        error = (graph_module(x) - model(x)).abs()
        assert bool((error <= rounding(model, FUNCTIONS[name], x)).all())
    assert len(notes) == 1
    assert sorted(targets(graph_module)) == ["fc1", "fc1_outliers", "fc2", "fc2_outliers"]


def test_every_node_is_annotated_as_it_runs() -> None:
    graph_module, _ = split(mlp(F.relu))

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op != "output":
                assert n.meta["tensor"].shape == tuple(result.shape)
                assert n.meta["range"] is not None
                assert n.meta["origin"]
            return result

    Shapes(graph_module).run(tokens(1))
    paths = {node.name: module_path(node) for node in graph_module.graph.nodes}
    assert paths["fc1_outliers"] == "fc1"
    assert paths["fc2_outliers"] == paths["fc2_main"] == paths["fc2"] == "fc2"


def test_layers_without_bias_stay_without() -> None:
    layers = {"fc1": nn.Linear(C, HIDDEN, bias=False), "fc2": nn.Linear(HIDDEN, C, bias=False)}
    far(layers["fc1"], layers["fc2"], 40)
    model = module(lambda self, x: self.fc2(F.gelu(self.fc1(x))), **layers)
    graph_module, _ = split(model)
    assert not any(name.endswith("bias") for name in graph_module.state_dict())
    assert torch.allclose(graph_module(tokens()), model(tokens()), atol=1e-5)


def test_only_the_last_part_adds_the_bias() -> None:
    graph_module, _ = split(mlp())
    biases = {name for name in graph_module.state_dict() if name.endswith("bias")}
    assert biases == {"fc1.bias", "fc1_outliers.bias", "fc2.bias"}


def test_a_relu_behind_is_that_of_the_sum() -> None:
    model = module(lambda self, x: F.relu(self.fc2(F.relu(self.fc1(x)))), **pair())
    graph_module, notes = split(model)
    assert len(notes) == 1
    assert "add_relu(fc2_main, fc2_outliers)" in to_text(graph_module)
    assert torch.allclose(graph_module(tokens()), model(tokens()), atol=1e-5)


def test_the_stage_before_keeps_its_weights() -> None:
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_name_that_is_taken_is_avoided() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x))) + self.fc1_outliers(x)

    model = module(forward, **pair(), fc1_outliers=nn.Linear(C, C))
    graph_module, _ = split(model)
    assert "fc1_outliers_1" in targets(graph_module)
    assert torch.allclose(graph_module(tokens()), model(tokens()), atol=1e-5)


# -- which channels ----------------------------------------------------------------------


def test_nothing_happens_without_outliers() -> None:
    model = mlp(reach=1.0)
    graph_module = fused(model)
    before = to_text(graph_module)
    assert not run(graph_module, [(tokens(),)]).modified
    assert to_text(graph_module) == before
    assert graph_module.get_submodule("fc1").weight is model.fc1.weight


def test_nothing_happens_a_second_time() -> None:
    model = mlp(F.gelu, 40.0, 1, 2)
    far(model.fc1, model.fc2, 20.0, 2)
    graph_module, notes = split(model)
    assert len(notes) == 1
    before = to_text(graph_module)
    assert not run(graph_module, [(tokens(),)]).modified
    assert to_text(graph_module) == before


def test_channels_of_like_range_go_together() -> None:
    graph_module, notes = split(mlp(F.gelu, 40.0, 3, 7))
    assert graph_module.get_submodule("fc1_outliers").weight.shape == (2, C)
    assert "2 of 48 channels reach " in notes[0]


def test_each_step_of_the_range_is_a_pair_of_its_own() -> None:
    model = mlp(F.gelu, 20.0, 3, 7)
    far(model.fc1, model.fc2, 20.0, 7)
    graph_module, notes = split(model)
    assert torch.equal(graph_module.get_submodule("fc1_outliers").weight, model.fc1.weight[7:8])
    assert torch.equal(graph_module.get_submodule("fc1_outliers_2").weight, model.fc1.weight[3:4])
    assert notes[0].count(" reach") == 2
    expected = model(tokens())
    assert torch.allclose(graph_module(tokens()), expected, atol=1e-4)


def test_more_channels_than_allowed_stay() -> None:
    assert split(mlp(F.gelu, 40.0, 3, 7, 9))[1] == []


def test_the_ratio_says_what_an_outlier_is() -> None:
    assert split(mlp(F.gelu, 8.0), ratio=20.0)[1] == []
    assert len(split(mlp(F.gelu, 8.0), ratio=3.0)[1]) == 1


def test_zeros_beside_it_make_no_outlier() -> None:
    model = mlp(F.relu, reach=1.0)
    with torch.no_grad():
        keep = torch.zeros(HIDDEN)
        keep[3] = 1.0
        model.fc1.weight *= keep[:, None]
        model.fc1.bias *= keep
    assert split(model)[1] == []


def test_all_batches_count() -> None:
    graph_module = fused(mlp())
    quiet = torch.zeros(2, 6, C)
    assert run(graph_module, [(quiet,), (tokens(),), (quiet,)]).modified


# -- which layers ------------------------------------------------------------------------


def test_what_somebody_else_reads_is_left_alone() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden) + hidden.mean()

    assert split(module(forward, **pair()))[1] == []


def test_a_function_across_channels_is_left_alone() -> None:
    assert split(mlp(lambda x: F.softmax(x, dim=-1)))[1] == []


def test_a_layer_called_twice_is_left_alone() -> None:
    graph_module = fused(mlp())
    (fc1,) = (node for node in graph_module.graph.nodes if node.target == "fc1")
    with graph_module.graph.inserting_before(fc1):
        graph_module.graph.call_module("fc1", fc1.args)
    assert not run(graph_module, [(tokens(),)]).modified


def test_convolutions_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1)).eval()
    model[0].weight.data[2] *= 100  # type: ignore[operator,index]
    assert not run(fused(model, images(1)), [(images(),)]).modified


def test_of_two_pairs_with_a_layer_in_common_the_worse_is_split() -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(C, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, C)}
    far(layers["a"], layers["b"], 20.0)
    far(layers["b"], layers["c"], 80.0)
    model = module(lambda self, x: self.c(F.gelu(self.b(F.gelu(self.a(x))))), **layers)
    graph_module, notes = split(model)
    assert [note.partition(":")[0] for note in notes] == ["c"]
    assert torch.allclose(graph_module(tokens()), model(tokens()), atol=1e-4)
    assert not run(graph_module, [(tokens(),)]).modified


def test_keeps_what_every_pass_promises() -> None:
    graph_module = fused(mlp())
    ranges = measure_ranges(graph_module, ["fc2"], [(tokens(),)], of="inputs")
    check(SplitOutliers(ranges), graph_module, tokens(1), modified=True)


def test_a_pair_that_was_not_measured_is_left_alone() -> None:
    assert not SplitOutliers({}).run(fused(mlp())).modified


def test_a_ratio_out_of_bounds_is_refused() -> None:
    with pytest.raises(RecipeError, match="split_outliers"):
        SplitOutliers({}, 1.0)


# -- compiled ----------------------------------------------------------------------------


class Block(nn.Module):
    """Embedding, one transformer block with a far hidden channel, mean over tokens, head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(C, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)
        far(self.fc1, self.fc2, 200.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x).mean(1))


def compiled(model: nn.Module, recipe: str, ratio: float) -> CompiledModel:
    changed = Recipe.named(recipe).replace({"split_outliers": ratio})
    return fxquant.compile(model, changed, calibration=tokens(32), target="reference")


def sqnr(model: nn.Module, quantized: Callable[[Tensor], Tensor]) -> float:
    x = tokens(64, seed=9)
    with torch.no_grad():
        want, got = model(x), quantized(x)
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))


def test_a_selector_of_a_layer_holds_for_its_parts() -> None:
    recipe = Recipe.named("vit_w8a8").replace({"float": ["fc2"], "split_outliers": 4.0})
    rows = fxquant.compile(
        Block(), recipe, calibration=tokens(32), target="reference"
    ).report.coverage
    parts = {row.node: row.runs_in for row in rows if row.path == "fc2"}
    assert parts == {"fc2": "float", "fc2_main": "float", "fc2_outliers": "float"}


@pytest.mark.parametrize("recipe", ["vit_w8a8", "vit_w8a8_integer"])
def test_a_transformer_gains(recipe: str) -> None:
    model = Block()
    before = compiled(model, recipe, 0)
    after = compiled(model, recipe, 4.0)
    assert sqnr(model, after) > sqnr(model, before) + 6
    assert any("computed apart" in note for note in after.report.notes)


def test_the_new_addition_belongs_to_the_residual_stream() -> None:
    after = compiled(Block(), "vit_w8a8_integer", 4.0)
    stream = ResidualStream(after.stages["fused"])
    assert "fc2" in {node.name for node in stream.additions}
    assert {"fc2_main", "fc2_outliers"} <= {node.name for node in stream.values}


def test_runs_on_x86_kernels() -> None:
    reference = compiled(Block(), "vit_w8a8", 4.0)
    x86 = reference.to_target("x86")
    assert torch.allclose(x86(tokens(8)), reference(tokens(8)), atol=1e-3)


def test_a_plain_mlp_gains() -> None:
    torch.manual_seed(0)
    layers = {"fc1": nn.Linear(C, 64), "fc2": nn.Linear(64, 32), "fc3": nn.Linear(32, 8)}
    far(layers["fc1"], layers["fc2"], 200.0)
    model = module(lambda self, x: self.fc3(F.relu(self.fc2(F.relu(self.fc1(x))))), **layers)
    before = compiled(model, "w8a8", 0)
    after = compiled(model, "w8a8", 4.0)
    assert sqnr(model, after) > sqnr(model, before) + 6
