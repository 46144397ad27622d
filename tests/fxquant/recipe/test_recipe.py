from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import RecipeError
from fxquant.recipe import (
    GRAMMAR,
    METHODS,
    ActivationRecipe,
    CalibrationRecipe,
    Override,
    Recipe,
    Selector,
    WeightRecipe,
    names,
)
from fxquant.spec import OBSERVERS, QuantSpec

NAMES = ["conv1", "layer1", "layer1.0", "layer1.0.conv1", "layer1.0.relu", "layer2.0.conv1", "fc"]
TYPES = {
    "conv1": "Conv2d",
    "layer1.0.conv1": "Conv2d",
    "layer1.0.relu": "ReLU",
    "layer2.0.conv1": "Conv2d",
    "fc": "Linear",
}

# -- named recipes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names.file_names())
def test_named_recipe_opens_and_is_described(name: str) -> None:
    assert Recipe.named(name).name == name
    assert len(names.describe()[name]) > 20


def test_the_promised_recipes_exist() -> None:
    promised = (
        "bf16 w8a8 w8a8_bf16 w8a8_onnx w8a8_x86 w8a32 w4a32 w4a8 w4a4_head_stem8 dynamic_w8a8"
    )
    assert set(promised.split()) <= set(names.file_names())


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'w8a9'.*did you mean 'w8a8'"):
        Recipe.named("w8a9")


@pytest.mark.parametrize(
    ("name", "file", "method", "bits"),
    [
        ("w4a8_adaround", "w4a8", "adaround", (4, 8)),
        ("w2a4_head_stem8_qdrop", "w4a4_head_stem8", "qdrop", (2, 4)),
        ("w4a4_first_last8", "w4a4_first_last8", "none", (4, 4)),
        ("w3a32_gptq", "w4a32", "gptq", (3, "float")),
        ("w8a8_x86_brecq", "w8a8_x86", "brecq", (8, 8)),
    ],
)
def test_names_follow_a_grammar(
    name: str, file: str, method: str, bits: tuple[int, int | str]
) -> None:
    recipe = Recipe.named(name)
    assert (recipe.name, recipe.reconstruction.method) == (name, method)
    assert (recipe.weights.bits, recipe.activations.bits) == bits
    assert recipe.overrides == Recipe.named(file).overrides


@pytest.mark.parametrize("ending", ["_head_stem8", "_first_last8"])
def test_32_keeps_every_activation_float(ending: str) -> None:
    recipe = Recipe.named(f"w3a32{ending}")
    for position, bits in (("first", 8), ("", 3), ("last", 8)):
        layer = ("conv", "Conv2d", position)
        weight = recipe.spec_for_weight(*layer)
        assert weight is not None
        assert weight.bits == bits
        assert recipe.spec_for_output(*layer) is None
        assert recipe.spec_for_input(*layer) is None
    assert recipe.spec_for_network_input() is None


def test_the_grammar_is_told_with_every_method() -> None:
    told = names.grammar()
    assert all(f"\n  {method}" in told for method in METHODS)
    with pytest.raises(RecipeError, match=re.escape(GRAMMAR)):
        Recipe.named("w4b8")


def test_recipe_module_can_be_imported_on_its_own() -> None:
    code = "from fxquant.recipe import Recipe; Recipe.named('w8a8')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_head_and_stem_stay_in_8_bits() -> None:
    recipe = Recipe.named("w4a4_head_stem8")

    def bits(spec: QuantSpec | None) -> int:
        assert spec is not None
        return spec.bits

    assert bits(recipe.spec_for_weight("conv1", "Conv2d", "first")) == 8
    assert bits(recipe.spec_for_output("conv1", "Conv2d", "first")) == 8
    assert bits(recipe.spec_for_weight("layer1", "Conv2d")) == 4
    assert bits(recipe.spec_for_output("layer1", "Conv2d")) == 4
    assert bits(recipe.spec_for_weight("fc", "Linear", "last")) == 8
    assert bits(recipe.spec_for_input("fc", "Linear", "last")) == 8
    assert bits(recipe.spec_for_output("fc", "Linear", "last")) == 4


# -- reading and writing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", names.file_names())
def test_named_recipe_round_trips(name: str) -> None:
    recipe = Recipe.named(name)
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


