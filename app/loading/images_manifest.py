"""Which scan is whose, as a manifest says."""

from __future__ import annotations

import csv
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import InputError
from app.loading.images_header import Acquired, parse_moment

COLUMNS = ("person_id", "acquired_at", "path")
MASK = "mask"
"""A column that a manifest may have beside them."""
MASKS = (".nii", ".nii.gz")
BIGINT = 2**63
HOST_ROOT = "/"
"""Name and place of the root of scans that lie outside the manifest's folder; `--root` cannot name another one so."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One record that makes sense by itself."""

    record: int
    """From 1, header not counted."""
    person_id: int
    acquired: Acquired | None
    path: str
    """Relative to the root, with slashes."""
    root: str | None = None
    """HOST_ROOT, or None where the path lies below the folder it was read for."""
    mask: str | None = None
    """A NIfTI file that marks a part of the scan, relative to the scan's root; None where the manifest names none."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One record that cannot be loaded."""

    record: int
    column: str | None
    rule: str


@dataclass(slots=True)
class Manifest:
    """What was asked for."""

    entries: list[Entry] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    size: int = 0
    """Records read."""


def read_manifest(content: bytes, root: Path, *, confined: bool) -> Manifest:
    """Read a CSV manifest (person_id, path and, where headers do not tell, acquired_at; mask, if some scans have
    one; other columns are ignored).

    Args:
        content: the file; UTF-8, delimited by comma, tab or semicolon, header in any case.
        root: the folder its paths are relative to.
        confined: refuse paths that lead out of it, rather than read them from the host's root.

    Raises:
        InputError: not UTF-8, a column is missing, or there are no records.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("Expected a manifest in UTF-8, got other bytes; save it as UTF-8.") from None
    header = text.partition("\n")[0]
    delimiter = max(",\t;", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = [name.strip().lower() for name in next(reader, [])]
    missing = [name for name in ("person_id", "path") if name not in names]
    if missing:
        raise InputError(
            f"Expected a manifest with the columns {', '.join(COLUMNS)}, found none named {' or '.join(missing)}; "
            "name the columns in its first line."
        )
    manifest = Manifest()
    try:
        for values in reader:
            if values:
                manifest.size += 1
                _add(manifest, names, values, root, confined)
    except csv.Error as error:
        raise InputError(
            f"Expected CSV, got something else after record {manifest.size} ({error}); mend the manifest."
        ) from None
    if not manifest.size:
        raise InputError("Expected a manifest with records, found only its header; nothing was changed.")
    return manifest


def _add(manifest: Manifest, names: list[str], values: list[str], root: Path, confined: bool) -> None:
    def refuse(column: str | None, rule: str) -> None:
        manifest.refusals.append(Refusal(manifest.size, column, rule))

    if len(values) != len(names):
        return refuse(None, "wrong_number_of_fields")
    row = dict(zip(names, values, strict=True))
    if any("\0" in row[name] for name in (*COLUMNS, MASK) if name in row):
        return refuse(None, "nul_character")
    person_id = _person_id(row["person_id"])
    if person_id is None:
        return refuse("person_id", "unparsable_id")
    stated = row["path"].strip()
    path, beyond = _relative(stated, root), None
    if path is None and stated and not confined:
        path, beyond = _relative(str(root / stated), Path(HOST_ROOT)), HOST_ROOT
    if path is None:
        return refuse("path", "path_outside_root" if stated else "missing_path")
    moment = row.get("acquired_at", "").strip()
    acquired = parse_moment(moment, "manifest") if moment else None
    if moment and acquired is None:
        return refuse("acquired_at", "unparsable_time")
    mask, fault = mask_path(row.get(MASK, "").strip(), root, Path(beyond or root))
    if fault:
        return refuse(MASK, fault)
    manifest.entries.append(Entry(manifest.size, person_id, acquired, path, beyond, mask))
    return None


def mask_path(stated: str, folder: Path, root: Path) -> tuple[str | None, str | None]:
    """The mask stated, relative to its scan's root, or the rule that it breaks; neither where none is stated."""
    if not stated:
        return None, None
    mask = _relative(str(folder / stated), root)
    if mask is None:
        return None, "mask_outside_root"
    if not mask.endswith(MASKS):
        return None, "mask_not_nifti"
    return (mask, None) if (root / mask).is_file() else (None, "missing_mask")


def _person_id(text: str) -> int | None:
    text = text.strip()
    if not re.fullmatch(r"[+-]?\d{1,19}", text, re.ASCII):
        return None
    number = int(text)
    return number if -BIGINT <= number < BIGINT else None


def _relative(text: str, root: Path) -> str | None:
    """A path below `root`, normalised; None where it is empty or leaves it."""
    if not text:
        return None
    path = os.path.normpath(root / text)
    relative = os.path.relpath(path, root)
    outside = relative == "." or Path(relative).parts[0] == os.pardir
    return None if outside else Path(relative).as_posix()
