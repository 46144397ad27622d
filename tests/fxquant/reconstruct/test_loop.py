from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import ArtifactError, CalibrationError, CompileError, ModelError
from fxquant.recipe import ReconstructionRecipe
from fxquant.reconstruct import loop
from fxquant.reconstruct.loop import reconstruct
from fxquant.reconstruct.subgraph import macs_of
from fxquant.simulate.quantizers import ActivationQuantizer, RoundedWeightQuantizer
from passes import FusedLayer
from tests.fxquant.reconstruct.graphs import Graphs, graphs, state
from tests.fxquant.small_networks import Residual, module

METHODS = ("adaround", "brecq", "qdrop", "pdquant")


def settings(method: str = "brecq", **options: Any) -> ReconstructionRecipe:
    return ReconstructionRecipe(**{"method": method, "iterations": 8, "batch_size": 8, **options})


def run(found: Graphs, recipe: ReconstructionRecipe, **options: Any) -> list[str]:
    return reconstruct(
        found.simulated, found.fused, found.data, recipe, float_graph=found.float_graph, **options
    )


def error(found: Graphs) -> float:
    """Of the logits."""
    x = torch.cat([batch[0] for batch in found.data])
    with torch.no_grad():
        return float((found.simulated(x) - found.fused(x)).square().mean())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_closer_to_float_than_nearest_rounding(method: str) -> None:
    found = graphs()
    nearest = error(found)
    notes = run(found, settings(method, iterations=100, learning_rate=1e-2))
    assert error(found) < 0.7 * nearest
    assert sum("reconstruction of" in note for note in notes) == (4 if method == "adaround" else 3)


def test_every_weight_ends_in_codes() -> None:
    found = graphs()
    run(found, settings())
    layers = [part for part in found.simulated.modules() if isinstance(part, FusedLayer)]
    assert len(layers) == 4
    assert all(isinstance(layer.weight_quantizer, RoundedWeightQuantizer) for layer in layers)


def test_the_stages_before_stay_as_they_are() -> None:
    found = graphs()
    x = found.data.first[0]
    weights = {name: value.clone() for name, value in found.fused.state_dict().items()}
    before = found.fused(x)
    run(found, settings("qdrop"))
    assert torch.equal(found.fused(x), before)
    assert all(torch.equal(found.fused.state_dict()[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("steps", "learned"), [("none", False), ("jointly", True), ("after", True)]
)
def test_steps_are_learned_where_asked(steps: str, learned: bool) -> None:
    found = graphs()
    before = state(found.simulated)
    run(found, settings(steps=steps, iterations=20, scale_learning_rate=1e-3))
    after = state(found.simulated)
    quantizers = [path for path in before if path.startswith("quantizers.")]
    assert len(quantizers) == 4
    assert all(torch.equal(before[path], after[path]) is not learned for path in quantizers)


def test_a_shared_quantizer_stays_shared() -> None:
    branches = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 1), "c": nn.Conv2d(8, 4, 1)}
    model = module(
        lambda self, x: self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)), **branches
    )
    found = graphs(model)
    paths = [str(node.target) for node in found.simulated.graph.nodes if node.op == "call_module"]
    shared = [path for path in set(paths) if paths.count(path) == 2]
    before = state(found.simulated)
    run(found, settings("qdrop"))
    after = [str(node.target) for node in found.simulated.graph.nodes if node.op == "call_module"]
    assert after == paths
    assert len(shared) == 1
    assert not torch.equal(before[shared[0]], state(found.simulated)[shared[0]])


