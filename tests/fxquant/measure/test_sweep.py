from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.data import ImageBatches, ImageSet, Preprocessing
from fxquant.errors import ArtifactError, RecipeError
from fxquant.measure.studies import CALIBRATION_SIZE, STUDIES, VIT, Setting, start_points
from fxquant.measure.sweep import _changed, _Shuffled, sweep


class Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.layer1 = nn.Conv2d(4, 4, 3)
        self.layer2 = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.layer2(F.relu(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def run(
    study: str,
    recipe: str = "w8a8",
    *,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> fxquant.sweep.Sweep:
    images = torch.randn(10, 3, 10, 10)
    return sweep(
        study,
        Staged().eval(),
        fxquant.Recipe.named(recipe).replace(changes or {}),
        calibration=images,
        evaluation=[(images, torch.arange(10) % 3)],
        target="reference",
        **options,
    )


@pytest.mark.parametrize(
    ("study", "rows"),
    [
        ("fusion", 3),
        ("observers", 10),
        ("start_at", 3),
        ("calibration_size", 10),
        ("random_calibration", 2),
        ("weight_schemes", 40),
        ("activation_schemes", 56),
        ("one_sided", 12),
        ("granularity", 8),
        ("vit", 22),
        ("adaround", 112),
        ("brecq", 112),
        ("pdquant", 112),
        ("qat", 112),
    ],
)
def test_studies_have_the_rows_of_the_study(study: str, rows: int) -> None:
    settings = STUDIES[study](Staged())
    assert len(settings) == rows
    assert len({setting.name for setting in settings}) == rows


@pytest.mark.parametrize("study", STUDIES)
def test_every_setting_is_a_recipe(study: str) -> None:
    for setting in STUDIES[study](Staged()):
        fxquant.Recipe.named("w8a8").replace(setting.changes)


def test_the_float_row_comes_first_and_rows_have_all_figures() -> None:
    result = run("fusion")
    assert [row.name for row in result.rows] == ["float", "none", "blocks", "all"]
    assert not any(row.error for row in result.rows)
    for row in result.rows:
        assert row.evaluation is not None
        assert row.evaluation.loss is not None
        assert row.size_bytes
        assert row.latency_ms
    assert result.rows[-1].size_bytes < result.rows[0].size_bytes
    json.dumps(result.to_json(), allow_nan=False)
    assert str(result).splitlines()[2].startswith("float")


def test_start_points_are_layers_or_spread_over_the_longest_sequence() -> None:
    assert [setting.name for setting in start_points(Staged())] == ["all", "layer1", "layer2"]
    features = nn.Sequential(*(nn.ReLU() for _ in range(10)))
    names = [setting.name for setting in start_points(nn.ModuleDict({"features": features}))]
    assert names == ["all", "features.2", "features.4", "features.6", "features.8"]


def test_calibration_takes_the_share_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    compiled = fxquant.compile(
        Staged().eval(), "w8a8", calibration=torch.randn(2, 3, 10, 10), target="reference"
    )

    def counting(*arguments: object, calibration: list[Tensor], **options: object) -> object:
        seen.append(sum(len(images) for images in calibration))
        return compiled

    monkeypatch.setattr("fxquant.measure.sweep.compile", counting)
    kept = (CALIBRATION_SIZE[2], CALIBRATION_SIZE[9])
    monkeypatch.setitem(STUDIES, "calibration_size", lambda model: kept)
    result = run("calibration_size")
    assert seen == [3, 10]
    assert [row.images for row in result.rows] == [0, 3, 10]


def test_a_setting_that_fails_says_why_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    points = start_points(Staged())
    wrong = Setting("layer9", {"start_at": "layer9"})
    monkeypatch.setitem(STUDIES, "start_at", lambda model: (points[0], wrong))
    result = run("start_at")
    assert "layer9" in result.rows[-1].error
    assert "layer9: " in str(result)
    monkeypatch.setitem(STUDIES, "start_at", lambda model: (wrong,))
    with pytest.raises(RecipeError):
        run("start_at")


def test_the_vit_study_shows_what_it_varies_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("W4A8", "W8A8 I-ViT")
    kept = tuple(setting for setting in VIT if setting.name in names)
    monkeypatch.setitem(STUDIES, "vit", lambda model: kept)
    result = run("vit", recipe="vit_w8a8")
    assert not any(row.error for row in result.rows)
    header, _, _, w4a8, i_vit = (line.split() for line in str(result).splitlines()[:5])
    assert header[1:7] == ["weights", "activations", "softmax", "GELU", "LayerNorm", "residual"]
    assert w4a8[1:7] == ["4", "8", "float", "float", "float", "float"]
    assert i_vit[2:9] == ["8", "8", "i-vit", "8", "i-vit", "i-vit", "16"]


def test_every_row_has_the_float_top1_beside_its_own() -> None:
    header, _, *rows = str(run("fusion")).splitlines()
    assert "float top-1" in header
    shares = [row.split("%")[0].split()[-1] for row in rows[:4]]
    assert len(set(shares)) == 1


def test_integers_of_i_vit_are_exchanged_one_at_a_time() -> None:
    rows = {setting.name: setting.changes for setting in VIT}
    exchanged = rows["W4A8 I-ViT, residual in 8 bits"]
    assert {k: v for k, v in exchanged.items() if rows["W4A8 I-ViT"][k] != v} == {
        "operations.residual": 8
    }
    assert all(changes["requantization"] == "dyadic" for n, changes in rows.items() if "I-ViT" in n)


SHORT = {"reconstruction.iterations": 4}


def test_rows_of_a_learned_rounding_are_compiled_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[fxquant.CompiledModel] = []
    compile_ = fxquant.compile

    def keeping(*arguments: Any, **options: Any) -> fxquant.CompiledModel:
        made.append(compile_(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("fxquant.measure.sweep.compile", keeping)
    chosen = ("W4A32, BN unfolded, MSE, lr 0.01", "W2A4 head*, BN folded, min-max, lr 0.001")
    result = run("adaround", changes=SHORT, select=chosen)
    assert not any(row.error for row in result.rows)
    weights_only, mixed = (q.recipe for q in made)
    for recipe, rate in ((weights_only, 0.01), (mixed, 0.001)):
        assert recipe.reconstruction.method == "adaround"
        assert recipe.reconstruction.learning_rate == rate
        assert recipe.reconstruction.iterations == 4
    assert (weights_only.activations.bits, weights_only.input_bits) == ("float", "float")
    assert not weights_only.fold_batch_norm
    assert weights_only.weights.scheme == "symmetric"
    assert (mixed.weights.bits, mixed.activations.bits, mixed.weights.scheme) == (2, 4, "affine")
    assert mixed.overrides == fxquant.Recipe.named("w4a4_head_stem8").overrides


def test_overrides_of_a_row_come_behind_those_of_the_recipe() -> None:
    own = {"overrides": [{"modules": "layer1", "weights": {"bits": 8}}]}
    rows = {setting.name: setting for setting in STUDIES["brecq"](Staged())}
    setting = rows["W4A4 head/stem 8, BN folded, MSE, lr 0.01"]
    changed = _changed(fxquant.Recipe.named("w8a8").replace(own), setting)
    assert [override.modules for override in changed.overrides] == ["layer1", "", ""]


@pytest.mark.parametrize("labelled", [True, False])
def test_qat_trains_on_the_calibration_images(
    monkeypatch: pytest.MonkeyPatch, labelled: bool
) -> None:
    seen: list[dict[str, Any]] = []
    finetune = fxquant.finetune

    def noting(*arguments: Any, **options: Any) -> fxquant.CompiledModel:
        seen.append(options)
        return finetune(*arguments, **options)

    monkeypatch.setattr("fxquant.measure.sweep.finetune", noting)
    images = torch.randn(8, 3, 10, 10)
    training = [(images, torch.arange(8) % 3)] if labelled else None
    rows = ["W4A4, BN folded, MSE, lr 0.001"]
    result = run("qat", select=rows, epochs=1, training=training)
    (options,) = seen
    assert not result.rows[-1].error
    assert (options["learning_rate"], options["epochs"]) == (1e-3, 1)
    assert (options["loss"] is not None) == labelled


def test_images_are_trained_on_in_another_order_each_time() -> None:
    pixels = np.arange(32, dtype=np.uint8).reshape(32, 1, 1, 1).repeat(3, 3)
    names = tuple(map(str, range(32)))
    images = ImageSet(names, tuple(range(32)), pixels)
    batches = _Shuffled(ImageBatches(images, Preprocessing.parse("none"), batch_size=8))
    torch.manual_seed(0)
    epochs = [torch.cat([labels for _, labels in batches]) for _ in range(2)]
    assert len(batches) == 4
    assert not torch.equal(*epochs)
    assert all(torch.equal(epoch.sort().values, torch.arange(32)) for epoch in epochs)
    found = [(pixel, label) for x, y in batches for pixel, label in zip(x, y, strict=True)]
    assert all(round(float(pixel[0, 0, 0]) * 255) == int(label) for pixel, label in found)


def test_rows_are_chosen_by_globs_and_a_limit() -> None:
    result = run("observers", select=["MSE*", "min-max x histogram"], limit=2)
    names = [row.name for row in result.rows]
    assert names == ["float", "min-max x histogram", "MSE x histogram"]
    with pytest.raises(RecipeError, match=r"'W8\*' matches no row .* 112, such as 'W4A32, BN"):
        run("qat", select=["W8*"])


def test_an_unknown_study_is_an_error() -> None:
    with pytest.raises(RecipeError, match="did you mean 'fusion'"):
        run("fusions")


def test_noise_has_the_statistics_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []

    def noting(*arguments: Any, calibration: Any, **options: Any) -> fxquant.CompiledModel:
        seen.append(list(calibration))
        return fxquant.compile(*arguments, calibration=seen[-1], **options)

    monkeypatch.setattr("fxquant.measure.sweep.compile", noting)
    assert len(run("random_calibration").rows) == 3
    images, noise = (torch.cat(batches) for batches in seen)
    assert images.shape == noise.shape
    assert not torch.equal(images, noise)
    # 1,000 values a channel: the mean of their noise is off by about 1/32 of a deviation.
    assert float((images - noise).mean((0, 2, 3)).abs().max()) < 0.2
    torch.testing.assert_close(images.std((0, 2, 3)), noise.std((0, 2, 3)), rtol=0.1, atol=0)


def _compiles(monkeypatch: pytest.MonkeyPatch, fail_at: int = 99) -> list[str]:
    """The fusions of the recipes that a sweep compiles; the one at `fail_at` stops it."""
    seen: list[str] = []

    def noting(model: nn.Module, recipe: fxquant.Recipe, **options: Any) -> fxquant.CompiledModel:
        seen.append(recipe.fusion)
        if len(seen) > fail_at:
            raise KeyboardInterrupt
        return fxquant.compile(model, recipe, **options)

    monkeypatch.setattr("fxquant.measure.sweep.compile", noting)
    return seen


def seeded(**options: Any) -> Any:
    torch.manual_seed(0)
    return run("fusion", **options)


def test_an_interrupted_sweep_goes_on_behind_its_last_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as first:
        _compiles(first, fail_at=2)
        with pytest.raises(KeyboardInterrupt):
            seeded(checkpoint=tmp_path)
    compiled = _compiles(monkeypatch)
    resumed = seeded(checkpoint=tmp_path)
    assert compiled == ["all"]
    again = seeded()
    assert [row.evaluation for row in resumed.rows] == [row.evaluation for row in again.rows]


def test_rows_of_another_sweep_are_refused(tmp_path: Path) -> None:
    seeded(checkpoint=tmp_path, limit=1)
    with pytest.raises(ArtifactError, match="another study, model, recipe"):
        seeded(checkpoint=tmp_path, changes={"weights.bits": 4})


def test_a_damaged_row_says_what_to_remove(tmp_path: Path) -> None:
    seeded(checkpoint=tmp_path, limit=1)
    for file in tmp_path.iterdir():
        file.write_text("{")
    with pytest.raises(ArtifactError, match="remove it, and it is measured again"):
        seeded(checkpoint=tmp_path, limit=1)


def _reached(found: fxquant.sweep.Sweep) -> list[tuple[str, Any, Any]]:
    reached = [(row.name, row.evaluation) for row in found.rows]
    return [(name, each and each.top1, each and each.agreement) for name, each in reached]


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = seeded(checkpoint=f"{folder}/rows-{rank}")
    torch.save(_reached(found), f"{folder}/{rank}")
    dist.barrier()  # gloo aborts a process whose peer has gone while it takes leave
    dist.destroy_process_group()


def test_processes_share_the_rows_and_all_have_the_whole_sweep(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert first == second == _reached(seeded())
    # Three settings and the float row: the first process measured two settings, the other one.
    kept = [len(list((tmp_path / f"rows-{rank}").iterdir())) for rank in (0, 1)]
    assert kept == [3, 2]
