import json

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import InputError, TargetError
from fxquant.measure.profile import profile
from tests.fxquant.small_networks import compiled, images

pytestmark = pytest.mark.usefixtures("native")


def test_counts_the_products_of_a_layer() -> None:
    """8×8 pixels of 8 channels, each with a window of 3×3 over its inputs; 4 logits of 8."""
    torch.manual_seed(0)
    q = compiled(target="native")
    for batch in (1, 3):
        layers = profile(q, images(batch), calls=1).layers
        macs = sorted(layer.macs for layer in layers if layer.macs)
        square = 8 * 8 * 8 * 9
        assert macs == [batch * n for n in (4 * 8, square * 3, square * 8, square * 8)]


def test_counts_the_bytes_that_grow_with_the_batch_and_the_weights_once() -> None:
    torch.manual_seed(0)
    q = compiled(target="native")
    one, two, three = (
        {layer.node: layer.bytes for layer in profile(q, images(n), calls=1).layers}
        for n in (1, 2, 3)
    )
    for node, size in one.items():
        assert two[node] - size == three[node] - two[node] > 0
    convolution = next(
        layer for layer in profile(q, images(1), calls=1).layers if layer.macs == 64 * 8 * 72
    )
    values, weights = 2 * 8 * 8 * 8, 8 * 8 * 9
    assert convolution.bytes >= values + weights


def test_shares_add_up_and_every_layer_has_a_bound() -> None:
    found = profile(compiled(target="native"), images(2), calls=2)
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert {layer.bound for layer in found.layers} <= {"multiply", "memory", "other"}
    assert all(layer.kernels and layer.nanoseconds > 0 for layer in found.layers)
    assert json.loads(json.dumps(found.to_json()))["isa"] == found.isa
    for layer in found.layers:
        assert layer.node in str(found)


class Attention(nn.Module):
    """Two heads over 5 tokens of 8 features."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(8, 24)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.projections(x).reshape(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        weights = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1)
        return self.last((weights @ v).transpose(1, 2).reshape(-1, 5, 8))


def test_the_products_of_attention_are_all_counted() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    q = compiled(Attention().eval(), calibration=x, recipe="vit_w8a8", target="native")
    linear, products = 2 * 5 * 8 * (24 + 8), 2 * 2 * (2 * 5 * 5 * 4)
    layers = profile(q, x, calls=1).layers
    assert sum(layer.macs for layer in layers) == linear + products
    matmuls = [layer for layer in layers if layer.macs and "conv" not in layer.kernels]
    assert sum(layer.macs for layer in matmuls) == products


def test_other_targets_are_refused() -> None:
    q = compiled(target="reference")
    with pytest.raises(TargetError, match=r"reference.*to_target"):
        profile(q, images())


def test_inputs_must_fit() -> None:
    with pytest.raises(InputError):
        profile(compiled(target="native"), torch.randn(3, 8))
