"""Images of a folder's files, put together to series, however the files are spread.

All images wait in a database of SQLite's own that has no name and goes with its connection: two million of them would
fill the memory.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from app.loading.images_dicom import DAMAGED, FAULTS, Image, describe, is_image, shape_key
from app.loading.images_header import MIN_SLICES, Header

DOSE_REPORT, REPORTS = "1.2.840.10008.5.1.4.1.1.88.67", "1.2.840.10008.5.1.4.1.1.88."
"""SOP classes of X-ray radiation dose reports, and of all structured reports."""
REUSED = "series_uid_reused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One series found in a folder."""

    path: str
    """Its folder, or its first file where others lie there, too; relative to the root."""
    files: tuple[str, ...]
    """All its files, relative to the root, where `path` is not a folder of its own."""
    found: Header | str
    """What its headers say, or the rule by which it is set aside."""
    part: str = ""
    """Tells it from another volume under the same UID; empty for the largest."""


class SeriesBook:
    """Images by series."""

    def __init__(self) -> None:
        self.book = sqlite3.connect("", isolation_level=None)
        self.book.execute("PRAGMA journal_mode = OFF")
        self.book.execute("PRAGMA cache_size = -65536")
        self.book.execute("CREATE TABLE image (series TEXT, folder TEXT, file TEXT, facts TEXT)")
        self.book.execute("BEGIN")
        self.damaged: Counter[str] = Counter()
        """Folder → its files that cannot be read as the DICOM files that they seem to be."""

    def close(self) -> None:
        self.book.close()

    def add(self, path: str, images: list[Image]) -> bool:
        """Note the images of a file; False where it holds none and belongs to no series either."""
        folder, _, _ = path.rpartition("/")
        uid = images[0].get("SeriesInstanceUID") if images else None
        if not images or not (uid or any(is_image(image) for image in images)):
            return False
        series = uid or f"/{folder}"
        rows = [(series, folder, path, json.dumps(image)) for image in images]
        self.book.executemany("INSERT INTO image VALUES (?, ?, ?, ?)", rows)
        return True

    def fault(self, path: str, rule: str) -> bool:
        """Note a file that a series of its folder may lack; whether the rule is one of those."""
        if rule in FAULTS:
            self.damaged[path.rpartition("/")[0]] += 1
        return rule in FAULTS

    def count(self) -> int:
        """How many series there are to look at."""
        (count,) = self.book.execute("SELECT count(DISTINCT series) FROM image").fetchone()
        return int(count)

    def series(self) -> Iterator[Series]:
        """All of them, by their first file."""
        self.book.execute("CREATE INDEX by_series ON image (series, file)")
        self.book.execute("CREATE INDEX by_folder ON image (folder)")
        order = "SELECT series FROM image GROUP BY series ORDER BY min(file)"
        for (series,) in self.book.execute(order).fetchall():
            query = "SELECT folder, file, facts FROM image WHERE series = ? ORDER BY file, rowid"
            rows = self.book.execute(query, (series,)).fetchall()
            images = [json.loads(facts) | {"folder": folder, "path": path} for folder, path, facts in rows]
            yield from self._read(images)

    def lost(self) -> Iterator[str]:
        """Folders with damaged files and no series that lacks them, once for each file."""
        for folder, count in sorted(self.damaged.items()):
            if not self.book.execute("SELECT 1 FROM image WHERE folder = ? LIMIT 1", (folder,)).fetchone():
                yield from [folder] * count

    def _read(self, images: list[Image]) -> Iterator[Series]:
        if rule := set_aside(images):
            yield self._made(images, rule)
            return
        images = [image for image in images if is_image(image)]
        groups, reused = _places(images)
        for number, group in enumerate(groups):
            for part, volume in _volumes(group):
                reasons = [REUSED] if reused else []
                reasons += [DAMAGED] if any(i["folder"] in self.damaged for i in volume) else []
                made = self._made(volume, describe(volume, reasons))
                yield replace(made, part=f"{part}/{made.path}" if reused and number else part)

    def _made(self, images: list[Image], found: Header | str) -> Series:
        files = tuple(dict.fromkeys(str(image["path"]) for image in images))
        folder = str(images[0]["folder"])
        query = "SELECT count(DISTINCT file) FROM image WHERE folder = ?"
        is_alone = folder and self.book.execute(query, (folder,)).fetchone() == (len(files),)
        if is_alone and all(image["folder"] == folder for image in images):
            return Series(path=folder, files=(), found=found)
        return Series(path=files[0], files=files if len(files) > 1 else (), found=found)


def set_aside(images: list[Image]) -> str | None:
    """The rule by which a whole series is none of CT images; None where it is one."""
    classes = {str(image.get("SOPClassUID", "")) for image in images}
    if not any(is_image(image) for image in images):
        if DOSE_REPORT in classes:
            return "dose_report"
        return "structured_report" if any(c.startswith(REPORTS) for c in classes) else "not_an_image"
    return None if any(image.get("Modality", "CT") == "CT" for image in images) else "not_ct"


def _places(images: list[Image]) -> tuple[list[list[Image]], bool]:
    """The images of one UID as one series, or one for each folder: where they are copies, or where a UID was given to
    several series (True)."""
    folders: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        folders[image["folder"]].append(image)
    if len(folders) == 1:
        return [images], False
    instances = [image.get("SOPInstanceUID", image["path"]) for image in images]
    are_copies = len(set(instances)) < len(instances)
    one_patient = len({image.get("PatientID") for image in images}) == 1
    if one_patient and not are_copies and not _overlaps(images):
        return [images], False
    return list(folders.values()), not are_copies


def _volumes(images: list[Image]) -> Iterator[tuple[str, list[Image]]]:
    """(name, images) of the volumes in a series: by size and orientation, then by acquisition where positions repeat.

    Few images of another kind stay with the largest volume, whose reasons then name them.
    """
    scans = [image for image in images if not image["is_localizer"]]
    stacks = list(_split(scans, lambda image: str(shape_key(image))))
    volumes = []
    for name, stack in stacks:
        runs = list(_split(stack, lambda image: str(image.get("AcquisitionNumber", "")))) if _overlaps(stack) else []
        whole = len(runs) > 1 and all(len(run) >= MIN_SLICES and not _overlaps(run) for _, run in runs)
        volumes += [(f"{name} {number}", run) for number, run in runs] if whole else [(name, stack)]
    volumes.sort(key=lambda volume: (-len(volume[1]), volume[0]))
    others = [(name, volume) for name, volume in volumes[1:] if len(volume) >= MIN_SLICES]
    apart = {id(image) for _, volume in others for image in volume}
    yield "", [image for image in images if id(image) not in apart]
    yield from others


def _split(images: Iterable[Image], key: Any) -> Iterator[tuple[str, list[Image]]]:
    groups: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        groups[key(image)].append(image)
    yield from groups.items()


def _overlaps(images: list[Image]) -> bool:
    """Whether several different images of one kind lie at one position."""
    once = {image.get("SOPInstanceUID", image["path"]): image for image in images}.values()
    places = [
        (shape_key(image), tuple(round(x, 2) for x in image["ImagePositionPatient"]))
        for image in once
        if len(image.get("ImagePositionPatient", ())) == 3 and not image["is_localizer"]
    ]
    return len(set(places)) < len(places)
