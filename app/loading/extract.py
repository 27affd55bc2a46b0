"""Find the files of an extract in a folder, and read their headers: which table, which columns, which dialect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.errors import InputError
from app.loading.cdm import COLUMNS, OTHER_TABLES, required_columns
from app.loading.records import blocks

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".pq")
FOREIGN_SUFFIXES = (
    *(".7z", ".arrow", ".avro", ".bz2", ".feather", ".gz", ".lz4", ".orc", ".rar", ".sas7bdat"),
    *(".xls", ".xlsx", ".xz", ".zip", ".zst"),
)
"""What tables are also kept in, but not read."""
DELIMITERS = (",", "\t", ";", "|")
NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
MAX_HEADER = 1 << 16
MAX_DEPTH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFile:
    """One file of one table."""

    table: str
    path: Path
    name: str
    """Path relative to the folder that was given."""
    columns: tuple[str | None, ...]
    """Canonical column names in the file's order; None for a cell that is no column of the table."""
    cells: tuple[str, ...]
    """The header's cells as they stand there."""
    delimiter: str | None
    """None for Parquet."""
    types: tuple[str, ...] = ()
    """Parquet: the type of each column, as Arrow names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extract:
    """The files of an extract, by table, and the tables left aside."""

    files: dict[str, list[TableFile]]
    ignored: list[str]
    """Tables of the CDM that are not read."""
    unknown: list[str]
    """Files, and folders of them, whose names are no table's."""


def stem(path: Path) -> str:
    """Lower-case name without suffixes that say the format."""
    name = path.name.lower()
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def is_data(path: Path) -> bool:
    """A file that may hold a table: no hidden file, no archive's litter."""
    return path.is_file() and not path.name.startswith((".", "_")) and path.name.lower().endswith(SUFFIXES)


def table_of(path: Path) -> str | None:
    """The CDM table that a file's or folder's name says."""
    name = stem(path)
    return name if name in COLUMNS or name in OTHER_TABLES else None


def table_files(folder: Path) -> dict[str, list[Path]]:
    """Tables whose files, or folders of shards, lie directly in a folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        table = table_of(path)
        if table is None:
            continue
        parts = shards(path, table) if path.is_dir() else [path] if is_data(path) else []
        if parts:
            if table in found:
                raise InputError(
                    f"Expected one file or one folder of shards for {table}, "
                    f"found {found[table][0].name} and {path.name}; remove one."
                )
            found[table] = parts
    return found


def shards(folder: Path, table: str) -> list[Path]:
    """Files of a table's folder and of the folders in it (`year=2020/part-0.parquet`); none where they are tables."""
    parts: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "_")):
            parts += shards(path, table)
        elif is_data(path):
            parts.append(path)
    return [] if any(table_of(part) not in (None, table) for part in parts) else parts


def unknown_files(folder: Path, tables: dict[str, list[Path]]) -> list[str]:
    """What of an extract's folder nothing is read from.

    Raises:
        InputError: a table is there, but in a form that is not read: silence would leave it out.
    """
    unknown = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "_")):
            continue
        base = path.name.lower().partition(".")[0]
        table = table_of(path)
        if path.is_dir():
            left = table not in tables and any(is_data(below) for below in path.iterdir())
        elif path.suffix.lower() in FOREIGN_SUFFIXES and base in COLUMNS and base not in tables:
            raise InputError(
                f"Expected {base} as CSV, TSV, csv.gz or Parquet, found {path.name}; convert it, or move it away."
            )
        else:
            left = table is None and is_data(path)
        if left:
            unknown.append(path.name)
    return unknown


def _folders(folder: Path) -> Iterator[list[Path]]:
    """The folder, then those below it, level by level."""
    level = [folder]
    for _ in range(MAX_DEPTH):
        yield level
        level = [
            below
            for above in level
            for below in sorted(above.iterdir())
            if below.is_dir() and not below.name.startswith((".", "__"))
        ]


def find_extract(folder: Path) -> tuple[Path, dict[str, list[Path]]]:
    """The folder that holds an extract's tables: the given one, or the only one below it that does.

    Raises:
        InputError: it is no folder, is empty, holds no PERSON, or holds several extracts.
    """
    if not folder.is_dir():
        raise InputError(f"Expected a folder of OMOP files, found the file {folder.name}; give its folder.")
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


