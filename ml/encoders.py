"""ENCODERS: name → function that builds a 3D encoder (B, 1, Z, Y, X) → (B, D), with its `width` D.

Any size of volume goes in (SwinUNETR: multiples of 32), because features are pooled by their mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Encoder(nn.Module):
    """A convolutional or windowed-attention body whose last feature map is pooled by its mean."""

    def __init__(self, body: nn.Module, width: int, *, frozen_statistics: bool = False) -> None:
        super().__init__()
        self.body, self.width, self.frozen_statistics = body, width, frozen_statistics

    def forward(self, volume_B1ZYX: Tensor) -> Tensor:
        features_BDZYX: Tensor = self.body(volume_B1ZYX)
        return features_BDZYX.float().mean((2, 3, 4))  # the pooled embedding is float32 inside a bf16 step, too

    def train(self, mode: bool = True) -> Encoder:
        """Train mode; batch normalisation with frozen statistics stays as in evaluation."""
        super().train(mode)
        if self.frozen_statistics:
            for layer in batch_norms(self):
                layer.eval()
        return self


def tiny(norm: str) -> Encoder:
    """161 k weights: conv 12-24-64-64, strides 2, 2, 2, 1, GroupNorm(4). Knows group normalisation only."""
    if norm != "group":
        raise ValueError(f"Expected norm=group for the encoder tiny, got {norm}; it has no batch normalisation.")
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 12, 2), (12, 24, 2), (24, 64, 2), (64, 64, 1)):
        layers += [nn.Conv3d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.ReLU(inplace=True)]
    return Encoder(nn.Sequential(*layers), 64)


def densenet121(norm: str) -> Encoder:
    """MONAI's 3D DenseNet-121 up to its last activation; D = 1,024."""
    from monai.networks.nets.densenet import DenseNet

    features = DenseNet(spatial_dims=3, in_channels=1, out_channels=1).features
    body = nn.Sequential(*features.children(), nn.ReLU(inplace=True))
    return _normalised(body, 1024, norm)


def resnet152(norm: str) -> Encoder:
    """MONAI's 3D ResNet-152 up to its last block, first convolution with stride 2; D = 2,048."""
    from monai.networks.nets.resnet import ResNet

    net = ResNet(
        "bottleneck", [3, 8, 36, 3], [64, 128, 256, 512], n_input_channels=1, conv1_t_stride=2, feed_forward=False
    )
    body = nn.Sequential(*(layer for name, layer in net.named_children() if name != "avgpool"))
    return _normalised(body, 2048, norm)


class _SwinBottleneck(nn.Module):
    """The deepest hidden state of a Swin transformer."""

    def __init__(self, swin: nn.Module) -> None:
        super().__init__()
        self.swin = swin

    def forward(self, volume_B1ZYX: Tensor) -> Tensor:
        if any(size % 32 for size in volume_B1ZYX.shape[2:]):
            sizes = tuple(volume_B1ZYX.shape[2:])
            raise ValueError(f"Expected volume sizes that are multiples of 32 for swinunetr, got {sizes}.")
        deepest: Tensor = self.swin(volume_B1ZYX)[-1]
        return deepest


def swinunetr(norm: str) -> Encoder:
    """The encoder of MONAI's SwinUNETR (feature size 48); its bottleneck is pooled, D = 768. It has layer norms."""
    from monai.networks.nets.swin_unetr import SwinTransformer

    swin = SwinTransformer(
        in_chans=1,
        embed_dim=48,
        window_size=(7, 7, 7),
        patch_size=(2, 2, 2),
        depths=(2, 2, 2, 2),
        num_heads=(3, 6, 12, 24),
    )
    return _normalised(_SwinBottleneck(swin), 768, norm)


ENCODERS: dict[str, Callable[[str], Encoder]] = {
    "tiny": tiny,
    "densenet121": densenet121,
    "resnet152": resnet152,
    "swinunetr": swinunetr,
}


def choose_norm(norm: str, *, has_statistics: bool) -> str:
    """The normalisation that `norm` means: auto is frozen where the weights bring statistics, else group.

    Raises:
        ValueError: frozen without statistics.
    """
    if norm == "auto":
        return "frozen" if has_statistics else "group"
    if norm == "frozen" and not has_statistics:
        raise ValueError("Expected weights with batch-norm statistics for norm=frozen, found none; use norm=group.")
    return norm


def build_encoder(name: str, norm: str = "group") -> Encoder:
    """A new encoder, its weights drawn from torch's global generator.

    Args:
        name: of ENCODERS.
        norm: group, frozen (batch normalisation whose statistics stay) or batch.

    Raises:
        ValueError: unknown name, or a norm that the encoder does not have.
    """
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(ENCODERS)}."
        raise ValueError(f"No encoder named {name!r}. {hint}")
    return ENCODERS[name](norm)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch normalisation layers inside a module."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def _normalised(body: nn.Module, width: int, norm: str) -> Encoder:
    """The encoder with the wanted normalisation.

    Layers are exchanged afterwards, because MONAI's ResNet hands its argument `norm` to the first layer alone.
    """
    if norm == "group":
        _exchange_batch_norms(body)
    return Encoder(body, width, frozen_statistics=norm == "frozen")


def _exchange_batch_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            channels = child.num_features
            groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
            setattr(module, name, nn.GroupNorm(groups, channels))
        else:
            _exchange_batch_norms(child)


@torch.no_grad()
def reestimate_statistics(encoder: Encoder, batches: Iterable[Tensor]) -> int:
    """Set the statistics of batch normalisation to those of some train volumes; how many volumes.

    Each pass is normalised by its own statistics, as in training; the mean and the whole variance over all passes,
    between them, too, are what evaluation uses from then on.

    Args:
        encoder: left in evaluation mode; one without batch normalisation stays as it is.
        batches: (B, 1, Z, Y, X) inputs, 200 volumes or more, each of one size.
    """
    layers = batch_norms(encoder)
    if not layers:
        return 0
    sums: dict[nn.Module, Tensor] = {layer: layer.weight.new_zeros(2, layer.num_features) for layer in layers}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float().transpose(0, 1).flatten(1)
        sums[layer] += torch.stack([x.mean(1), x.square().mean(1)]) * len(inputs[0])

    encoder.eval()
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    for layer in layers:
        layer.train()
    volumes = 0
    for batch in batches:
        encoder(batch)
        volumes += len(batch)
    for layer, hook in zip(layers, hooks, strict=True):
        hook.remove()
        mean, square = sums[layer] / volumes
        layer.running_mean, layer.running_var = mean, (square - mean.square()).clamp(min=0)
    encoder.eval()
    return volumes
