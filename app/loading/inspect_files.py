"""The files of INSPECT as they are released: found by name, read whole (they are small), each record judged.

Huang et al. 2023, "INSPECT: a multimodal dataset for pulmonary embolism diagnosis and prognosis", and the tables of its
release: splits, labels, study mapping, metadata of series and studies; the volumes lie in `CTPA/<image_id>.nii.gz`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import InputError
from app.loading.images_header import Acquired, parse_moment
from app.store.loads import FileRecord

REQUIRED = {
    "splits": ("person_id", "split"),
    "labels": ("impression_id",),
    "study_mapping": ("impression_id", "person_id", "image_id"),
}
"""File → columns without which it cannot be read."""
OPTIONAL = ("series_metadata", "study_metadata")
TIMES = ("procedure_datetime", "note_datetime")
"""When a study was, best first: when it was ordered, when its report was written. Acquisition is not released."""
DEPTH = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One record: its number in the file, from 1, and its fields by lower-case column."""

    record: int
    values: dict[str, str]


@dataclass(slots=True)
class Sheet:
    """One file."""

    file: FileRecord
    columns: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    refused: list[tuple[int, str | None, str]] = field(default_factory=list)
    """(record, column, rule) of those that are in none of `rows`."""

    def once(self, *key: str) -> None:
        """Refuse copies of a record but the first, and every record of a key with different contents."""
        seen: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            seen.setdefault(tuple(row.values.get(name, "") for name in key), []).append(row)
        self.rows = []
        for rows in seen.values():
            same = all(row.values == rows[0].values for row in rows)
            self.rows += rows[:1] if same else []
            for row in rows[1:] if same else rows:
                self.refused.append((row.record, key[0], "duplicate_row" if same else "duplicate_key"))
        self.rows.sort(key=lambda row: row.record)


@dataclass(frozen=True, slots=True)
class Study:
    """One CT study of the mapping."""

    record: int
    impression_id: str
    person_id: int
    image_id: str
    acquired: Acquired | None
    """None where the mapping has no time for it."""

    @property
    def path(self) -> str:
        """Relative to the folder of volumes."""
        return f"{self.image_id}.nii.gz"


def find(folder: Path, name: str) -> Path | None:
    """The file of a table, `labels.tsv` or `labels_20250611.tsv`, in a folder or below; of several the newest release.

    Raises:
        InputError: two files of the same release.
    """
    pattern = re.compile(rf"{name}(?:_(\d{{8}}))?\.(?:tsv|csv)(?:\.gz)?", re.IGNORECASE)
    found: list[tuple[str, Path]] = []
    level = [folder]
    for _ in range(DEPTH):
        for path in (path for above in level for path in sorted(above.iterdir())):
            if (match := pattern.fullmatch(path.name)) and path.is_file():
                found.append((match[1] or "", path))
        level = [p for above in level for p in sorted(above.iterdir()) if p.is_dir() and p.name.lower() != "ctpa"]
    if not found:
        return None
    newest = max(release for release, _ in found)
    best = [path for release, path in found if release == newest]
    if len(best) > 1:
        raise InputError(f"Expected one file of {name}, found {len(best)} named {best[0].name}; remove all but one.")
    return best[0]


def read(path: Path, name: str) -> Sheet:
    """Read one file.

    Raises:
        InputError: not UTF-8, a damaged gzip file, or a needed column is missing.
    """
    content = path.read_bytes()
    try:
        plain = gzip.decompress(content) if path.name.lower().endswith(".gz") else content
        text = plain.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        raise InputError(
            f"Expected text in UTF-8 in {path.name}, found other or damaged bytes; copy it again."
        ) from None
    header = text.partition("\n")[0]
    delimiter = "\t" if "\t" in header else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = tuple(cell.strip().lower() for cell in next(reader, []))
    missing = [column for column in REQUIRED.get(name, ()) if column not in columns]
    if missing:
        raise InputError(
            f"Expected the column {missing[0]} in {path.name}, found none; give the file as it was released."
        )
    rows: list[Row] = []
    refused: list[tuple[int, str | None, str]] = []
    number = 0
    try:
        for values in reader:
            if not values:
                continue
            number += 1
            if len(values) != len(columns):
                refused.append((number, None, "wrong_number_of_fields"))
            elif any("\0" in value for value in values):
                refused.append((number, None, "nul_byte"))
            else:
                rows.append(Row(number, {c: v.strip() for c, v in zip(columns, values, strict=True)}))
    except csv.Error as error:
        raise InputError(
            f"Expected a table in {path.name}, got something else after record {number} ({error}); copy it again."
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    dialect = "tab" if delimiter == "\t" else "comma"
    file = FileRecord(name=path.name, sha256=digest, size=len(content), records=number, dialect=dialect)
    return Sheet(file, columns, rows, refused)


def person_id(text: str) -> int | None:
    """A whole number of 64 bits, also written `7.0`; None where it is none."""
    if not re.fullmatch(r"-?\d{1,19}(?:\.0*)?", text, re.ASCII):
        return None
    number = int(text.partition(".")[0])
    return number if -(2**63) <= number < 2**63 else None


def studies(mapping: Sheet) -> list[Study]:
    """The studies of the mapping; records that name none are refused."""
    mapping.once("impression_id")
    found = []
    for row in mapping.rows:
        person = person_id(row.values["person_id"])
        image = row.values["image_id"].removesuffix(".nii.gz")
        if person is None:
            mapping.refused.append((row.record, "person_id", "unparsable_id"))
        elif not image:
            mapping.refused.append((row.record, "image_id", "missing_path"))
        elif not re.fullmatch(r"[\w][\w.-]*", image, re.ASCII):
            mapping.refused.append((row.record, "image_id", "path_outside_root"))
        else:
            found.append(Study(row.record, row.values["impression_id"], person, image, _time(row)))
    return found


def _time(row: Row) -> Acquired | None:
    """When a study was: the best of the mapping's times."""
    for column in TIMES:
        if (text := row.values.get(column, "")) and (found := parse_moment(text, column)):
            return found
    return None


@dataclass(frozen=True, slots=True)
class Facts:
    """What the metadata say of a volume."""

    thickness_mm: float | None = None
    kernel: str | None = None


def facts(series: Sheet | None, study: Sheet | None) -> dict[str, Facts]:
    """image_id → thickness and kernel; of several series that with most slices, the thinner one on a tie."""
    best: dict[str, tuple[float, float]] = {}
    for row in series.rows if series else ():
        slices, thickness = (_number(row.values.get(c, "")) for c in ("num_slices", "slicethickness"))
        key = (slices or 0.0, -(thickness or 0.0))
        image = row.values.get("image_id", "")
        best[image] = max(best.get(image, key), key)
    kernels = {
        row.values.get("image_id", ""): row.values.get("convolutionkernel") or None
        for row in (study.rows if study else ())
    }
    return {
        image: Facts(-best[image][1] or None if image in best else None, kernels.get(image))
        for image in {*best, *kernels} - {""}
    }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
