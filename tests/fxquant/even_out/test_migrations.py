"""Where a layer norm can trade range with the linear layers behind it, and where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.even_out.migrations import apply_migration, find_migrations
from passes import Rewriter
from tests.fxquant.even_out.norm_networks import NETWORKS, C, fused, mlp, norm, windows
from tests.fxquant.small_networks import module


@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_of_these_networks_can_migrate(name: str) -> None:
    build, inputs = NETWORKS[name]
    places, declines = find_migrations(fused(build(), inputs(1)))
    assert len(places) == 1
    assert declines == []
    assert places[0].shiftable == (name != "padded windows")


def test_padding_forbids_a_shift() -> None:
    graph_module = fused(windows(True), NETWORKS["padded windows"][1](1))
    ((place,), _) = find_migrations(graph_module)
    with pytest.raises(ValueError, match="shift"):
        apply_migration(Rewriter(graph_module), place, torch.ones(C), torch.ones(C))


def test_a_scale_that_is_not_positive_is_refused() -> None:
    graph_module = fused(mlp())
    ((place,), _) = find_migrations(graph_module)
    with pytest.raises(ValueError, match="positive"):
        apply_migration(Rewriter(graph_module), place, torch.zeros(C))


def test_each_layer_that_changed_has_a_line() -> None:
    graph_module = fused(mlp())
    ((place,), _) = find_migrations(graph_module)
    lines = apply_migration(Rewriter(graph_module), place, torch.full((C,), 2.0))
    assert lines == ["norm: outputs divided by 2 to 2", "fc1: columns times 2 to 2"]


def declined(forward: Callable[..., Any], x: Tensor | None = None, **parts: Any) -> str:
    places, (decline,) = find_migrations(fused(module(forward, **parts), x))
    assert places == []
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
