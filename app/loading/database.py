"""Read an OMOP CDM straight out of a Postgres: one consistent snapshot, spooled as the files of an extract.

The tables leave the server by COPY in one read-only transaction of isolation REPEATABLE READ, so that they agree with
each other, and wait as text in the job's own folder: the source holds its snapshot only while it is copied, and what is
decoded, judged and rejected is decided by the rules for files. Only the columns that are loaded leave the server; rows
come in the order of their keys, so that the same rows have the same digest again.

An address never holds a password: libpq finds it in a service or password file
(https://www.postgresql.org/docs/current/libpq-pgservice.html, …/libpq-pgpass.html) or in the worker's environment.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import InputError, SourceLost
from app.loading.cdm import COLUMNS, OTHER_TABLES, VOCABULARY, required_columns
from app.loading.extract import Extract, TableFile, map_columns
from app.store.work import Work

if TYPE_CHECKING:
    import psycopg

SECRETS = ("password", "sslpassword", "oauth_client_secret")
"""Parameters of libpq that are secrets."""
KEYWORDS = ("service", "host", "hostaddr", "port", "dbname", "user", "passfile", "sslmode", *SECRETS)
BLOCK = 1 << 20
CHECK_ROWS = 20_000

TABLES = """
SELECT n.nspname, c.relname, greatest(c.reltuples, 0)::bigint, has_schema_privilege(n.oid, 'USAGE')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND lower(c.relname) = ANY (%s)
AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1, 2
"""
COLUMNS_OF = """
SELECT a.attname, format_type(a.atttypid, NULL) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
SESSION = (
    "SET LOCAL DateStyle = 'ISO, YMD'",
    "SET LOCAL statement_timeout = 0",
    "SET LOCAL idle_in_transaction_session_timeout = 0",
    "SET LOCAL row_security = off",  # a policy that hides rows is an error then, not a smaller extract
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Database:
    """Where a CDM is."""

    address: str
    """Keywords of libpq, none of them secret."""
    cdm_schema: str | None = None
    """None: the only schema that holds a table `person`."""
    vocabulary_schema: str | None = None
    """None: the schema of the CDM."""


@dataclass(frozen=True, slots=True)
class Found:
    """A table of the source."""

    table: str
    """Its name in the CDM."""
    schema: str
    name: str
    """As the source spells it."""
    rows: int
    """The source's own estimate."""


def is_address(text: str) -> bool:
    """True for what names a database and no path: a URL, or `keyword=value` of libpq."""
    if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        return True
    return "=" in text and text.split("=", 1)[0].strip().lower() in KEYWORDS


def clean_address(text: str) -> str:
    """An address as keywords of libpq.

    Raises:
        InputError: it holds a password, or is none; it is not repeated, for it may hold one.
    """
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    try:
        given = conninfo_to_dict(text)
    except ProgrammingError:
        raise InputError(
            "Expected an address such as service=NAME, 'host=… dbname=… user=…' or postgresql://user@host/database, "
            "found one that libpq cannot read; correct it."
        ) from None
    nested = str(given.get("dbname") or "")
    if any(given.get(name) for name in SECRETS) or "=" in nested or "://" in nested:
        raise InputError(
            "Expected an address without a password, found one with it; keep the password in ~/.pgpass, in a file that "
            "passfile= names, or in a service of ~/.pg_service.conf and give service=NAME; change the one just shown."
        )
    if "passfile" in given:
        given["passfile"] = str(Path(str(given["passfile"])).expanduser().absolute())
    return make_conninfo("", **{name: value for name, value in sorted(given.items()) if value is not None})


def read_database(work: Work, database: Database, folder: Path, used: Mapping[str, frozenset[str]]) -> Extract:
    """Copy the tables of a CDM into `folder`, as of one moment.

    Args:
        work: for progress and cancelling.
        database: where they are.
        folder: an empty one of the job's own.
        used: the columns that are loaded, by table.

    Raises:
        InputError: the source does not let us in, holds no CDM, or refuses a table; or it is a Lachesis store.
        SourceLost: the connection ends midway.
    """
    import psycopg

    with _connected(database) as connection:
        try:
            for statement in SESSION:
                connection.execute(statement)
            _refuse_own(connection)
            tables = find_tables(connection, database)
            files = {}
            done, total = 0, sum(found.rows for found in tables if found.table in COLUMNS)
            for found in tables:
                if found.table in COLUMNS:
                    files[found.table], count = _spool(work, connection, found, used[found.table], folder, done, total)
                    done += count
        except psycopg.OperationalError as error:
            raise SourceLost(
                "Expected the database that is loaded from to answer until all tables were copied, it broke off "
                f"({_words(error)}); nothing was loaded, run it again."
            ) from None
        except psycopg.Error as error:
            raise InputError(_refusal(error)) from None
    return Extract(
        files={table: [file] for table, file in files.items()},
        ignored={
            found.table: [] for found in sorted(tables, key=lambda found: found.table) if found.table not in COLUMNS
        },
        unknown=[],
    )


@contextmanager
def _connected(database: Database) -> Iterator[psycopg.Connection]:
    """A transaction that reads one moment of the source, and ends without a trace."""
    import psycopg

    more = {
        "client_encoding": "UTF8",
        "application_name": "lachesis:load",
        "connect_timeout": 15,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
    }
    try:
        connection = psycopg.connect(database.address, **more)  # type: ignore[arg-type]
    except psycopg.OperationalError as error:
        raise InputError(_no_entry(_words(error))) from None
    try:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        yield connection
    finally:
        connection.close()


def _no_entry(words: str) -> str:
    host = socket.gethostname()
    if "definition of service" in words or "service file" in words:
        return (
            f"Expected the service in the service file of the host that runs this job, {host}, found none ({words}); "
            "add it to ~/.pg_service.conf there, or set PGSERVICEFILE for its worker."
        )
    if "no password supplied" in words or "password authentication failed" in words:
        return (
            f"Expected a password that the database accepts, found none or another on the host {host} ({words}); "
            "put it into ~/.pgpass (mode 0600) there, or into the service."
        )
    return f"Expected a database that answers the host {host}, found none ({words}); check address and network."


def _words(error: psycopg.Error) -> str:
    """The server's or libpq's own sentence, the last line of several."""
    lines = [line.strip() for line in str(error.diag.message_primary or error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


def _refusal(error: psycopg.Error) -> str:
    words = _words(error)
    if error.sqlstate == "42501":
        return f"Expected to be let read every table of the CDM, was not ({words}); grant SELECT to this login."
    return f"Expected tables that can be copied, found some that cannot ({words}); mend the source."


def _refuse_own(connection: psycopg.Connection) -> None:
    own = "to_regclass('ops.load') IS NOT NULL AND to_regclass('omop.timeline') IS NOT NULL"
    row = connection.execute(f"SELECT {own}").fetchone()
    if row and row[0]:
        raise InputError(
            "Expected a database with an OMOP CDM, found a Lachesis store; give the database it came from."
        )


def find_tables(connection: psycopg.Connection, database: Database) -> list[Found]:
    """The tables of the CDM, those that are not read too.

    Raises:
        InputError: no schema, or several, hold PERSON; a schema cannot be entered; a table is there twice.
    """
    names = sorted({*COLUMNS, *OTHER_TABLES})
    rows = connection.execute(TABLES, [names]).fetchall()
    cdm = database.cdm_schema or _only_schema([schema for schema, name, *_ in rows if name.lower() == "person"])
    vocabulary = database.vocabulary_schema or cdm
    found: dict[str, Found] = {}
    for schema, name, estimate, entered in rows:
        table = name.lower()
        if schema != (vocabulary if table in VOCABULARY else cdm):
            continue
        if not entered:
            raise InputError(f"Expected to be let into the schema {schema}, was not; grant USAGE on it to this login.")
        if table in found:
            raise InputError(
                f"Expected one table {table} in the schema {schema}, found two that differ in case; drop one."
            )
        found[table] = Found(table, schema, name, estimate)
    if "person" not in found:
        raise InputError(
            f"Expected a table person in the schema {cdm}, found none; name the CDM's schema with --cdm-schema."
        )
    if database.vocabulary_schema and not set(found) & set(VOCABULARY):
        raise InputError(
            f"Expected concept and its like in the schema {vocabulary}, found none; name it with --vocabulary-schema."
        )
    return [found[table] for table in sorted(found)]


def _only_schema(schemas: Sequence[str]) -> str:
    if len(set(schemas)) != 1:
        what = f"several: {', '.join(sorted(set(schemas)))}" if schemas else "none"
        raise InputError(f"Expected one schema with a table person, found {what}; name it with --cdm-schema.")
    return schemas[0]


def _spool(
    work: Work,
    connection: psycopg.Connection,
    found: Found,
    used: frozenset[str],
    folder: Path,
    done: int,
    total: int,
) -> tuple[TableFile, int]:
    """Copy one table into a file; its header, and how many rows the server says it sent."""
    name = f"{found.schema}.{found.table}"
    kinds = {str(column): str(kind) for column, kind in connection.execute(COLUMNS_OF, [found.schema, found.name])}
    columns = map_columns(tuple(kinds), found.table, name)
    for group in required_columns(found.table):
        if not set(group) & set(columns):
            raise InputError(
                f"Expected the column {' or '.join(group)} in {name}, found none; give a CDM of version 5.2 to 5.4."
            )
    cells = [cell for cell, column in zip(kinds, columns, strict=True) if column in used]
    path = folder / f"{found.table}.csv"
    cursor = connection.cursor()
    statement = _statement(connection, found, {cell: kinds[cell] for cell in cells})
    count = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb", BLOCK) as file, cursor.copy(statement.encode()) as copy:
        for row in copy:  # the protocol sends a row a message
            file.write(row)
            count += 1
            if count % CHECK_ROWS == 0:
                work.progress(done + count, max(total, done + count), "rows", f"copying {name}")
    work.check()
    if cursor.rowcount != count - 1:  # the header
        raise InputError(f"Expected {cursor.rowcount:,} rows of {name}, got {count - 1:,}; run it again.")
    file_ = TableFile(
        table=found.table,
        path=path,
        name=name,
        columns=tuple(column for column in columns if column in used),
        cells=tuple(cells),
        delimiter=",",
    )
    return file_, cursor.rowcount


def _statement(connection: psycopg.Connection, found: Found, kinds: Mapping[str, str]) -> str:
    """COPY of one table's used columns, as text that the rules for files read, in the order of its keys."""
    listed = ", ".join(_value(connection, cell, kind) for cell, kind in kinds.items())
    by_name = {cell.lower(): cell for cell in kinds}
    keys = [by_name[key] for key in _keys(found.table) if key in by_name]
    order = ", ".join(f"{_quoted(key)}{' COLLATE ' + _quoted('C') if _is_text(kinds[key]) else ''}" for key in keys)
    where = f"{_quoted(found.schema)}.{_quoted(found.name)}"
    query = f"SELECT {listed} FROM {where}" + (f" ORDER BY {order}" if order else "")
    return f"COPY ({query}) TO STDOUT (FORMAT csv, HEADER true)"


def _keys(table: str) -> Sequence[str]:
    if table in VOCABULARY:
        return VOCABULARY[table].key
    if table == "death":
        return ("person_id", "death_date", "death_datetime", "cause_concept_id")
    return ("cdm_source_name",) if table == "cdm_source" else (f"{table}_id",)


def _is_text(kind: str) -> bool:
    return kind in ("text", "character varying", "character", "citext", "name")


def _value(connection: psycopg.Connection, cell: str, kind: str) -> str:
    """A column as the text a file would hold: no zeros behind a whole number, no padding behind a text."""
    name = _quoted(cell)
    if kind == "numeric" and connection.info.server_version >= 130_000:
        return f"trim_scale({name}) AS {name}"
    return f"CAST({name} AS text) AS {name}" if kind == "character" else name


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
