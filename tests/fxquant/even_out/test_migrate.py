"""Layer norms and attentions trade range with the linear layers behind them, exactly in float."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.errors import CalibrationError, RecipeError
from fxquant.even_out.channel_ranges import ChannelRanges
from fxquant.even_out.migrate import reparameterize, smooth_quant
from fxquant.even_out.migrations import (
    Migration,
    apply_migration,
    declined_migrations,
    find_migrations,
)
from fxquant.frontend.trace import trace
from passes import Canonicalize, FuseConvBnRelu, Pipeline, copy_sharing_tensors
from tests.fxquant.small_networks import module

C = 8


def tokens(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 4, C, generator=generator)


def norm(channels: int = C) -> nn.LayerNorm:
    """A layer norm with channels of very different range and centre."""
    layer = nn.LayerNorm(channels)
    with torch.no_grad():
        layer.weight.copy_(torch.logspace(-1.5, 1.5, channels))
        layer.bias.copy_(torch.linspace(-3, 3, channels))
    return layer


def fused(model: nn.Module, x: Tensor | None = None) -> fx.GraphModule:
    example = (tokens(1) if x is None else x,)
    graph_module = trace(model.eval(), 1).graph_module
    Pipeline([Canonicalize(), FuseConvBnRelu()]).run(graph_module, example)
    return copy_sharing_tensors(graph_module)


def mlp() -> nn.Module:
    return module(
        lambda self, x: x + self.fc2(F.gelu(self.fc1(self.norm(x)))),
        norm=norm(), fc1=nn.Linear(C, 16), fc2=nn.Linear(16, C),
    )  # fmt: skip


def _heads(x: Tensor) -> Tensor:
    return x.reshape(x.size(0), x.size(1), 2, C // 2).permute(0, 2, 1, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(torch.matmul(q, k.transpose(-2, -1)) * 0.5, dim=-1)
    joined = torch.matmul(weights, v).permute(0, 2, 1, 3)
    return joined.reshape(joined.size(0), joined.size(1), C)


def attention() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (_heads(layer(y)) for layer in (self.q, self.k, self.v))
        return x + self.proj(_attend(q, k, v))

    return module(forward, norm=norm(), **{name: nn.Linear(C, C) for name in "qkv"},
                  proj=nn.Linear(C, C))  # fmt: skip


def joint_attention() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.qkv(self.norm(x)).reshape(x.size(0), x.size(1), 3, 2, C // 2)
        y = y.permute(2, 0, 3, 1, 4)
        return x + self.proj(_attend(y[0], y[1], y[2]))

    return module(forward, norm=norm(), qkv=nn.Linear(C, 3 * C), proj=nn.Linear(C, C))


def windows(padded: bool) -> nn.Module:
    """Swin: shifted windows of 2 x 2, of a map of 4 x 4 or of 3 x 3 that zeros fill up."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(x)
        if padded:
            y = F.pad(y, (0, 0, 0, 1, 0, 1))
        y = torch.roll(y, (-1, -1), (1, 2))
        y = y.view(y.size(0), 2, 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, C)
        return self.fc(y)

    return module(forward, norm=norm(), fc=nn.Linear(C, 5))


