"""MONAI's 3D DenseNet-121."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def densenet121() -> nn.Module:
    """Up to its last activation; D = 1,024."""
    from monai.networks.nets.densenet import DenseNet

    features = DenseNet(spatial_dims=3, in_channels=1, out_channels=1).features
    return nn.Sequential(OrderedDict([*features.named_children(), ("relu5", nn.ReLU(inplace=True))]))