def test_a_channelwise_quantizer_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)).eval()
    found = graphs(model, {"activations.depthwise": "per_channel"})
    wide = {
        path: part.qparams.scale
        for path, part in found.simulated.named_modules()
        if isinstance(part, ActivationQuantizer) and part.qparams.axis is not None
    }
    assert len(wide) == 1
    run(found, settings("qdrop"))
    after = state(found.simulated)
    assert all(torch.equal(after[path], scale) for path, scale in wide.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    first, second, other = graphs(), graphs(), graphs()
    run(first, settings(method))
    run(second, settings(method))
    run(other, settings(method, seed=1, learning_rate=0.1))
    left, right = state(first.simulated), state(second.simulated)
    assert all(torch.equal(left[path], right[path]) for path in left)
    assert any(not torch.equal(left[path], value) for path, value in state(other.simulated).items())


@pytest.mark.parametrize("method", ["brecq", "pdquant"])
def test_values_on_disk_give_the_same_bits_as_in_memory(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory, on_disk = graphs(), graphs()
    run(in_memory, settings(method))
    monkeypatch.setattr("fxquant.reconstruct.loop.room_for_values", lambda *_: 0)
    run(on_disk, settings(method))
    left, right = state(in_memory.simulated), state(on_disk.simulated)
    assert all(torch.equal(left[path], right[path]) for path in left)


def _interrupt(monkeypatch: pytest.MonkeyPatch, block: str, error: BaseException) -> None:
    real = loop.train_block

    def train(name: str, *args: Any, **options: Any) -> Any:
        if name == block:
            raise error
        return real(name, *args, **options)

    monkeypatch.setattr(loop, "train_block", train)


@pytest.mark.parametrize("method", ["adaround", "qdrop"])
def test_resumes_to_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken, resumed = graphs(), graphs(), graphs()
    run(whole, settings(method))
    file = tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        _interrupt(patch, "head", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(broken, settings(method), checkpoint=file)
    _interrupt(monkeypatch, "stem", AssertionError("done already"))
    notes = run(resumed, settings(method), checkpoint=file, resume=True)
    left, right = state(whole.simulated), state(resumed.simulated)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[path], right[path]) for path in left)
    assert any("reconstruction of stem" in note for note in notes)


@pytest.mark.parametrize(
    ("changed", "options"), [("settings", {"seed": 5}), ("weights", {}), ("data", {})]
)
def test_refuses_a_foreign_checkpoint(
    changed: str, options: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint"
    floats = {"activations.bits": "float", "input_bits": "float"}
    run(graphs(changes=floats), settings(), checkpoint=file)
    model = Residual() if changed == "weights" else None
    images = torch.randn(24, 3, 8, 8) if changed == "data" else None
    other = graphs(model, floats, images=images)
    with pytest.raises(ArtifactError, match="another model, recipe or calibration"):
        run(other, settings(**options), checkpoint=file, resume=True)


def test_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        run(graphs(), settings(), checkpoint=file, resume=True)


def test_a_nan_stops_with_the_name_and_the_last_good_state(tmp_path: Path) -> None:
    found = graphs()
    before = state(found.simulated)
    layer = found.simulated.get_submodule("conv1")
    assert isinstance(layer, FusedLayer)
    layer.layer = nn.Conv2d(8, 8, 3, padding=1)
    nn.init.constant_(layer.layer.bias, float("nan"))  # type: ignore[arg-type]
    file = tmp_path / "checkpoint"
    with pytest.raises(CompileError, match=r"block conv1\.\.conv2: the loss is nan at iteration 0"):
        run(found, settings(steps="none"), checkpoint=file)
    after = state(found.simulated)
    assert set(after) - set(before) == {"stem.weight_quantizer"}
    assert file.exists()


def test_stops_when_all_roundings_are_settled() -> None:
    found = graphs()
    options = {"iterations": 400, "learning_rate": 0.3, "regularizer": 10.0, "granularity": "model"}
    (note,) = run(found, settings(**options))
    assert int(note.split(": ")[1].split(" ")[0]) < 400
    assert "100.0% of the roundings settled" in note


def test_weights_alone_are_learned_where_activations_stay_float() -> None:
    found = graphs(changes={"activations.bits": "float", "input_bits": "float"})
    nearest = error(found)
    run(found, settings("qdrop", iterations=100, learning_rate=1e-2))
    assert error(found) < 0.7 * nearest


def test_named_blocks_are_blocks_of_their_own() -> None:
    notes = run(graphs(), settings(blocks=("conv1",)))
    assert any(note.startswith("reconstruction of conv1 (named):") for note in notes)
    with pytest.raises(ModelError, match="named block 1"):
        run(graphs(), settings(blocks=("nothing",)))


@pytest.mark.parametrize("granularity", ["layer", "block", "stage", "model"])
def test_any_granularity(granularity: str) -> None:
    found = graphs()
    nearest = error(found)
    run(found, settings("qdrop", granularity=granularity, iterations=100, learning_rate=1e-2))
    assert error(found) < 0.8 * nearest


def test_fisher_weights_change_the_result() -> None:
    plain, weighted = graphs(), graphs()
    run(plain, settings(learning_rate=0.1))
    run(weighted, settings(learning_rate=0.1, fisher=True))
    left, right = state(plain.simulated), state(weighted.simulated)
    assert any(not torch.equal(left[path], right[path]) for path in left)


def test_a_token_block_is_weighted_by_averaged_fisher_information() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 3)
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.reshape(x, (x.size(0), 3, 64)).transpose(1, 2)
            x = x + self.second(F.relu(self.first(x)))
            return self.head(x.mean(1))

    found = graphs(Mixer().eval())
    nearest = error(found)
    run(found, settings("qdrop", iterations=100, learning_rate=1e-2))
    assert error(found) < nearest


def test_no_images_is_an_error() -> None:
    found = graphs()
    with pytest.raises(CalibrationError, match="no images"):
        reconstruct(found.simulated, found.fused, [], settings())


def test_counts_multiply_accumulates() -> None:
    found = graphs()
    expected = 64 * (3 * 8 * 9 + 2 * 8 * 8 * 9) + 8 * 4
    assert macs_of(found.fused) == expected


def test_nothing_happens_without_a_learned_method() -> None:
    found = graphs()
    before = state(found.simulated)
    assert run(found, ReconstructionRecipe()) == []
    assert state(found.simulated).keys() == before.keys()
