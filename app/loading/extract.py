"""Find the files of an extract in a folder or archive, and read their headers: table, columns, dialect."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import InputError
from app.loading.cdm import COLUMNS, OTHER_TABLES, required_columns
from app.loading.dialect import (
    DELIMITERS,
    HEAD_BYTES,
    NO_QUOTE,
    Reading,
    head_of,
    nulls_seen,
    refuse_magic,
    sniff_encoding,
)
from app.loading.headerless import columns_by_order, no_header
from app.loading.places import Place, Stage, is_junk, place

PACKED = ("", ".gz", ".zst")
TEXT_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".csv", ".tsv", ".txt", ".psv") for packed in PACKED)
PARQUET_SUFFIXES = (".parquet", ".pq")
SUFFIXES = (*TEXT_SUFFIXES, *PARQUET_SUFFIXES)
FOREIGN_SUFFIXES = (
    *(".7z", ".arrow", ".avro", ".bz2", ".feather", ".gz", ".lz4", ".orc", ".rar", ".sas7bdat", ".tar", ".tgz"),
    *(".xls", ".xlsx", ".xz", ".zst"),
)
"""What tables are also kept in, but not read."""
MAX_HEADER = 1 << 16
MAX_DEPTH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFile:
    """One file of one table."""

    table: str
    path: Path
    name: str
    """Path relative to the folder or archive that was given."""
    columns: tuple[str | None, ...]
    """Canonical column names in the file's order; None for a cell that is no column of the table."""
    cells: tuple[str, ...]
    """The header's cells as they stand there; c0, c1, … where there is none."""
    delimiter: str | None
    """None for Parquet."""
    types: tuple[str, ...] = ()
    """Parquet: the type of each column, as Arrow names it."""
    encoding: str = "utf-8"
    quote: str | None = None
    """What was said of quotes: a character, or `none`; None where the file is to tell."""
    version: str | None = None
    """CDM version whose order of columns stands in for a header."""
    nulls: tuple[str, ...] = ()
    """Texts for missing values that were seen in the file's first records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extract:
    """The files of an extract, by table, and what is left aside."""

    files: dict[str, list[TableFile]]
    ignored: dict[str, list[Place]]
    """Tables of the CDM that are not read."""
    unknown: list[Place]
    """Files, and folders of them, whose names are no table's."""
    stage: Stage = field(default_factory=lambda: Stage(Path()))


def stem(name: str) -> str:
    """Lower-case name without suffixes that say the format."""
    name = name.lower().removesuffix(".zip")
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def is_data(found: Place) -> bool:
    """A file that may hold a table: no hidden file, no archive's litter."""
    return found.is_file and not is_junk(found.name) and found.name.lower().endswith(SUFFIXES)


def table_of(found: Place) -> str | None:
    """The CDM table that a file's or folder's name says."""
    name = stem(found.name)
    return name if name in COLUMNS or name in OTHER_TABLES else None


def table_files(folder: Place) -> dict[str, list[Place]]:
    """Tables whose files, or folders or archives of shards, lie directly in a folder."""
    found: dict[str, list[Place]] = {}
    for below in folder.children():
        table = table_of(below)
        if table is None or is_junk(below.name):
            continue
        parts = shards(below, table) if below.is_folder else [below] if is_data(below) else []
        if parts:
            if table in found:
                raise InputError(
                    f"Expected one file or one folder of shards for {table}, "
                    f"found {found[table][0].name} and {below.name}; remove one."
                )
            found[table] = parts
    return found


def shards(folder: Place, table: str) -> list[Place]:
    """Files of a table's folder and of the folders in it (`year=2020/part-0.parquet`); none where they are tables."""
    parts: list[Place] = []
    for below in folder.children():
        if below.is_folder and not is_junk(below.name):
            parts += shards(below, table)
        elif is_data(below):
            parts.append(below)
    return [] if any(table_of(part) not in (None, table) for part in parts) else parts


def unknown_files(folder: Place, tables: dict[str, list[Place]]) -> list[Place]:
    """What of an extract's folder nothing is read from.

    Raises:
        InputError: a table is there, but in a form that is not read: silence would leave it out.
    """
    unknown = []
    for below in folder.children():
        name = below.name.lower()
        if is_junk(name):
            continue
        base = name.partition(".")[0]
        table = table_of(below)
        if below.is_folder:
            archive = name.endswith(".zip") and table is None
            left = archive or (table not in tables and any(is_data(deeper) for deeper in below.children()))
        elif not below.is_file and (table is not None or base in COLUMNS):
            raise InputError(
                f"Expected a regular file in {below.name}, found none; replace the link or pipe by a file."
            )
        elif name.endswith(FOREIGN_SUFFIXES) and base in COLUMNS and base not in tables:
            raise InputError(
                f"Expected {base} as CSV, TSV, TXT or PSV (.gz, .zst, .zip) or Parquet, found {below.name}; "
                "convert it, or move it away."
            )
        else:
            left = table is None and is_data(below)
        if left:
            unknown.append(below)
    return unknown


