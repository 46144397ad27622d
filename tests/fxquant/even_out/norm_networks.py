"""Small networks whose layer norms feed linear layers, in the ways that transformers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.even_out.channel_ranges import ChannelRange, measure_ranges
from fxquant.even_out.migrations import find_migrations
from fxquant.frontend.trace import trace
from passes import Canonicalize, FuseConvBnRelu, Pass, PassRecord, Pipeline, copy_sharing_tensors
from tests.fxquant.small_networks import module

__all__ = [
    "NETWORKS",
    "C",
    "attention",
    "fused",
    "measured",
    "mlp",
    "norm",
    "run",
    "tokens",
    "windows",
]

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


def measured(graph_module: fx.GraphModule, x: Tensor) -> dict[str, ChannelRange]:
    """The ranges of all norms that can migrate, on `x`."""
    paths = [place.path for place in find_migrations(graph_module)[0]]
    return measure_ranges(graph_module, paths, [(x,)], of="outputs")


def run(pass_: Pass, graph_module: fx.GraphModule, x: Tensor) -> PassRecord:
    """Run the pass with the proof that a pipeline asks for."""
    (record,) = Pipeline([pass_]).run(graph_module, (x,))
    return record