OPTIONS = {
    "p_norm": {"p": 1.5, "bins": 1024},
    "percentile": {"percentile": 99.9},
    "moving_average_min_max": {"momentum": 1e-05},
}
OBSERVED = st.sampled_from(sorted(OBSERVERS)).map(
    lambda name: {"observer": name, "options": OPTIONS.get(name, {})}
)
SECTION = st.fixed_dictionaries(
    {}, optional={"bits": st.sampled_from([3, 8, "float"]), "reduce_range": st.booleans()}
)
OVERRIDE = st.tuples(
    st.fixed_dictionaries({"modules": st.text(min_size=1)}),
    st.fixed_dictionaries({}, optional={"weights": SECTION, "inputs": OBSERVED}),
).map(lambda pair: pair[0] | pair[1])
TABLE = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(),
        "fusion": st.sampled_from(["all", "blocks", "two-step", "none"]),
        "equalize": st.booleans(),
        "bias_correction": st.booleans(),
        "start_at": st.text(),
        "float": st.lists(st.text(min_size=1).map(lambda text: "x" + text), max_size=3),
        "input_bits": st.sampled_from([8, 16, "float"]),
        "weights": st.builds(lambda a, b: a | b, SECTION, OBSERVED),
        "activations": st.builds(lambda a, b: a | b, SECTION, OBSERVED),
        "calibration": st.fixed_dictionaries({"source": st.text(), "images": st.integers(0, 99)}),
        "overrides": st.lists(OVERRIDE, max_size=3),
    },
)