def _folders(folder: Place) -> Iterator[list[Place]]:
    """The folder, then those below it, level by level; archives are folders, too."""
    level = [folder]
    for _ in range(MAX_DEPTH):
        yield level
        level = [below for above in level for below in above.children() if below.is_folder and not is_junk(below.name)]


def find_extract(folder: Place | Path) -> tuple[Place, dict[str, list[Place]]]:
    """The folder that holds an extract's tables: the given one, or the only one below it that does.

    Raises:
        InputError: it is no folder, is empty, holds no PERSON, or holds several extracts.
    """
    if isinstance(folder, Path):  # nothing is unpacked for looking alone
        folder = place(folder, "", Stage(folder))
    if not folder.is_folder:
        raise InputError(
            f"Expected a folder or zip archive of OMOP files, found the file {folder.name}; give its folder."
        )
    for level in _folders(folder):
        found = [(below, tables) for below in level if (tables := table_files(below))]
        known = [(below, tables) for below, tables in found if set(tables) & set(COLUMNS)]
        if len(known) > 1:
            names = ", ".join(below.name for below, _ in known[:4])
            raise InputError(
                f"Expected one extract, found several in the folder ({names}); "
                "give one of them, or put the files of one extract into one folder."
            )
        if known:
            return known[0]
    raise InputError(
        "Expected a folder of OMOP files (person.csv, condition_occurrence.parquet, …), found none in it; "
        "give the folder that holds them."
    )


def read_extract(
    path: Path, reading: Reading, folder: Path, check: Callable[[], None] = lambda: None, *, whole: bool = True
) -> Extract:
    """Find the files and read every header.

    Args:
        path: the folder or zip archive that was given.
        reading: what the user says of the files.
        folder: where members of archives are unpacked, and text is written anew; it need not be there yet.
        check: called now and then; may raise to stop.

    Raises:
        InputError: see `find_extract` and `read_header`; also where PERSON is absent, but from a delta (not `whole`).
    """
    stage = Stage(folder, check)
    found, tables = find_extract(place(path, "", stage))
    unknown = unknown_files(found, tables)
    if whole and "person" not in tables:
        raise InputError("Expected a file of PERSON in the folder, found none; add person.csv or person.parquet.")
    files = {
        table: [read_header(part.path, part.label, table, reading) for part in parts]
        for table, parts in tables.items()
        if table in COLUMNS
    }
    ignored = {table: parts for table, parts in sorted(tables.items()) if table not in COLUMNS}
    return Extract(files=files, ignored=ignored, unknown=unknown, stage=stage)


def read_header(path: Path, name: str, table: str, reading: Reading) -> TableFile:
    """What the beginning of one file says: its header or, under `reading.cdm`, the order of its columns.

    Raises:
        InputError: neither, an unknown delimiter, a required column missing, a cell that cannot be understood.
    """
    if name.lower().endswith(PARQUET_SUFFIXES):
        cells, types = _parquet_header(path, name)
        columns = map_columns(cells, table, name)
        _require(columns, table, name)
        return TableFile(table=table, path=path, name=name, columns=columns, cells=cells, delimiter=None, types=types)
    head = head_of(path, name)
    refuse_magic(head, name)
    encoding = sniff_encoding(head, reading.encoding)
    lines = first_lines(head, name, encoding)
    quote = None if reading.quote == NO_QUOTE else reading.quote or '"'
    known = choose_delimiter(lines[0], table, reading.delimiter, quote)
    version = None
    if known is not None:
        delimiter, cells = known
        columns = map_columns(cells, table, name)
    elif seems_header(lines[0], table):
        raise InputError(_no_delimiter(name, reading.delimiter))
    else:
        if reading.cdm is None:
            raise InputError(no_header(lines[0], table, name, reading.delimiter, quote))
        version = reading.cdm
        delimiter, columns = columns_by_order(lines, table, name, reading, quote)
        cells = tuple(f"c{i}" for i in range(len(columns)))
    _require(columns, table, name)
    seen = nulls_seen("\n".join(lines), delimiter, reading.nulls)
    return TableFile(
        table=table,
        path=path,
        name=name,
        columns=columns,
        cells=cells,
        delimiter=delimiter,
        encoding=encoding,
        quote=reading.quote,
        version=version,
        nulls=tuple(seen),
    )


