"""Volumes as the encoder wants them, decoded once and kept as int16 files for any process.

HOME/cache/RECIPE/SOURCE.json says which file holds the volume of a source, and what is known of it; the file's name is
the digest of its voxels, so that equal volumes lie there once. Files are written beside and renamed: any number of
processes may fill one cache. This module imports no torch: the processes that decode start quickly.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ml.config import Recipe
from ml.decoding import Gone
from ml.decoding_pool import DecodingPool, Limits
from ml.volume_mask import mask_of
from ml.volumes import VolumeRecipe, read_volume

TRIES = 3
"""How often a scan is tried that is not there, changes while it is read, or whose decoder dies."""
PAUSE_SECONDS = 0.3
FEW = 4
"""Scans a child process is worth starting for."""
HEADER_BYTES = 128
"""Of a .npy file."""
AT_ONCE = 64
"""Volumes decoded again together where a run misses one: whoever removed one rarely removed one alone."""
STALE_PART_SECONDS = 6 * 3600
"""Half-written files that are older were left by a machine that went down."""


class NoRoom(Exception):
    """The disk was full before all volumes were kept."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a volume comes from: a NIfTI file or a folder of DICOM slices."""

    path: Path
    format: str
    files: tuple[Path, ...] = ()
    """The series' own files, where its folder holds others, too."""
    mask: Path | None = None
    """A mask given for the scan; where none is, the one beside it counts. For recipes that ask for one alone."""


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

    @property
    def voxels_sha256(self) -> str:
        """Of the volume itself, hexadecimal; its file has this name."""
        return self.file.removesuffix(".npy")


def volume_recipe(recipe: Recipe) -> VolumeRecipe:
    """The part of a recipe that says what a volume is."""
    z, y, x = recipe.shape_zyx
    low, high = recipe.clip_hu
    return VolumeRecipe.from_dict(
        {
            "shape_zyx": (z, y, x),
            "spacing_mm": recipe.spacing_zyx,
            "low_hu": int(low),
            "high_hu": int(high),
            "centre": recipe.centre,
            "scaling": recipe.scaling,
            "grid": recipe.grid,
            "crop": recipe.crop,
        }
    )


