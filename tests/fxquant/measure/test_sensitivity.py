import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import FxquantError, ModelError, RecipeError
from fxquant.measure.auto_bits import auto_recipe, choose_bits, weight_bytes
from fxquant.measure.sensitivity import Effect, Sensitivity, measure
from tests.fxquant.small_networks import Residual, compiled, images

LAYERS = ["stem", "conv1", "conv2", "head"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(images(4), torch.arange(4)), (images(2), torch.arange(2))]


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return measure(model(), "w8a8", labelled(), activations=True)


# -- measuring -----------------------------------------------------------------------------


def test_every_layer_is_measured_at_every_bit_width(found: Sensitivity) -> None:
    weights = found.of("weight")

    assert list(weights) == LAYERS
    assert all(list(effects) == [2, 3, 4, 8] for effects in weights.values())
    assert weights["stem"][2].values == 3 * 8 * 9
    assert found.images == 6


def test_more_bits_disturb_less(found: Sensitivity) -> None:
    for effects in (*found.of("weight").values(), *found.of("activation").values()):
        assert effects[8].sqnr_db > effects[4].sqnr_db > effects[2].sqnr_db


def test_an_effect_is_that_of_the_layer_alone_in_the_simulated_graph(found: Sensitivity) -> None:
    network = model()
    only_conv1 = {
        "weights.bits": "float",
        "activations.bits": "float",
        "bias_correction": False,
        "overrides": [{"modules": "conv1", "weights": {"bits": 3}}],
    }
    q = compiled(network, only_conv1, calibration=images(4), target="reference")
    batch = torch.cat([x for x, _ in labelled()])
    want = network(batch).detach().double()
    noise = (q.stages["simulated"](batch).detach().double() - want).square().sum()

    expected = 10 * math.log10(float(want.square().sum() / noise))

    assert math.isclose(found.of("weight")["conv1"][3].sqnr_db, expected, rel_tol=1e-4)


def test_the_loss_is_that_of_the_labels(found: Sensitivity) -> None:
    network = model()
    loss = sum(
        float(nn.functional.cross_entropy(network(x).detach(), y, reduction="sum"))
        for x, y in labelled()
    )

    assert found.float_loss is not None
    assert math.isclose(found.float_loss, loss / 6, rel_tol=1e-4)


def test_without_labels_there_is_no_loss() -> None:
    found = measure(model(), "w8a8", images(4), bits=[4])

    assert found.float_loss is None
    assert all(row.loss is None and row.kl is not None for row in found.rows)


def test_a_compiled_model_is_measured_against_its_float_network(found: Sensitivity) -> None:
    q = compiled(model(), {"bias_correction": True}, target="reference")

    again = measure(q, "", labelled(), bits=[2])

    for row in again.rows:
        assert math.isclose(row.sqnr_db, found.of("weight")[row.path][2].sqnr_db, rel_tol=1e-4)


def test_an_output_without_classes_has_no_kl() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()

    found = measure(network, "w8a32", images(4), bits=[4])

    assert [row.kl for row in found.rows] == [None]


def test_a_one_shot_iterator_is_enough() -> None:
    assert measure(model(), "w8a8", iter(labelled()), bits=[8]).images == 6


def test_json_gives_an_equal_sensitivity_back(found: Sensitivity) -> None:
    assert Sensitivity.from_json(found.to_json()) == found


def test_the_table_names_layers_and_widths(found: Sensitivity) -> None:
    text = str(found)

    assert all(name in text for name in (*LAYERS, "SQNR 2 bit", "KL 8 bit"))


def test_a_loaded_artefact_is_refused(tmp_path: Path) -> None:
    compiled(model()).save(tmp_path / "m.fxq")

    with pytest.raises(ModelError, match="holds no float network"):
        measure(fxquant.load(tmp_path / "m.fxq"), "", images())


@pytest.mark.parametrize("bits", [[], [1], [16], [True]])
def test_a_width_that_is_none_is_refused(bits: Any) -> None:
    with pytest.raises(RecipeError, match="between 2 and 8"):
        measure(model(), "w8a8", images(), bits=bits)


# -- the plot ------------------------------------------------------------------------------


