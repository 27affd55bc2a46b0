"""MONAI's 3D ResNet-18."""

from __future__ import annotations

from torch import nn

from ml.encoders._resnet import resnet


def resnet18() -> nn.Module:
    """Basic blocks 2, 2, 2, 2; D = 512."""
    return resnet("basic", [2, 2, 2, 2])
