"""Volumes into vectors: evaluation mode, in batches, each distinct content once; standardised, checked for search.

Shape suffixes: B = scan of a batch, N = scan, D = embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ml.batches import Batches, Volumes
from ml.config import Recipe
from ml.data import prefetch
from ml.encoders import Encoder
from ml.volumes import WHOLE

PASSES, FASTER = 8, 1.05
"""Passes after which a batch size is judged, and how much faster a larger one has to be."""
HALF_MAX = 65504.0
"""The largest number a half holds; pgvector's halfvec refuses more."""
_ROWS = 1_000
"""Vectors standardised at once."""


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


def embed(
    encoder: Encoder,
    recipe: Recipe,
    volume: Volumes,
    items: Sequence[int],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:
    """(N, D) raw embeddings of the volumes of `items`, as `embed_each` makes them."""
    made = [np.empty((0, encoder.width), np.float32)]
    embed_each(encoder, recipe, volume, items, lambda _, raw_BD: made.append(raw_BD), report)
    return np.concatenate(made)


@torch.inference_mode()
def embed_each(
    encoder: Encoder,
    recipe: Recipe,
    volume: Volumes,
    items: Sequence[int],
    keep: Callable[[Sequence[int], NDArray[np.float32]], None],
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    known: Container[int] = (),
) -> None:
    """Embed volumes in evaluation mode; no more than a batch of embeddings is held.

    Args:
        encoder: on its device; left in the mode it came in.
        recipe: of the encoder.
        volume: item → (Z, Y, X) in HU.
        items: distinct volumes, to be embedded once each.
        keep: called with the items and raw (B, D) embeddings of each batch made.
        report: called with (done, total) volumes.
        known: items that an earlier attempt has embedded; batches that are known as a whole are not made again, so that
            the result is that of an attempt without a break. Those of other batches are made, and kept, again.
    """
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    # On a processor no more than training takes at once: that is the memory that whoever set the batch has.
    batch = BatchSize(recipe.batch, grows=device.type == "cuda")
    todo = _todo(items, known, recipe.batch)
    done, there, batches = 0, len(items) - len(todo), Batches(recipe.shape_zyx)
    while done < len(todo):
        size, began, before = batch.size, time.monotonic(), done
        starts = range(done, min(len(todo), done + size * PASSES), size)

        def load(i: int, starts: range = starts) -> Tensor:
            return torch.from_numpy(batches.stack(volume, todo[starts[i] : starts[i] + starts.step]))

        try:
            with closing(prefetch(load, range(len(starts)))) as passes:
                for voxels_BZYX in passes:
                    with autocast(recipe, device):
                        embedding_BD = encoder(to_input(voxels_BZYX.to(device), recipe))
                    keep(todo[done : done + len(voxels_BZYX)], embedding_BD.float().cpu().numpy())
                    done += len(voxels_BZYX)
                    report(there + done, len(items))
        except torch.OutOfMemoryError:
            batch.does_not_fit()
            torch.cuda.empty_cache()
        else:
            batch.took(done - before, time.monotonic() - began)
    encoder.train(was_training)


def _todo(items: Sequence[int], known: Container[int], batch: int) -> list[int]:
    """Items of batches that are not known as a whole."""
    batches = (items[start : start + batch] for start in range(0, len(items), batch))
    return [item for some in batches if not all(item in known for item in some) for item in some]


class BatchSize:
    """Volumes a pass: doubled as long as that is faster and fits."""

    def __init__(self, size: int, *, grows: bool) -> None:
        self.size, self._grows, self._rate, self._smallest = size, grows, 0.0, size

    def took(self, volumes: int, seconds: float) -> None:
        """Some passes of this size took so long."""
        rate = volumes / max(seconds, 1e-9)
        if not self._grows:
            return
        if rate > FASTER * self._rate:
            self.size, self._rate = 2 * self.size, rate
        else:
            self.size, self._grows = max(self._smallest, self.size // 2), False

    def does_not_fit(self) -> None:
        """Half of it from now on. Raises OutOfMemoryError where it cannot be less."""
        if self.size == 1:
            raise torch.OutOfMemoryError("a single volume does not fit")
        self.size, self._grows = self.size // 2, False
        self._smallest = min(self._smallest, self.size)


def statistics(raw_ND: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and SD (D,) of train embeddings. Raises ValueError where all are the same vector."""
    return statistics_of(lambda: (raw_ND[start : start + _ROWS] for start in range(0, len(raw_ND), _ROWS)))


def statistics_of(
    blocks: Callable[[], Iterable[NDArray[np.float32]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and SD (D,) of train embeddings that come in blocks of (B, D), asked for twice.

    Raises:
        ValueError: all are the same vector, or not finite.
    """
    count, total = 0, np.zeros(1)
    for raw_BD in blocks():
        count, total = count + len(raw_BD), total + raw_BD.sum(0, dtype=np.float64)
    mean = total / count
    squares = sum(((raw_BD - mean) ** 2).sum(0) for raw_BD in blocks())
    sd = np.sqrt(squares / count)
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
    made = np.empty(raw_ND.shape, np.float32)
    for i in range(0, len(made), _ROWS):  # what is computed in float64 is never all there
        made[i : i + _ROWS] = (raw_ND[i : i + _ROWS] - mean) / np.where(varies, sd, 1.0) * varies
    _refuse(made)
    return made


def _refuse(made: NDArray[np.float32]) -> None:
    """Raise ValueError for vectors that cannot be searched for."""
    for fault, words in (
        (~np.isfinite(made).all(1), "are not finite"),
        (~made.any(1), "are zero"),
        ((np.abs(made) > HALF_MAX).any(1), "are beyond the range of a half"),
    ):
        if fault.any():
            raise ValueError(
                f"Expected embeddings that can be searched, got {int(fault.sum())} of {len(made)} that {words}."
            )


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
