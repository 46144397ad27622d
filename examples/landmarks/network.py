"""A small MobileNetV2 that says where twelve landmarks of a face are."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

from examples.landmarks.faces import LANDMARKS, SIZE

__all__ = ["WEIGHTS", "LandmarkNet"]

WEIGHTS = Path(__file__).with_name("landmarks.safetensors")
# Channels, stride, and how many times as many channels are in between.
_BLOCKS = ((24, 2, 3), (24, 1, 3), (32, 2, 3), (32, 1, 3), (48, 2, 4), (48, 1, 4))


class LandmarkNet(nn.Module):
    """Images float32[N, 3, 64, 64] to landmarks float32[N, 24] in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv2dNormActivation(3, 16, stride=2, activation_layer=nn.ReLU6)]
        channels = 16
        for wide, stride, expand in _BLOCKS:
            layers.append(InvertedResidual(channels, wide, stride, expand))
            channels = wide
        layers.append(Conv2dNormActivation(channels, 64, 1, activation_layer=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        # No pooling: where a feature lies is what is asked for.
        side = SIZE // 16
        self.head = nn.Linear(64 * side * side, 2 * len(LANDMARKS))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y: Tensor = self.head(self.features(x).flatten(1))
        return y
