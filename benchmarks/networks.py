"""The networks with real weights, as factories: ``benchmarks.networks:cifar_resnet20`` is a MODEL.

Weights are handed over apart (``--weights``), or by `benchmarks.real.RealNetwork.load`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without weights (option A of the paper)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.added = channels - channels_in
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """f32[N,C,H,W] → f32[N,channels,H/stride,W/stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added or self.stride != 1:
            half = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 images: He et al. 2015, section 4.2, with 6·blocks + 2 layers."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = CifarBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(CifarBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """f32[N,3,32,32] → logits f32[N,classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size(3))
        return self.linear(x.view(x.size(0), -1))


def cifar_resnet20() -> nn.Module:
    return CifarResNet(3)


def cifar_resnet56() -> nn.Module:
    return CifarResNet(9)


def mobilenet_v2() -> nn.Module:
    return models.mobilenet_v2()


def squeezenet1_1() -> nn.Module:
    return models.squeezenet1_1()


def resnet18_10() -> nn.Module:
    return models.resnet18(num_classes=10)


def shufflenet_v2_10() -> nn.Module:
    return models.shufflenet_v2_x1_0(num_classes=10)


def vit_tiny() -> nn.Module:
    return models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768
    )
