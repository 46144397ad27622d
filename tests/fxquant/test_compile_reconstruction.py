"""Recipes that round better than to nearest, from the recipe's name to the integer graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ArtifactError, CompileError, RecipeError
from fxquant.reconstruct import loop
from fxquant.simulate.quantizers import WeightQuantizer
from passes import FusedLayer
from tests.fxquant.small_networks import Residual, images

LEARNED = ("adaround", "brecq", "qdrop", "pdquant")
SHORT = {
    "reconstruction.iterations": 300,
    "reconstruction.batch_size": 8,
    "reconstruction.learning_rate": 1e-2,
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def compiled(
    name: str, changes: dict[str, Any] | None = None, calibration: Any = None, **options: Any
) -> fxquant.CompiledModel:
    return fxquant.compile(
        model(),
        fxquant.Recipe.named(name).replace(SHORT | (changes or {})),
        calibration=images(16) if calibration is None else calibration,
        target="reference",
        **options,
    )


def codes(q: fxquant.CompiledModel) -> dict[str, Tensor]:
    found = {}
    for path, layer in q.stages["simulated"].named_modules():
        if isinstance(layer, FusedLayer):
            quantizer = layer.weight_quantizer
            assert isinstance(quantizer, WeightQuantizer)
            found[path], zero_point = quantizer.integers(layer.layer.weight.detach())
            assert zero_point is None
    return found


def error(q: fxquant.CompiledModel) -> float:
    """Of the logits on the calibration images."""
    with torch.no_grad():
        return float((q(images(16)) - model()(images(16))).square().mean())


@pytest.fixture(scope="module")
def nearest() -> fxquant.CompiledModel:
    # A bias correction would leave nothing to gain: this network's head reads means alone.
    return compiled("w3a8", {"bias_correction": False})


@pytest.mark.parametrize("method", ["gptq", *LEARNED])
def test_a_method_at_the_end_of_the_name_rounds_otherwise_and_not_worse(
    method: str, nearest: fxquant.CompiledModel
) -> None:
    q = compiled(f"w3a8_{method}")
    before, after = codes(nearest), codes(q)
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[path], after[path]) for path in before) >= 3
    # Learned rounding goes up or down from the float weight; GPTQ feeds errors back.
    steps = [int((before[path].int() - after[path].int()).abs().max()) for path in before]
    assert method == "gptq" or max(steps) == 1
    assert error(q) <= error(nearest)
    assert q.recipe.name == f"w3a8_{method}"


def test_the_integer_graph_holds_the_codes_that_were_learned() -> None:
    q = compiled("w3a8_brecq", {"reconstruction.iterations": 20})
    stored = [t for t in q.stages["integer"].state_dict().values() if t.dtype == torch.int8]
    learned = [code.to(torch.int8).flatten() for code in codes(q).values()]
    assert len(stored) == len(learned) == 4
    for code in learned:
        assert any(torch.equal(code, tensor.flatten()) for tensor in stored)


@pytest.mark.parametrize("method", ["gptq", "brecq"])
def test_notes_of_the_rounding_are_in_the_report(method: str) -> None:
    notes = compiled(f"w4a8_{method}", {"reconstruction.iterations": 4}).report.notes
    assert any(note.startswith(("reconstruction of conv1", "gptq")) for note in notes)
    assert any("bias correction" in note for note in notes) == (method == "gptq")


def test_a_learned_rounding_may_start_from_the_closed_form() -> None:
    still = {"reconstruction.iterations": 1, "reconstruction.learning_rate": 1e-6}
    closed = codes(compiled("w3a8_gptq"))
    started = codes(compiled("w3a8_brecq", {**still, "reconstruction.start": "gptq"}))
    assert all(torch.equal(closed[path], started[path]) for path in closed)
    usual = codes(compiled("w3a8_brecq", still))
    assert not all(torch.equal(closed[path], usual[path]) for path in closed)


@pytest.mark.parametrize("method", ["gptq", "qdrop"])
def test_calibration_may_be_a_one_shot_iterator(method: str) -> None:
    def once() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images(16).split(8):
            yield batch, torch.zeros(len(batch), dtype=torch.int64)

    few = {"reconstruction.iterations": 10}
    again = compiled(f"w4a8_{method}", few, calibration=list(images(16).split(8)))
    found = compiled(f"w4a8_{method}", few, calibration=once())
    assert torch.equal(found(images(16)), again(images(16)))


@pytest.mark.parametrize("method", ["adaround", "qdrop"])
def test_an_interrupted_compile_resumes_to_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"reconstruction.iterations": 10}
    whole = compiled(f"w4a4_{method}", few)
    trained: list[str] = []
    train = loop.train_block

    def stops_at_the_third(name: str, *arguments: Any, **options: Any) -> Any:
        trained.append(name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(name, *arguments, **options)

    monkeypatch.setattr(loop, "train_block", stops_at_the_third)
    file = tmp_path / "done.safetensors"
    with pytest.raises(KeyboardInterrupt):
        compiled(f"w4a4_{method}", few, checkpoint=file)
    resumed = compiled(f"w4a4_{method}", few, checkpoint=str(file), resume=True)

    assert len(trained) == len(set(trained)) + 1
    assert torch.equal(resumed(images(16)), whole(images(16)))
    assert resumed.report.notes == whole.report.notes


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    few = {"reconstruction.iterations": 4}
    file = tmp_path / "done.safetensors"
    compiled("w4a8_adaround", few, checkpoint=file)
    with pytest.raises(ArtifactError, match="another model, recipe or calibration"):
        compiled("w4a8_adaround", few | {"reconstruction.seed": 1}, checkpoint=file, resume=True)


def test_a_loss_that_is_not_finite_names_the_block() -> None:
    diverging = {"reconstruction.learning_rate": 1.0, "reconstruction.regularizer": 1e6}
    settings = diverging | {"reconstruction.iterations": 4}
    poisoned = model()
    with torch.no_grad():
        poisoned.get_parameter("conv1.weight").mul_(1e25)
    with pytest.raises(CompileError, match="conv1"):
        fxquant.compile(
            poisoned,
            fxquant.Recipe.named("w4a32_brecq").replace(settings),
            calibration=images(8),
            target="reference",
        )


def test_what_is_compiled_saves_and_loads(tmp_path: Path) -> None:
    q = compiled("w4a8_gptq")
    q.save(tmp_path / "m.fxq")
    loaded = fxquant.load(tmp_path / "m.fxq", target="reference")
    assert torch.equal(loaded(images(4)), q(images(4)))
    assert loaded.recipe.reconstruction.method == "gptq"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a8_adaroun", "did you mean 'w4a8_adaround'"),
        ("w4a8_gptq_brecq", "w4a8"),
        ("w3a5_head_stem8_pdqant", "did you mean 'w3a5_head_stem8_pdquant'"),
        ("w9a8_brecq", r"w\{2..8\}a\{2..8\|16\|32\}.*_brecq"),
    ],
)
def test_an_unknown_ending_is_told_from_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fxquant.compile(model(), name, calibration=images())


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused_before_the_work(device: str) -> None:
    with pytest.raises(fxquant.InputError, match=f"device {device}: "):
        fxquant.compile(nn.Linear(3, 3), "w8a8", calibration=torch.zeros(0), device=device)


def test_a_checkpoint_without_a_learned_rounding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe w8a8 learns nothing"):
        fxquant.compile(
            Residual(), "w8a8", calibration=images(), checkpoint=tmp_path / "x.pt", resume=True
        )


def test_a_block_that_no_module_has_is_named_by_its_selector() -> None:
    recipe = fxquant.Recipe.named("w4a8_brecq").replace({"reconstruction.blocks": ["conv9"]})
    with pytest.raises(RecipeError, match=r"reconstruction.blocks\[0\]: 'conv9' matches no module"):
        fxquant.compile(Residual(), recipe, calibration=images())
