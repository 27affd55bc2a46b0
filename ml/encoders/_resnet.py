"""What MONAI's 3D ResNets share."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def resnet(block: str, layers: list[int]) -> nn.Module:
    """A ResNet up to its last block, first convolution with stride 2; D is 512 (basic) or 2,048 (bottleneck)."""
    from monai.networks.nets.resnet import ResNet

    net = ResNet(block, layers, [64, 128, 256, 512], n_input_channels=1, conv1_t_stride=2, feed_forward=False)
    return nn.Sequential(OrderedDict((name, layer) for name, layer in net.named_children() if name != "avgpool"))
