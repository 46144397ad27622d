"""Transformers from float to integers: what runs, how near it is, what the recipes promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxquant
from fxquant.errors import CompileError
from fxquant.recipe import Recipe
from passes import masked_softmax
from tests.fxquant.small_networks import module
from tests.fxquant.small_transformers import Causal, compiled_vit, images, swin, vit

INTEGER_RECIPES = ("vit_w8a8_integer", "vit_w4a8_integer")


def sqnr(expected: Tensor, found: Tensor) -> float:
    noise = (expected - found).double().square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))


def float_output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# -- what runs on integers -----------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["vit_w8a8", "vit_w8a8_integer", "w8a8"])
def test_every_multiply_accumulate_of_a_vit_runs_in_int8(recipe: str) -> None:
    rows = compiled_vit(recipe).report.coverage
    assert all(row.runs_in == "int8" for row in rows if row.macs)


def test_products_of_two_activations_count_as_multiply_accumulates() -> None:
    rows = compiled_vit("vit_w8a8").report.coverage
    products = ("scaled_matmul", "weighted_mean")
    counted = {row.operation: row.macs for row in rows if row.operation in products}
    assert counted == dict.fromkeys(products, 2 * 17 * 17 * 16)


def test_what_stays_float_has_the_recipe_as_its_reason() -> None:
    rows = compiled_vit("vit_w8a8").report.coverage
    reasons = {row.operation: row.reason for row in rows if row.reason}
    assert reasons["softmax_numerators"] == "the recipe keeps softmax in float"
    assert reasons["layernorm"] == "the recipe keeps LayerNorm in float"
    assert reasons["gelu"] == "the recipe keeps GELU in float"
    assert reasons["add"] == "the recipe keeps the residual stream in float"


@pytest.mark.parametrize("recipe", INTEGER_RECIPES)
def test_nothing_stays_float_on_integers_alone(recipe: str) -> None:
    assert not [row for row in compiled_vit(recipe).report.coverage if row.runs_in == "float"]


def test_the_residual_stream_has_16_bits_on_integers_alone() -> None:
    integer = compiled_vit("vit_w8a8_integer").stages["integer"]
    dtypes = {
        node.meta["grid"].dtype
        for node in integer.graph.nodes
        if node.target is torch.ops.fxquant.add_rescaled.default
    }
    assert dtypes == {torch.int16}


# -- how near it is ------------------------------------------------------------------------


# 8 bits of a normal value within +-4 deviations are 38 dB for each quantizer; some thirty of them
# in a row, half of them divided by a layer norm, leave 38 - 10 log10(15), less a margin of 4.
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("vit_w8a8", ()),
        ("vit_w8a8", (("reparameterize", False), ("smooth_quant", 0.8))),
        ("vit_w8a8_integer", ()),
        ("vit_w8a8_integer", (("operations.softmax", "i-vit"), ("operations.softmax_bits", 16))),
        ("vit_w8a8", (("operations.softmax", "table"), ("operations.residual", 16))),
        ("w8a8", ()),
    ],
)
def test_8_bits_stay_near_the_float_network(recipe: str, changes: Any) -> None:
    x = images(8)
    assert sqnr(float_output(vit(), x), compiled_vit(recipe, changes)(x)) > 22


def test_power_of_two_factors_cost_small_tokens_their_bits() -> None:
    # Eight bits for a channel over all tokens: the class token, which starts near zero, has few.
    x = images(8)
    q = compiled_vit("vit_w8a8_integer", (("operations.layer_norm", "power_of_two"),))
    assert 10 < sqnr(float_output(vit(), x), q(x)) < 22


@pytest.mark.parametrize("softmax", ["i-vit", "log2", "table"])
@pytest.mark.parametrize("gelu", ["i-vit", "table"])
@pytest.mark.parametrize("layer_norm", ["integer", "i-vit"])
def test_every_form_runs_as_it_was_simulated(softmax: str, gelu: str, layer_norm: str) -> None:
    changes = (
        ("operations.softmax", softmax),
        ("operations.gelu", gelu),
        ("operations.layer_norm", layer_norm),
    )
    q = compiled_vit("vit_w8a8_integer", changes)
    x = images(4)
    simulated = float_output(q.stages["simulated"], x)
    # What differs are ties of the roundings in float; a power of two makes a step of each.
    assert sqnr(simulated, q(x)) > (15 if softmax == "log2" else 25)


def test_swin_windows_and_rolls_move_integers() -> None:
    x = images(2)
    q = fxquant.compile(swin(), "vit_w8a8_integer", calibration=[x], target="reference")
    moved = [n for n in q.stages["integer"].graph.nodes if n.target is torch.roll]
    assert moved
    assert all("grid" in node.meta for node in moved)
    assert sqnr(float_output(swin(), x), q(x)) > 15


@pytest.mark.parametrize("recipe", ["vit_w8a8", "vit_w8a8_integer"])
def test_causal_attention_compiles(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = Causal(), torch.randn(4, 12, 32)
    q = fxquant.compile(model, recipe, calibration=[x], target="reference")
    assert any(n.target is masked_softmax for n in q.stages["float"].graph.nodes)
    assert sqnr(float_output(model, x), q(x)) > 20


def test_what_a_causal_mask_hides_changes_nothing() -> None:
    torch.manual_seed(0)
    model, x = Causal(), torch.randn(2, 12, 32)
    q = fxquant.compile(model, "vit_w8a8_integer", calibration=[x], target="reference")
    changed = x.clone()
    changed[:, 8:] = torch.randn(2, 4, 32)
    assert torch.equal(q(x)[:, :8], q(changed)[:, :8])


def test_the_batch_size_is_free() -> None:
    q, x = compiled_vit("vit_w8a8_integer"), images(3)
    assert torch.equal(q(x), torch.cat([q(one) for one in x.split(1)]))


def test_a_saved_file_gives_the_same_bits(tmp_path: Any) -> None:
    q, x = compiled_vit("vit_w8a8_integer"), images(2)
    q.save(tmp_path / "vit.fxq")
    assert torch.equal(fxquant.load(tmp_path / "vit.fxq", target="reference")(x), q(x))


@pytest.mark.parametrize("recipe", ["vit_w8a8", "vit_w8a8_integer"])
def test_x86_is_at_most_one_step_away(recipe: str) -> None:
    check = compiled_vit(recipe, (), "x86").report.target_check
    assert check["largest_difference"] <= 1


# -- integers alone ------------------------------------------------------------------------


class NoFloat(TorchDispatchMode):
    """Fails on every float tensor from the first quantizer until `last` is called."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self.last = last
        self.calls: list[str] = []
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        result = func(*args, **(kwargs or {}))
        if name == self.last and self.is_last(func, args):
            self.inside = False
        if self.inside:
            self.calls.append(name)
            for value in tree_leaves((args, kwargs, result)):
                assert not (isinstance(value, Tensor) and value.is_floating_point()), name
        if name == "fxquant.quantize.default":
            self.inside = True
        return result

    @staticmethod
    def is_last(func: Any, args: Any) -> bool:
        names = [argument.name for argument in func._schema.arguments]
        return dict(zip(names, args, strict=False))["dtype"] == torch.float32


