"""Decode the files of one table with DuckDB: everything is read as text, then parsed by rules of our own.

Nothing is sniffed. A row's `rowid` in the decoded table is its place among the records that were read, because DuckDB
keeps the order of insertion; with the records known to be broken it gives back the record number in the file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.loading.cdm import TEXT_COLUMNS
from app.loading.dialect import NO_QUOTE, Reading, dialect_words, head_of, looks_quoted
from app.loading.extract import TableFile
from app.loading.places import Stage
from app.loading.records import Scan, scan
from app.loading.repair import repair
from app.loading.zones import zone_macro
from app.store.loads import FileRecord

if TYPE_CHECKING:
    import duckdb

MEMORY_LIMIT = "1400MB"

MACROS = r"""
CREATE TABLE forgotten_person (person_id BIGINT);
CREATE MACRO strict_int(x) AS CASE
    WHEN CAST(TRY_CAST(x AS BIGINT) AS VARCHAR) = x THEN TRY_CAST(x AS BIGINT)
    WHEN regexp_full_match(x, '-?(0|[1-9][0-9]{0,15})[.]0+') THEN exact_int(x) END;
CREATE MACRO loose_int(x) AS CASE
    WHEN CAST(TRY_CAST(x AS BIGINT) AS VARCHAR) = x THEN TRY_CAST(x AS BIGINT)
    WHEN regexp_full_match(x, '[+-]?[0-9]{1,19}') THEN TRY_CAST(x AS BIGINT)
    WHEN regexp_full_match(x, '[+-]?[0-9]{1,16}[.]0*') THEN exact_int(x) END;
CREATE MACRO concept(x) AS CASE WHEN loose_int(x) BETWEEN 0 AND 2147483647 THEN CAST(loose_int(x) AS INTEGER) END;
CREATE MACRO clock(x) AS regexp_extract(x,
    '^([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]((?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.][0-9]{1,6})?)?)[0-9]{0,3}'
    || ' ?(?:Z|z|UTC|([+-])([0-9]{2})(?::?([0-9]{2}))?)?$', ['day', 'time', 'sign', 'hours', 'minutes']);
CREATE MACRO zoned(x) AS regexp_matches(x, '(Z|z|UTC|:[0-9.]+ ?[+-][0-9]{2}(:?[0-9]{2})?)$');
CREATE MACRO ahead(c) AS to_minutes(CASE WHEN c.hours = '' THEN 0 ELSE
    CASE c.sign WHEN '-' THEN -1 ELSE 1 END * (CAST(c.hours AS INTEGER) * 60 + CAST('0' || c.minutes AS INTEGER)) END);
CREATE MACRO wall(x) AS TRY_CAST(clock(x).day || ' ' || clock(x).time AS TIMESTAMP);
CREATE MACRO moment(x) AS CASE
    WHEN x LIKE '____-__-__ __:__:__' AND substr(x, 12, 2) < '24' THEN TRY_CAST(x AS TIMESTAMP)
    WHEN x LIKE '____-__-__' THEN CAST(TRY_CAST(x AS DATE) AS TIMESTAMP)
    WHEN length(x) = 8 AND regexp_full_match(x, '[0-9]{8}') THEN try_strptime(x, '%Y%m%d')
    WHEN clock(x).day <> '' THEN there(x) END;
CREATE MACRO in_range(t) AS t >= TIMESTAMP '1800-01-01' AND t < TIMESTAMP '2301-01-01';
CREATE MACRO is_midnight(t) AS t = date_trunc('day', t);
CREATE MACRO end_of_day(t) AS date_trunc('day', t) + INTERVAL 86399 SECOND;
CREATE MACRO number(x) AS CASE WHEN isfinite(TRY_CAST(x AS FLOAT)) THEN TRY_CAST(x AS FLOAT) END;
"""
"""Whom to leave out (see `forgotten`), and how text becomes values.

Fractions are cut, never rounded; `there` is what a zone behind a time does to it."""

EXACT_INT = r"""
CREATE MACRO exact_int(x) AS CASE
    WHEN abs(TRY_CAST(regexp_extract(x, '[+-]?[0-9]+') AS BIGINT)) < 9007199254740992
    THEN TRY_CAST(regexp_extract(x, '[+-]?[0-9]+') AS BIGINT) END;
