"""Where the body and the lungs lie in a scan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COARSE_MM = 6.0
"""What is looked for is much larger."""
DENSE_HU = -500
SMALLEST_LUNG_MM3 = 100_000.0
SECOND_LUNG = 0.2
"""Share of the larger lung that the smaller one has at least."""
STOMACH_HU = -960
"""Gas that is emptier on the whole lies in the bowel or the airways alone."""


def centre_of(hu: NDArray[np.int16], spacing: NDArray[np.float64], centre: str) -> NDArray[np.float64]:
    """(3,) mm from the scan's edges: the middle of `box_of`."""
    low, high = box_of(hu, spacing, centre)
    return np.minimum((low + high) / 2, np.array(hu.shape) * spacing)


def box_of(
    hu: NDArray[np.int16], spacing: NDArray[np.float64], what: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(3,) and (3,): lower and upper corner, mm from the scan's edges.

    Args:
        hu: (Z, Y, X) in RAS order.
        spacing: (3,) mm.
        what: body (the largest thing denser than -500 HU), lung (the one or two largest airy parts inside it; the
            body where there are none) or middle (the whole scan).
    """
    whole = np.zeros(3), np.array(hu.shape) * spacing
    if what == "middle":
        return whole
    stride = np.maximum(1, np.round(COARSE_MM / spacing)).astype(int)
    coarse = hu[:: stride[0], :: stride[1], :: stride[2]]
    body = _body(coarse > DENSE_HU)
    if body is None:
        return whole
    found = _lungs(coarse, body, float(np.prod(stride * spacing))) if what == "lung" else None
    places = np.nonzero(body if found is None else found)
    low, high = (np.array([edge(axis) for axis in places]) for edge in (np.min, np.max))
    return low * stride * spacing, (high + 1) * stride * spacing


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
