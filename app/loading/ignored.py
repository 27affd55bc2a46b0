"""What of an extract is left aside, with its number of rows where counting them is cheap; and how files were read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from app.errors import InputError
from app.loading.dialect import DELIMITERS, NO_QUOTE, Reading, head_of, sniff_encoding
from app.loading.extract import PARQUET_SUFFIXES, Extract, first_lines, is_data

if TYPE_CHECKING:
    from app.loading.places import Place
    from app.store.loads import FileRecord

CHEAP_BYTES = 64 << 20
"""Larger text files are not read for their number of rows alone."""
SHOWN = 40


def left_aside(extract: Extract, reading: Reading) -> tuple[dict[str, int | None], dict[str, int | None]]:
    """Rows of the tables that are not read, and of the files that no table has the name of; None where unknown."""
    headerless = any(file.version for files in extract.files.values() for file in files)

    def total(places: Iterable[Place]) -> int | None:
        counts = [count_rows(found, reading, headerless=headerless) for found in places]
        return None if None in counts or not counts else sum(filter(None, counts))

    ignored = {table: total(places) for table, places in extract.ignored.items()}
    unknown = {found.name: total(_files(found)) if found.is_file else None for found in extract.unknown}
    return ignored, unknown


def _files(found: Place) -> list[Place]:
    return [found] if is_data(found) else []


def count_rows(found: Place, reading: Reading, *, headerless: bool) -> int | None:
    """Rows of a file that is not read; None where counting them is not cheap, or the file cannot be understood."""
    from app.loading.records import scan

    try:
        if found.size > CHEAP_BYTES:
            return None
        if found.name.lower().endswith(PARQUET_SUFFIXES):
            import pyarrow.parquet

            return int(pyarrow.parquet.read_metadata(found.path).num_rows)
        head = head_of(found.path, found.name, 1 << 16)
        if not head:
            return 0
        encoding = sniff_encoding(head, reading.encoding)
        first = first_lines(head, found.name, encoding)[0]
        delimiter = reading.delimiter or max(DELIMITERS, key=first.count)
        if encoding != "utf-8":
            from app.loading.records import blocks

            data = b"".join(blocks(found.path, found.name, encoding=encoding))
            lines = sum(1 for line in data.splitlines() if line)
            return lines - _is_header(first, delimiter, headerless=headerless)
        seen = scan(found.path, found.name, delimiter, lambda: None)
        quoting = seen.quoted and not seen.malformed and reading.quote != NO_QUOTE
        return (seen.records if quoting else seen.lines) - _is_header(first, delimiter, headerless=headerless)
    except (InputError, OSError, ValueError):
        return None


def _is_header(first: str, delimiter: str, *, headerless: bool) -> bool:
    """Whether a first line names columns: its first cell is no number, and has an underscore where others have none."""
    cell = first.split(delimiter)[0].strip().strip('"')
    return not cell.lstrip("+-").isdigit() and (not headerless or "_" in cell)


def rows_of(counts: Mapping[str, int | None]) -> str:
    """Tables and files with their rows, in words."""
    words = [name if rows is None else f"{name} {rows:,} rows" for name, rows in counts.items() if rows != 0]
    empty = sum(rows == 0 for rows in counts.values())
    shown = words[:SHOWN] + ([f"{len(words) - SHOWN} more"] if len(words) > SHOWN else [])
    return ", ".join([*shown, f"{empty} empty"] if empty else shown)


def dialects_of(records: Iterable[FileRecord]) -> str:
    """How files were read, in words: `comma (12 files); tab, utf-16-le (3 files)`."""
    counted = Counter(record.dialect for record in records)
    return "; ".join(f"{how} ({n} file{'s' if n > 1 else ''})" for how, n in counted.most_common())
