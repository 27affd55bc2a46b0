"""Scans of a cohort as cached volumes: what can be read, what cannot and why, and which contents are equal."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError
from app.loading.images_header import REASONS
from app.store import cache_room
from app.store.cache_room import CacheRoom, Lease, gb
from app.store.unreadable import clear_unreadable, mark_unreadable
from ml.data import permuted_among
from ml.volume_cache import Cached, NoRoom, Source, VolumeCache, volume_recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from app.store.work import Work
    from ml.config import Recipe
    from workers.bridge import Members, Scan

PASSING = ("took longer", "crashed", "a mask", "scaling=minmax")
"""Words of reasons that say nothing of the scan by itself: a slow disk, too little memory, a mask that is missing."""
MOST_NAMED, MOST_LOGGED = 20, 200
"""Scans that a result names, and those that a log does."""
NOTE_SECONDS = 5.0
"""Between two words of a lease."""
MAX_UNREADABLE, FEW = 0.05, 10
"""A larger share of unreadable volumes, and more than a few of them, end a job: their place is wrong, not some of
them. So does more than half, however few they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanVolumes:
    """The volumes of some scans."""

    cache: VolumeCache
    cached: dict[int, Cached]
    """image_occurrence_id → its volume; scans of one path share one."""
    failed: dict[int, str]
    """image_occurrence_id → why it cannot be read."""
    lease: Lease | None = None
    """Keeps the volumes from being removed while this is held."""
    num_made: int = 0
    """How many were not in the cache before."""

    def read(self, image: int, out: NDArray[np.int16] | None = None) -> NDArray[np.int16]:
        """(Z, Y, X) in HU. Raises InputError where it has to be decoded again and the disk is full."""
        try:
            return self.cache.read(self.cached[image], out)
        except NoRoom:
            raise became_full(self.cache) from None

    @property
    def by_masks(self) -> bool:
        """Whether a volume depends on a mask, too: of one content there may then be several."""
        return self.cache.recipe.wants_mask

    def embedded(self, image: int) -> str:
        """Hexadecimal digest of what an encoder sees of a scan: of its content, with masks of the volume itself."""
        cached = self.cached[image]
        return cached.voxels_sha256 if self.by_masks else cached.content_sha256

    def permuted(self, source: dict[int, int]) -> ScanVolumes:
        """The same scans, each with the volume of another one."""
        cached = {image: self.cached[other] for image, other in source.items() if other in self.cached}
        failed = {image: self.failed[other] for image, other in source.items() if other in self.failed}
        return replace(self, cached=cached, failed=failed)

    def failures(self) -> dict[str, Any]:
        """For a job's result: how many scans were set aside, why, and some of them with their reasons."""
        return {
            "num_failed": len(self.failed),
            "failed_by_reason": dict(Counter(self.failed.values()).most_common(10)),
            "failed_scans": {str(image): self.failed[image] for image in sorted(self.failed)[:MOST_NAMED]},
        }

    def log_failures(self, work: Work) -> None:
        """A line a scan that was set aside, so that none has to be looked for; of very many the first."""
        for image in sorted(self.failed)[:MOST_LOGGED]:
            work.log(f"scan {image} (image_occurrence_id) is set aside: {self.failed[image]}")
        if len(self.failed) > MOST_LOGGED:
            work.log(f"{len(self.failed) - MOST_LOGGED:,} more scans are set aside")


def permuted_images(members: Members, seed: int) -> dict[int, int]:
    """image_occurrence_id → the scan whose volume it gets in the control: persons are permuted inside each split.

    Training and embedding of a checkpoint use the same permutation, so that nothing of the true pairing is left.
    """
    source = permuted_among(members.split.astype(np.int64), members.person, seed)
    return dict(zip(members.image.tolist(), members.image[source].tolist(), strict=True))


def prepare(work: Work, recipe: Recipe, scans: Sequence[Scan]) -> ScanVolumes:
    """Decode what the cache lacks and note the digests of contents in `omop.image_occurrence`.

    Raises:
        InputError: no scan at all, no room for their volumes, or too many unreadable ones.
    """
    if not scans:
        raise InputError("Expected scans, found none; does the cohort have members?")
    cache = VolumeCache(cache_room.folder(work.settings), volume_recipe(recipe))
    masks = cache.recipe.wants_mask
    sources = {
        scan.image_occurrence_id: Source(scan.path, scan.format, scan.files, scan.mask if masks else None)
        for scan in scans
    }
    known = cache.look_up(list(sources.values()))
    missing = [source for source, cached in known.items() if cached is None]
    found = _fill(work, cache, known, lease := _claim(work, cache, known))
    outcomes = {image: found[source] for image, source in sources.items()}
    volumes = ScanVolumes(
        cache=cache,
        cached={image: outcome for image, outcome in outcomes.items() if isinstance(outcome, Cached)},
        failed={image: outcome for image, outcome in outcomes.items() if isinstance(outcome, str)},
        lease=lease,
        num_made=sum(isinstance(found[source], Cached) for source in missing),
    )
    volumes.log_failures(work)
    _note_unreadable(work, volumes, scans)
    _refuse_too_many(volumes, scans)
    _note_contents(work, volumes)
    return volumes


