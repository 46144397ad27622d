from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant.errors import CompileError, RecipeError
from fxquant.recipe import Recipe
from fxquant.simulate.recurrent import QuantizeRecurrentWeights, recurrent_quantizers
from passes.infra.verify import flatten

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")

# No code of these inputs lies so near a tie that float rounding moves it. What remains between
# the kernels and the reference is float rounding: a fused multiply-add for each gate and the last
# bit of sigmoid and tanh, below 2^-22 for values near one, over at most 5 steps and 2 layers.
ROUNDING = 1e-5


class Recurrent(nn.Module):
    """A recurrent layer and a linear layer behind it."""

    def __init__(self, layer: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (1 + layer.bidirectional), 3)

    def forward(self, x: Tensor) -> Any:
        y, state = self.layer(x)
        return self.head(y), state


def seeded(make: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return make(*args, **kwargs).eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def recurrent(kind: Any, *args: Any, **kwargs: Any) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(kind(8, 6, *args, **kwargs)).eval()


def tensors(value: Any) -> list[Tensor]:
    return [leaf for _, leaf in flatten(value)]


def check(model: nn.Module, *inputs: Tensor) -> fxquant.CompiledModel:
    """Compile; the kernels must agree with the reference and be near to the float model."""
    compiled = fxquant.compile(model, "dynamic_w8a8", calibration=[inputs])
    reference = compiled.to_target("reference")
    expected = model(*inputs)
    found = compiled(*inputs)
    assert [path for path, _ in flatten(found)] == [path for path, _ in flatten(expected)]
    for got, same, near in zip(*map(tensors, (found, reference(*inputs), expected)), strict=True):
        assert got.shape == near.shape
        torch.testing.assert_close(got, same, rtol=0, atol=ROUNDING)
        assert (got - near).norm() <= 0.03 * near.norm()
    return compiled


def test_mlp_runs_on_the_dynamic_kernel() -> None:
    compiled = check(seeded(mlp), torch.randn(5, 8))
    targets = [str(node.target) for node in compiled.stages["x86"].graph.nodes]
    assert targets.count("quantized.linear_dynamic.default") == 2
    assert compiled.report.int8_share == 1


def test_coverage_says_dynamic_int8_and_why_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
    compiled = fxquant.compile(model, "dynamic_w8a8", calibration=torch.randn(2, 3, 4, 4))
    rows = {row.operation: row for row in compiled.report.coverage}
    assert rows["linear"].runs_in == "dynamic int8"
    assert rows["conv2d"].reason == "dynamic quantization keeps it in float"


def test_weights_are_simulated() -> None:
    model = seeded(mlp)
    x = torch.randn(5, 8)
    compiled = fxquant.compile(model, "dynamic_w8a8", calibration=x)
    simulated, integer = compiled.stages["simulated"], compiled.stages["integer"]
    weight = simulated.get_submodule("0").weight_quantizer(model[0].weight)
    codes, scale = integer.get_buffer("0.weight"), integer.get_buffer("0.weight_scale")
    assert codes.dtype == torch.int8
    assert torch.equal(weight, codes.float() * scale[:, None])
    assert not torch.equal(simulated(x), model(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "num_layers": 2},
        {"bidirectional": True, "num_layers": 2, "bias": False},
    ],
    ids=["plain", "batch_first", "bidirectional"],
)
def test_recurrent_layers_run_on_the_dynamic_kernels(kind: Any, options: dict[str, Any]) -> None:
    compiled = check(recurrent(kind, **options), torch.randn(3, 5, 8))
    names = [getattr(node.target, "__name__", "") for node in compiled.stages["x86"].graph.nodes]
    assert kind.__name__.lower() in names
    assert compiled.report.int8_share == 1


def test_takes_an_initial_state() -> None:
    x, h, c = torch.randn(4, 3, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 6)

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 6, 2)
            self.gru = nn.GRU(8, 6, 2)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            return self.lstm(x, (h, c)), self.gru(hx=h, input=x)

    check(seeded(Called), x, h, c)


def test_takes_a_sequence_without_a_batch() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 6, batch_first=True)
            self.gru = nn.GRU(8, 6, bidirectional=True)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
            return self.lstm(x, (h, c)), self.gru(x)

    check(seeded(Called), torch.randn(4, 8), torch.randn(1, 6), torch.randn(1, 6))


def test_a_layer_by_itself_keeps_the_structure_of_its_output() -> None:
    check(seeded(nn.LSTM, 8, 6), torch.randn(4, 3, 8))


