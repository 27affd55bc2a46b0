"""Vectors that were made elsewhere, from Parquet, CSV, npz or safetensors: one a scan, in float32.

The column (or array) `image_occurrence_id`, `series_uid` or `path` says whose vector it is. The vector is the column or
array `embedding`; in tables without one it is all other columns, in their order.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.loading.images_manifest import Refusal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MATCHES = ("image_occurrence_id", "series_uid", "path")
"""What may name a scan."""
VECTOR = "embedding"
SUFFIXES = (".parquet", ".csv", ".npz", ".safetensors")
WIDEST = 4_000
"""Numbers of a vector that pgvector indexes as halves."""
UNCOUNTED = frozenset({"duplicate_row"})
"""Rules that do not count at the gate: nothing is lost."""


@dataclass(slots=True)
class Given:
    """What a file holds."""

    match: str
    width: int = 0
    keys: list[str] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    """Record of each vector, from 1, header not counted."""
    vectors: list[NDArray[np.float32]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    num_read: int = 0

    def refuse(self, record: int, rule: str, column: str | None = None) -> None:
        self.refusals.append(Refusal(record, column, rule))

    def add(self, key: str, values: Any) -> None:
        """Keep a record's vector, or say what is wrong with it. The first usable one says how long all are."""
        import numpy as np

        self.num_read += 1
        record = self.num_read
        if not key:
            return self.refuse(record, "missing_scan", self.match)
        try:
            with np.errstate(over="ignore"):
                vector = np.asarray(values, np.float64).astype(np.float32)
        except (TypeError, ValueError):
            return self.refuse(record, "unparsable_number", VECTOR)
        if vector.ndim != 1 or not vector.size or (self.width and vector.size != self.width):
            return self.refuse(record, "wrong_width", VECTOR)
        if not np.isfinite(vector).all():
            return self.refuse(record, "not_finite", VECTOR)
        if not vector.any():
            return self.refuse(record, "zero_vector", VECTOR)
        self.width = vector.size
        self.keys.append(key)
        self.records.append(record)
        self.vectors.append(vector)
        return None

    @property
    def by_rule(self) -> dict[str, int]:
        return dict(Counter(refusal.rule for refusal in self.refusals))


def read_vectors(file: Path, match: str | None) -> Given:
    """Read a file of vectors.

    Args:
        file: of one of SUFFIXES.
        match: what names the scan, one of MATCHES; None where the file has one of them alone.

    Raises:
        InputError: a file of another kind, one without a name for scans or without vectors, or vectors too long.
    """
    readers = {".parquet": _parquet, ".csv": _csv, ".npz": _arrays, ".safetensors": _arrays}
    if file.suffix.lower() not in readers:
        raise InputError(f"Expected a file that ends in {', '.join(SUFFIXES)}, got {file.suffix or 'no ending'}.")
    given = readers[file.suffix.lower()](file, match)
    if not given.num_read:
        raise InputError(f"Expected vectors in {file.name}, found none; nothing was changed.")
    if given.width > WIDEST:
        raise InputError(f"Expected vectors of {WIDEST:,} numbers at the most, got {given.width:,}; make them shorter.")
    return given


def resolve(given: Given, scans: Mapping[str, Sequence[int]]) -> dict[int, NDArray[np.float32]]:
    """Scan → vector, by ascending image_occurrence_id; refuses names of no scan or several, and scans that come twice.

    Args:
        given: what was read; refusals are added to it.
        scans: image_occurrence_ids that a key means.
    """
    import numpy as np

    places: dict[int, list[int]] = {}
    for position, key in enumerate(given.keys):
        found = scans.get(key, ())
        if len(found) != 1:
            given.refuse(given.records[position], "ambiguous_scan" if found else "unknown_scan", given.match)
            continue
        places.setdefault(found[0], []).append(position)
    kept: dict[int, NDArray[np.float32]] = {}
    for image, positions in sorted(places.items()):
        first = given.vectors[positions[0]]
        if all(np.array_equal(first, given.vectors[p]) for p in positions[1:]):
            kept[image] = first
            for p in positions[1:]:
                given.refuse(given.records[p], "duplicate_row", given.match)
        else:
            for p in positions:
                given.refuse(given.records[p], "duplicate_key", given.match)
    return kept


def _matched(columns: Sequence[str], match: str | None, file: Path) -> str:
    """The column that names the scan."""
    if match is not None and match not in MATCHES:
        raise UnknownName("value of --match", match, MATCHES)
    found = [name for name in MATCHES if name in columns and match in (None, name)]
    if len(found) != 1:
        raise InputError(
            f"Expected one of {', '.join([match] if match else MATCHES)} in {file.name} to say whose vectors they are, "
            f"found {', '.join(found) or 'none'}; name one with --match or add it."
        )
    return found[0]


def _csv(file: Path, match: str | None) -> Given:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = csv.reader(opened)
            names = [name.strip() for name in next(rows, [])]
            given = Given(_matched(names, match, file))
            place = names.index(given.match)
            numbers = [i for i, name in enumerate(names) if name not in MATCHES]
            for row in rows:
                if len(row) == len(names):
                    given.add(row[place].strip(), [row[i] for i in numbers])
                elif row:
                    given.num_read += 1
                    given.refuse(given.num_read, "wrong_number_of_fields")
    except (UnicodeDecodeError, csv.Error):
        raise InputError(f"Expected CSV in UTF-8 in {file.name}, got something else; write the file again.") from None
    return given


def _parquet(file: Path, match: str | None) -> Given:
    from pyarrow import ArrowInvalid, parquet

    try:
        opened = parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        given = Given(_matched(names, match, file))
        wanted = [VECTOR] if VECTOR in names else [name for name in names if name not in MATCHES]
        for batch in opened.iter_batches(1_000, columns=[given.match, *wanted]):
            columns = [batch.column(name).to_pylist() for name in wanted]
            vectors: Iterator[Any] = iter(columns[0]) if wanted == [VECTOR] else zip(*columns, strict=True)
            for key, vector in zip(batch.column(given.match).to_pylist(), vectors, strict=True):
                given.add("" if key is None else str(key), vector)
    except (ArrowInvalid, OSError):
        raise InputError(f"Expected Parquet in {file.name}, got something else; write the file again.") from None
    return given


def _arrays(file: Path, match: str | None) -> Given:
    """npz or safetensors; nothing is unpickled."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    arrays: Mapping[str, NDArray[Any]]
    try:
        if file.suffix.lower() == ".npz":
            with np.load(file, allow_pickle=False) as opened:
                arrays = {name: opened[name] for name in opened.files}
        else:
            arrays = load_file(file)
    except (ValueError, OSError, EOFError, KeyError, SafetensorError):
        raise InputError(
            f"Expected arrays of numbers or text in {file.name}, got something else; write it without pickle."
        ) from None
    given = Given(_matched(list(arrays), match, file))
    vectors, keys = arrays.get(VECTOR), arrays[given.match]
    if vectors is None or vectors.ndim != 2 or keys.shape != vectors.shape[:1]:
        found = "none" if vectors is None else f"shapes {vectors.shape} and {keys.shape}"
        raise InputError(f"Expected {VECTOR} of shape (N, D) and {given.match} of shape (N,), found {found}.")
    for key, vector in zip(keys.tolist(), vectors, strict=True):
        given.add(str(key), vector)
    return given


def too_many(given: Given, most: float) -> bool:
    """True where a larger share than `most` is rejected, copies not counted."""
    counted = sum(count for rule, count in given.by_rule.items() if rule not in UNCOUNTED)
    return counted > math.floor(most * given.num_read)