Known = Mapping[Source, Cached | None]
"""Distinct sources and what of them is in the cache."""


def _claim(work: Work, cache: VolumeCache, known: Known) -> Lease:
    """Room for the volumes that the cache lacks; it is said what is needed.

    Raises:
        InputError: there is not enough.
    """
    missing, kept = [source for source, cached in known.items() if cached is None], _names(cache, known.values())
    need = len(missing) * cache.bytes_a_volume
    z, y, x = cache.recipe.shape_zyx
    what = f"{len(missing):,} volumes of {z} × {y} × {x}"
    room = CacheRoom(cache.folder.parent, work.settings.cache_bytes)
    lease, removed = room.claim(kept, need, what)
    said = f"cache: {len(known) - len(missing):,} volumes are there, {what} to make, {gb(need)}"
    work.log(f"{said}; {removed:,} others were removed for them" if removed else said)
    return lease


def _names(cache: VolumeCache, outcomes: Iterable[Cached | str | None]) -> list[str]:
    """RECIPE/FILE of those that are volumes."""
    return [f"{cache.folder.name}/{one.file}" for one in outcomes if isinstance(one, Cached)]


def _fill(work: Work, cache: VolumeCache, known: Known, lease: Lease) -> dict[Source, Cached | str]:
    """Decode, with progress, and have the lease say what is left to be written, in the end what is used.

    Raises:
        InputError: the disk became full on the way.
    """
    next_note = [0.0]

    def report(done: int, total: int) -> None:
        work.progress(done, total, "volume", "reading volumes")
        if time.monotonic() > next_note[0]:
            next_note[0] = time.monotonic() + NOTE_SECONDS
            lease.note(kept, (total - done) * cache.bytes_a_volume)

    kept = _names(cache, known.values())
    try:
        found = cache.prepare(list(known), report, known)
    except NoRoom:
        lease.close()
        raise became_full(cache) from None
    except BaseException:
        lease.close()
        raise
    lease.note(_names(cache, found.values()), 0)
    return found


def became_full(cache: VolumeCache) -> InputError:
    """What to do where the disk of the cache has no room for a volume."""
    return InputError(
        f"The disk of the cache became full on the way; volumes that are whole stay. Free some of it, or set "
        f"LACHESIS_CACHE to a folder on a larger one, and run it again: {gb(cache.bytes_a_volume)} a volume."
    )


def _refuse_too_many(volumes: ScanVolumes, scans: Sequence[Scan]) -> None:
    """Counts files, not scans: one file may be the scan of many persons."""
    total = len({(scan.path, scan.files) for scan in scans})
    failed = {
        (scan.path, scan.files): volumes.failed[i]
        for scan in scans
        if (i := scan.image_occurrence_id) in volumes.failed
    }
    limit = min(max(FEW, int(MAX_UNREADABLE * total)), total // 2)
    if len(failed) > limit:
        reason, count = Counter(failed.values()).most_common(1)[0]
        raise InputError(
            f"Expected at most {limit} unreadable volumes of {total}, got {len(failed)}; "
            f"the most frequent reason ({count}; the job's log names each scan and its reason): {reason}"
        )


def _note_unreadable(work: Work, volumes: ScanVolumes, scans: Sequence[Scan]) -> None:
    """Give scans whose voxels turned out unreadable the verdict that their headers did not, so that no new cohort
    takes them in; those that can be read again, as their file was mended, lose it.

    A scan that is not at its place keeps its verdict: it is the place that is wrong.
    """
    failed = ((scan, volumes.failed.get(scan.image_occurrence_id)) for scan in scans)
    unreadable = [s.image_occurrence_id for s, why in failed if why and not _may_pass(why) and _is_there(s)]
    unusable = {reason for reason, verdict in REASONS.items() if verdict == "unusable"}
    with work.transaction() as connection:
        mark_unreadable(connection, unreadable)
        clear_unreadable(connection, sorted(volumes.cached), unusable)


def _may_pass(why: str) -> bool:
    """Whether the host or the recipe may be at fault, not the scan."""
    return any(words in why for words in PASSING)


def _is_there(scan: Scan) -> bool:
    """Whether all that the scan is made of may be opened on this host."""
    return all(os.access(path, os.R_OK) for path in scan.files or (scan.path,))


def _note_contents(work: Work, volumes: ScanVolumes) -> None:
    """Fill `sha256` of scans whose voxels were read for the first time, or whose file changed."""
    from sqlalchemy import text

    images = sorted(volumes.cached)
    digests = [bytes.fromhex(volumes.cached[image].content_sha256) for image in images]
    statement = text(
        "UPDATE omop.image_occurrence i SET sha256 = v.sha256 "
        "FROM unnest(CAST(:images AS bigint[]), CAST(:digests AS bytea[])) v(image_occurrence_id, sha256) "
        "WHERE i.image_occurrence_id = v.image_occurrence_id AND i.sha256 IS DISTINCT FROM v.sha256"
    )
    with work.transaction() as connection:
        connection.execute(statement, {"images": images, "digests": digests})