@given(table=TABLE)
@settings(max_examples=100, deadline=None)
def test_any_recipe_round_trips(table: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(table)
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert hash(Recipe.from_dict(recipe.to_dict())) == hash(recipe)
    assert recipe.replace({}) == recipe


def test_file_without_a_name_is_called_as_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[weights]\nbits = 4\n", encoding="utf-8")
    recipe = Recipe.from_toml(path)
    assert (recipe.name, recipe.weights.bits) == ("mine", 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("weights = = 4", r"mine.toml: is no TOML: .*line 1"),
        ("fussion = 'all'", r"mine.toml: unknown key 'fussion' in the recipe; did you mean 'fusi"),
        ("[weights]\nbit = 4", r"unknown key 'bit' in weights; did you mean 'bits'"),
        ("[weights.options]\np = 2.0", r"weights.options: observer 'mse' has no option 'p'"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        Recipe.from_toml(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere.toml: cannot be read"):
        Recipe.from_toml(tmp_path / "nowhere.toml")


# -- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"fusion": "some"}, 'fusion must be "all", "blocks", "two-step" or "none", got \'some\''),
        ({"fold_batch_norm": 1}, "fold_batch_norm must be true or false, got 1"),
        ({"requantization": "dyadic", "dynamic": True}, "dyadic.* is static"),
        ({"input_bits": 4}, 'input_bits must be 8, 16 or "float", got 4'),
        ({"equalize": "yes"}, "equalize must be true or false, got 'yes'"),
        ({"float": "fc"}, "float must be a list of texts, got 'fc'"),
        ({"float": ["position:middle"]}, "position must be 'first' or 'last'"),
        ({"float": ["regex:("]}, "no regular expression"),
        ({"weights": 8}, "weights must be a table, got 8"),
        ({"weights": {"bits": 16}}, "weights.bits must be 2, .*, got 16"),
        ({"weights": {"bits": True}}, "weights.bits must be"),
        ({"weights": {"bits": 8.0}}, "weights.bits must be"),
        ({"weights": {"one_sided": True}}, "unknown key 'one_sided' in weights"),
        ({"activations": {"bits": 9}}, "activations.bits must be"),
        ({"activations": {"granularity": "per_channel"}}, "unknown key 'granularity'"),
        ({"activations": {"observer": "mean"}}, "activations.observer is an unknown observer"),
        ({"activations": {"bits": 2, "reduce_range": True}}, "reduce_range needs at least 3"),
        ({"calibration": {"images": -1}}, "calibration.images must be an integer from 0"),
        ({"calibration": {"batch": 4}}, "unknown key 'batch'.*did you mean 'batch_size'"),
        ({"overrides": {}}, "overrides must be a list of tables"),
        ({"overrides": [{"weights": {}}]}, "exactly one of modules, regex, type, position"),
        ({"overrides": [{"modules": "a", "type": "b"}]}, "got modules, type"),
        ({"overrides": [{"modul": "a"}]}, r"unknown key 'modul' in overrides\[0\]"),
        (
            {"overrides": [{"modules": "a"}, {"modules": "b", "weights": {"bits": 1}}]},
            r"overrides\[1\].weights.bits must be",
        ),
        (
            {"overrides": [{"modules": "a", "weights": {"options": {"p": 3.0}}}]},
            r"overrides\[0\]: weights.options: observer 'mse' has no option 'p'",
        ),
    ],
)
def test_refuses_a_recipe(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(table)


def test_constructor_is_as_strict() -> None:
    with pytest.raises(RecipeError, match=r"weights\.bits"):
        WeightRecipe(bits=9)
    with pytest.raises(RecipeError, match=r"activations\.one_sided"):
        ActivationRecipe(one_sided=1)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"calibration\.batch_size"):
        CalibrationRecipe(batch_size=0)
    with pytest.raises(RecipeError, match="fusion"):
        Recipe(fusion="some")  # type: ignore[arg-type]


# -- replace -------------------------------------------------------------------------------------


def test_replace_changes_a_copy() -> None:
    recipe = Recipe.named("w8a8")
    changed = recipe.replace({"weights.bits": 4, "fusion": "none", "float": ["fc"]})
    assert (changed.weights.bits, changed.fusion, changed.float) == (4, "none", ("fc",))
    assert recipe == Recipe.named("w8a8")


def test_replace_takes_tables_and_overrides() -> None:
    changed = Recipe().replace(
        {
            "weights": {"bits": 4, "scheme": "affine"},
            "overrides": [{"type": "Linear", "weights": {"bits": 8}}, Override(modules="a")],
        }
    )
    assert (changed.weights.bits, changed.weights.scheme) == (4, "affine")
    assert changed.weights.granularity == Recipe().weights.granularity
    assert [override.type for override in changed.overrides] == ["Linear", ""]


def test_another_observer_drops_the_options_of_the_old_one() -> None:
    recipe = Recipe.named("w4a8")
    assert dict(recipe.weights.options) == {"p": 2.4}
    assert recipe.replace({"weights.observer": "min_max"}).weights.options == ()
    changed = recipe.replace({"weights.options.p": 3.0, "weights.observer": "p_norm"})
    assert dict(changed.weights.options) == {"p": 3.0}
    changed = recipe.replace({"weights.options.bins": 512, "weights.observer": "mse"})
    assert dict(changed.weights.options) == {"bins": 512}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("weights.bit", "unknown key 'weights.bit' in the recipe; did you mean 'weights.bits'"),
        ("weight.bits", "did you mean 'weights.bits'"),
        ("fusion.kind", "unknown key 'fusion.kind'"),
        ("weights.options.q", "has no option 'q'"),
    ],
)
def test_replace_refuses_unknown_paths(path: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe().replace({path: 1})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("weights.bits=4", "weights.bits", 4),
        ("weights.bits = float", "weights.bits", "float"),
        ("equalize=true", "equalize", True),
        ("fusion=blocks", "fusion", "blocks"),
        ("start_at=layer1.0", "start_at", "layer1.0"),
        ('float=["fc", "layer1.*"]', "float", ["fc", "layer1.*"]),
        ("weights.options={p = 2.0}", "weights.options", {"p": 2.0}),
        ("weights.observer=p_norm_2.4", "weights.observer", "p_norm_2.4"),
        ("calibration.source=a=b", "calibration.source", "a=b"),
    ],
)
def test_parses_assignments(text: str, key: str, value: object) -> None:
    assert Recipe.parse_assignment(text) == (key, value)


@pytest.mark.parametrize("text", ["weights.bits", "=4", ""])
def test_refuses_what_is_no_assignment(text: str) -> None:
    with pytest.raises(RecipeError, match="no KEY=VALUE"):
        Recipe.parse_assignment(text)


# -- selectors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "matches"),
    [
        ("conv1", "conv1", True),
        ("conv1", "conv10", False),
        ("layer1", "layer1.0.conv1", True),
        ("layer1.*", "layer1.0.conv1", True),
        ("layer1.*", "layer1", False),
        ("layer?.0", "layer2.0.conv1", True),
        ("*.conv1", "layer2.0.conv1", True),
        ("conv1", "layer2.0.conv1", False),
        ("regex:layer[12]", "layer1.0", False),
        (r"regex:layer[12]\..*", "layer1.0", True),
        ("type:Conv2d", "anything", True),
        ("type:Conv?d", "anything", True),
        ("type:Linear", "anything", False),
        ("position:first", "anything", True),
        ("position:last", "anything", False),
        ("*", "", True),
    ],
)
def test_selectors(text: str, path: str, matches: bool) -> None:
    selector = Selector.parse(text)
    assert selector.matches(path, "Conv2d", "first") is matches
    assert str(selector) == text


