"""Small random networks: whatever a vision model may be made of, in any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OPERATIONS", "RandomNetwork"]

Step = Callable[[nn.ModuleList, list[Tensor]], Tensor]

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    F.relu,
    F.relu6,
    F.hardswish,
    F.silu,
    F.hardsigmoid,
    torch.sigmoid,
    torch.tanh,
    F.leaky_relu,
)
_MOST_CHANNELS = 12


class RandomNetwork(nn.Module):
    """Runs the drawn operations one after another; each reads values that were made before.

    The names in `operations` say what is drawn, `seed` everything else about it. Values are
    computed while drawing, on `example`, so that every operation fits what it reads.
    """

    def __init__(self, operations: Sequence[str], seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            channels = self.random.choice([1, 2, 3, 4])
            height, width = self.random.choice([(8, 8), (8, 8), (7, 7), (5, 9)])
            self.example = torch.randn(4, channels, height, width)
            self.values = [self.example]
            # Quantization pays off from the first layer on; what comes before it stays float.
            self._draw_convolution()
            for name in operations:
                getattr(self, f"_draw_{name}")()
            self._choose_outputs()
        self.form = self.random.choice(["tensor", "tuple", "dict"])
        del self.values, self.random
        self.eval()

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(step(self.layers, values))
        chosen = [values[index] for index in self.outputs]
        if self.form == "dict":
            return {f"output{index}": value for index, value in enumerate(chosen)}
        return chosen[0] if self.form == "tensor" else tuple(chosen)

    # -- drawing ---------------------------------------------------------------------------

    def _add(self, step: Step) -> int:
        self.steps.append(step)
        self.values.append(step(self.layers, self.values))
        return len(self.values) - 1

    def _layer(self, layer: nn.Module, source: int) -> int:
        layer.eval()
        index = len(self.layers)
        self.layers.append(layer)
        return self._add(lambda layers, values: layers[index](values[source]))

    def _pick(self, rank: int = 4) -> int:
        """One of the latest values, so that networks get deep."""
        fitting = [i for i, value in enumerate(self.values) if value.dim() == rank]
        return self.random.choice(fitting[-3:])

    def _channels(self, index: int) -> int:
        return self.values[index].shape[1]

    def _choose_outputs(self) -> None:
        count = min(len(self.values) - 1, self.random.choice([1, 1, 1, 2, 3]))
        self.outputs = list(range(len(self.values) - count, len(self.values)))

    # -- layers ----------------------------------------------------------------------------

    def _convolve(self, source: int, *, outer: int | None = None, same: bool = False) -> int:
        channels = self._channels(source)
        groups = self.random.choice([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
        if outer is None:
            outer = groups * self.random.randint(1, max(1, 8 // groups))
        elif outer % groups:
            groups = 1
        kernel: Any = self.random.choice([1, 3, 3, (1, 3), (5, 3)])
        pads = [k // 2 for k in (kernel, kernel)] if isinstance(kernel, int) else None
        padding = pads or [k // 2 for k in kernel]
        layer = nn.Conv2d(
            channels,
            outer,
            kernel,
            stride=1 if same else self.random.choice([1, 1, 2, (2, 1)]),
            padding=padding,
            groups=groups,
            bias=self.random.random() < 0.5,
        )
        return self._layer(layer, source)

    def _normalize(self, source: int) -> int:
        channels = self._channels(source)
        norm = nn.BatchNorm2d(channels, affine=self.random.random() < 0.8)
        norm.running_mean = torch.randn(channels) * 0.5
        norm.running_var = torch.rand(channels) + 0.1
        if norm.affine:
            norm.weight.copy_(torch.randn(channels))
            norm.bias.copy_(torch.randn(channels) * 0.5)
        return self._layer(norm, source)

    def _activate(self, source: int) -> int:
        function = self.random.choice(_ACTIVATIONS)
        return self._add(lambda layers, values: function(values[source]))

    def _draw_convolution(self) -> None:
        self._convolve(self._pick())

    def _draw_convolution_norm(self) -> None:
        result = self._normalize(self._convolve(self._pick()))
        if self.random.random() < 0.7:
            self._activate(result)

    def _draw_convolution_along_rows(self) -> None:
        source = self._pick()
        _, channels, height, width = self.values[source].shape
        if height * width > 100:
            return
        flat = self._add(lambda layers, values: values[source].flatten(2))
        same = self._layer(nn.Conv1d(channels, channels, 3, padding=1), flat)
        pooled = self._add(lambda layers, values: F.relu(values[same]))
        self._add(lambda layers, values: values[pooled].unflatten(2, (height, width)))

    def _draw_tokens(self) -> None:
        source = self._pick()
        channels = self._channels(source)
        tokens = self._add(lambda layers, values: values[source].permute(0, 2, 3, 1))
        mixed = self._layer(nn.Linear(channels, channels), tokens)
        total = self._add(lambda layers, values: values[mixed] + values[tokens])
        self._add(lambda layers, values: values[total].permute(0, 3, 1, 2))

    def _draw_dilated(self) -> None:
        source = self._pick()
        channels = self._channels(source)
        self._layer(nn.Conv2d(channels, channels + 1, 3, padding=2, dilation=2), source)

    def _draw_transposed(self) -> None:
        source = self._pick()
        channels = self._channels(source)
        groups = 2 if channels % 2 == 0 and self.random.random() < 0.5 else 1
        stride = self.random.choice([1, 2]) if self.values[source].shape[-1] < 9 else 1
        layer = nn.ConvTranspose2d(
            channels,
            groups * self.random.randint(1, 3),
            3,
            stride=stride,
            padding=1,
            output_padding=stride - 1,
            groups=groups,
            bias=self.random.random() < 0.5,
        )
        result = self._layer(layer, source)
        if self.random.random() < 0.5:
            self._normalize(result)

    def _draw_norm(self) -> None:
        self._normalize(self._pick())

    def _draw_activation(self) -> None:
        self._activate(self._pick())

    def _draw_same_layer_again(self) -> None:
        source = self._pick()
        fitting = [
            index
            for index, layer in enumerate(self.layers)
            if not isinstance(layer, nn.Conv1d | nn.Linear)
            and getattr(layer, "in_channels", getattr(layer, "num_features", 0))
            == self._channels(source)
        ]
        if fitting:
            index = self.random.choice(fitting)
            self._add(lambda layers, values: layers[index](values[source]))

    # -- several values ----------------------------------------------------------------------

    def _draw_residual_block(self) -> None:
        source = self._pick()
        channels = self._channels(source)
        normed = self._normalize(self._convolve(source, same=True))
        inner = normed
        if self.random.random() < 0.8:
            inner = self._add(lambda layers, values: F.relu(values[normed]))
        outer = self._convolve(inner, outer=channels, same=True)
        last = self._normalize(outer) if self.random.random() < 0.7 else outer
        total = self._add(lambda layers, values: values[last] + values[source])
        if self.random.random() < 0.7:
            self._add(lambda layers, values: F.relu(values[total]))

    def _draw_simple_residual(self) -> None:
        source = self._pick()
        last = self._convolve(source, outer=self._channels(source), same=True)
        if self.random.random() < 0.5:
            self._add(lambda layers, values: values[source] + values[last])
        else:
            self._add(lambda layers, values: values[last].add(values[source]))

    def _draw_binary(self) -> None:
        left = self._pick()
        shape = self.values[left].shape
        right = self.random.choice([i for i, v in enumerate(self.values) if v.shape == shape])
        function = self.random.choice([torch.add, torch.add, torch.mul, torch.sub])
        self._add(lambda layers, values: function(values[left], values[right]))

    def _draw_concat(self) -> None:
        first = self._pick()
        size = self.values[first].shape[2:]
        others = [
            i
            for i, v in enumerate(self.values)
            if v.dim() == 4 and v.shape[2:] == size and v.shape[1] <= _MOST_CHANNELS
        ]
        parts = [
            first,
            *(self.random.choice(others or [first]) for _ in range(self.random.choice([1, 1, 2]))),
        ]
        self._add(lambda layers, values: torch.cat([values[i] for i in parts], dim=1))

    def _draw_squeeze_excite(self) -> None:
        source = self._pick()
        channels = self._channels(source)
        if self.random.random() < 0.5:
            pooled = self._add(lambda layers, values: F.adaptive_avg_pool2d(values[source], 1))
        else:
            pooled = self._add(lambda layers, values: values[source].mean((2, 3), keepdim=True))
        squeezed = self._layer(nn.Conv2d(channels, 2, 1), pooled)
        active = self._add(lambda layers, values: F.relu(values[squeezed]))
        excited = self._layer(nn.Conv2d(2, channels, 1), active)
        gate = self.random.choice([torch.sigmoid, F.hardsigmoid])
        scale = self._add(lambda layers, values: gate(values[excited]))
        self._add(lambda layers, values: values[scale] * values[source])

    # -- pooling and moving ------------------------------------------------------------------

    def _draw_pool(self) -> None:
        source = self._pick()
        if min(self.values[source].shape[2:]) < 3:
            return
        stride, ceil = self.random.choice([1, 2]), self.random.random() < 0.3
        kind = self.random.choice(["max", "average", "average", "adaptive", "mixed"])
        include = self.random.random() < 0.5
        pools: dict[str, Callable[[Tensor], Tensor]] = {
            "max": lambda x: F.max_pool2d(x, 3, stride, 1, ceil_mode=ceil),
            "average": lambda x: F.avg_pool2d(
                x, 3, stride, 1, ceil_mode=ceil, count_include_pad=include
            ),
            "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
            "mixed": lambda x: F.avg_pool2d(x, (2, 3)),
        }
        self._add(lambda layers, values: pools[kind](values[source]))

    def _draw_pad(self) -> None:
        source = self._pick()
        if 3 <= min(self.values[source].shape[2:]) <= max(self.values[source].shape[2:]) < 10:
            amounts = self.random.choice([(1, 0, 0, 1), (1, 1, 1, 1), (0, -1, 1, 0)])
            self._add(lambda layers, values: F.pad(values[source], amounts))

    def _draw_chunk(self) -> None:
        source = self._pick()
        if self._channels(source) % 2:
            return
        half = self._channels(source) // 2
        left = self._add(lambda layers, values: values[source].chunk(2, 1)[0])
        right = self._add(lambda layers, values: torch.split(values[source], half, 1)[1])
        self._add(lambda layers, values: torch.cat((values[right], values[left]), 1))

    def _draw_shuffle(self) -> None:
        source = self._pick()
        if self._channels(source) % 2:
            return

        def shuffle(layers: nn.ModuleList, values: list[Tensor]) -> Tensor:
            x = values[source]
            batch, channels, height, width = x.size()
            parts = x.view(batch, 2, channels // 2, height, width)
            return parts.transpose(1, 2).contiguous().view(batch, channels, height, width)

        self._add(shuffle)

    def _draw_slice(self) -> None:
        source = self._pick()
        if self._channels(source) > 1 and self.values[source].shape[3] > 2:
            self._add(lambda layers, values: values[source][:, 1:, :, :-1])

    def _draw_scalar(self) -> None:
        source = self._pick()
        kind = self.random.choice(["scale", "shift", "from one"])
        scalars: dict[str, Callable[[Tensor], Tensor]] = {
            "scale": lambda x: x * 0.5,
            "shift": lambda x: x + 3,
            "from one": lambda x: 1 - x,
        }
        self._add(lambda layers, values: scalars[kind](values[source]))

    def _draw_size_as_scalar(self) -> None:
        source = self._pick()
        if self.random.random() < 0.5:
            self._add(lambda layers, values: values[source] / values[source].size(2))
        else:
            self._add(lambda layers, values: values[source] + values[source].shape[-1])

    def _draw_float_island(self) -> None:
        source = self._pick()
        self._add(lambda layers, values: F.softmax(values[source], dim=1))

    def _draw_upsample(self) -> None:
        source = self._pick()
        if max(self.values[source].shape[2:]) < 6:
            self._add(lambda layers, values: F.interpolate(values[source], scale_factor=2))

    def _draw_head(self) -> None:
        source = self._pick()
        channels = self._channels(source)
        if self.random.random() < 0.5:
            pooled = self._add(lambda layers, values: F.adaptive_avg_pool2d(values[source], 1))
            flat = self._add(lambda layers, values: torch.flatten(values[pooled], 1))
        else:
            flat = self._add(lambda layers, values: values[source].mean([2, 3]))
        hidden = self._layer(nn.Linear(channels, 5), flat)
        if self.random.random() < 0.5:
            active = self._add(lambda layers, values: F.relu(values[hidden]))
            self._layer(nn.Linear(5, 3, bias=self.random.random() < 0.5), active)


OPERATIONS = tuple(
    name.removeprefix("_draw_") for name in vars(RandomNetwork) if name.startswith("_draw_")
)
