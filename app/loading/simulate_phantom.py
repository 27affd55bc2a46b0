"""Chest phantoms: small volumes whose biomarkers are known and hidden from crude statistics by nuisance.

Arrays are (Z, Y, X) with Z growing towards the head, Y towards the front and X to the right, so that they are in RAS
order; inside `_Body` lengths are in units of the half width of the volume (-1 to 1). Parameters: docs/science.md
section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPE_ZYX = (32, 40, 40)
SPACING_MM = 9.0
BIOMARKERS = ("heart", "effusion", "emphysema", "nodules")
DESCRIPTION = "Lachesis simulated phantom"
"""Stands in the header of every file, so that a phantom is never taken for a person."""

Grid = NDArray[np.float32]
Mask = NDArray[np.bool_]
Voxels = NDArray[np.int64]
"""(N, 3) voxel indices (z, y, x)."""

_AXES = [np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE_ZYX]
_BALL = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), -1).reshape(-1, 3)
_BALL_DISTANCE2 = (_BALL**2).sum(1)


@dataclass(slots=True)
class _Body:
    """A chest in the making."""

    hu: Grid
    lungs: Mask
    """What of the lungs is still air."""
    sides: list[Mask]
    """Left and right lung as first drawn."""
    scale: float
    aspect: float
    shift: NDArray[np.float64]
    """(3,) of z, y, x."""
    lung_height: float


def phantom(seed: int, person: int, biomarkers: NDArray[np.float64]) -> NDArray[np.int16]:
    """The volume of one person; it depends on nothing but the arguments.

    Args:
        seed: of the simulation.
        person: 0, 1, …; each has a random stream of its own.
        biomarkers: (4,) standard normal latents: heart size, effusion, emphysema, nodules.

    Returns:
        (32, 40, 40) HU, at 9 mm, -1024 to 1500.
    """
    rng = np.random.default_rng([seed, person, 0])
    body = _chest(rng, float(biomarkers[0]))
    _soften_bases(rng, body)
    _pour_effusion(rng, body, float(biomarkers[1]))
    voxels = np.argwhere(body.lungs)
    _dig_holes(rng, body, voxels, float(biomarkers[2]))
    _draw_vessels(rng, body, voxels)
    _set_nodules(rng, body, voxels, float(biomarkers[3]))
    return _scan(rng, body.hu)


def _ellipsoid(centre: NDArray[np.float64] | list[float], radii: tuple[float, float, float]) -> Mask:
    z, y, x = (((axis - np.float32(c)) / np.float32(r)) ** 2 for axis, c, r in zip(_AXES, centre, radii, strict=True))
    inside: Mask = z[:, None, None] + y[:, None] + x < 1
    return inside


def _chest(rng: np.random.Generator, heart_size: float) -> _Body:
    """Body, lungs and heart; the heart's radius carries the first biomarker, relative to the body's scale."""
    scale, aspect = np.exp(rng.normal(0, 0.07)), np.exp(rng.normal(0, 0.05))
    shift = rng.uniform(-0.08, 0.08, 3)
    dz, dy, dx = shift
    hu = np.full(SHAPE_ZYX, -1000, np.float32)
    hu[_ellipsoid([dz * 0.3, dy, dx], (1.6, 0.78 * scale * aspect, 0.92 * scale))] = 40 + rng.normal(0, 15)
    lung_hu, lung_height = -820 + rng.normal(0, 25), 0.82 * np.exp(rng.normal(0, 0.06))
    sides = [
        _ellipsoid(
            [dz, dy, dx + side * 0.40 * scale],
            (
                lung_height,
                0.52 * scale * aspect * np.exp(rng.normal(0, 0.03)),
                0.30 * scale * np.exp(rng.normal(0, 0.03)),
            ),
        )
        for side in (-1, 1)
    ]
    lungs = sides[0] | sides[1]
    hu[lungs] = lung_hu
    radius, stretch = 0.27 * scale * np.exp(0.24 * heart_size), np.exp(rng.normal(0, 0.05))
    heart = _ellipsoid(
        [dz + 0.15 + rng.normal(0, 0.03), dy - 0.12, dx + 0.10], (radius * 1.05 / stretch, radius * stretch, radius)
    )
    hu[heart] = 45 + rng.normal(0, 15)
    return _Body(hu, lungs & ~heart, sides, scale, aspect, shift, lung_height)


def _soften_bases(rng: np.random.Generator, body: _Body) -> None:
    """Nuisance: soft tissue at each base, as much as an effusion may hold."""
    for side in body.sides:
        height = max(0.0, rng.normal(0.10, 0.14))
        low = _AXES[0] > body.shift[0] + body.lung_height - 0.05 - 2 * height
        tissue = side & body.lungs & low[:, None, None]
        body.hu[tissue] = 35 + rng.normal(0, 10)
        body.lungs &= ~tissue


def _pour_effusion(rng: np.random.Generator, body: _Body, amount: float) -> None:
    """The second biomarker: depth of fluid at the back of one side."""
    depth, side = 0.11 * max(0.0, amount + 0.6), body.sides[int(rng.random() < 0.5)]
    if depth > 0:
        back = _AXES[1] > body.shift[1] + 0.52 * body.scale * body.aspect - 0.04 - 2 * depth
        fluid = side & body.lungs & back[:, None]
        body.hu[fluid] = 12 + rng.normal(0, 5)
        body.lungs &= ~fluid


def _pick(rng: np.random.Generator, voxels: Voxels, n: int) -> Voxels:
    return voxels[rng.integers(0, len(voxels), n)] if len(voxels) else voxels


def _balls(rng: np.random.Generator, centres: Voxels, smallest: float, largest: float) -> Mask:
    """Union of balls with radii in voxels."""
    radii = rng.uniform(smallest, largest, len(centres))
    inside = radii[:, None] ** 2 >= _BALL_DISTANCE2
    padded = np.zeros([n + 6 for n in SHAPE_ZYX], bool)
    z, y, x = ((centres[:, None] + _BALL)[inside] + 3).T
    padded[z, y, x] = True
    return padded[3:-3, 3:-3, 3:-3]


def _dig_holes(rng: np.random.Generator, body: _Body, voxels: Voxels, emphysema: float) -> None:
    """The third biomarker: number of low-attenuation holes."""
    count = min(int(rng.poisson(7 * np.exp(0.7 * emphysema))), 90)
    body.hu[_balls(rng, _pick(rng, voxels, count), 2.0, 3.0) & body.lungs] -= 150


def _draw_vessels(rng: np.random.Generator, body: _Body, voxels: Voxels) -> None:
    """Nuisance: lines one voxel thick, as dense as nodules."""
    starts = _pick(rng, voxels, int(rng.poisson(45 * np.exp(rng.normal(0, 0.35)))))
    n = len(starts)
    direction = rng.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    length, hu = rng.integers(3, 9, n), rng.normal(-150, 80, n)
    steps = np.arange(8)
    path = np.rint(starts[:, None] + steps[:, None] * direction[:, None]).astype(np.int64)
    inside = (steps < length[:, None]) & ((path >= 0) & (path < SHAPE_ZYX)).all(2)
    z, y, x = path[inside].T
    air = body.lungs[z, y, x]
    body.hu[z[air], y[air], x[air]] = np.broadcast_to(hu[:, None], inside.shape)[inside][air]


def _set_nodules(rng: np.random.Generator, body: _Body, voxels: Voxels, nodules: float) -> None:
    """The fourth biomarker: number of nodules."""
    count = min(int(rng.poisson(4 * np.exp(0.7 * nodules))), 40)
    body.hu[_balls(rng, _pick(rng, voxels, count), 1.7, 2.6) & body.lungs] = 50


def _scan(rng: np.random.Generator, hu: Grid) -> NDArray[np.int16]:
    """Nuisance of the scanner: dose, one of two kernels, gain, offset and side; then into RAS order."""
    noise = rng.standard_normal(SHAPE_ZYX, np.float32) * np.float32(np.exp(rng.normal(np.log(22), 0.4)))
    if rng.random() < 0.5:
        noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)) / 2
    hu = hu * np.float32(1 + rng.normal(0, 0.02)) + np.float32(rng.normal(0, 12)) + noise
    if rng.random() < 0.5:
        hu = hu[:, :, ::-1]
    return np.ascontiguousarray(np.clip(hu, -1024, 1500).astype(np.int16)[::-1, ::-1])


def write_phantom(path: Path, voxels: NDArray[np.int16]) -> None:
    """Write a (Z, Y, X) phantom as an uncompressed NIfTI file in RAS order."""
    import nibabel

    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = [-SPACING_MM * (n - 1) / 2 for n in reversed(SHAPE_ZYX)]
    image: Any = nibabel.Nifti1Image(np.ascontiguousarray(voxels.transpose(2, 1, 0)), affine)  # type: ignore[no-untyped-call]
    image.header["descrip"] = DESCRIPTION.encode()
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
