"""Walking through a folder of scans: which files may be images, in order, a few at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from app.loading.images_nifti import SUFFIXES

DEEPEST = 64
"""Folders below one another; more are links that lead around."""
UNREADABLE_FOLDER, UNNAMEABLE = "unreadable_folder", "unnameable_file"
MASKS = (".mask.nii.gz", ".mask.nii")
"""Ends of names of files that mark a part of the scan beside them (docs/volumes.md)."""
_PASSED_OVER = (
    *(".bmp", ".bval", ".bvec", ".csv", ".css", ".docx", ".exe", ".gif", ".gz", ".htm", ".html", ".inf", ".ini"),
    *(".jpeg", ".jpg", ".js", ".json", ".log", ".md", ".pdf", ".png", ".tar", ".tif", ".tiff", ".toml", ".tsv"),
    *(".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml", ".zip"),
)
"""Ends of names that no DICOM file has."""


def walk(root: Path, check: Callable[[], None] = lambda: None) -> Iterator[tuple[str, str]]:
    """(kind, path relative to `root`) of files that may be images, folder by folder, names in order.

    Kind is nifti or dicom; or a rule: unreadable_folder, or unnameable_file where a name is no text. Links are
    followed, but not into a folder that they lie in; what is neither a file nor a folder (a pipe, a device) is passed
    over, as are hidden names, DICOMDIR, masks beside scans, and names that end as those of other files do.

    Args:
        root: a folder.
        check: called once a folder; what it raises ends the walk.
    """
    yield from _walk(str(root), "", frozenset(), check)


def _walk(root: str, here: str, above: frozenset[str], check: Callable[[], None]) -> Iterator[tuple[str, str]]:
    check()
    place = os.path.join(root, here) if here else root  # noqa: PTH118 - millions of names
    real = os.path.realpath(place)
    if real in above or len(above) >= DEEPEST:
        return
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    (folders if entry.is_dir() else files if entry.is_file() else []).append(entry.name)
                except OSError:
                    continue  # a link that leads to itself
    except FileNotFoundError:
        return  # gone since it was listed
    except OSError:
        yield UNREADABLE_FOLDER, here
        return
    prefix = f"{here}/" if here else ""
    siblings = frozenset(files)
    for name in sorted(files):
        if kind := _kind(name, siblings):
            yield kind, prefix + name
    for name in sorted(folders):
        if _is_text(name):
            yield from _walk(root, prefix + name, above | {real}, check)
        else:
            yield UNNAMEABLE, prefix + name


def _kind(name: str, siblings: frozenset[str]) -> str | None:
    lower = name.lower()
    if not _is_text(name):
        return UNNAMEABLE
    if lower.endswith(MASKS):
        return None
    if lower.endswith(SUFFIXES):
        is_half = lower.endswith(".img") and any(name[:-4] + end in siblings for end in (".hdr", ".HDR"))
        return None if is_half else "nifti"
    return None if lower == "dicomdir" or lower.endswith(_PASSED_OVER) else "dicom"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8: the store could not hold the path
        return False
    return True
