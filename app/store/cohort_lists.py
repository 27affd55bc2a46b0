"""Scans that a person names: rows of a CSV file, or members of an OMOP cohort table; declared keys, no guesses."""

from __future__ import annotations

import csv
import datetime as dt
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.store.splits import OWN_WORDS

if TYPE_CHECKING:
    from sqlalchemy import Connection

KEYS = ("image_occurrence_id", "series_uid", "study_uid", "person_id")
"""Columns by which a row may name scans; a file has exactly one of them."""
NUMBERS = ("image_occurrence_id", "person_id")
TIME, SPLIT = "acquired_at", "split"

MATCH = """
SELECT l.n, i.image_occurrence_id, i.person_id
FROM unnest(CAST(:lines AS int[]), CAST(:keys AS {kind}[]), CAST(:days AS date[]), CAST(:times AS timestamp[]))
     l(n, key, day, time)
JOIN omop.image_occurrence i ON i.{key} = l.key
 AND (l.day IS NULL OR i.acquired_at::date = l.day)
 AND (l.time IS NULL OR i.acquired_at = l.time OR (i.date_only AND i.acquired_at::date = l.time::date))
"""

OMOP_COHORT = """
SELECT DISTINCT i.image_occurrence_id FROM {table} c
JOIN omop.image_occurrence i ON i.person_id = c.subject_id
 AND i.acquired_at::date BETWEEN c.cohort_start_date::date AND coalesce(c.cohort_end_date::date, DATE 'infinity')
WHERE c.cohort_definition_id = :id
"""
"""Scans made while their person was in an OMOP cohort, first and last day included."""

COHORT_COLUMNS = ("cohort_definition_id", "subject_id", "cohort_start_date", "cohort_end_date")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """Scans that a list names."""

    scans: list[int]
    """Each `image_occurrence_id` once, ascending."""
    definition: dict[str, Any]
    """What a cohort keeps of the list: never a path, never a row."""
    rows: int = 0
    unmatched: tuple[int, ...] = ()
    """Lines that name no scan of the store."""
    splits: dict[int, str] = field(default_factory=dict)
    """Person → split, where the file has such a column."""


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    key: str | int
    day: dt.date | None
    time: dt.datetime | None
    split: str | None


def scans_of_file(connection: Connection, path: Path) -> Listed:
    """Scans that the rows of a CSV file name.

    Args:
        connection: whose snapshot is asked.
        path: a file with a header that has one column of `KEYS`; beside `person_id` it may have `acquired_at` (a day
            or a time), beside any key `split`; further columns are left alone.

    Raises:
        InputError: naming the line and what is wrong with it; also where no row names a scan.
    """
    name = path.name
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"Expected UTF-8 in {name}, found other bytes at {error.start}; convert it.") from None
    except OSError as error:
        raise InputError(f"Expected a CSV file to read at {path}: {error.strerror}.") from None
    key, rows = _parse(text, name)
    found = _match(connection, key, rows)
    if not found:
        raise InputError(
            f"Expected rows of {name} to name scans of the store by {key}, found none among {len(rows):,} that do; "
            "give the ids as they were loaded (`lachesis sql 'SELECT * FROM omop.image_occurrence LIMIT 5'`)."
        )
    scans = sorted({scan for matches in found.values() for scan, _ in matches})
    unmatched = tuple(row.line for row in rows if row.line not in found)
    definition = {"sha256": hashlib.sha256(content).hexdigest(), "key": key, "rows": len(rows)}
    splits = _splits(rows, found, name)
    return Listed(scans=scans, definition=definition, rows=len(rows), unmatched=unmatched, splits=splits)


def _parse(text: str, name: str) -> tuple[str, list[_Row]]:
    head = text.split("\n", 1)[0]
    delimiter = max(",\t;", key=head.count)
    records = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
    columns = [cell.strip().lower() for cell in next(records, [])]
    keys = [column for column in KEYS if column in columns]
    if len(keys) != 1:
        found = " and ".join(keys) if keys else "none"
        raise InputError(
            f"Expected one of the columns {', '.join(KEYS)} in the header of {name}, found {found}; keep one."
        )
    if TIME in columns and keys[0] != "person_id":
        raise InputError(f"Expected {TIME} in {name} beside person_id only, found it beside {keys[0]}; drop one.")
    twice = next((column for column in (*KEYS, TIME, SPLIT) if columns.count(column) > 1), None)
    if twice:
        raise InputError(f"Expected the column {twice} once in the header of {name}, found it twice; remove one.")
    return keys[0], list(_rows(records, columns, keys[0], name))


def _rows(records: Any, columns: list[str], key: str, name: str) -> Iterator[_Row]:
    for record in records:
        line = records.line_num
        if not any(cell.strip() for cell in record):
            continue
        if len(record) != len(columns):
            raise InputError(
                f"Expected {len(columns)} cells in line {line} of {name}, found {len(record)}; mend the line."
            )
        cells = dict(zip(columns, (cell.strip() for cell in record), strict=True))
        day, time = _moment(cells.get(TIME, ""), line, name)
        yield _Row(line, _key(cells[key], key, line, name), day, time, _split(cells.get(SPLIT, ""), line, name))


