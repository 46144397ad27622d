"""Products that stay float compute in bfloat16, and all that is connected to them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant.errors import TargetError
from fxquant.to_integer import narrow_floats

COMPILED = sys.modules["fxquant.compiled"]
EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Layer `b` is to stay float, between two on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = (x + self.b(x)).relu()
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPILED, "has_fast_bfloat16", lambda device: True)


def compiled(target: str = "reference", recipe: str = "w8a8_bf16") -> fxquant.CompiledModel:
    torch.manual_seed(0)
    changed = fxquant.Recipe.named(recipe).replace({"float": ["b"]})
    return fxquant.compile(Mixed().eval(), changed, calibration=EXAMPLE, target=target)


def dtypes(graph_module: fx.GraphModule) -> dict[str, torch.dtype]:
    found = {}
    for node in graph_module.graph.nodes:
        if "tensor" in node.meta:
            found[node.name] = node.meta["tensor"].dtype
    return found


def test_a_float_layer_and_what_is_connected_to_it_are_bfloat16() -> None:
    q = compiled()
    found = dtypes(q.stages["integer"])
    assert found["conv2d"] == found["add"] == found["mean"] == torch.bfloat16
    assert found["a"] == torch.float32
    assert "1 products that stay float compute in bfloat16" in q.report.notes


def test_its_weight_is_rounded_once_and_stored_so() -> None:
    tensors = compiled().stages["integer"].state_dict()
    assert tensors["b.weight_bfloat16"].dtype == torch.bfloat16
    assert "b.weight" not in tensors


def test_the_network_yields_float32_near_the_float_layer_s() -> None:
    narrow, wide = compiled()(EXAMPLE), compiled(recipe="w8a8")(EXAMPLE)
    assert narrow.dtype == torch.float32
    # A few roundings to 8 bits of mantissa, 2^-9 each of values of at most 4.
    assert 0 < (narrow - wide).abs().max() < 0.05


@pytest.mark.parametrize("target", ["reference", "x86", "native"])
def test_a_saved_file_computes_the_same_on_each_target(tmp_path: Path, target: str) -> None:
    try:
        q = compiled(target)
    except TargetError as error:
        pytest.skip(str(error))
    q.save(tmp_path / "m.fxq")
    assert torch.equal(fxquant.load(tmp_path / "m.fxq", target)(EXAMPLE), q(EXAMPLE))


def test_a_network_without_a_float_product_stays_as_it_is() -> None:
    torch.manual_seed(0)
    q = fxquant.compile(Mixed().eval(), "w8a8_bf16", calibration=EXAMPLE, target="reference")
    assert torch.bfloat16 not in dtypes(q.stages["integer"]).values()


def test_a_function_that_torch_has_not_in_bfloat16_stays_float32() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(torch.matmul(x, x)) * 2

    graph_module = fx.symbolic_trace(Inverse())
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    narrowed, products = narrow_floats(graph_module, torch.bfloat16, (x,))
    assert products == 1
    found = dtypes(narrowed)
    assert (found["matmul"], found["linalg_inv"]) == (torch.bfloat16, torch.float32)
    assert narrowed(x).dtype == torch.float32


def test_recipe_bf16_quantizes_nothing() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    q = fxquant.compile(model, "bf16", calibration=EXAMPLE, target="reference")
    assert not any(str(n.target).startswith("fxquant.") for n in q.stages["integer"].graph.nodes)
    assert {"conv2d", "linear"} <= {
        name for name, dtype in dtypes(q.stages["integer"]).items() if dtype == torch.bfloat16
    }
    assert (q(EXAMPLE) - model(EXAMPLE)).abs().max() < 0.05


def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPILED, "has_fast_bfloat16", lambda device: False)
    q = compiled()
    assert torch.bfloat16 not in dtypes(q.stages["integer"]).values()
    assert any("multiplies no bfloat16" in note for note in q.report.notes)
    assert torch.equal(q(EXAMPLE), compiled(recipe="w8a8")(EXAMPLE))


def test_an_onnx_file_of_it_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(TargetError, match='float_dtype = "float32"'):
        compiled().export_onnx(tmp_path / "m.onnx")