def _require(columns: tuple[str | None, ...], table: str, name: str) -> None:
    for group in required_columns(table):
        if not set(group) & set(columns):
            raise InputError(
                f"Expected the column {' or '.join(group)} in {name}, found none; "
                "give a file whose header names the columns of the CDM."
            )


def _parquet_header(path: Path, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"Expected a whole Parquet file in {name}, found another or a damaged one; copy it."
        ) from error
    return tuple(schema.names), tuple(str(field.type) for field in schema)


def first_lines(head: bytes, name: str, encoding: str) -> list[str]:
    """Lines of a file's beginning that are not blank, without a byte order mark; at least one.

    Raises:
        InputError: the file is empty, or its first line is not in its encoding.
    """
    import codecs

    decoder = codecs.getincrementaldecoder(encoding)("replace")
    lines = [line for line in re.split(r"\r\n|\n|\r", decoder.decode(head).removeprefix("\ufeff")) if line.strip()]
    if not lines:
        raise InputError(f"Expected a header in {name}, found an empty file; remove it or export it again.")
    if "\ufffd" in lines[0] or "\0" in lines[0]:
        raise InputError(
            f"Expected {encoding.upper()} in {name}, found other bytes in line 1; "
            "name its encoding with --encoding, or convert it."
        )
    lines[0] = lines[0][:MAX_HEADER]
    return lines[:-1] if len(lines) > 1 and len(head) >= HEAD_BYTES else lines


def split_header(line: str, delimiter: str, quote: str | None = '"') -> tuple[str, ...]:
    """Cells of a header line, quotes removed."""
    from app.loading.repair import Broken, split_record

    try:
        cells = split_record(line, delimiter, quote)
    except Broken:
        cells = None
    return tuple(cell.strip() for cell in (cells or line.split(delimiter)))


def choose_delimiter(
    line: str, table: str, given: str | None, quote: str | None = '"'
) -> tuple[str, tuple[str, ...]] | None:
    """The delimiter under which most cells of a header are columns of the table; `given` where that does not tell.

    None where no delimiter makes the line a header.
    """

    def known(delimiter: str) -> int:
        return sum(len(named(cell, table)) == 1 for cell in split_header(line, delimiter, quote))

    best = max(DELIMITERS, key=known)
    if given is not None and known(given) >= known(best):
        best = given
    if known(best) == 0 or (known(best) == 1 and len(split_header(line, best)) == 1 and not _single(line, table)):
        return None
    return best, split_header(line, best, quote)


def named(cell: str, table: str) -> list[str]:
    """The columns of a table that a header cell names: its own name, or those in `c.person_id`, `date(birth_date)`."""
    plain = cell.strip().strip('"').lower()
    if plain in COLUMNS[table]:
        return [plain]
    return sorted(set(re.findall(r"[a-z_][a-z0-9_]*", plain)) & COLUMNS[table])


def _single(line: str, table: str) -> bool:
    """A header of one column is whole only where the table needs no more."""
    return len(required_columns(table)) == 1 and line.strip().strip('"').lower() in COLUMNS[table]


def seems_header(line: str, table: str) -> bool:
    """Whether a line names columns, though no delimiter that is known divides it."""
    return sum(column in line.lower() for column in COLUMNS[table]) >= 2


def _no_delimiter(name: str, given: str | None) -> str:
    found = f"not {given!r}" if given else "none of them"
    return (
        f"Expected comma, tab, semicolon or bar between the columns of {name}, found {found} in its header; "
        "name the delimiter with --delimiter."
    )


def map_columns(cells: tuple[str, ...], table: str, name: str) -> tuple[str | None, ...]:
    """Canonical names of header cells: by name in any case, or the one column that an SQL expression names.

    Raises:
        InputError: an expression names no column or several, or two cells are the same column.
    """
    columns: list[str | None] = []
    for cell in cells:
        plain = cell.strip().strip('"').lower()
        found = named(cell, table)
        if plain in COLUMNS[table] or re.fullmatch(r"\w*", plain):
            columns.append(plain if plain in COLUMNS[table] else None)
        elif len(found) == 1:
            columns.append(found[0])
        elif found or re.search(r"[()'\"+*<>=|,]", plain):
            what = "several: " + ", ".join(found) if found else "none"
            raise InputError(
                f"Expected the header cell {cell!r} of {name} to name one column of {table.upper()}, found {what}; "
                "rename it."
            )
        else:
            columns.append(None)
    twice = sorted({c for c in columns if c is not None and columns.count(c) > 1})
    if twice:
        raise InputError(f"Expected the column {twice[0]} once in the header of {name}, found it twice; remove one.")
    return tuple(columns)