def _key(cell: str, key: str, line: int, name: str) -> str | int:
    if not cell or "\0" in cell:
        raise InputError(f"Expected {key} in line {line} of {name}, found nothing; fill it in or remove the line.")
    if key not in NUMBERS:
        return cell
    if not re.fullmatch(r"[+-]?\d{1,19}", cell) or not -(2**63) <= int(cell) < 2**63:
        raise InputError(f"Expected a whole number as {key} in line {line} of {name}, found another value; mend it.")
    return int(cell)


def _moment(cell: str, line: int, name: str) -> tuple[dt.date | None, dt.datetime | None]:
    if not cell:
        return None, None
    try:
        if len(cell) <= 10:
            return dt.date.fromisoformat(cell), None
        time = dt.datetime.fromisoformat(cell)
    except ValueError:
        time = None
    if time is None or time.tzinfo is not None:
        raise InputError(
            f"Expected YYYY-MM-DD or YYYY-MM-DD HH:MM:SS without a zone as {TIME} in line {line} of {name}, "
            "found another value; write it so."
        )
    return None, time


def _split(cell: str, line: int, name: str) -> str | None:
    if not cell:
        return None
    if cell.lower() not in OWN_WORDS:
        raise InputError(
            f"Expected train, tuning or held_out as split in line {line} of {name}, found another word; mend it."
        )
    return OWN_WORDS[cell.lower()]


def _match(connection: Connection, key: str, rows: list[_Row]) -> dict[int, list[tuple[int, int]]]:
    """Line → (scan, person) of every scan that it names."""
    from sqlalchemy import text

    kind = "bigint" if key in NUMBERS else "text"
    values = {
        "lines": [row.line for row in rows],
        "keys": [row.key for row in rows],
        "days": [row.day for row in rows],
        "times": [row.time for row in rows],
    }
    found: dict[int, list[tuple[int, int]]] = {}
    for line, scan, person in connection.execute(text(MATCH.format(kind=kind, key=key)), values):
        found.setdefault(line, []).append((scan, person))
    return found


def _splits(rows: list[_Row], found: dict[int, list[tuple[int, int]]], name: str) -> dict[int, str]:
    given: dict[int, str] = {}
    for row in rows:
        for _, person in found.get(row.line, ()):
            if row.split is not None and given.setdefault(person, row.split) != row.split:
                raise InputError(
                    f"Expected one split a person in {name}, found {row.split} in line {row.line} and "
                    f"{given[person]} for the same person before it; mend one of them."
                )
    return given


def scans_of_omop_cohort(connection: Connection, named: str) -> Listed:
    """Scans made while their person was in an OMOP cohort, first and last day included.

    Args:
        connection: to the store's own database, where the cohort table must be.
        named: `SCHEMA.TABLE:ID`, e.g. `results.cohort:17`.

    Raises:
        InputError: it is not of that form, there is no such table, or it is not a cohort table.
    """
    from sqlalchemy import text

    table, cohort_id = _omop_table(connection, named)
    scans = connection.execute(text(OMOP_COHORT.format(table=table)), {"id": cohort_id}).scalars()
    rows = connection.scalar(text(f"SELECT count(*) FROM {table} WHERE cohort_definition_id = :id"), {"id": cohort_id})
    if not rows:
        raise InputError(f"Expected rows of cohort_definition_id {cohort_id} in {table}, found none; name another id.")
    return Listed(scans=sorted(scans), definition={"omop_cohort": named}, rows=int(rows))


def _omop_table(connection: Connection, named: str) -> tuple[str, int]:
    """The quoted table and the id of `SCHEMA.TABLE:ID`."""
    from sqlalchemy import text

    match = re.fullmatch(r'([^".:\0]+)\.([^".:\0]+):(\d{1,9})', named)
    if match is None:
        raise InputError(
            f"Expected SCHEMA.TABLE:ID for --from-omop-cohort, got {named!r}; for instance results.cohort:17."
        )
    schema, table, cohort_id = match.groups()
    quoted = f'"{schema}"."{table}"'
    columns = set(
        connection.execute(
            text(
                "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(:table) AND attnum > 0 "
                "AND NOT attisdropped"
            ),
            {"table": quoted},
        ).scalars()
    )
    if not columns:
        raise InputError(
            f"Expected a table {schema}.{table} in the store's database, found none; create it there, for instance "
            "with `lachesis psql`."
        )
    missing = [column for column in COHORT_COLUMNS if column not in columns]
    if missing:
        raise InputError(f"Expected the column {missing[0]} in {schema}.{table}, found none; give a cohort table.")
    return quoted, int(cohort_id)
