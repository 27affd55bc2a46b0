"""A small convolutional encoder for phantoms and for trying things on two cores."""

from __future__ import annotations

from torch import nn


def tiny() -> nn.Module:
    """161 k weights: conv 12-24-64-64, strides 2, 2, 2, 1, GroupNorm(4); D = 64."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 12, 2), (12, 24, 2), (24, 64, 2), (64, 64, 1)):
        layers += [nn.Conv3d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
