"""Where the grid of a volume is centred: on the body, the lungs, a mask, or the middle of the scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ml.decoding import Unreadable, decode_nifti

COARSE_MM = 6.0
"""What is looked for is much larger."""
DENSE_HU = -500
SMALLEST_LUNG_MM3 = 100_000.0
SECOND_LUNG = 0.2
"""Share of the larger lung that the smaller one has at least."""
STOMACH_HU = -960
"""Gas that is emptier on the whole lies in the bowel or the airways alone."""


def centre_of(hu: NDArray[np.int16], spacing: NDArray[np.float64], centre: str) -> NDArray[np.float64]:
    """(3,) mm from the scan's edges.

    Args:
        hu: (Z, Y, X) in RAS order.
        spacing: (3,) mm.
        centre: body (the largest thing denser than -500 HU), lung (the one or two largest airy parts inside it; the
            body where there are none) or middle (of the scan).
    """
    size = np.array(hu.shape) * spacing
    if centre == "middle":
        return size / 2
    stride = np.maximum(1, np.round(COARSE_MM / spacing)).astype(int)
    coarse = hu[:: stride[0], :: stride[1], :: stride[2]]
    body = _body(coarse > DENSE_HU)
    if body is None:
        return size / 2
    found = _lungs(coarse, body, float(np.prod(stride * spacing))) if centre == "lung" else None
    places = np.nonzero(body if found is None else found)
    low, high = (np.array([edge(axis) for axis in places]) for edge in (np.min, np.max))
    middle: NDArray[np.float64] = (low + high + 1) / 2 * stride * spacing
    return np.minimum(middle, size)


def _body(dense: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """The largest connected part, without a couch; None where nothing is dense."""
    from scipy.ndimage import binary_opening, label

    opened = binary_opening(dense, iterations=1)  # a couch is thinner than two of these voxels
    labels, count = label(opened if opened.any() else dense)
    if count == 0:
        return None
    found: NDArray[np.bool_] = labels == int(np.bincount(labels.ravel())[1:].argmax()) + 1
    return found


def _lungs(coarse: NDArray[np.int16], body: NDArray[np.bool_], voxel_mm3: float) -> NDArray[np.bool_] | None:
    """The one or two largest airy parts that the body encloses in its axial slices; None where there are none."""
    from scipy.ndimage import binary_closing, binary_fill_holes, label

    closed = binary_closing(body, iterations=1) | body
    enclosed = np.stack([binary_fill_holes(page) for page in closed])
    labels, count = label(enclosed & (coarse < DENSE_HU))
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    sums = np.bincount(labels.ravel(), coarse.ravel())[1:]
    is_lung = (sizes * voxel_mm3 >= SMALLEST_LUNG_MM3) & (sums / sizes > STOMACH_HU)
    ranked = sorted(np.flatnonzero(is_lung), key=lambda part: (-int(sizes[part]), int(part)))[:2]
    if not ranked:
        return None
    if len(ranked) == 2 and sizes[ranked[1]] < SECOND_LUNG * sizes[ranked[0]]:
        ranked.pop()
    found: NDArray[np.bool_] = np.isin(labels, [part + 1 for part in ranked])
    return found


def centre_of_mask(mask: Path | None) -> NDArray[np.float64]:
    """(3,) Z, Y, X of the middle of the box around what is marked, mm of the mask's own coordinates.

    Raises:
        Unreadable: there is no mask, nothing is marked, or it is no NIfTI volume.
    """
    if mask is None:
        raise Unreadable(
            "Expected a mask beside the scan for centre=mask (NAME.mask.nii.gz beside NAME.nii.gz or the folder NAME), "
            "found none; add it or choose another centre."
        )
    decoded = decode_nifti(mask, is_mask=True)
    marked, affine = decoded.hu > 0, decoded.affine
    if not marked.any():
        raise Unreadable("Expected a mask that marks something, got one that marks nothing.")
    along = [np.flatnonzero(marked.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    corners = np.stack(np.meshgrid(*[(a[0] - 0.5, a[-1] + 0.5) for a in along], indexing="ij"), -1).reshape(-1, 3)
    places = corners @ affine[:3, :3].T + affine[:3, 3]
    middle: NDArray[np.float64] = ((places.min(0) + places.max(0)) / 2)[::-1]
    return middle
