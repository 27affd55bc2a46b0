"""One statement of a person's own, run by a login that may only read."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from app.errors import InputError, StoreError
from app.store.schema_version import first_line

if TYPE_CHECKING:
    import psycopg


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a statement gave: column names, and rows that are read as they are asked for."""

    columns: list[str]
    rows: Iterator[tuple[Any, ...]]


@contextmanager
def ask(url: str, statement: str) -> Iterator[Answer]:
    """Run one statement in a read-only transaction; its rows stream, so that any number of them can be written.

    Args:
        url: a login that may only read (`Store.reader_url`): what it may do is the database's decision, not ours.
        statement: exactly one; the protocol refuses a second.

    Raises:
        InputError: Postgres refuses the statement, or it gives no rows.
        StoreError: the database does not answer.
    """
    import psycopg

    plain = url.replace("postgresql+psycopg://", "postgresql://", 1)
    try:
        connection = psycopg.connect(
            plain, connect_timeout=5, application_name="lachesis:sql", options="-c TimeZone=UTC -c jit=off"
        )
    except psycopg.OperationalError as error:
        raise StoreError(f"The database does not answer: {first_line(error)}") from None
    with connection:
        connection.read_only = True
        cursor = connection.cursor()
        try:
            columns = _columns(connection, statement)
            # in chunks where libpq can, else row by row
            rows = cast(
                "Generator[tuple[Any, ...]]",
                cursor.stream(statement, size=1000 if psycopg.capabilities.has_stream_chunked() else 1),
            )
            with closing(rows):  # else a reader that stops early leaves the connection locked
                yield Answer(columns=columns, rows=rows)
        except psycopg.Error as error:
            raise InputError(_refusal(error)) from None


def _columns(connection: psycopg.Connection[Any], statement: str) -> list[str]:
    """Names of a statement's columns, asked before it runs, since a stream without rows does not tell them."""
    from psycopg import pq
    from psycopg.errors import error_from_result

    prepared = connection.pgconn.prepare(b"", statement.encode())
    if prepared.status != pq.ExecStatus.COMMAND_OK:
        raise error_from_result(prepared)
    described = connection.pgconn.describe_prepared(b"")
    names = [(described.fname(i) or b"").decode() for i in range(described.nfields)]
    if not names:
        raise InputError("Expected a statement that gives rows, found one that gives none; readers only read.")
    return names


def _refusal(error: Any) -> str:
    """Postgres's own sentence, with its hint and ours."""
    message = first_line(error.diag.message_primary or error)
    if "multiple commands" in message:
        return "Expected one statement, found several; ask them one by one."
    if error.sqlstate == "42501":
        return f"{message} Readers see no source values, paths or UIDs, and change nothing; name the columns you need."
    if error.sqlstate == "57014":
        return f"{message} Ask for one task or one member, or set statement_timeout for the reader."
    hint = error.diag.message_hint
    return f"{message} {hint}" if hint else message
