"""One CT series as the volume an encoder sees: oriented, resampled, centred, clipped.

Shape suffixes: volumes are (Z, Y, X) in RAS order: Z towards the head, Y towards the front, X to the right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ml.decoding import AIR, Decoded, Unreadable, decode, is_plausible, spacing_of

OBLIQUE = 0.02
"""Axes whose direction cosines are off by more are resampled through the whole affine."""
SLAB = 16
"""Rows resampled at a time, which bounds the memory."""
WIDEST_RANGE_HU = 5000


@dataclass(frozen=True, slots=True)
class VolumeRecipe:
    """What a volume is; part of an encoder's recipe."""

    shape_zyx: tuple[int, int, int]
    spacing_mm: float
    """Isotropic."""
    low_hu: int = -1000
    high_hu: int = 1000
    centre: Literal["body", "middle"] = "body"
    """Centre of the grid: that of the body's box, or of the scan."""


@dataclass(frozen=True, slots=True)
class Volume:
    """What an encoder sees of a scan."""

    voxels: NDArray[np.int16]
    """(Z, Y, X) HU, clipped to the recipe's window."""
    content_sha256: bytes
    """Of the decoded voxels in RAS order and their spacing: equal content has one digest, whatever its file format."""
    padding_share: float
    """Share of the grid that lies outside the scan."""
    z_coverage: float
    """Length scanned along Z, mm."""


@dataclass(frozen=True, slots=True)
class _Canonical:
    hu: NDArray[np.int16]
    """(Z, Y, X) in RAS order."""
    spacing: NDArray[np.float64]
    """(3,) of Z, Y, X, mm."""
    directions: NDArray[np.float64]
    """(3, 3) unit columns of Z, Y, X in (Z, Y, X) coordinates; the identity where the axes are the body's."""


def read_volume(path: Path, format: str, recipe: VolumeRecipe, files: Sequence[Path] = ()) -> Volume:
    """Decode one series and bring it into the recipe's grid.

    A scan that has the recipe's shape and spacing is only clipped. Others are clipped, resampled by a triangle filter
    as wide as the coarser of both spacings (linear upwards, antialiased downwards) and padded with air.

    Args:
        path: a NIfTI file or a folder with a DICOM series.
        format: nifti or dicom.
        recipe: grid and window.
        files: the DICOM series' own files, where its folder holds others, too.

    Raises:
        Unreadable: a ValueError; what is there cannot be read as a CT volume, in one sentence that names no file.
    """
    scan = _canonical(decode(path, format, files))
    _check_hounsfield(scan.hu)
    digest = _digest(scan)
    length = float(scan.hu.shape[0] * scan.spacing[0])
    if scan.hu.shape == tuple(recipe.shape_zyx) and np.allclose(scan.spacing, recipe.spacing_mm, atol=1e-3):
        return Volume(np.clip(scan.hu, recipe.low_hu, recipe.high_hu), digest, 0.0, length)
    if np.abs(scan.directions - np.eye(3)).max() > OBLIQUE:
        scan = _straighten(scan, recipe)
    voxels, padding = _resample(scan, recipe)
    return Volume(voxels, digest, padding, length)


def _canonical(decoded: Decoded) -> _Canonical:
    """Permute and flip the stored axes to the nearest RAS order."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    if not is_plausible(decoded.affine):
        raise Unreadable("Expected a spacing between 0.02 and 100 mm along each axis, got another; convert it again.")
    orientation = io_orientation(decoded.affine)
    if np.isnan(orientation).any():
        raise Unreadable("Expected three independent axes, got an affine that has fewer; convert the scan again.")
    hu = apply_orientation(decoded.hu, orientation)
    affine = decoded.affine @ inv_ornt_aff(orientation, decoded.hu.shape)
    spacing = spacing_of(affine)
    directions = (affine[:3, :3] / spacing)[::-1, ::-1]
    # Formats keep spacings with different precision; 0.1 micrometre is more than any of them means.
    return _Canonical(np.ascontiguousarray(hu.transpose(2, 1, 0)), spacing[::-1].round(4), directions)


def _check_hounsfield(hu: NDArray[np.int16]) -> None:
    lowest, highest = int(hu.min()), int(hu.max())
    if lowest == highest:
        raise Unreadable(f"Expected a scan, got {lowest} in every voxel.")
    if lowest >= 0 or highest < -500:
        raise Unreadable(
            f"Expected Hounsfield units, which hold air or fat and tissue, got values from {lowest} to {highest}; "
            "rescale the scan."
        )
    if highest - lowest > WIDEST_RANGE_HU:
        sample = hu.ravel()[:: max(1, hu.size // 100_000)]
        low, high = np.percentile(sample, [1, 99])
        if high - low > WIDEST_RANGE_HU:
            raise Unreadable(
                f"Expected Hounsfield units, got values that span {high - low:.0f} between their 1st and 99th "
                "percentile; rescale the scan."
            )


def _digest(scan: _Canonical) -> bytes:
    about = [*scan.hu.shape, *(round(float(s) * 10_000) for s in scan.spacing)]
    digest = hashlib.sha256(np.array(about, "<i8").tobytes())
    digest.update(np.ascontiguousarray(scan.hu, "<i2").data)
    return digest.digest()


def _straighten(scan: _Canonical, recipe: VolumeRecipe) -> _Canonical:
    """Resample an oblique or sheared (tilted gantry) scan to axes that are the body's."""
    from scipy.ndimage import affine_transform, gaussian_filter

    spacing = np.maximum(scan.spacing, recipe.spacing_mm / 2)
    matrix = scan.directions * scan.spacing
    corners = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in scan.hu.shape], indexing="ij"), -1).reshape(-1, 3)
    low, high = (corners @ matrix.T).min(0), (corners @ matrix.T).max(0)
    shape = np.maximum(2, np.ceil((high - low) / spacing - 1e-6)).astype(int)
    start = (low + high) / 2 - (shape - 1) / 2 * spacing
    hu = np.clip(scan.hu, recipe.low_hu, recipe.high_hu).astype(np.float32)
    blur = np.where(spacing > scan.spacing * 1.01, spacing / scan.spacing / 2.355, 0)
    if blur.any():
        hu = gaussian_filter(hu, blur, mode="nearest", truncate=2.5)
    inverse = np.linalg.inv(matrix)
    straight = affine_transform(
        hu, inverse * spacing, inverse @ start, output_shape=tuple(shape), order=1, cval=float(AIR), output=np.float32
    )
    return _Canonical(np.rint(straight).astype(np.int16), spacing, np.eye(3))