@pytest.mark.parametrize("recipe", INTEGER_RECIPES)
def test_no_float_tensor_between_the_first_quantizer_and_the_output(recipe: str) -> None:
    q, x = compiled_vit(recipe), images(1)
    with torch.no_grad(), NoFloat("fxquant.linear.default") as mode:
        q.stages["integer"](x)
    assert not mode.inside
    operators = {name.split(".")[1] for name in mode.calls if name.startswith("fxquant")}
    assert {"linear_accumulate", "matmul_accumulate", "rescale", "add_rescaled"} <= operators
    assert {"softmax_table", "layer_norm_integer", "lookup", "conv_accumulate"} <= operators


def test_the_dispatch_mode_does_fail_on_floats() -> None:
    q, x = compiled_vit("vit_w8a8"), images(1)
    with pytest.raises(AssertionError), torch.no_grad(), NoFloat("fxquant.linear.default"):
        q.stages["integer"](x)


def test_an_operation_that_stays_float_in_between_is_an_error_that_names_it() -> None:
    recipe = Recipe.named("vit_w8a8_integer").replace({"operations.softmax": "float"})
    with pytest.raises(
        CompileError, match=r"softmax, softmax_1 \(the recipe keeps softmax in float\); choose"
    ):
        fxquant.compile(vit(), recipe, calibration=images(2).split(2), target="reference")


def test_an_operation_without_an_integer_form_is_an_error_that_says_what_to_do() -> None:
    model = module(
        lambda self, x: self.b(torch.sin(self.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4)
    )
    with pytest.raises(CompileError, match=r"sin has no integer form.*requantization"):
        fxquant.compile(
            model, "vit_w8a8_integer", calibration=torch.randn(4, 4), target="reference"
        )


def test_convolutional_networks_run_on_integers_alone_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = x + self.b(x)
        return self.head(torch.nn.functional.avg_pool2d(x, 2).mean((2, 3)))

    model = module(
        forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 3, padding=1), head=nn.Linear(4, 5)
    )
    recipe = Recipe.named("w8a8").replace({"requantization": "dyadic"})
    x = torch.randn(4, 3, 8, 8)
    q = fxquant.compile(model, recipe, calibration=[x], target="reference")
    with torch.no_grad(), NoFloat("fxquant.linear.default") as mode:
        q.stages["integer"](x)
    assert not mode.inside
    assert sqnr(float_output(model, x), q(x)) > 25


class Unbinding(nn.Module):
    """Attention as timm writes it: one projection, whose result is taken apart by `unbind`."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(n, t, c))


def test_attention_that_unbinds_its_projection_runs_on_integers_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 16), Unbinding(), nn.Linear(16, 4)).eval()
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    q = fxquant.compile(model, "vit_w8a8_integer", calibration=[x], target="reference")
    assert {row.runs_in for row in q.report.coverage} <= {"int8", "int16"}