def test_hands_the_state_of_one_layer_to_another() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.LSTM(8, 6, batch_first=True)
            self.decoder = nn.LSTM(8, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.encoder(x)
            y: Tensor = self.decoder(x, state)[0]
            return y

    check(seeded(Translator), torch.randn(3, 5, 8))


def test_a_layer_called_twice_is_quantized_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y, h = self.layer(x)
            z: Tensor = self.layer(y, hx=h)[0]
            return z

    check(seeded(Twice), torch.randn(4, 3, 6))


def test_an_lstm_with_a_projection_stays_float() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(8, 6, proj_size=4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.layer(x)[0])
            return y

    compiled = check(seeded(Projected), torch.randn(4, 3, 8))
    reasons = {row.path: row.reason for row in compiled.report.coverage}
    assert "proj_size" in reasons["layer"]


def test_packed_sequences_stay_float() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(8, 6, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            y, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
            return y

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Packed()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y: Tensor = self.head(self.encoder(x, lengths))
            return y

    compiled = check(seeded(Classifier), torch.randn(3, 5, 8), torch.tensor([5, 2, 4]))
    runs = {row.path: row.runs_in for row in compiled.report.coverage}
    assert runs == {"encoder": "float", "head": "dynamic int8"}
    assert any(decline.path == "encoder" for decline in compiled.report.declines)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_saved_model_computes_the_same(kind: Any, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8)
    compiled = fxquant.compile(recurrent(kind), "dynamic_w8a8", calibration=x)
    compiled.save(tmp_path / "model.fxq")
    loaded = fxquant.load(tmp_path / "model.fxq")
    for got, expected in zip(tensors(loaded(x)), tensors(compiled(x)), strict=True):
        assert torch.equal(got, expected)
    weight = loaded.stages["integer"].get_buffer("layer.weight_hh_l0")
    assert weight.dtype == torch.int8


def test_the_length_and_the_batch_are_free() -> None:
    model = recurrent(nn.LSTM)
    compiled = fxquant.compile(model, "dynamic_w8a8", calibration=torch.randn(4, 3, 8))
    for shape in ((1, 3, 8), (9, 1, 8)):
        assert compiled(torch.randn(shape))[0].shape == (*shape[:2], 3)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_other_forms(granularity: str, bits: int) -> None:
    recipe = Recipe.named("dynamic_w8a8").replace(
        {"weights.granularity": granularity, "weights.bits": bits}
    )
    x = torch.randn(4, 3, 8)
    compiled = fxquant.compile(recurrent(nn.GRU), recipe, calibration=x)
    reference = compiled.to_target("reference")
    torch.testing.assert_close(compiled(x), reference(x), rtol=0, atol=ROUNDING)


def test_the_recipe_can_keep_a_layer_in_float() -> None:
    recipe = Recipe.named("dynamic_w8a8").replace({"float": ["0"]})
    compiled = fxquant.compile(seeded(mlp), recipe, calibration=torch.randn(4, 8))
    runs = [row.runs_in for row in compiled.report.coverage]
    assert runs == ["float", "dynamic int8"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights.scheme": "affine"}, "symmetric weights"),
        ({"activations.bits": 4}, "8-bit activations"),
    ],
)
def test_refuses_recipes_without_a_dynamic_form(changes: dict[str, Any], message: str) -> None:
    recipe = Recipe.named("dynamic_w8a8").replace(changes)
    with pytest.raises(RecipeError, match=message):
        fxquant.compile(seeded(mlp), recipe, calibration=torch.randn(4, 8))


def test_says_so_where_nothing_can_be_quantized() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with pytest.raises(CompileError, match="keeps it in float"):
        fxquant.compile(model, "dynamic_w8a8", calibration=torch.randn(1, 3, 4, 4))


def test_weight_quantizers_are_put_on_once() -> None:
    model = fx.symbolic_trace(seeded(nn.Sequential, nn.LSTM(8, 6)))
    spec = Recipe.named("dynamic_w8a8").weights.spec()
    assert spec is not None
    name = next(node.name for node in model.graph.nodes if node.op == "call_module")
    quantizers, _ = recurrent_quantizers(model, {name: spec})
    quantize = QuantizeRecurrentWeights(quantizers)
    assert quantize.run(model).modified
    assert not quantize.run(model).modified


class ConvolutionsAndLstm(nn.Module):
    """Features along the width of an image, a recurrent layer over them, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.lstm = nn.LSTM(32, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).relu().permute(0, 3, 1, 2).flatten(2)
        sequence, _ = self.lstm(features)
        logits: Tensor = self.head(sequence)
        return logits


def test_a_static_recipe_may_have_a_dynamic_lstm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = ConvolutionsAndLstm().eval(), torch.randn(4, 3, 4, 6)
    mixed = Recipe.named("w8a8").replace({"recurrent": "dynamic"})
    q = fxquant.compile(model, mixed, calibration=x, target="reference")
    operators = [
        node.target.name()
        for node in q.stages["integer"].graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    ]
    assert [name.removeprefix("fxquant::") for name in operators] == [
        "quantize", "conv", "lstm_dynamic", "quantize", "linear",
    ]  # fmt: skip
    assert q.report.int8_share == 1
    assert {row.runs_in for row in q.report.coverage if row.macs} == {"int8", "dynamic int8"}
    q.save(tmp_path / "m.fxq")
    assert torch.equal(fxquant.load(tmp_path / "m.fxq", "reference")(x), q(x))


def test_weights_with_zero_points_keep_the_lstm_of_a_static_recipe_float() -> None:
    model, x = ConvolutionsAndLstm().eval(), torch.randn(4, 3, 4, 6)
    mixed = Recipe.named("w8a8").replace(
        {
            "recurrent": "dynamic",
            "overrides": [{"modules": "lstm", "weights": {"bits": 4, "scheme": "affine"}}],
        }
    )
    q = fxquant.compile(model, mixed, calibration=x, target="reference")
    reasons = {row.path: row.reason for row in q.report.coverage}
    assert "symmetric" in reasons["lstm"]


@pytest.mark.parametrize("target", list(fxquant.available_targets()))
def test_static_convolutions_and_a_dynamic_lstm_run_on_every_target(target: str) -> None:
    torch.manual_seed(0)
    model, x = ConvolutionsAndLstm().eval(), torch.randn(4, 3, 4, 6)
    mixed = Recipe.named("w8a8").replace({"recurrent": "dynamic"})
    q = fxquant.compile(model, mixed, calibration=x, target=target)
    expected = model(x).detach()
    # Eight bits have 6 dB each; what is behind three such layers has lost less than four bits.
    assert (q(x) - expected).norm() < 0.06 * expected.norm()