def pooled() -> nn.Module:
    """Swin's head: the norm, an average over positions, a linear layer."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(x).permute(0, 3, 1, 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))

    return module(forward, norm=norm(), head=nn.Linear(C, 5))


def convnext() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.fc2(F.gelu(self.fc1(y))).permute(0, 3, 1, 2)

    return module(forward, conv=nn.Conv2d(C, C, 3, padding=1, groups=C), norm=norm(),
                  fc1=nn.Linear(C, 16), fc2=nn.Linear(16, C))  # fmt: skip


def _map(size: int) -> Callable[[int], Tensor]:
    return lambda count=3: torch.randn(
        count, size, size, C, generator=torch.Generator().manual_seed(3)
    )


def _nchw(count: int = 3) -> Tensor:
    return _map(4)(count).permute(0, 3, 1, 2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, tokens),
    "attention": (attention, tokens),
    "joint attention": (joint_attention, tokens),
    "windows": (lambda: windows(False), _map(4)),
    "padded windows": (lambda: windows(True), _map(3)),
    "pooled head": (pooled, _map(4)),
    "convnext": (convnext, _nchw),
    "class token": (
        lambda: module(
            lambda self, x: self.fc(self.norm(x)[:, 0]), norm=norm(), fc=nn.Linear(C, 5)
        ),
        tokens,
    ),
    "norm without bias": (
        lambda: nn.Sequential(nn.LayerNorm(C, bias=False), nn.Linear(C, 5, bias=False)), tokens,
    ),
}  # fmt: skip
REWRITES: dict[str, Callable[..., list[str]]] = {
    "smooth quant": lambda graph, data: smooth_quant(graph, data, values=True),
    "smooth quant, centred": lambda graph, data: smooth_quant(graph, data, 0.8, center=True),
    "smooth quant, searched": lambda graph, data: smooth_quant(graph, data, "auto"),
    "reparameterization": functools.partial(reparameterize, fewest=1),
}


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("name", NETWORKS)
def test_computes_the_same(name: str, rewrite: str) -> None:
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    x = inputs(3).double()
    graph_module = fused(model, x[:1])
    with torch.no_grad():
        expected = model(x)
        notes = REWRITES[rewrite](graph_module, [(x,)])
        found = graph_module(x)
    assert " 1 place" in notes[0] or " 2 place" in notes[0]
    # In float64 nothing but an error of the rewrite is seen: sums of 16 terms of at most some
    # hundreds times the result, each rounded by 2^-53 a few times, stay below 2^-40.
    assert torch.allclose(found, expected, rtol=0, atol=2**-40 * float(expected.abs().max()))
    assert all(tensor.dtype == torch.float64 for tensor in graph_module.state_dict().values())


def channel_spread(graph_module: fx.GraphModule, x: Tensor) -> float:
    ranges = ChannelRanges(graph_module, ["norm"]).sweep([(x,)])
    low, high = ranges.range("norm")
    widths = high - low
    return float(widths.max() / widths.min())


def test_alpha_one_gives_all_channels_the_same_largest_value() -> None:
    graph_module = fused(mlp())
    smooth_quant(graph_module, [(tokens(),)], 1.0)
    low, high = ChannelRanges(graph_module, ["norm"]).sweep([(tokens(),)]).range("norm")
    largest = torch.maximum(-low, high)
    assert torch.allclose(largest, largest.mean(), rtol=1e-5)


def test_the_scale_is_equation_4() -> None:
    model: Any = attention()
    graph_module = fused(model)
    smooth_quant(graph_module, [(tokens(),)], 0.25)
    x = model.norm(tokens()).detach().abs().amax((0, 1))
    w = torch.cat([model.q.weight, model.k.weight, model.v.weight]).detach().abs().amax(0)
    scale = x**0.25 / w**0.75
    changed: Any = graph_module.get_submodule("norm")
    assert torch.allclose(changed.weight, model.norm.weight / scale, rtol=1e-5)


def test_reparameterized_channels_have_one_grid() -> None:
    model: Any = mlp()
    graph_module = fused(model)
    x = tokens()
    before = ChannelRanges(graph_module, ["norm"]).sweep([(x,)])
    low, high = (bound.double() for bound in before.range("norm"))
    s = (high - low) / 255
    z = -low / s
    codes = model.norm(x).detach().double() / s + z
    reparameterize(graph_module, [(x,)], fewest=1)
    changed: Any = graph_module.get_submodule("norm")
    found = changed(x).detach().double() / s.mean() + z.mean()
    assert torch.allclose(found, codes, atol=255 * 2**-18)
    assert channel_spread(graph_module, x) < 1 + 1e-4


def test_what_was_seen_in_few_rows_keeps_its_grid() -> None:
    graph_module = fused(mlp())
    x = tokens()
    before = channel_spread(graph_module, x)
    notes = reparameterize(graph_module, [(x,)])
    assert notes[-1] == "no scale reparameterization of norm: seen in fewer than 512 rows"
    assert channel_spread(graph_module, x) == before


def test_the_model_keeps_its_weights() -> None:
    model = attention()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph_module = fused(model)
    shared = copy_sharing_tensors(graph_module)
    smooth_quant(graph_module, [(tokens(),)], values=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(shared(tokens()), model(tokens()))


def test_attention_values_trade_with_the_projection() -> None:
    (joint,) = (m for m in find_migrations(fused(joint_attention())) if m.kind == "value")
    assert joint.producer == "qkv"
    assert joint.channels.tolist() == [False] * 2 * C + [True] * C
    assert [reader.path for reader in joint.readers] == ["proj"]
    assert joint.readers[0].columns.tolist() == list(range(2 * C, 3 * C))
    assert not joint.shiftable


def test_padding_forbids_a_shift() -> None:
    (place,) = find_migrations(fused(windows(True), _map(3)(1)))
    assert not place.shiftable
    graph_module = fused(windows(True), _map(3)(1))
    with pytest.raises(ValueError, match="shift"):
        apply_migration(graph_module, place, torch.ones(C), torch.ones(C))


def declined(forward: Callable[..., Any], x: Tensor | None = None, **parts: Any) -> str:
    graph_module = fused(module(forward, **parts), x)
    assert not [place for place in find_migrations(graph_module) if place.kind == "norm"]
    (decline,) = declined_migrations(graph_module)
    return decline.reason


def test_a_residual_addition_declines() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + F.gelu(self.fc(y))

    assert "add reads it" in declined(forward, norm=norm(), fc=nn.Linear(C, C))


def test_a_fused_residual_addition_declines() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.fc(y)

    assert "fc adds it to its result" in declined(forward, norm=norm(), fc=nn.Linear(C, C))


def test_an_output_declines() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.norm(x)
        return y, self.fc(y)

    assert "an output" in declined(forward, norm=norm(), fc=nn.Linear(C, C))


def test_a_function_between_declines() -> None:
    reason = declined(
        lambda self, x: self.fc(F.gelu(self.norm(x))), norm=norm(), fc=nn.Linear(C, 5)
    )
    assert "gelu reads it" in reason


def test_a_convolution_declines() -> None:
    reason = declined(
        lambda self, x: self.conv(self.norm(x).transpose(1, 2)),
        norm=norm(),
        conv=nn.Conv1d(C, 5, 1),
    )
    assert "not a linear layer" in reason


def test_a_reshape_that_mixes_channels_declines() -> None:
    reason = declined(
        lambda self, x: self.fc(self.norm(x).transpose(1, 2).reshape(-1, 4, C)),
        norm=norm(), fc=nn.Linear(C, 5),
    )  # fmt: skip
    assert "more than one channel" in reason


def test_a_reshape_that_mixes_channels_of_a_batch_only_declines() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(x).permute(1, 2, 0)  # [4, C, N], and with N = 1 as good as [4, 1, C]
        return self.fc(y.reshape(4, -1, C))

    assert "more than one channel" in declined(forward, norm=norm(), fc=nn.Linear(C, 5))


def test_a_norm_without_weight_declines() -> None:
    reason = declined(
        lambda self, x: self.fc(self.norm(x)),
        norm=nn.LayerNorm(C, elementwise_affine=False), fc=nn.Linear(C, 5),
    )  # fmt: skip
    assert "no weight" in reason


def test_a_norm_over_two_dimensions_declines() -> None:
    reason = declined(
        lambda self, x: self.fc(self.norm(x)), norm=nn.LayerNorm((4, C)), fc=nn.Linear(C, 5)
    )
    assert "more than the last dimension" in reason


def test_a_layer_called_twice_declines() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc(self.norm(x)) + self.fc(x)

    assert "more than once" in declined(forward, norm=norm(), fc=nn.Linear(C, C))


def test_a_channel_that_is_always_zero_keeps_its_scale() -> None:
    model: Any = mlp()
    model.norm.weight.data[2] = model.norm.bias.data[2] = 0.0
    model.fc1.weight.data[:, 5] = 0.0
    for rewrite in REWRITES.values():
        graph_module = fused(model)
        rewrite(graph_module, [(tokens(),)])
        assert all(bool(tensor.isfinite().all()) for tensor in graph_module.state_dict().values())
        assert torch.allclose(graph_module(tokens()), model(tokens()), atol=1e-4)


def test_the_search_declines_to_migrate_where_all_channels_are_alike() -> None:
    model = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 16)).eval()
    with torch.no_grad():
        signs = torch.randint(0, 2, (16, C), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        model[1].weight.copy_(signs)
    assert smooth_quant(fused(model), [(tokens(64),)], "auto") == [
        "smooth quant: 1 places, alpha none: 1"
    ]


def test_ranges_are_those_of_the_data_or_the_mean_of_those_of_the_images() -> None:
    graph_module = fused(mlp())
    x = tokens(6)
    ranges = ChannelRanges(graph_module, ["norm"], rows=5).sweep([(x[:4],), (x[4:],)])
    y = graph_module.get_submodule("norm")(x).detach()
    low, high = ranges.range("norm")
    assert torch.equal(low, y.amin((0, 1)))
    assert torch.equal(high, y.amax((0, 1)))
    low, high = ranges.range("norm", "mean")
    assert torch.allclose(low, y.amin(1).mean(0))
    assert torch.allclose(high, y.amax(1).mean(0))
    rows = ranges.sample("norm")
    assert rows.shape == (5, C)
    assert all(bool((y.flatten(0, 1) == row).all(1).any()) for row in rows)


def test_no_data_is_refused() -> None:
    with pytest.raises(CalibrationError, match="never seen"):
        smooth_quant(fused(mlp()), [])


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        reparameterize(fused(mlp()), [(tokens() * float("inf"),)])


def test_an_alpha_above_one_is_refused() -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        smooth_quant(fused(mlp()), [(tokens(),)], 1.5)


def test_a_scale_that_is_not_positive_is_refused() -> None:
    graph_module = fused(mlp())
    place: Migration = find_migrations(graph_module)[0]
    with pytest.raises(ValueError, match="positive"):
        apply_migration(graph_module, place, torch.zeros(C))