def read_extract(folder: Path, delimiter: str | None) -> Extract:
    """Find the files and read every header.

    Raises:
        InputError: see `find_extract` and `read_header`; also where PERSON is absent.
    """
    if delimiter is not None:
        delimiter = {"\\t": "\t", "tab": "\t"}.get(delimiter, delimiter)
        if len(delimiter) != 1 or delimiter in '"\r\n' or not delimiter.isascii():
            raise InputError("Expected one ASCII character after --delimiter (or tab); give the one the files use.")
    place, tables = find_extract(folder)
    unknown = unknown_files(place, tables)
    if "person" not in tables:
        raise InputError("Expected a file of PERSON in the folder, found none; add person.csv or person.parquet.")
    files = {
        table: [read_header(path, path.relative_to(folder).as_posix(), table, delimiter) for path in paths]
        for table, paths in tables.items()
        if table in COLUMNS
    }
    return Extract(files=files, ignored=sorted(set(tables) - set(COLUMNS)), unknown=unknown)


def read_header(path: Path, name: str, table: str, delimiter: str | None) -> TableFile:
    """What the header of one file says.

    Raises:
        InputError: no header, an unknown delimiter, a required column missing, a cell that cannot be understood.
    """
    if path.name.lower().endswith((".parquet", ".pq")):
        cells, types = _parquet_header(path, name)
        found: str | None = None
    else:
        line = first_record(path, name)
        found, cells = choose_delimiter(line, table, name, delimiter)
        types = ()
    columns = map_columns(cells, table, name)
    for group in required_columns(table):
        if not set(group) & set(columns):
            raise InputError(
                f"Expected the column {' or '.join(group)} in {name}, found none; "
                "give a file whose header names the columns of the CDM."
            )
    return TableFile(table=table, path=path, name=name, columns=columns, cells=cells, delimiter=found, types=types)


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


def first_record(path: Path, name: str) -> str:
    """The first line that is not blank, without a byte order mark. Raises InputError where there is none."""
    head = b""
    for block in blocks(path, name):
        head += block
        if len(head) >= MAX_HEADER or b"\n" in head.lstrip(b"\xef\xbb\xbf\r\n"):
            break
    try:
        text = head[:MAX_HEADER].decode("utf-8-sig", errors="strict" if len(head) < MAX_HEADER else "ignore")
    except UnicodeDecodeError as error:
        if b"\n" not in head:
            raise InputError(f"Expected UTF-8 in {name}, found other bytes in line 1; convert it.") from error
        text = head[: head.rindex(b"\n")].decode("utf-8-sig", errors="replace")
    for line in text.splitlines():
        if line.strip():
            if "\ufffd" in line or "\0" in line:
                raise InputError(f"Expected UTF-8 in {name}, found other bytes in its header; convert it.")
            return line
    raise InputError(f"Expected a header in {name}, found an empty file; remove it or export it again.")


def split_header(line: str, delimiter: str) -> tuple[str, ...]:
    """Cells of a header line, quotes removed."""
    from app.loading.repair import Broken, split_record

    try:
        cells = split_record(line, delimiter, '"')
    except Broken:
        cells = None
    return tuple(cell.strip() for cell in (cells or line.split(delimiter)))


def choose_delimiter(line: str, table: str, name: str, given: str | None) -> tuple[str, tuple[str, ...]]:
    """The delimiter under which most cells of a header are columns of the table; `given` where that does not tell."""

    def known(delimiter: str) -> int:
        return sum(len(named(cell, table)) == 1 for cell in split_header(line, delimiter))

    best = max(DELIMITERS, key=known)
    if given is not None and known(given) >= known(best):
        best = given
    if known(best) == 0 or (known(best) == 1 and len(split_header(line, best)) == 1 and not _single(line, table)):
        raise InputError(_no_header(line, table, name, given))
    return best, split_header(line, best)


def named(cell: str, table: str) -> list[str]:
    """The columns of a table that a header cell names: its own name, or those in `c.person_id`, `date(birth_date)`."""
    plain = cell.strip().strip('"').lower()
    if plain in COLUMNS[table]:
        return [plain]
    return sorted(set(re.findall(r"[a-z_][a-z0-9_]*", plain)) & COLUMNS[table])


def _single(line: str, table: str) -> bool:
    """A header of one column is whole only where the table needs no more."""
    return len(required_columns(table)) == 1 and line.strip().strip('"').lower() in COLUMNS[table]


def _no_header(line: str, table: str, name: str, given: str | None) -> str:
    if sum(column in line.lower() for column in COLUMNS[table]) >= 2:
        found = f"not {given!r}" if given else "none of them"
        return (
            f"Expected comma, tab, semicolon or bar between the columns of {name}, found {found} in its header; "
            "name the delimiter with --delimiter."
        )
    return (
        f"Expected a header naming the columns of {table.upper()} in the first line of {name}, found none of them; "
        "add the header."
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
