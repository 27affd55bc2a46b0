"""Normalisation layers: which kind an encoder gets, and the statistics of batch normalisation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch normalisation layers inside a module."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def has_learnt_statistics(module: nn.Module) -> bool:
    """True where a module was built with statistics of batch normalisation that are not those of a new layer."""
    kept = [(layer.running_mean, layer.running_var) for layer in batch_norms(module)]
    return any(mean is not None and var is not None and bool(mean.any() or (var != 1).any()) for mean, var in kept)


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


def exchange_batch_norms(module: nn.Module) -> None:
    """Put group normalisation in the place of each batch normalisation inside; scale and shift are kept.

    Layers are exchanged afterwards, because MONAI's ResNet hands its argument `norm` to the first layer alone.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            channels = child.num_features
            groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
            new = nn.GroupNorm(groups, channels)
            if child.affine:
                new.load_state_dict({"weight": child.weight.detach(), "bias": child.bias.detach()})
            setattr(module, name, new)
        else:
            exchange_batch_norms(child)


@torch.no_grad()
def reestimate_statistics(encoder: nn.Module, batches: Iterable[Tensor]) -> int:
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
