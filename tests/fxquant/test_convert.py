"""A float model in half the bits: what runs inside, and that inputs and outputs stay float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import InputError, ModelError
from tests.fxquant.small_networks import Residual, compiled, images, module


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_layers_see_the_type_and_callers_float32(name: str, dtype: torch.dtype) -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Spy()).eval()
    y = fxquant.convert(model, name)(images())
    assert seen == [dtype]
    assert y.dtype == torch.float32


def test_the_error_is_that_of_the_types_mantissa() -> None:
    # One rounding is at most half a unit of 8 bits (bfloat16) or of 11 bits (float16), relative.
    model = module(lambda self, x: x * 1.0)
    x = torch.rand(1000) + 0.5
    for name, bits in (("bfloat16", 8), ("float16", 11)):
        error = (fxquant.convert(model, name)(x) - x).abs() / x
        assert 0 < float(error.max()) <= 2.0**-bits


def test_the_model_stays_as_it_is() -> None:
    model = Residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxquant.convert(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_compiled_model_gives_its_fused_float_network() -> None:
    q = compiled()
    half = fxquant.convert(q)
    assert not [m for m in half.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = q.stages["fused"](images())
    assert 30 < fxquant.evaluate(half, [images()], reference=lambda x: expected).sqnr_db < 70


def test_names_and_nested_outputs_are_kept() -> None:
    model = module(lambda self, x, ids: {"y": [x + 1, ids], "z": (x,)})
    found = fxquant.convert(model)(ids=torch.tensor([3]), x=torch.zeros(1))
    assert (found["y"][0].dtype, found["z"][0].dtype) == (torch.float32, torch.float32)
    assert torch.equal(found["y"][1], torch.tensor([3]))


def test_volumes_and_sequences_run() -> None:
    model = nn.Sequential(nn.Conv3d(2, 3, 1)).eval()
    assert fxquant.convert(model)(torch.randn(1, 2, 3, 3, 3)).shape == (1, 3, 3, 3, 3)


def test_what_cannot_be_converted_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'bfloat', expected bfloat16 or float16.*did you mean"):
        fxquant.convert(Residual(), "bfloat")
    with pytest.raises(ModelError, match="training mode"):
        fxquant.convert(Residual().train())
    with pytest.raises(ModelError, match="meta device"):
        fxquant.convert(nn.Linear(2, 2, device="meta").eval())
    compiled().save(tmp_path / "m.fxq")
    with pytest.raises(ModelError, match="holds no float network"):
        fxquant.convert(fxquant.load(tmp_path / "m.fxq"))
