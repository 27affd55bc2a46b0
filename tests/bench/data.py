"""Row `data`: batches of cached volumes, as training reads them, against copying as many bytes from the page cache.

Ours reads volumes of the cache into batches ahead of their use, in threads, in a shuffled order, as a training does.
The limit reads the same files into resident buffers, as many as batches are under way, in one thread: no allocation,
no page fault.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import nibabel
import numpy as np

from ml.batches import Batches
from ml.config import read_recipe
from ml.data import order, prefetch
from ml.volume_cache import Cached, Source, VolumeCache, cores, volume_recipe
from tests.bench import Row, median_ratio

SCANS, BATCH, ROUNDS = 24, 4, 3
UNDER_WAY = 6
"""Batches that `prefetch` has made, is making, or has handed out."""
SHAPE = "128,128,128"


def run() -> list[Row]:
    """Median over 5 pairs, each of three epochs of few volumes of 4 MB, after one that warms the page cache."""
    recipe = read_recipe("densenet121", {"shape_zyx": SHAPE, "batch": str(BATCH)})
    with tempfile.TemporaryDirectory() as folder:
        cache = VolumeCache(Path(folder) / "cache", volume_recipe(recipe))
        found = cache.prepare([_scan(Path(folder) / f"{i}.nii", i) for i in range(SCANS)])
        cached = [one for one in found.values() if isinstance(one, Cached)]
        ours, limit = _ours(cache, cached), _limit([cache.folder / one.file for one in cached], cache.bytes_a_volume)
        ours()
        limit()
        ratio, seconds, _ = median_ratio(ours, limit)
    volumes, size = SCANS * ROUNDS / seconds, SCANS * ROUNDS * cache.bytes_a_volume / seconds / 1e9
    print(f"# data: {volumes:.0f} volumes of {SHAPE} a second, {size:.2f} GB/s, {cores()} cores", file=sys.stderr)
    return [Row(row="data", figure=ratio, unit="of copying the files from memory", target=0.5)]


def _ours(cache: VolumeCache, cached: list[Cached]) -> Callable[[], object]:
    made = Batches([int(n) for n in SHAPE.split(",")])

    def volume(i: int, out: np.ndarray | None = None) -> np.ndarray:
        return cache.read(cached[i], out)

    def epochs() -> None:
        for epoch in range(ROUNDS):
            rows = order(0, epoch, SCANS)

            def load(k: int, rows: np.ndarray = rows) -> np.ndarray:
                return made.stack(volume, rows[k * BATCH : (k + 1) * BATCH].tolist())

            with closing(prefetch(load, range(SCANS // BATCH))) as batches:
                for batch in batches:
                    assert batch.shape[0] == BATCH

    return epochs


def _limit(files: list[Path], size: int) -> Callable[[], object]:
    buffers = np.zeros((UNDER_WAY * BATCH, size), np.uint8)

    def copy() -> None:
        for epoch in range(ROUNDS):
            for k, i in enumerate(order(0, epoch, SCANS)):
                with files[i].open("rb", buffering=0) as file:
                    file.readinto(buffers[k % len(buffers)].data)

    return copy


def _scan(file: Path, seed: int) -> Source:
    """A noisy scan of 4 mm that becomes a volume of the recipe's 2 mm."""
    voxels = np.random.default_rng(seed).normal(-500, 300, (64, 64, 64)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([4.0, 4.0, 4.0, 1.0])), file)
    return Source(file, "nifti")
