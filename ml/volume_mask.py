"""What a mask marks of a scan: found beside it or given with it, and held against the scan's own geometry.

Places are RAS millimetres (X, Y, Z) of the files' own coordinates, corners the eight of a box, shape (8, 3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.decoding import Decoded, Unreadable, decode_nifti, spacing_of

MOST_PLACES = 50_000
"""Marked voxels that are held against the scan; more are sampled."""
LEAST_INSIDE = 0.95
"""Share of what a mask marks that lies inside its scan at least; segmentations may reach a voxel over its ends."""


def mask_of(path: Path) -> Path | None:
    """The mask file beside a scan: NAME.mask.nii.gz or .nii beside NAME.nii.gz, NAME.nii or the folder NAME."""
    name = path.name.removesuffix(".gz").removesuffix(".nii") if path.is_file() else path.name
    found = (path.with_name(f"{name}.mask{suffix}") for suffix in (".nii.gz", ".nii"))
    return next((file for file in found if file.is_file()), None)


def marked_corners(mask: Path | None, scan: Decoded) -> NDArray[np.float64]:
    """(8, 3) corners of the box, along the mask's own axes, around what it marks.

    Raises:
        Unreadable: there is no mask, it is no NIfTI volume, nothing is marked, or it is not of this scan.
    """
    if mask is None or not mask.exists():
        raise Unreadable(
            "Expected a mask of the scan (the manifest's column mask, or NAME.mask.nii.gz beside NAME.nii.gz or the "
            "folder NAME), found none; add a mask or choose another centre or crop."
        )
    decoded = _decode(mask)
    marked = decoded.hu > 0
    if not marked.any():
        raise Unreadable("Expected a mask that marks something, got a mask that marks nothing.")
    along = [np.flatnonzero(marked.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    _check_place(decoded, marked, scan)
    return _moved(decoded.affine, _corners([a[0] - 0.5 for a in along], [a[-1] + 0.5 for a in along]))


def _decode(mask: Path) -> Decoded:
    """The mask's file; every fault says that it is the mask's, for the scan may be sound."""
    try:
        return decode_nifti(mask, is_mask=True)
    except MemoryError:
        raise
    except Unreadable as error:
        raise Unreadable(f"Of a mask: {error}") from None
    except Exception as error:  # a damaged file makes the library raise almost anything, with its values in the text
        raise Unreadable(
            f"Expected a mask as a NIfTI file, got one that fails with {type(error).__name__}; write it again."
        ) from None


def _check_place(mask: Decoded, marked: NDArray[np.bool_], scan: Decoded) -> None:
    """Raise Unreadable where the mask was made for another scan, or has lost its place."""
    if mask.hu.shape == scan.hu.shape:
        corners = _corners([-0.5] * 3, [n - 0.5 for n in mask.hu.shape])
        apart = np.abs(_moved(mask.affine, corners) - _moved(scan.affine, corners)).max()
        same_box = _same_box(_moved(mask.affine, corners), _moved(scan.affine, corners), spacing_of(scan.affine).max())
        if apart > spacing_of(scan.affine).max() and not same_box:
            raise Unreadable(
                f"Expected a mask that lies where its scan does, got a mask of the same {_shape(scan)} voxels up to "
                f"{apart:.0f} mm away; was it saved without the scan's affine?"
            )
    places = np.argwhere(marked)
    places = places[:: -(-len(places) // MOST_PLACES)]
    index = _moved(np.linalg.inv(scan.affine), _moved(mask.affine, places.astype(np.float64)))
    inside = ((index >= -1) & (index <= scan.hu.shape)).all(1).mean()
    if inside < LEAST_INSIDE:
        raise Unreadable(
            f"Expected a mask of this scan, got a mask of which {1 - inside:.0%} lies outside the scan's "
            f"{_shape(scan)} voxels; was it made for another one?"
        )


def _same_box(a: NDArray[np.float64], b: NDArray[np.float64], within: float) -> bool:
    """Whether two boxes of corners cover the same place, in whatever order their axes are stored."""
    return bool(np.abs(a.min(0) - b.min(0)).max() <= within and np.abs(a.max(0) - b.max(0)).max() <= within)


def _shape(scan: Decoded) -> str:
    return " × ".join(str(n) for n in scan.hu.shape)


def _corners(low: list[float], high: list[float]) -> NDArray[np.float64]:
    return np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), -1).reshape(-1, 3).astype(np.float64)


def _moved(affine: NDArray[np.floating[Any]], places: NDArray[np.float64]) -> NDArray[np.float64]:
    moved: NDArray[np.float64] = places @ affine[:3, :3].T + affine[:3, 3]
    return moved


def middle_of(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,) Z, Y, X of the middle of the upright box around corners, mm."""
    middle: NDArray[np.float64] = ((corners.min(0) + corners.max(0)) / 2)[::-1]
    return middle


def cut_out(scan: Decoded, corners: NDArray[np.float64]) -> NDArray[np.int16]:
    """(I, J, K) voxels of the scan inside the box around corners along its stored axes, at least two along each."""
    index = _moved(np.linalg.inv(scan.affine), corners) + 0.5
    shape = np.array(scan.hu.shape)
    low = np.clip(np.floor(index.min(0) + 1e-3), 0, shape - 2).astype(int)
    high = np.clip(np.ceil(index.max(0) - 1e-3), low + 2, shape).astype(int)
    i, j, k = (slice(a, b) for a, b in zip(low, high, strict=True))
    return scan.hu[i, j, k]