"""
"""Whole numbers with a decimal point have mostly been floating-point numbers: from 2^53 on they may be any other."""

HERE = "zone_here"


def missing(names: Iterable[str]) -> str:
    """SQL list of the texts that are no value."""
    return ", ".join(sql_text(name) for name in dict.fromkeys(("", *names)))


@dataclass(slots=True)
class ReadFile:
    """A file as it was decoded."""

    file: TableFile
    record: FileRecord
    broken: list[tuple[int, str]] = field(default_factory=list)
    """(record number, rule) of records that are not in the decoded table, ascending."""
    first_row: int = 0
    """rowid of its first row in the decoded table."""
    rows: int = 0

    def record_number(self, row: int) -> int:
        """Record number, from 1, of a row of the decoded table."""
        number = row - self.first_row + 1
        for broken, _ in self.broken:
            if broken > number:
                break
            number += 1
        return number


@dataclass(slots=True)
class Decoded:
    """One table of the extract, decoded into the DuckDB table `name`."""

    name: str
    files: list[ReadFile]

    @property
    def num_read(self) -> int:
        return sum(f.record.records for f in self.files)

    def locate(self, row: int) -> tuple[str, int]:
        """File name and record number of a rowid."""
        starts = [f.first_row for f in self.files]
        found = self.files[bisect_right(starts, row) - 1]
        return found.file.name, found.record_number(row)


def open_decoder(folder: Path, reading: Reading = Reading()) -> duckdb.DuckDBPyConnection:  # noqa: B008
    """A DuckDB of one's own, that spills into `folder` and knows the parsing rules.

    Args:
        folder: where it spills.
        reading: which texts are missing values, and the zone whose clock times with a zone are to show.
    """
    import duckdb

    connection = duckdb.connect(":memory:")
    connection.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
    spill = folder / "spill"
    spill.mkdir(exist_ok=True)
    connection.execute("SET temp_directory = $1", [str(spill)])
    connection.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")
    know_rules(connection, reading)
    return connection


def know_rules(connection: duckdb.DuckDBPyConnection, reading: Reading = Reading()) -> None:  # noqa: B008
    """Make the macros that turn text into values."""
    words = ("\\N",) if reading.null is None else ("\\N", reading.null)
    connection.execute(f"CREATE MACRO blank(x) AS CASE WHEN x IN ({missing(reading.nulls)}) THEN NULL ELSE x END")
    connection.execute(f"CREATE MACRO words(x) AS CASE WHEN x IN ({missing(words)}) THEN NULL ELSE x END")
    there = "wall(x)"
    if reading.timezone is not None:
        connection.execute(zone_macro(reading.timezone, HERE))
        there = f"CASE WHEN zoned(x) THEN {HERE}(wall(x) - ahead(clock(x))) ELSE wall(x) END"
    connection.execute(EXACT_INT)
    connection.execute("CREATE MACRO there(x) AS NULL")
    connection.execute(MACROS)
    connection.execute(f"CREATE OR REPLACE MACRO there(x) AS {there}")


def query_batches(connection: duckdb.DuckDBPyConnection, query: str, rows: int) -> Iterator[Any]:
    """Arrow batches of a query, streamed; safe in a thread of its own."""
    relation = connection.cursor().sql(query)
    yield from relation.to_arrow_reader(rows)


def examine(file: TableFile, check: Callable[[], None], stage: Stage | None = None) -> tuple[FileRecord, Scan | None]:
    """Count a file's records without DuckDB: our own counter for text, the footer's own word for Parquet.

    Args:
        file: what to read.
        check: called between blocks; may raise to stop.
        stage: where text that is not UTF-8, or packed by zstd, is written anew; needed for such files alone.
    """
    if file.delimiter is not None:
        return _examine_text(file, file.delimiter, check, stage)
    import hashlib

    import pyarrow
    import pyarrow.parquet

    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        records = pyarrow.parquet.read_metadata(file.path).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"Expected a whole Parquet file in {file.name}, found another or a damaged one; copy it."
        ) from error
    size = file.path.stat().st_size
    return FileRecord(name=file.name, sha256=digest, size=size, records=records, dialect="parquet"), None


def _examine_text(
    file: TableFile, delimiter: str, check: Callable[[], None], stage: Stage | None
) -> tuple[FileRecord, Scan]:
    mark = '"' if file.quote in (None, NO_QUOTE) else str(file.quote)
    found = scan(
        file.path,
        file.name,
        delimiter,
        check,
        quote=mark,
        encoding=file.encoding,
        spool=stage.new if stage else None,
    )
    quoting = found.quoted and file.quote != NO_QUOTE
    if quoting and found.malformed and file.quote is None:
        head = head_of(found.path, file.name, 1 << 20).decode("utf-8", "replace")
        quoting = delimiter != "\t" and looks_quoted(head, delimiter, mark)
    found = replace(found, quote=mark if quoting else None)
    records = (found.records if quoting else found.lines) - (file.version is None)
    dialect = dialect_words(
        delimiter=delimiter,
        quoted=quoting,
        quote=mark,
        encoding=file.encoding,
        line_end=found.line_end,
        version=file.version,
        nulls=list(file.nulls),
    )
    return FileRecord(name=file.name, sha256=found.sha256, size=found.size, records=records, dialect=dialect), found


def sql_text(value: str) -> str:
    """A SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def sql_name(value: str) -> str:
    """A quoted SQL identifier."""
    return '"' + value.replace('"', '""') + '"'


