"""Volumes as the encoder wants them, decoded once and kept as int16 files that any process may map; order and chance.

A training batch is a pure function of (seed, epoch, step), so that resuming needs no state of a sampler. This module
imports no torch: the processes that decode start quickly.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ml.config import Recipe
from ml.volumes import VolumeRecipe, read_volume

T = TypeVar("T")
FEW = 16
"""Up to so many volumes are decoded here; starting processes would take longer."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a volume comes from: a NIfTI file or a folder of DICOM slices."""

    path: Path
    format: str
    files: tuple[Path, ...] = ()
    """The series' own files, where its folder holds others, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cached:
    """A decoded volume in the cache, and what is known of it."""

    file: str
    """Name inside the cache's folder."""
    content_sha256: str
    """Of the decoded voxels and their spacing, hexadecimal."""
    padding_share: float
    z_coverage: float
    mean_hu: float
    sd_hu: float


def volume_recipe(recipe: Recipe) -> VolumeRecipe:
    """The part of a recipe that says what a volume is."""
    z, y, x = recipe.shape_zyx
    low, high = recipe.clip_hu
    return VolumeRecipe(shape_zyx=(z, y, x), spacing_mm=recipe.spacing_mm, low_hu=int(low), high_hu=int(high))


class VolumeCache:
    """int16 volumes of one volume recipe in one folder; sources with the same path share a file."""

    def __init__(self, root: Path, recipe: VolumeRecipe) -> None:
        fields = json.dumps(asdict(recipe), sort_keys=True)
        self.recipe = recipe
        self.folder = root / hashlib.sha256(fields.encode()).hexdigest()[:16]

    def prepare(
        self, sources: Sequence[Source], report: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[Source, Cached | str]:
        """Decode what the cache lacks, in parallel; for each distinct source its volume, or why it cannot be read.

        Args:
            sources: repeated ones are decoded once.
            report: called with (done, total) distinct sources; what it raises ends the work.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        distinct = list(dict.fromkeys(sources))
        found: dict[Source, Cached | str] = {}
        todo: list[Source] = []
        for source in distinct:
            kept = self._look_up(source)
            if kept is None:
                todo.append(source)
            else:
                found[source] = kept
        report(len(found), len(distinct))
        for source, outcome in _decode_all(todo, self.recipe, self.folder):
            found[source] = outcome
            report(len(found), len(distinct))
        return found

    def _look_up(self, source: Source) -> Cached | None:
        """The finished entry of a source, if there is one; half-written ones have no name."""
        try:
            stem = _stem(source)
            size = (self.folder / f"{stem}.npy").stat().st_size
            facts = json.loads((self.folder / f"{stem}.json").read_text())
        except (OSError, ValueError):
            return None
        return Cached(**facts) if size == 128 + 2 * int(np.prod(self.recipe.shape_zyx)) else None

    def read(self, cached: Cached) -> NDArray[np.int16]:
        """(Z, Y, X) in HU."""
        voxels: NDArray[np.int16] = np.load(self.folder / cached.file)
        return voxels


def _stem(source: Source) -> str:
    """Key of a source: its path, and size and time of change of all its files, so that altered ones are read again."""
    digest = hashlib.sha256(f"{source.path.absolute()}\0{source.format}".encode())
    # writing into a slice leaves the time of its folder as it was
    whole = [source.path, *sorted(source.path.rglob("*"))] if source.path.is_dir() else [source.path]
    for file in source.files or whole:
        stat = file.stat()
        digest.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _decode(source: Source, recipe: VolumeRecipe, folder: Path) -> Cached | str:
    """Read one volume into the cache; a sentence where it cannot be read."""
    try:
        stem = _stem(source)
        volume = read_volume(source.path, source.format, recipe, source.files)
    except ValueError as error:
        return str(error)
    except OSError as error:  # its text would name the path
        return f"Expected a readable {source.format} volume, found none ({error.strerror or 'cannot be read'})."
    cached = Cached(
        file=f"{stem}.npy",
        content_sha256=volume.content_sha256.hex(),
        padding_share=float(volume.padding_share),
        z_coverage=float(volume.z_coverage),
        mean_hu=float(volume.voxels.mean(dtype=np.float64)),
        sd_hu=float(volume.voxels.std(dtype=np.float64)),
    )
    part = folder / f".{stem}.{os.getpid()}"
    part.write_text(json.dumps(asdict(cached)))
    part.replace(folder / f"{stem}.json")
    with part.open("wb") as file:
        np.save(file, np.ascontiguousarray(volume.voxels, np.int16))
    part.replace(folder / cached.file)
    return cached


def _decode_all(sources: Sequence[Source], recipe: VolumeRecipe, folder: Path) -> Iterator[tuple[Source, Cached | str]]:
    """Decode in this process or, where it pays, in several."""
    if len(sources) <= FEW:
        for source in sources:
            yield source, _decode(source, recipe, folder)
        return
    left = dict.fromkeys(sources)
    try:
        with _pool(min(cores(), 8)) as pool:
            futures = {pool.submit(_decode, source, recipe, folder): source for source in sources}
            try:
                for future in as_completed(futures):
                    outcome = future.result()
                    left.pop(futures[future])
                    yield futures[future], outcome
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    except BrokenProcessPool:  # a decoder died; whose volume it was shows one at a time
        for source in left:
            yield source, _decode_alone(source, recipe, folder)


def _decode_alone(source: Source, recipe: VolumeRecipe, folder: Path) -> Cached | str:
    try:
        with _pool(1) as pool:
            return pool.submit(_decode, source, recipe, folder).result()
    except BrokenProcessPool:
        return f"Expected a readable {source.format} volume; its decoder crashed."


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent, (os.getpid(),))


def _end_with_parent(parent: int) -> None:
    """Ask Linux to end this process with the one that started it, which may be killed without a word."""
    import contextlib
    import ctypes
    import signal

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(recipe: Recipe) -> int:
    """Threads for the computations of a step; small volumes gain less by a second one than they lose in waiting."""
    return 1 if recipe.batch * int(np.prod(recipe.shape_zyx)) < 1_000_000 else cores()


def order(seed: int, epoch: int, n: int, turn: int = 0) -> NDArray[np.int64]:
    """The order of n train scans in an epoch; another one in each further turn at it."""
    return np.random.default_rng([seed, epoch, turn] if turn else [seed, epoch]).permutation(n)


def mirrored(seed: int, epoch: int, rows: NDArray[np.int64], chance: float) -> NDArray[np.bool_]:
    """Which of the scans `rows` are mirrored in an epoch; each by (seed, epoch, scan), whatever batch it is in."""
    return np.array([np.random.default_rng([seed, epoch, int(row), 1]).random() < chance for row in rows], np.bool_)


def permuted_among(groups: NDArray[np.int64], persons: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """(N,) for each scan the scan whose volume it gets instead: persons are permuted inside their group.

    Args:
        groups: (N,) split of each scan; scans with a negative one keep their volumes.
        persons: (N,) person of each scan.
        seed: of the permutation.
    """
    source = np.arange(len(groups))
    rng = np.random.default_rng([seed, 2])
    for group in np.unique(groups[groups >= 0]):
        rows = np.flatnonzero(groups == group)
        _, person = np.unique(persons[rows], return_inverse=True)
        place = rng.permutation(int(person.max()) + 1)
        source[rows[np.argsort(person, kind="stable")]] = rows[np.argsort(place[person], kind="stable")]
    return source


def prefetch(make: Callable[[int], T], items: range, *, threads: int = 2) -> Generator[T, None, None]:
    """make(i) for each item in order, a few ahead of their use, in threads."""
    pool = ThreadPoolExecutor(threads, "prefetch")
    ahead: deque[Future[T]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