def _resample(scan: _Canonical, recipe: VolumeRecipe) -> tuple[NDArray[np.int16], float]:
    """The recipe's grid around the centre, and the share of it that is padding."""
    centres = _centre(scan, recipe)
    filters = [
        _filter(n, float(mm), float(centre), n_out, recipe.spacing_mm)
        for n, mm, centre, n_out in zip(scan.hu.shape, scan.spacing, centres, recipe.shape_zyx, strict=True)
    ]
    (z, in_z, used_z), (y, in_y, used_y), (x, in_x, used_x) = filters
    used = scan.hu[used_z, used_y, used_x]
    pages = np.empty((z.shape[0], *used.shape[1:]), np.float32)
    for k in range(0, used.shape[1], SLAB):
        slab = np.clip(used[:, k : k + SLAB], recipe.low_hu, recipe.high_hu).astype(np.float32)
        pages[:, k : k + SLAB] = (z @ slab.reshape(len(slab), -1)).reshape(len(pages), -1, slab.shape[2])
    voxels = np.stack([np.rint((x @ (y @ page).T).T).astype(np.int16) for page in pages])
    pad = np.int16(np.clip(AIR, recipe.low_hu, recipe.high_hu))
    voxels[~in_z], voxels[:, ~in_y], voxels[:, :, ~in_x] = pad, pad, pad
    return voxels, float(1 - in_z.mean() * in_y.mean() * in_x.mean())


def _filter(n: int, mm: float, centre: float, n_out: int, out_mm: float) -> tuple[Any, NDArray[np.bool_], slice]:
    """Weights (n_out, used) of one axis, sparse, which outputs lie inside the scan, and which inputs are used.

    Positions are millimetres from the scan's edge. Where the spacings agree the grid snaps to the voxels.
    """
    from scipy.sparse import csr_array

    position = centre + (np.arange(n_out) - (n_out - 1) / 2) * out_mm
    if abs(mm - out_mm) < 1e-3:
        position += (round(position[0] / mm - 0.5) + 0.5) * mm - position[0]
    inside = (position >= 0) & (position <= n * mm)
    width = max(mm, out_mm)
    weights = np.maximum(0, 1 - np.abs(position[:, None] - (np.arange(n) + 0.5) * mm) / width)
    weights[~inside] = 0
    weights[inside] /= weights[inside].sum(1, keepdims=True)
    columns = np.flatnonzero(weights.any(0))
    used = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
    return csr_array(weights[:, used], dtype=np.float32), inside, used


def _centre(scan: _Canonical, recipe: VolumeRecipe) -> NDArray[np.float64]:
    """(3,) centre of the grid, mm from the scan's edges: of the largest thing denser than -500 HU, or the middle."""
    from scipy.ndimage import binary_opening, find_objects, label

    size = np.array(scan.hu.shape) * scan.spacing
    if recipe.centre == "middle":
        return size / 2
    stride = np.maximum(1, np.round(6 / scan.spacing)).astype(int)
    dense = scan.hu[:: stride[0], :: stride[1], :: stride[2]] > -500
    opened = binary_opening(dense, iterations=1)  # a couch is thinner than two of these 6 mm voxels
    labels, count = label(opened if opened.any() else dense)
    if count == 0:
        return size / 2
    largest = int(np.bincount(labels.ravel())[1:].argmax())
    box = find_objects(labels)[largest]
    low, high = np.array([s.start for s in box]), np.array([s.stop for s in box])
    middle: NDArray[np.float64] = (low + high) / 2 * stride * scan.spacing
    return np.minimum(middle, size)