def csv_source(
    path: Path, width: int, delimiter: str, *, quote: str | None, line_end: str, zipped: bool, header: bool = True
) -> str:
    """A reader of a text file in a dialect that is stated in full; columns are c0, c1, …, all text."""
    columns = ", ".join(f"c{i}: 'VARCHAR'" for i in range(width))
    mark = sql_text(quote or "")
    end = line_end.replace("\r", "\\r").replace("\n", "\\n")
    return (
        f"read_csv({sql_text(str(path))}, auto_detect = false, header = {str(header).lower()}, "
        f"delim = {sql_text(delimiter)}, "
        f"quote = {mark}, escape = {mark}, new_line = '{end}', columns = {{{columns}}}, "
        f"compression = '{'gzip' if zipped else 'none'}', encoding = 'utf-8')"
    )


def parquet_text(cell: str, kind: str, zones: Mapping[str, str]) -> str:
    """A Parquet column as the text a CSV file would hold; `zones` names the function of each zone's clock."""
    name = sql_name(cell)
    if kind.startswith("timestamp") and "tz=" in kind:
        moment = f"timezone('UTC', CAST({name} AS TIMESTAMPTZ))"
        return f"CAST({zones[kind.split('tz=', 1)[1].rstrip(']')]}({moment}) AS VARCHAR)"
    if kind.startswith("timestamp[ns"):  # cut to microseconds, also before 1970
        return (
            f"CAST(make_timestamp(epoch_ns({name}) // 1000 - CAST(epoch_ns({name}) % 1000 < 0 AS BIGINT)) AS VARCHAR)"
        )
    if kind.startswith("timestamp"):
        return f"CAST(CAST({name} AS TIMESTAMP) AS VARCHAR)"
    if kind in ("double", "float", "halffloat"):  # whole numbers that a float holds exactly are written as such
        whole = f"{name} = trunc({name}) AND abs({name}) < 9007199254740992"
        # a data frame writes NaN where an id is missing; DuckDB folds comparisons by statistics that know no NaN
        return (
            f"CASE WHEN isnan({name}) THEN NULL WHEN {whole} THEN CAST(TRY_CAST({name} AS BIGINT) AS VARCHAR) "
            f"ELSE CAST({name} AS VARCHAR) END"
        )
    if kind.startswith("decimal"):
        whole = f"{name} = trunc({name})"
        return f"CASE WHEN {whole} THEN CAST(CAST({name} AS HUGEINT) AS VARCHAR) ELSE CAST({name} AS VARCHAR) END"
    return f"CAST({name} AS VARCHAR)"


def _changed(file: TableFile, record: FileRecord, found: Scan | None) -> bool:
    """Whether a file is another one than was counted and digested."""
    now = file.path.stat()
    return now.st_size != record.size if found is None else (now.st_size, now.st_mtime_ns) != found.stamp


