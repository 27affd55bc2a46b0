"""`headers`: the headers of 1,000 CT slices of 512 × 512, against reading the first 64 KiB of the same files.

Both ways, with the pages of the files dropped from the cache before (as a first load from a disk finds them, though
the disk's own cache stays) and warm (where a read costs microseconds). The children are started beforehand: a load
starts them once.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from app.loading.images_elements import FIRST_BYTES
from app.loading.images_pool import HeaderPool
from tests.app.loading.scans import write_dicom
from tests.bench import Row, seconds

SERIES, SLICES = 10, 100


def run() -> list[Row]:
    """How fast headers are read, as a share of the bare reading of their bytes by one reader."""
    with tempfile.TemporaryDirectory() as folder, HeaderPool() as pool:
        files = _write(Path(folder))
        read = [lambda: _read(files), lambda: list(pool.read((file, "dicom", file) for file in files))]
        seconds(read[1])  # starts the children
        rows = []
        for name, forget in (("cold", lambda: _forget(files)), ("warm", lambda: None)):
            ratio, ours, theirs = _side_by_side(read[1], read[0], forget)
            unit = f"of reading 64 KiB each, {name} ({len(files) / ours:,.0f} and {len(files) / theirs:,.0f} files/s)"
            rows.append(Row(row="headers", figure=ratio, unit=unit, target=0.5))
    return rows


def _side_by_side(
    ours: Callable[[], object], theirs: Callable[[], object], forget: Callable[[], None]
) -> tuple[float, float, float]:
    """As `median_ratio`, with the cache in the same state before each, which is not timed."""
    mine, other = [], []
    for _ in range(5):
        forget()
        mine.append(seconds(ours))
        forget()
        other.append(seconds(theirs))
    ratio = statistics.median(b / a for a, b in zip(mine, other, strict=True))
    return ratio, statistics.median(mine), statistics.median(other)


def _write(folder: Path) -> list[str]:
    """Series of noise, as large as real ones, with private elements as scanners add them."""
    noise = np.random.default_rng(0).integers(-1000, 1000, (512, 512, 1)).astype(np.int16)
    voxels = np.broadcast_to(noise, (512, 512, SLICES))

    def private(k: int, ds: object) -> None:
        block = ds.private_block(0x0029, "MAKER", create=True)  # type: ignore[attr-defined]
        for number in range(60):
            block.add_new(number, "LO", f"value {number}")

    series = [write_dicom(folder / str(n), voxels, edit=private) for n in range(SERIES)]
    return [str(file) for one in series for file in sorted(one.iterdir())]


def _read(files: list[str]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.read(descriptor, FIRST_BYTES)
        os.close(descriptor)


def _forget(files: list[str]) -> None:
    """Drop the pages of files from the cache, once they are on the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