def test_a_single_layer_is_first_and_last() -> None:
    assert Selector("position", "last").matches("fc", "Linear", ("first", "last"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"float": ["layr1"]}, r"float\[0\]: 'layr1' matches no module; did you mean 'layer1'"),
        ({"float": ["fc", "type:Conv3d"]}, r"float\[1\]: 'type:Conv3d' .* did you mean 'Conv2d'"),
        ({"float": ["regex:zzz.*"]}, "matches no module; there are conv1, fc, layer1"),
        ({"start_at": "layer3"}, "start_at: 'layer3' matches no module; did you mean"),
        ({"overrides": [{"type": "Lineer"}]}, r"overrides\[0\]: .* did you mean 'Linear'"),
    ],
)
def test_selectors_must_match(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe().replace(changes).check_selectors(NAMES, TYPES)


def test_selectors_that_match_pass() -> None:
    Recipe().replace(
        {
            "start_at": "layer1",
            "float": ["fc", "type:ReLU", "position:last"],
            "overrides": [{"regex": r".*conv\d"}, {"modules": "layer2"}],
        }
    ).check_selectors(NAMES, TYPES)


# -- what it says about a module -----------------------------------------------------------------


def test_later_overrides_win() -> None:
    recipe = Recipe().replace(
        {
            "overrides": [
                {"type": "Conv2d", "weights": {"bits": 4, "scheme": "affine"}},
                {"modules": "layer1", "weights": {"bits": 6}},
            ]
        }
    )
    spec = recipe.spec_for_weight("layer1.0.conv1", "Conv2d")
    assert spec is not None
    assert (spec.bits, spec.scheme, spec.kind) == (6, "affine", "weight")
    spec = recipe.spec_for_weight("conv1", "Conv2d")
    assert spec is not None
    assert spec.bits == 4


def test_float_modules_have_no_spec() -> None:
    recipe = Recipe().replace({"float": ["fc"]})
    assert recipe.keeps_float("fc", "Linear")
    assert recipe.spec_for_weight("fc", "Linear") is None
    assert recipe.spec_for_output("fc", "Linear") is None
    assert recipe.spec_for_input("fc", "Linear") is None
    assert recipe.spec_for_weight("conv1", "Conv2d") is not None


def test_float_bits_mean_no_spec() -> None:
    recipe = Recipe.named("w8a32")
    assert recipe.spec_for_output("conv1") is None
    assert recipe.spec_for_network_input() is None
    assert recipe.spec_for_weight("conv1") is not None


def test_16_bits_are_symmetric() -> None:
    recipe = Recipe().replace({"activations.bits": 16, "input_bits": 16})
    for spec in (recipe.spec_for_output("conv1"), recipe.spec_for_network_input()):
        assert spec is not None
        assert (spec.bits, spec.scheme) == (16, "symmetric")


def test_network_input_has_its_own_bits() -> None:
    spec = Recipe.named("w4a4_head_stem8").spec_for_network_input()
    assert spec is not None
    assert spec.bits == 8


def test_input_override_is_told_from_the_default() -> None:
    recipe = Recipe().replace({"overrides": [{"modules": "fc", "inputs": {"bits": 16}}]})
    spec = recipe.input_override("fc")
    assert spec is not None
    assert spec.bits == 16
    assert recipe.input_override("conv1") is None
    assert recipe.spec_for_input("conv1") is not None


def test_new_observer_in_an_override_takes_its_own_options() -> None:
    recipe = Recipe.named("w4a8").replace(
        {"overrides": [{"modules": "a", "weights": {"observer": "min_max"}}]}
    )
    spec = recipe.spec_for_weight("a")
    assert spec is not None
    assert (spec.observer, spec.options) == ("min_max", ())


def test_dynamic_recipe_observes_nothing() -> None:
    recipe = Recipe.named("dynamic_w8a8")
    assert recipe.spec_for_output("fc") is None
    assert recipe.spec_for_weight("fc") is not None


def test_starts_at_names_modules_and_what_is_inside() -> None:
    recipe = Recipe().replace({"start_at": "layer1"})
    assert [name for name in NAMES if recipe.starts_at(name)] == NAMES[1:5]
    assert not Recipe().starts_at("conv1")
