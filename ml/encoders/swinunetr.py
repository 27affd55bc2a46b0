"""MONAI's SwinUNETR, feature size 48: the bottleneck of its encoder, or the output of its decoder."""

from __future__ import annotations

from torch import Tensor, nn

from ml.config import Recipe

DECODER_WIDTH = 384


class _Swin(nn.Module):
    """Refuses sizes that five halvings do not divide."""

    width: int

    def forward(self, volume_B1ZYX: Tensor) -> Tensor:
        if any(size % 32 for size in volume_B1ZYX.shape[2:]):
            sizes = tuple(volume_B1ZYX.shape[2:])
            raise ValueError(f"Expected volume sizes that are multiples of 32 for swinunetr, got {sizes}.")
        return self.features(volume_B1ZYX)

    def features(self, volume_B1ZYX: Tensor) -> Tensor:
        raise NotImplementedError


class _Bottleneck(_Swin):
    """The deepest hidden state of a Swin transformer."""

    width = 768

    def __init__(self, swin: nn.Module) -> None:
        super().__init__()
        self.swin = swin

    def features(self, volume_B1ZYX: Tensor) -> Tensor:
        deepest: Tensor = self.swin(volume_B1ZYX)[-1]
        return deepest


class _Decoder(_Swin):
    """The decoder's 48 channels, pooled, then its last 1 × 1 × 1 convolution to 384.

    A mean over voxels and a 1 × 1 × 1 convolution may change places: the same numbers, without 384 values a voxel. It
    also shows that these 384 numbers span 48 dimensions at most (and an offset).
    """

    width = DECODER_WIDTH

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.out = net.get_submodule("out")
        net.out = nn.Identity()

    def features(self, volume_B1ZYX: Tensor) -> Tensor:
        pooled: Tensor = self.net(volume_B1ZYX).float().mean((2, 3, 4), keepdim=True)
        made: Tensor = self.out(pooled)
        return made


def swinunetr(recipe: Recipe) -> nn.Module:
    """By `output` of the recipe: bottleneck, D = 768, or decoder, D = 384 of rank 48. It has layer norms."""
    from monai.networks.nets.swin_unetr import SwinTransformer, SwinUNETR

    if recipe.output == "decoder":
        return _Decoder(SwinUNETR(1, DECODER_WIDTH, feature_size=48, use_checkpoint=recipe.recompute))
    swin = SwinTransformer(
        in_chans=1,
        embed_dim=48,
        window_size=(7, 7, 7),
        patch_size=(2, 2, 2),
        depths=(2, 2, 2, 2),
        num_heads=(3, 6, 12, 24),
        use_checkpoint=recipe.recompute,
    )
    return _Bottleneck(swin)
