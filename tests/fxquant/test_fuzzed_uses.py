"""Whatever a user hands over, the answer is a result or an FxquantError of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.data import open_batches
from fxquant.frontend.models import load_model
from fxquant.qat.finetune import finetune
from tests.fxquant.fuzzing import Use, raw_error, uses

pytestmark = pytest.mark.filterwarnings("ignore")


def right_uses(folder: Path) -> list[Use]:
    """Each public function with arguments that are right."""
    torch.manual_seed(0)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
    ).eval()
    recipe = fxquant.Recipe.named("w8a8")
    q = fxquant.compile(model, recipe, calibration=x, target="reference")
    file = str(folder / "m.fxq")
    q.save(file)
    table = fxquant.sensitivity(q, recipe, [(x, labels)], bits=(4, 8))
    options = {"calibration": x, "target": "reference", "check_inputs": True, "diff_passes": ()}
    compile_use: Use = ("compile", fxquant.compile, (model, recipe), options)
    raising = options | {
        "accuracy_target": fxquant.Drop(100),
        "metric": lambda outputs, targets: outputs.sum(),
        "validation": [(x, labels)],
    }
    return [
        compile_use,
        ("q", q, (x,), {}),
        compile_use,
        ("load", fxquant.load, (file,), {"target": "reference"}),
        ("evaluate", fxquant.evaluate, (q, [(x, labels)]), {"reference": model, "classes": 4}),
        ("Recipe.replace", recipe.replace, ({"weights.bits": 4},), {}),
        ("Recipe.named", fxquant.Recipe.named, ("w8a8",), {}),
        ("Recipe.from_dict", fxquant.Recipe.from_dict, (recipe.to_dict(),), {}),
        ("Recipe.from_toml", fxquant.Recipe.from_toml, (folder / "r.toml",), {}),
        ("compile to a target", fxquant.compile, (model, recipe), raising),
        ("save", q.save, (folder / "n.fxq",), {}),
        ("to_target", q.to_target, ("reference",), {}),
        ("compare", fxquant.compare, (q, x), {}),
        ("sensitivity", fxquant.sensitivity, (q, recipe, x), {"bits": (4,), "images": 1}),
        ("choose_bits", fxquant.choose_bits, (table, 400), {"objective": "kl", "fixed": {}}),
        ("auto_recipe", fxquant.auto_recipe, (recipe, {"0": 4}), {"name": "n"}),
        ("benchmark", fxquant.benchmark, ({"q": q}, x), {"rounds": 1, "calls": 1, "warmup": 0}),
        ("compare_ops", fxquant.compare_ops, (model, recipe, x), {"worst": 1}),
        ("finetune", finetune, (q, [(x, labels)]), {"epochs": 1, "device": "cpu"}),
        ("open_batches", open_batches, (folder,), {"preprocessing": "none", "images": 1}),
        ("load_model", load_model, ("torchvision:nothing",), {"weights": None, "classes": 4}),
        ("Drop", fxquant.Drop, (0.5,), {"relative": True, "images": 3}),
        ("Metric", fxquant.Metric, (lambda outputs, targets: 0.0,), {"per_batch": True}),
        ("evaluate by a metric", fxquant.evaluate, (q, [(x, labels)]),
         {"metric": lambda outputs, targets: outputs.sum(), "reference": model}),
        ("export_cpp", q.export_cpp, (folder,), {"name": "model"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "seed"), [(100, 0), pytest.param(500, 1, marks=pytest.mark.slow)]
)
def test_no_use_of_the_api_ends_in_a_raw_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, seed: int
) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for name, function, args, kwargs in uses(count, seed, right_uses(tmp_path)):
        raw = raw_error(lambda: function(*args, **kwargs))  # noqa: B023
        if raw:
            found[name] = (args, kwargs, raw)
    assert not found, "\n".join(f"{name}\n    {what}" for name, what in found.items())