class VolumeCache:
    """int16 volumes of one volume recipe in one folder; sources with the same path share a file."""

    def __init__(self, root: Path, recipe: VolumeRecipe, limits: Limits | None = None) -> None:
        fields = recipe.to_dict()
        self.recipe, self.limits = recipe, limits or Limits()
        self.folder = root / hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
        self._source_of: dict[str, Source] = {}
        self._rebuilding = threading.Lock()

    @property
    def bytes_a_volume(self) -> int:
        return HEADER_BYTES + 2 * int(np.prod(self.recipe.shape_zyx))

    def look_up(self, sources: Sequence[Source]) -> dict[Source, Cached | None]:
        """Each distinct source's finished entry, if there is one; they count as used now."""
        found = {source: self._look_up(source) for source in dict.fromkeys(sources)}
        for cached in found.values():
            if cached:
                self._touch(cached)
        return found

    def prepare(
        self,
        sources: Sequence[Source],
        report: Callable[[int, int], None] = lambda done, total: None,
        known: Mapping[Source, Cached | None] | None = None,
    ) -> dict[Source, Cached | str]:
        """Decode what the cache lacks, in parallel; for each distinct source its volume, or why it cannot be read.

        Each scan is decoded by a child process whose memory and time are limited. One that is away, changes while it is
        read, or whose decoder dies is tried again, three times in all.

        Args:
            sources: repeated ones are decoded once.
            report: called with (done, total) distinct sources, twice a second or more; what it raises ends the work.
            known: what `look_up` said of the sources a moment ago, which need not be asked again.

        Raises:
            NoRoom: the disk is full; what was decoded until then stays.
        """
        self._make_folder()
        known = self.look_up(sources) if known is None else known
        found: dict[Source, Cached | str] = {source: cached for source, cached in known.items() if cached}
        tick = lambda: report(len(found), len(known))  # noqa: E731
        tick()
        todo = [source for source, cached in known.items() if cached is None]
        for attempt in range(TRIES):
            again: dict[Source, str] = {}
            for source, outcome, may_pass in self._decode(todo, tick):
                if may_pass and attempt < TRIES - 1:
                    again[source] = str(outcome)
                else:
                    found[source] = outcome
            todo = list(again)
            if not todo:
                break
            time.sleep(PAUSE_SECONDS * (attempt + 1))
        for source, outcome in found.items():
            if isinstance(outcome, Cached):
                self._source_of[outcome.file] = source
        tick()
        return found

    def read(self, cached: Cached, out: NDArray[np.int16] | None = None) -> NDArray[np.int16]:
        """(Z, Y, X) in HU (or, with scaling=minmax, in 32,767ths); decoded again where it is gone by now.

        Args:
            cached: the volume.
            out: where it is to be put, contiguous.

        Raises:
            ValueError: it is gone, and its source cannot be read any more or holds another scan by now.
        """
        try:
            return self._get(cached, out)
        except (FileNotFoundError, ValueError):
            with self._rebuilding:
                return self._get(cached if self._is_whole(cached.file) else self._rebuild(cached), out)

    def _get(self, cached: Cached, out: NDArray[np.int16] | None) -> NDArray[np.int16]:
        """Raises FileNotFoundError, or ValueError where the file is too short."""
        out = np.empty(self.recipe.shape_zyx, np.int16) if out is None else out
        # not by way of a map: a page of a file that was cut short since ends the process, and mapping costs more
        with (self.folder / cached.file).open("rb", buffering=0) as stored:
            stored.seek(HEADER_BYTES)
            if stored.readinto(out.data.cast("B")) != out.nbytes:
                raise ValueError("Expected a whole volume in the cache, found part of one.")
        return out

    def _rebuild(self, cached: Cached) -> Cached:
        source = self._source_of.get(cached.file)
        if source is None:
            raise ValueError("Expected a volume in the cache, found none; run it again.")
        others = [other for file, other in self._source_of.items() if other != source and not self._is_whole(file)]
        outcome = self.prepare([source, *others[: AT_ONCE - 1]])[source]
        if isinstance(outcome, str):
            raise ValueError(f"A volume left the cache and could not be made again: {outcome}")
        if outcome.content_sha256 != cached.content_sha256:
            raise ValueError("A volume left the cache, and its scan was changed since; run it again.")
        return outcome

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "recipe.json"
        if not about.exists():
            part = self.folder / f".recipe.{os.getpid()}"
            part.write_text(json.dumps(self.recipe.to_dict(), sort_keys=True))
            part.replace(about)
        for part in self.folder.glob(".*"):
            try:
                if time.time() - part.stat().st_mtime > STALE_PART_SECONDS:
                    part.unlink()
            except OSError:
                continue

    def _look_up(self, source: Source) -> Cached | None:
        """The finished entry of a source, if there is one; half-written ones have no name."""
        try:
            facts = json.loads((self.folder / f"{stem_of(source, self.recipe)}.json").read_text())
            cached = Cached(**facts)
        except (OSError, ValueError, TypeError):
            return None
        return cached if self._is_whole(cached.file) else None

    def _is_whole(self, file: str) -> bool:
        try:
            return (self.folder / file).stat().st_size == self.bytes_a_volume
        except OSError:
            return False

    def _touch(self, cached: Cached) -> None:
        try:
            os.utime(self.folder / cached.file)
        except OSError:  # of another user, or gone
            return

    def _decode(
        self, sources: Sequence[Source], tick: Callable[[], None]
    ) -> Iterator[tuple[Source, Cached | str, bool]]:
        """(source, outcome, whether another try may end differently) in the order in which they end."""
        if not sources:
            return
        requests = [(source, self._request(source)) for source in sources]
        children = min(cores(), 8, -(-len(sources) // FEW))
        with DecodingPool[Source](children, self.limits, self._clean) as pool:
            for source, answer in pool.run(requests, tick):
                if "full" in answer:
                    raise NoRoom("Expected room for the volumes on the disk of the cache, found it full.")
                outcome = Cached(**answer["kept"]) if "kept" in answer else str(answer["why"])
                yield source, outcome, bool(answer.get("again"))

    def _request(self, source: Source) -> dict[str, Any]:
        return {
            "path": str(source.path.absolute()),
            "format": source.format,
            "files": [str(file.absolute()) for file in source.files],
            "mask": str(source.mask.absolute()) if source.mask else None,
            "recipe": self.recipe.to_dict(),
            "folder": str(self.folder.absolute()),
        }

    def _clean(self, process: int) -> None:
        """Remove what a child that was ended had half written."""
        for part in self.folder.glob(f".*.{process}"):
            part.unlink(missing_ok=True)


def stem_of(source: Source, recipe: VolumeRecipe) -> str:
    """Key of a source: its path, and size and time of change of all its files, so that altered ones are read again."""
    digest = hashlib.sha256(f"{source.path.absolute()}\0{source.format}".encode(errors="surrogateescape"))
    # writing into a slice leaves the time of its folder as it was
    whole = [source.path, *sorted(source.path.rglob("*"))] if source.path.is_dir() else [source.path]
    mask = source.mask or mask_of(source.path) if recipe.wants_mask else None
    if source.mask and recipe.wants_mask:
        digest.update(f"\0{source.mask.absolute()}".encode(errors="surrogateescape"))
    for file in [*(source.files or whole), *([mask] if mask and mask.exists() else [])]:
        stat = file.stat()
        digest.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def keep(source: Source, recipe: VolumeRecipe, folder: Path) -> Mapping[str, Any]:
    """Decode one source into the cache's folder; the fields of its `Cached`.

    Raises:
        Unreadable: it cannot be read; Gone where it is not there or changed meanwhile.
        OSError: a file cannot be opened, or the disk is full; nothing half-written stays.
    """
    stem = stem_of(source, recipe) if source.path.exists() else ""
    volume = read_volume(source.path, source.format, recipe, source.files, source.mask)
    if stem_of(source, recipe) != stem:
        raise Gone("Expected a scan that stays as it is, got one that changed while it was read; try again.")
    voxels = np.ascontiguousarray(volume.voxels, np.int16)
    mean, sd = float(voxels.mean(dtype=np.float64)), float(voxels.std(dtype=np.float64))
    cached = Cached(
        file=f"{hashlib.sha256(voxels.data).hexdigest()}.npy",
        content_sha256=volume.content_sha256.hex(),
        padding_share=float(volume.padding_share),
        z_coverage=float(volume.z_coverage),
        mean_hu=volume.offset_hu + volume.step_hu * mean,
        sd_hu=volume.step_hu * sd,
    )
    part = folder / f".{stem}.{os.getpid()}"
    try:
        with part.open("wb") as file:
            _write(file, voxels)
        part.replace(folder / cached.file)
        part.write_text(json.dumps(asdict(cached)))
        part.replace(folder / f"{stem}.json")
    finally:
        part.unlink(missing_ok=True)
    return asdict(cached)


def _write(file: IO[bytes], voxels: NDArray[np.int16]) -> None:
    """A .npy file; unlike numpy's own writer it says by the error's number when the disk is full.

    It is not forced to the disk, which would take a tenth of decoding and more: what a host that goes down leaves is
    shorter than a volume, as `_look_up` and `_get` see, and is decoded again.
    """
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(voxels))
    file.write(voxels.data)


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
