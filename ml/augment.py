"""Chance changes of training volumes, drawn by (seed, epoch, scan) and applied on the device.

What a scan becomes does not depend on the batch it is in, on threads or on how many devices share the work.
Shape suffixes: B = scan of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ml.config import Recipe
from ml.data import mirrored

PREFIX = "augment_"
TINY = 1e-7
"""Added to the range of a volume ahead of its contrast, as MONAI does."""


def draw(recipe: Recipe, seed: int, epoch: int, rows: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    """What happens to scans `rows` in an epoch, as arrays of a batch."""
    drawn: dict[str, NDArray[np.generic]] = {f"{PREFIX}flip": mirrored(seed, epoch, rows, recipe.flip_x)}
    if not (_moves(recipe) or _changes(recipe)):
        return drawn
    # what is drawn later stands behind, so that recipes without it draw what they always did
    chance = np.stack([np.random.default_rng([seed, epoch, int(row), 4]).uniform(-1, 1, 10) for row in rows])
    if _moves(recipe):
        drawn[f"{PREFIX}grid"] = np.stack([_grid(recipe, one) for one in chance]).astype(np.float32)
    if _changes(recipe):
        noise, offset = recipe.noise_hu * np.abs(chance[:, 5]), recipe.offset_hu * chance[:, 6]
        gain, gamma = 1 + recipe.gain * chance[:, 8], (1 + recipe.gamma) ** chance[:, 9]
        drawn[f"{PREFIX}hu"] = np.stack([offset, noise, gain, gamma], 1).astype(np.float32)
        drawn[f"{PREFIX}seed"] = (np.abs(chance[:, 7]) * 2**53).astype(np.int64)
    return drawn


def _moves(recipe: Recipe) -> bool:
    return bool(recipe.rotate_degrees or recipe.zoom or recipe.shift_mm)


def _changes(recipe: Recipe) -> bool:
    return bool(recipe.offset_hu or recipe.noise_hu or recipe.gain or recipe.gamma)


def _grid(recipe: Recipe, chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 4) from a place in the new volume to that in the old one, both in (x, y, z) from -1 to 1.

    Turned in the axial plane, zoomed and shifted, in voxels: axes differ in size, and so do their units of -1 to 1.
    """
    angle = math.radians(recipe.rotate_degrees) * chance[0]
    zoom = (1 + recipe.zoom) ** chance[1]
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]) / zoom
    half = np.array(recipe.shape_zyx[::-1]) / 2
    shift = recipe.shift_mm / np.array(recipe.spacing_zyx[::-1]) * chance[2:5]
    return np.column_stack([turn * half[None, :] / half[:, None], shift / half])


def apply(voxels_BZYX: Tensor, batch: Mapping[str, Tensor], recipe: Recipe) -> Tensor:
    """The volumes as drawn (HU; int16 as they were where only mirrored, else float32).

    What comes in from outside is air.
    """
    flip = batch.get(f"{PREFIX}flip")
    if flip is not None:
        voxels_BZYX = torch.where(flip.view(-1, 1, 1, 1), voxels_BZYX.flip(3), voxels_BZYX)
    grid = batch.get(f"{PREFIX}grid")
    if grid is not None:
        air = recipe.clip_hu[0] if recipe.scaling == "window" else 0.0
        size = (len(voxels_BZYX), 1, *voxels_BZYX.shape[1:])
        places = torch.nn.functional.affine_grid(grid, list(size), align_corners=False)
        above = (voxels_BZYX.float() - air).unsqueeze(1)
        voxels_BZYX = torch.nn.functional.grid_sample(above, places, align_corners=False)[:, 0] + air
    change = batch.get(f"{PREFIX}hu")
    if change is not None:
        voxels_BZYX = _intensity(voxels_BZYX.float(), change, batch[f"{PREFIX}seed"], recipe)
    return voxels_BZYX


def _intensity(voxels_BZYX: Tensor, change_B4: Tensor, seed_B: Tensor, recipe: Recipe) -> Tensor:
    """Contrast, gain, offset and noise, in this order, by the definitions of MONAI's AdjustContrast, ScaleIntensity
    (by a factor), ShiftIntensity and GaussianNoise."""
    offset, deviation, gain, gamma = (change_B4[:, i].view(-1, 1, 1, 1) for i in range(4))
    if recipe.gamma:
        low = voxels_BZYX.amin((1, 2, 3), keepdim=True)
        span = voxels_BZYX.amax((1, 2, 3), keepdim=True) - low
        voxels_BZYX = ((voxels_BZYX - low) / (span + TINY)) ** gamma * span + low
    voxels_BZYX = voxels_BZYX * gain + offset
    if recipe.noise_hu:
        noise = torch.stack([_noise(v, int(seed)) for v, seed in zip(voxels_BZYX, seed_B, strict=True)])
        voxels_BZYX = voxels_BZYX + deviation * noise
    return voxels_BZYX


def _noise(volume_ZYX: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(volume_ZYX.device).manual_seed(seed)
    return torch.randn(volume_ZYX.shape, generator=generator, device=volume_ZYX.device)
