"""Columns of a file without a header, by the order that a CDM version gives them, checked against the first records."""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.errors import InputError
from app.loading.dialect import DELIMITERS, Reading
from app.loading.layouts import VERSIONS, layouts, versions_of_width
from app.loading.repair import Broken, split_record

SAMPLE = 500
"""Records whose values are looked at."""
TEXT_IDS = frozenset(
    [
        *("unique_device_id", "production_id", "specimen_source_id"),
        *("domain_id", "vocabulary_id", "concept_class_id", "relationship_id"),
    ]
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d.*|\d{8}")
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")


def split(line: str, delimiter: str, quote: str | None) -> list[str]:
    """Fields of one line, as well as it can be divided."""
    try:
        return split_record(line, delimiter, quote) or line.split(delimiter)
    except Broken:
        return line.split(delimiter)


def likely_delimiter(line: str, table: str, given: str | None, quote: str | None) -> str:
    """The delimiter that gives a first record a width some version has; else the one that divides it most."""
    if given is not None:
        return given
    widths = {delimiter: _width(split(line, delimiter, quote), table) for delimiter in DELIMITERS}
    fitting = [delimiter for delimiter, width in widths.items() if width > 1 and versions_of_width(table, width)]
    return fitting[0] if fitting else max(DELIMITERS, key=lambda delimiter: widths[delimiter])


def _width(fields: list[str], table: str) -> int:
    """Number of fields; an empty one after the last delimiter of a line is none."""
    width = len(fields)
    return width - 1 if fields[-1] == "" and not versions_of_width(table, width) else width


def no_header(line: str, table: str, name: str, given: str | None, quote: str | None) -> str:
    """What to say of a file without a header where no version was named."""
    width = _width(split(line, likely_delimiter(line, table, given, quote), quote), table)
    fitting = versions_of_width(table, width)
    advice = f"say --cdm {fitting[-1]}" if fitting else f"add it, or say --cdm {VERSIONS[-1]}"
    fit = f", which fits CDM {' and '.join(fitting)}" if fitting else ""
    return (
        f"Expected a header naming the columns of {table.upper()} in the first line of {name}, found {width} "
        f"columns without one{fit}; {advice} for files that have none."
    )


def columns_by_order(
    lines: Sequence[str], table: str, name: str, reading: Reading, quote: str | None
) -> tuple[str, tuple[str | None, ...]]:
    """Delimiter and columns of a file without a header, under the version that was named.

    Raises:
        InputError: the version has another number of columns, or the values are not those of its columns.
    """
    version = reading.cdm or VERSIONS[-1]
    delimiter = likely_delimiter(lines[0], table, reading.delimiter, quote)
    rows = [split(line, delimiter, quote) for line in lines[:SAMPLE]]
    width = _width(rows[0], table)
    known = layouts(table, version)
    if not known:
        raise InputError(f"Expected no {table} in CDM {version}, found {name}; name the version that the files have.")
    wide = [layout for layout in known if len(layout) == width]
    if not wide:
        raise InputError(_other_width(table, name, version, width, len(known[0])))
    nulls = {"", *reading.nulls}
    judged = [(_misfit(layout, rows, nulls), -_filled(layout, rows, nulls), layout) for layout in wide]
    fitting = sorted((row for row in judged if row[0] is None), key=lambda row: row[1])
    if not fitting:
        column = judged[0][0] or ""
        place = wide[0].index(column) + 1
        what = "dates as 2020-01-31" if _is_time(column) else "whole numbers"
        raise InputError(
            f"Expected {what} of {column} in column {place} of {name} under CDM {version}, found other values; "
            "name the right version with --cdm, or give the files a header."
        )
    return delimiter, (*fitting[0][2], *(None for _ in range(len(rows[0]) - width)))


def _other_width(table: str, name: str, version: str, width: int, expected: int) -> str:
    fitting = versions_of_width(table, width)
    if fitting:
        advice = f"CDM {' and '.join(fitting)} have that many: say --cdm {fitting[-1]}"
    else:
        way = "missing" if width < expected else "too many"
        widths = ", ".join(f"{v} has {len(order)}" for v in VERSIONS for order in layouts(table, v)[:1])
        advice = f"{abs(width - expected)} are {way} and no version fits ({widths}): give the file a header"
    return f"Expected {expected} columns in {name} under CDM {version}, found {width}; {advice}."


def _is_time(column: str) -> bool:
    return column.endswith(("_date", "_datetime"))


def _misfit(layout: Sequence[str], rows: Sequence[list[str]], nulls: set[str]) -> str | None:
    """The first column whose values are mostly not of its kind."""
    for i, column in enumerate(layout):
        whole = column.endswith("_id") and column not in TEXT_IDS
        if not (whole or _is_time(column)):
            continue
        values = [row[i] for row in rows if len(row) > i and row[i] not in nulls]
        pattern = _WHOLE if whole else _DATE
        if sum(pattern.fullmatch(value) is None for value in values) * 2 > len(values):
            return column
    return None


def _filled(layout: Sequence[str], rows: Sequence[list[str]], nulls: set[str]) -> int:
    """How many concepts and visits an order finds: of two orders that fit, the right one finds more."""
    places = [i for i, column in enumerate(layout) if column.endswith("concept_id") or column == "visit_occurrence_id"]
    return sum(row[i] not in nulls for row in rows for i in places if len(row) > i)
