"""MONAI's 3D ResNet-50."""

from __future__ import annotations

from torch import nn

from ml.encoders._resnet import resnet


def resnet50() -> nn.Module:
    """Bottleneck blocks 3, 4, 6, 3; D = 2,048."""
    return resnet("bottleneck", [3, 4, 6, 3])
