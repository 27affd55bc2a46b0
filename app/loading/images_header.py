"""What the headers of a scan tell: geometry, time, Hounsfield state, and a verdict with reasons."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

REASONS: Mapping[str, str] = {
    "not_ct": "unusable",
    "localizer": "unusable",
    "multi_frame": "unusable",
    "colour": "unusable",
    "not_three_dimensional": "unusable",
    "too_few_slices": "unusable",
    "one_position": "unusable",
    "no_position": "unusable",
    "no_spacing": "unusable",
    "most_slices_missing": "unusable",
    "not_hounsfield": "unusable",
    "truncated": "unusable",
    "no_decoder": "unusable",
    "secondary_capture": "unusable",
    "projection": "unusable",
    "unreadable_voxels": "unusable",
    "derived": "suspect",
    "identity_conflict": "suspect",
    "series_uid_reused": "suspect",
    "damaged_slices": "suspect",
    "several_series": "suspect",
    "mixed_geometry": "suspect",
    "mixed_persons": "suspect",
    "duplicate_slices": "suspect",
    "duplicate_positions": "suspect",
    "uneven_spacing": "suspect",
    "tilted_gantry": "suspect",
    "oblique": "suspect",
    "no_rescale": "suspect",
    "monochrome1": "suspect",
    "no_orientation": "suspect",
    "orientations_disagree": "suspect",
    "not_millimetres": "suspect",
}
"""Reason → the verdict it leads to; the worst of a scan's reasons is its verdict."""

STAMP = "stamp"
"""Key, among the details of a scan, of what tells that its files are the same ones as before."""
MIN_SLICES = 5
"""Fewer are too few to be a volume of the chest."""


LEAST_SPACING_MM, MOST_SPACING_MM = 0.02, 100.0
"""Other spacings are those of a damaged header, or in another unit than it says."""


class Unreadable(Exception):
    """A file is not what its row says; its only argument is a rule for `ops.reject`, never a path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Acquired:
    """When a scan was acquired."""

    at: dt.datetime
    """Naive local time, whole seconds; 23:59:59 where only the day is known."""
    date_only: bool
    source: str
    """manifest, or the attribute it came from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """One CT series, as its headers have it; fields as the columns of omop.image_occurrence."""

    format: str
    rows: int | None = None
    columns: int | None = None
    slices: int | None = None
    spacing_mm: list[float] | None = None
    slice_thickness_mm: float | None = None
    kernel: str | None = None
    orientation: str | None = None
    hu_state: str = "unknown"
    study_uid: str | None = None
    series_uid: str | None = None
    reasons: tuple[str, ...] = ()
    acquired: Acquired | None = None
    patient: str | None = None
    """PatientID; used to match persons, never stored."""
    identity: dict[str, str] = field(default_factory=dict)
    """sex, birth_year and accession; used to compare with the person's, never stored."""
    simulated: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ok, suspect or unusable."""
        worst = {REASONS[reason] for reason in self.reasons}
        return "unusable" if "unusable" in worst else "suspect" if worst else "ok"


def written(status: os.stat_result) -> str:
    """What changes when a file is written to: its size, and when that was."""
    return f"{status.st_size} {status.st_mtime_ns}"


def stamp(files: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What tells that the files of a series, (name, `written`) each, are the same ones as before."""
    told = "\0".join(f"{name}\0{when}" for name, when in sorted(set(files)))
    return {STAMP: hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:32]}


def acquired(at: dt.datetime, source: str) -> Acquired:
    """A moment; exactly midnight means that only the day is known, as in OMOP tables."""
    at = at.replace(microsecond=0, tzinfo=None)
    if at.time() == dt.time():
        return Acquired(at=at.replace(hour=23, minute=59, second=59), date_only=True, source=source)
    return Acquired(at=at, date_only=False, source=source)


def parse_moment(text: str, source: str) -> Acquired | None:
    """ISO 8601 or DICOM digits (YYYYMMDD[HHMM[SS[.ffffff]]]), with or without an offset, which is dropped: local time
    is what the clock on the wall said. None where it is neither, or outside 1800 to 2300."""
    text = text.strip()
    moment: dt.datetime | None
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        moment = _parse_digits(text)
    if moment is None or not 1800 <= moment.year < 2300:
        return None
    return acquired(moment, source)


def _parse_digits(text: str) -> dt.datetime | None:
    digits = text.partition("+")[0].partition("-")[0].partition(".")[0].replace("T", "")
    layout = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(digits))
    try:
        return dt.datetime.strptime(digits, layout) if layout and digits.isdigit() else None
    except ValueError:
        return None
