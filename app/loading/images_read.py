"""Headers of scans by child processes: of the paths that a manifest names, or of all that lies in a folder."""

from __future__ import annotations

import csv
import datetime as dt
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from app.loading.images_dicom import DAMAGED, FAULTS, describe, is_image, series_files
from app.loading.images_header import Acquired, Header, Unreadable
from app.loading.images_nifti import is_nifti
from app.loading.images_pool import HeaderPool, Job
from app.loading.images_series import Series, SeriesBook
from app.loading.images_walk import walk
from app.store.work import Work

Found = Header | str
"""A header, or the rule by which its path is rejected."""
LIST_NAME = "set_aside.csv"
"""Lists path and rule of what no row stands for; in the job's own folder, for paths may name patients."""
_NOTHING_THERE = ("missing_file", "empty_file", "not_dicom", "not_an_image")
"""Of files of a folder that are no scans: counted, not rejected."""


def header_from(facts: dict[str, Any]) -> Header:
    """A header that has come through JSON."""
    acquired = facts.pop("acquired")
    if acquired:
        acquired = Acquired(**acquired | {"at": dt.datetime.fromisoformat(acquired["at"])})
    return Header(**facts | {"reasons": tuple(facts["reasons"])}, acquired=acquired)


def read_paths(work: Work, paths: Iterable[Path]) -> dict[Path, Found]:
    """The header of each path, a NIfTI file, a DICOM file or the folder of a series, or its rule."""
    wanted = sorted(set(paths))
    found: dict[Path, Found] = {}
    with HeaderPool() as pool:
        answers = pool.read(_jobs(wanted, found))
        for path, group in groupby(answers, lambda answer: answer[0]):
            found[path] = _of_one([answer for _, answer in group])
            work.progress(len(found), len(wanted), "scans", "reading headers")
    return found


def _jobs(paths: Iterable[Path], found: dict[Path, Found]) -> Iterator[Job]:
    for path in paths:
        try:
            is_folder = path.is_dir()
            files = [path] if not is_folder else series_files(path)
        except OSError:
            found[path] = "unreadable_file"
            continue
        if not files:
            found[path] = "unreadable_file"
        elif not is_folder and not path.is_file():
            found[path] = "unreadable_file" if path.exists() else "missing_file"  # a pipe would never end
        elif is_nifti(path) and not is_folder:
            yield path, "nifti", str(path)
        else:
            yield from ((path, "dicom", str(file)) for file in files)


def _of_one(answers: list[Any]) -> Found:
    """What the answers for the files of one path say together."""
    if isinstance(answers[0], dict):
        return header_from(answers[0])
    images = [image for answer in answers if isinstance(answer, list) for image in answer if is_image(image)]
    faults = [answer for answer in answers if answer in FAULTS]
    if not images:
        died = [rule for rule in faults if rule != "damaged_file"]
        return died[0] if died else "unreadable_file"
    try:
        return describe(images, [DAMAGED] if faults else [])
    except Unreadable as rule:
        return str(rule)


@dataclass(slots=True)
class FolderFacts:
    """What was in a folder beside scans."""

    files: int = 0
    aside: Counter[str] = field(default_factory=Counter)
    """Rule → files that are no scans and no record."""


def read_folder(work: Work, root: Path, facts: FolderFacts) -> Iterator[Series]:
    """Every scan below a folder, by path: NIfTI files first; then DICOM series, wherever their files lie.

    Files that cannot be read come as series with a rule; those that are no scans are counted in `facts`. What is set
    aside is listed by path in the job's folder.
    """
    book = SeriesBook()
    listing = work.folder / LIST_NAME
    try:
        with HeaderPool() as pool, listing.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            listing.chmod(0o600)
            aside = csv.writer(file, lineterminator="\n")
            aside.writerow(("path", "rule"))
            yield from _read_files(work, pool, root, book, facts, aside)
            total = book.count()
            for number, series in enumerate(book.series(), start=1):
                if isinstance(series.found, str):
                    aside.writerow((series.path, series.found))
                work.progress(number, total, "series", "putting series together")
                yield series
            for folder in book.lost():
                yield Series(path=folder or ".", files=(), found="damaged_file")
    finally:
        book.close()


def _read_files(
    work: Work, pool: HeaderPool, root: Path, book: SeriesBook, facts: FolderFacts, aside: Any
) -> Iterator[Series]:
    """Fill the book with what DICOM files hold; NIfTI files and what cannot be read are series by themselves."""
    refused: list[tuple[str, str]] = []

    def jobs() -> Iterator[Job]:
        for kind, path in walk(root, work.check):
            if kind in ("nifti", "dicom"):
                yield path, kind, f"{root}/{path}"
            else:
                refused.append((path, kind))

    for path, answer in pool.read(jobs()):
        facts.files += 1
        work.progress(facts.files, None, "files", "reading headers")
        if isinstance(answer, dict):
            yield Series(path=path, files=(), found=header_from(answer))
            continue
        rule = answer if isinstance(answer, str) else "" if book.add(path, answer) else "not_an_image"
        if not rule:
            continue
        aside.writerow((path, rule))
        if rule in _NOTHING_THERE and not is_nifti(Path(path)):
            facts.aside[rule] += 1
        elif is_nifti(Path(path)) or not book.fault(path, rule) or rule != "damaged_file":
            yield Series(path=path, files=(), found=rule)
    for path, rule in refused:
        aside.writerow((path.encode("utf-8", "backslashreplace").decode(), rule))
        yield Series(path=path, files=(), found=rule)
