"""Slow, obvious twins of loading: count records, encode rows, pack timelines."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path


def count_records(data: bytes, delimiter: str = ",") -> int:
    """Records of a well-formed CSV text, header included, as Python's csv module sees them."""
    reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True)
    return sum(1 for row in reader if row)


def rows_of_file(path: Path) -> list[dict[str, str]]:
    """Rows of a file, columns by lower-case name; SQL expressions keep the last identifier in parentheses."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    rows = csv.reader(io.StringIO(text, newline=""))
    header = [cell.lower() for cell in next(rows)]
    header = [c.split("(")[1].split(",")[0] if c.startswith("date(") else c for c in header]
    return [dict(zip(header, row, strict=True)) for row in rows if row]


def encode_row(values: Sequence[tuple[str, object]]) -> bytes:
    """One row of a binary COPY: (struct code, value), None for null; code s takes bytes."""
    row = struct.pack(">h", len(values))
    for code, value in values:
        if value is None:
            row += struct.pack(">i", -1)
        else:
            body = value if code == "s" else struct.pack(">" + code, value)
            assert isinstance(body, bytes)
            row += struct.pack(">i", len(body)) + body
    return row


def pack_timelines(events: Iterable[tuple[int, int, bool, int]]) -> dict[int, tuple[int, bytes, bytes, bytes]]:
    """Timelines by person from (person, seconds since 1970, date_only, concept)."""
    by_person: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for person, seconds, date_only, concept in events:
        by_person[person].append((seconds * 2 + date_only, concept))
    packed = {}
    for person, mine in by_person.items():
        mine.sort()
        times = b"".join(struct.pack("<q", time) for time, _ in mine)
        concepts = b"".join(struct.pack("<i", concept) for _, concept in mine)
        packed[person] = (len(mine), times, concepts, hashlib.sha256(times + concepts).digest()[:16])
    return packed
