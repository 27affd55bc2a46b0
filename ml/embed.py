"""Volumes into vectors: evaluation mode, in batches, each distinct content once; standardised, checked for search.

Shape suffixes: B = scan of a batch, N = scan, D = embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ml.config import Recipe
from ml.data import prefetch
from ml.encoders import Encoder
from ml.volumes import WHOLE

HALF_MAX = 65504.0
"""The largest number a half holds; pgvector's halfvec refuses more."""


def pick_device() -> torch.device:
    """The accelerator where there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(encoder: Encoder, device: torch.device) -> Encoder:
    """The encoder on a device, its weights laid out as convolutions want them."""
    return encoder.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def to_input(voxels_BZYX: Tensor, recipe: Recipe) -> Tensor:
    """(B, 1, Z, Y, X) float32 as the encoder sees it: HU clamped to the recipe's window, centred, scaled; or 0 to 1."""
    if recipe.scaling == "minmax":
        scaled_BZYX = voxels_BZYX.float() / WHOLE
    else:
        low, high = recipe.window_hu
        scaled_BZYX = (voxels_BZYX.float().clamp_(low, high) - recipe.centre_hu) / recipe.scale_hu
    return scaled_BZYX.unsqueeze(1).contiguous(memory_format=torch.channels_last_3d)


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The encoder's precision: bfloat16 where the recipe says so and an accelerator does it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16" and device.type == "cuda")


@torch.inference_mode()
def embed(
    encoder: Encoder,
    recipe: Recipe,
    volume: Callable[[int], NDArray[np.int16]],
    items: Sequence[int],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:
    """(N, D) raw embeddings of the volumes of `items`, in evaluation mode.

    Args:
        encoder: on its device; left in the mode it came in.
        recipe: of the encoder.
        volume: item → (Z, Y, X) in HU.
        items: distinct volumes, to be embedded once each.
        report: called with (done, total) volumes.
    """
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    # No more than training takes at once: that is the memory that whoever set the batch has.
    batches = [items[i : i + recipe.batch] for i in range(0, len(items), recipe.batch)]
    made = np.empty((len(items), encoder.width), np.float32)
    done = 0
    for voxels_BZYX in prefetch(
        lambda i: torch.from_numpy(np.stack([volume(v) for v in batches[i]])), range(len(batches))
    ):
        with autocast(recipe, device):
            embedding_BD = encoder(to_input(voxels_BZYX.to(device), recipe))
        made[done : done + len(voxels_BZYX)] = embedding_BD.float().cpu().numpy()
        done += len(voxels_BZYX)
        report(done, len(items))
    encoder.train(was_training)
    return made


def statistics(raw_ND: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and SD (D,) of train embeddings. Raises ValueError where all are the same vector."""
    mean, sd = raw_ND.mean(0, dtype=np.float64), raw_ND.std(0, dtype=np.float64)
    if not np.isfinite(sd).all():
        raise ValueError("Expected finite embeddings, got others; the encoder's weights or its precision are at fault.")
    if not (sd > 1e-6 * (1 + np.abs(mean))).any():
        raise ValueError("Expected embeddings that differ from scan to scan, got the same vector for every train scan.")
    return mean, sd


def standardise(raw_ND: NDArray[np.float32], mean: NDArray[np.float64], sd: NDArray[np.float64]) -> NDArray[np.float32]:
    """(x − mean) / SD as float32, fit for a search by angle; dimensions that never vary become 0.

    Raises:
        ValueError: a vector is zero, not finite, or beyond the range of a half.
    """
    varies = sd > 1e-6 * (1 + np.abs(mean))
    made = ((raw_ND - mean) / np.where(varies, sd, 1.0) * varies).astype(np.float32)
    for fault, words in (
        (~np.isfinite(made).all(1), "are not finite"),
        (~made.any(1), "are zero"),
        ((np.abs(made) > HALF_MAX).any(1), "are beyond the range of a half"),
    ):
        if fault.any():
            raise ValueError(
                f"Expected embeddings that can be searched, got {int(fault.sum())} of {len(made)} that {words}."
            )
    return made


def shared_volumes(content: Sequence[str], persons: NDArray[np.int64]) -> int:
    """How many scans have a content that a scan of another person has, too.

    Args:
        content: (N,) digest of each scan's content.
        persons: (N,) whose scan.
    """
    owners: dict[str, set[int]] = {}
    for digest, person in zip(content, persons.tolist(), strict=True):
        owners.setdefault(digest, set()).add(person)
    return sum(len(owners[digest]) > 1 for digest in content)
