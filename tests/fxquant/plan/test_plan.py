"""Which operations run on integers, and which values share a quantizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import CompileError
from fxquant.plan.plan import Plan, make_plan
from fxquant.plan.value_sites import ValueSite
from fxquant.recipe import Recipe
from passes import Canonicalize, FuseConvBnRelu, InferRanges, Pipeline
from tests.fxquant.small_networks import images, module
from tests.passes.checking import float_graph


def planned(model: nn.Module, changes: dict[str, Any] | None = None, *inputs: Tensor) -> Plan:
    graph_module = float_graph(model)
    probe = inputs or (images(1),)
    Pipeline([Canonicalize(), FuseConvBnRelu(), InferRanges()]).run(graph_module, probe)
    return make_plan(graph_module, Recipe.named("w8a8").replace(changes or {}))


def site_of(plan: Plan, name: str) -> ValueSite:
    (found,) = [site for site in plan.values if name in site.nodes]
    return found


def conv(inner: int = 3, outer: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 1)


def test_a_layer_reads_a_quantized_value() -> None:
    plan = planned(module(lambda self, x: self.conv(x), conv=conv()))
    assert [site.nodes for site in plan.values] == [("x",)]
    assert plan.weights["conv"].kind == "weight"


def test_accumulators_leave_as_float_at_the_end() -> None:
    model = module(lambda self, x: self.conv(x), conv=conv())
    plan = planned(model, {"quantize_output": True})
    assert [site.nodes for site in plan.values] == [("x",), ("conv",)]


def test_concatenation_shares_one_quantizer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x), self.b(x)], 1))

    plan = planned(module(forward, a=conv(), b=conv(), last=conv(8)))
    assert site_of(plan, "a") is site_of(plan, "b")
    assert site_of(plan, "a") is not site_of(plan, "x")


def test_an_average_of_both_signs_has_a_grid_of_its_own() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(F.adaptive_avg_pool2d(self.a(x), 1))

    plan = planned(module(forward, a=conv(), b=conv(4)))
    assert site_of(plan, "a").nodes == ("a",)
    assert site_of(plan, "adaptive_avg_pool2d").nodes == ("adaptive_avg_pool2d",)


def test_pooling_of_one_sign_keeps_the_grid_of_its_input() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(F.adaptive_avg_pool2d(F.max_pool2d(F.relu(self.a(x)), 2), 1))

    plan = planned(module(forward, a=conv(), b=conv(4)))
    assert site_of(plan, "a") is site_of(plan, "adaptive_avg_pool2d")
    assert not any("max_pool2d" in site.nodes for site in plan.values)


def test_movement_has_no_quantizer_of_its_own() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(self.a(x).flatten(2).unflatten(2, (8, 8)).transpose(2, 3))

    plan = planned(module(forward, a=conv(), b=conv(4)))
    assert [site.nodes for site in plan.values] == [("x",), ("a",)]


def test_movement_that_only_floats_read_stays_float() -> None:
    model = module(lambda self, x: F.softmax(self.a(x).flatten(1), 1), a=conv())
    plan = planned(model)
    assert plan.reasons["flatten"] == "its consumers are float"
    assert plan.reasons["softmax"] == "the recipe keeps softmax in float"


def test_what_reads_a_float_stays_float() -> None:
    model = module(lambda self, x: F.relu(F.softmax(self.a(x), 1)), a=conv())
    assert planned(model).reasons["relu"] == "its operand softmax is float"


def test_an_addition_of_two_layers_has_its_own_grid() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x)) + torch.tanh(self.b(x)))

    plan = planned(module(forward, a=conv(), b=conv(), c=conv(4)))
    assert len({id(site_of(plan, n)) for n in ("a", "b", "tanh", "tanh_1", "add")}) == 5


def test_scalars_make_a_table_and_sizes_do_not() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b((y * 0.5) * y.size(1))

    plan = planned(module(forward, a=conv(), b=conv(4)))
    assert plan.kinds["mul"].name == "TABLE"
    assert plan.reasons["mul_1"] == "the other operand is a number, known when the model runs"


def test_an_override_of_inputs_wins() -> None:
    overrides = [{"modules": "b", "inputs": {"bits": 16, "scheme": "symmetric"}}]
    model = module(lambda self, x: self.b(self.a(x)), a=conv(), b=conv(4))
    plan = planned(model, {"overrides": overrides, "activations.bits": 4})
    assert site_of(plan, "a").spec.bits == 16
    assert site_of(plan, "x").spec.bits == 8


def test_a_shared_quantizer_takes_the_most_bits() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 1))

    overrides = [{"modules": "b", "activations": {"bits": 8}}]
    model = module(forward, a=conv(), b=conv(), c=conv(8))
    plan = planned(model, {"overrides": overrides, "activations.bits": 4})
    assert site_of(plan, "a").spec.bits == 8


def test_a_value_from_a_float_module_is_quantized_for_its_reader() -> None:
    model = module(lambda self, x: self.b(self.a(x)), a=conv(), b=conv(4))
    plan = planned(model, {"float": ["a"]})
    assert plan.reasons["a"] == "the recipe keeps it in float"
    assert site_of(plan, "a").spec.bits == 8


def test_float_inputs_keep_their_readers_float() -> None:
    model = module(lambda self, x: self.b(self.a(x)), a=conv(), b=conv(4))
    plan = planned(model, {"input_bits": "float"})
    assert plan.reasons["a"] == "the recipe keeps the model's inputs in float"
    assert "b" not in plan.reasons


def test_a_residual_that_the_layer_reads_needs_a_grid() -> None:
    model = module(lambda self, x: self.a(x) + x, a=conv(3, 3))
    plan = planned(model)
    assert [site.nodes for site in plan.values] == [("x",), ("a",)]


def test_reflection_padding_has_no_integer_form() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    plan = planned(module(lambda self, x: self.b(self.a(x)), a=layer, b=conv(4)))
    assert plan.reasons["a"] == "padding mode 'reflect' has no integer form"


def test_integers_of_the_model_are_not_quantized() -> None:
    model = module(lambda self, x: self.table(x + 1), table=nn.Embedding(9, 3))
    plan = planned(model, None, torch.zeros(1, 2, dtype=torch.int64))
    assert plan.reasons["add"] == "x holds int64, not float32"
    assert plan.values == ()


def test_a_plan_of_another_graph_is_refused() -> None:
    plan = planned(module(lambda self, x: self.conv(x), conv=conv()))
    other = float_graph(module(lambda self, x: self.layer(x), layer=conv()))
    with pytest.raises(CompileError, match=r"the graph has no nodes conv \(1 of 2 names\)"):
        plan.check(other.graph)


W4A4 = {"activations.bits": 4}


def _block(self: Any, x: Tensor) -> Tensor:
    """A residual block whose shortcut is a convolution, as in a ResNet."""
    x = F.relu(self.stem(x))
    y = self.conv(x)
    return self.last(F.relu(self.shortcut(x) + y))


def _residual_block() -> nn.Module:
    layers = {"conv": conv(4), "shortcut": conv(4), "last": conv(4)}
    return module(_block, stem=conv(), **layers)


def test_the_branch_that_an_addition_carries_has_8_bits() -> None:
    plan = planned(_residual_block(), W4A4)
    bits = {site.nodes[0]: site.spec.bits for site in plan.values}
    assert bits == {"x": 8, "stem": 4, "conv": 8, "shortcut": 4}


def test_a_recipe_may_still_say_the_bits_of_a_carried_branch() -> None:
    override = {"modules": "conv", "activations": {"bits": 4}}
    plan = planned(_residual_block(), {**W4A4, "overrides": [override]})
    assert site_of(plan, "conv").spec.bits == 4


def test_a_branch_that_a_layer_reads_too_keeps_the_recipes_bits() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(F.relu(self.stem(x)))
        return self.last(y + self.b(y))

    plan = planned(module(forward, stem=conv(), a=conv(4), b=conv(4), last=conv(4)), W4A4)
    assert site_of(plan, "a").spec.bits == 4
