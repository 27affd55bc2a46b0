"""MONAI's 3D ResNet-152."""

from __future__ import annotations

from torch import nn

from ml.encoders._resnet import resnet


def resnet152() -> nn.Module:
    """Bottleneck blocks 3, 8, 36, 3; D = 2,048."""
    return resnet("bottleneck", [3, 8, 36, 3])