class Decoder:
    """Decodes files one after the other; symlinks keep paths with wildcard characters out of DuckDB's hands."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        folder: Path,
        check: Callable[[], None],
        timezone: str | None = None,
    ) -> None:
        self.connection, self.folder, self.check = connection, folder, check
        self.timezone = timezone
        self.count = 0
        self.zones: dict[str, str] = {}
        """Functions that show the clock of a Parquet column's zone."""

    def _link(self, path: Path) -> Path:
        self.count += 1
        link = self.folder / f"in{self.count}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
        return link

    def table(self, name: str, files: Sequence[tuple[TableFile, FileRecord, Scan | None]], select: str) -> Decoded:
        """Make the DuckDB table `name` from files of one table.

        Args:
            name: of the table in DuckDB.
            files: with what `examine` found.
            select: a query over `{source}`, the CDM's columns as text, blank ones null; those a file lacks are null.

        Raises:
            InputError: DuckDB read another number of records than we counted.
        """
        decoded = Decoded(name, [])
        for file, record, found in files:
            self.check()
            read = ReadFile(file, record, first_row=sum(f.rows for f in decoded.files))
            self._read(name, read, found, select, first=not decoded.files)
            if _changed(file, record, found):
                raise InputError(
                    f"Expected {file.name} to stay as it is, found it changed while it was read; try again."
                )
            decoded.files.append(read)
        return decoded

    def _read(self, name: str, read: ReadFile, found: Scan | None, select: str, *, first: bool) -> None:
        import duckdb

        if found is None:
            source, texts = f"read_parquet({sql_text(str(self._link(read.file.path)))})", self._parquet(read.file)
            try:
                read.rows = self._insert(name, source, texts, select, first=first)
            except duckdb.Error as error:
                raise InputError(
                    f"Expected Parquet columns of plain types in {read.file.name}, found some that cannot be read "
                    f"({type(error).__name__}); export it again."
                ) from error
        else:
            rows = None
            texts = {c: f"c{i}" for i, c in enumerate(read.file.columns) if c is not None}
            if found.plain or (found.quote is None and found.line_end != "mixed" and not found.has_nul):
                try:
                    rows = self._insert(name, self._csv(read, found), texts, select, first=first)
                except duckdb.Error:
                    rows = None  # a record of another shape: read the file record by record
            if rows != read.record.records:
                if rows is not None:
                    self._undo(name, read, first=first)
                self._repair(name, read, found, texts, select, first=first)
            else:
                read.rows = rows
        if read.rows + len(read.broken) != read.record.records:
            raise InputError(
                f"Expected {read.record.records} records in {read.file.name}, decoded "
                f"{read.rows + len(read.broken)}; the file's quoting cannot be understood, export it again."
            )

    def _csv(self, read: ReadFile, found: Scan) -> str:
        file = read.file
        return csv_source(
            self._link(found.path),
            len(file.cells),
            str(file.delimiter),
            quote=found.quote,
            line_end=found.line_end,
            zipped=found.zipped,
            header=file.version is None,
        )

    def _parquet(self, file: TableFile) -> dict[str, str]:
        for kind in file.types:
            if kind.startswith("timestamp") and "tz=" in kind:
                self._add_zone(kind.split("tz=", 1)[1].rstrip("]"))
        return {
            column: parquet_text(cell, kind, self.zones)
            for column, cell, kind in zip(file.columns, file.cells, file.types, strict=True)
            if column is not None
        }

    def _add_zone(self, zone: str) -> None:
        """A function for the clock of a zone, or of the one that was asked for."""
        if zone not in self.zones:
            self.zones[zone] = HERE if self.timezone else f"zone_{len(self.zones)}"
            if not self.timezone:
                self.connection.execute(zone_macro(zone, self.zones[zone]))

    def _insert(self, name: str, source: str, texts: dict[str, str], select: str, *, first: bool) -> int:
        from app.loading.cdm import COLUMNS

        table = name.removeprefix("t_")
        how = TEXT_COLUMNS.get(table, {})
        columns = ", ".join(
            f"{how.get(c, 'blank')}({texts[c]}) AS {c}" if c in texts else f"CAST(NULL AS VARCHAR) AS {c}"
            for c in sorted(COLUMNS[table])
        )
        query = select.replace("{source}", f"SELECT {columns} FROM {source}")
        if first:
            self.connection.execute(f"CREATE OR REPLACE TABLE {name} AS {query}")
            before = 0
        else:
            before = self._rows(name)
            self.connection.execute(f"INSERT INTO {name} {query}")
        return self._rows(name) - before

    def _rows(self, name: str) -> int:
        row = self.connection.execute(f"SELECT count(*) FROM {name}").fetchone()
        return int(row[0]) if row else 0

    def _undo(self, name: str, read: ReadFile, *, first: bool) -> None:
        """Take back rows of a file that was misread; a fresh table keeps rowids gapless."""
        if first:
            self.connection.execute(f"DROP TABLE {name}")
            return
        self.connection.execute(
            f"CREATE TABLE kept AS SELECT * FROM {name} WHERE rowid < {read.first_row} ORDER BY rowid; "
            f"DROP TABLE {name}; ALTER TABLE kept RENAME TO {name}"
        )

    def _repair(
        self, name: str, read: ReadFile, found: Scan, texts: dict[str, str], select: str, *, first: bool
    ) -> None:
        file = read.file
        self.count += 1
        into = self.folder / f"repaired{self.count}.csv"
        width = len(file.cells)
        done = repair(
            found.path,
            file.name,
            into,
            delimiter=str(file.delimiter),
            quote=found.quote,
            width=width,
            check=self.check,
            header=file.version is None,
        )
        read.broken = done.broken
        if found.malformed or found.line_end == "mixed":
            # our counter and our reader see different records where quotes or line ends are broken: the reader counts
            read.record = FileRecord(
                name=read.record.name,
                sha256=read.record.sha256,
                size=read.record.size,
                records=done.records,
                dialect=read.record.dialect,
            )
        source = csv_source(into, width, ",", quote='"', line_end="\n", zipped=False)
        read.rows = self._insert(name, source, texts, select, first=first)
        into.unlink()