def test_a_plot_without_matplotlib_says_what_to_install(
    found: Sensitivity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(FxquantError, match=r"pip install 'fxquant\[plots\]'"):
        found.plot(tmp_path / "s.png")


def test_the_plot_is_written(found: Sensitivity, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    found.plot(tmp_path / "s.png")

    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FxquantError, match="the plot cannot be written"):
        found.plot(tmp_path / "s.nothing")


# -- choosing ------------------------------------------------------------------------------


def made(*layers: tuple[int, dict[int, float]]) -> Sensitivity:
    """Layers a, b, c, ... with so many weights and a KL for each width."""
    rows = [
        Effect("abcdef"[index], "weight", width, values, -10 * math.log10(kl), kl, 1 + kl)
        for index, (values, harms) in enumerate(layers)
        for width, kl in harms.items()
    ]
    return Sensitivity(tuple(rows), "made", 1, 1.0)


THREE = made(
    (100, {2: 0.5, 4: 0.1, 8: 0.01}),
    (70, {2: 0.9, 4: 0.2, 8: 0.01}),
    (30, {2: 0.3, 4: 0.25, 8: 0.02}),
)


@pytest.mark.parametrize("storage", ["file", "bits"])
@pytest.mark.parametrize("budget", [100, 110, 130, 155, 200, 1000])
def test_the_choice_is_the_best_of_all(budget: int, storage: Any) -> None:
    layers = THREE.of("weight")

    def fits(widths: tuple[int, ...]) -> bool:
        return weight_bytes(THREE, dict(zip("abc", widths, strict=True)), storage=storage) <= budget

    def harm(widths: tuple[int, ...]) -> float:
        return sum(layers[p][w].kl for p, w in zip("abc", widths, strict=True))

    best = min(filter(fits, itertools.product((2, 4, 8), repeat=3)), key=harm)

    chosen = choose_bits(THREE, budget, storage=storage)

    assert math.isclose(harm(tuple(chosen.values())), harm(best))
    assert fits(tuple(chosen.values()))


@pytest.mark.parametrize("objective", ["kl", "loss", "noise"])
def test_every_objective_ranks_the_same_harms_alike(objective: Any) -> None:
    assert choose_bits(THREE, 130, objective=objective) == choose_bits(THREE, 130)


def test_a_ratio_is_a_budget() -> None:
    assert choose_bits(THREE, ratio=6) == choose_bits(THREE, 4 * 200 / 6)


def test_a_fixed_layer_keeps_its_width() -> None:
    assert choose_bits(THREE, 180, fixed={"b": 4})["b"] == 4


def test_many_sizes_are_counted_in_coarser_units_within_the_budget() -> None:
    layers = [(1_000_003 + 2 * i, {2: 0.5 + i, 4: 0.1, 8: 0.01}) for i in range(6)]
    sensitivity = made(*layers)

    chosen = choose_bits(sensitivity, 3_700_000, storage="bits")

    assert weight_bytes(sensitivity, chosen, storage="bits") <= 3_700_000
    assert sum(width == 8 for width in chosen.values()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a size budget in bytes or a ratio"),
        ({"size_budget_bytes": 100, "ratio": 4}, "one of the two"),
        ({"size_budget_bytes": 40}, "too small: the weights take at least 51 bytes"),
        ({"ratio": -1}, "must be positive"),
        ({"ratio": 4, "fixed": {"d": 4}}, "no layer 'd'"),
        ({"ratio": 4, "fixed": {"a": 5}}, "a was not measured at 5 bits"),
        ({"ratio": 4, "objective": "top1"}, "unknown objective 'top1'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_bits(THREE, **options)


def test_the_loss_needs_labels() -> None:
    without = Sensitivity(THREE.rows, "made", 1)

    with pytest.raises(RecipeError, match="needs labels"):
        choose_bits(without, ratio=4, objective="loss")


def test_an_auto_recipe_compiles_to_the_chosen_widths(found: Sensitivity) -> None:
    bits = choose_bits(found, ratio=6.5)
    recipe = auto_recipe(fxquant.Recipe.named("w8a8"), bits)

    q = fxquant.compile(model(), recipe, calibration=images(), target="reference")

    assert recipe.name == "w8a8_auto"
    assert len(set(bits.values())) > 1
    for path, width in bits.items():
        quantizer = q.stages["simulated"].get_submodule(path).weight_quantizer
        assert quantizer.qparams.qmax == 2 ** (width - 1) - 1
    assert fxquant.Recipe.from_dict(recipe.to_dict()) == recipe
