from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.reconstruct.convolutions import use_bfloat16
from passes import FusedLayer


def pair(layer: nn.Conv2d) -> tuple[nn.Module, nn.Module]:
    """A fused layer, and one of the same weights that may multiply in bfloat16."""
    fast = FusedLayer(layer)
    block = nn.Sequential(fast)
    use_bfloat16(block)
    return FusedLayer(layer), fast


def images(channels: int) -> Tensor:
    return torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_dense_convolution_multiplies_in_bfloat16_and_yields_float32() -> None:
    torch.manual_seed(0)
    plain, fast = pair(nn.Conv2d(16, 16, 3, padding=1))
    x = images(16)
    with torch.no_grad():
        wanted, found = plain(x), fast(x)
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    # 144 products, each off by at most 2^-8: the errors of random signs add up to 2^-8 of the
    # products' norm, which is no more than the values' deviation times a few.
    assert float((found - wanted).abs().max()) < 6 * 2**-8 * float(wanted.std())


def test_depthwise_convolutions_and_stems_stay_as_they_are() -> None:
    for layer in (nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(3, 16, 3)):
        plain, fast = pair(layer)
        x = images(layer.in_channels)
        assert torch.equal(plain(x), fast(x))


def test_the_original_layer_is_untouched() -> None:
    layer = nn.Conv2d(16, 16, 3)
    _, fast = pair(layer)
    assert type(layer) is nn.Conv2d
    assert fast.layer is not layer
    assert fast.layer.weight is layer.weight  # type: ignore[union-attr]
