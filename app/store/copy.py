"""Rows for COPY … (FORMAT binary), built from arrays: many times faster than row by row.

The format is that of https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format": a row is an int16 number
of fields, then for each an int32 length (-1 for null) and so many bytes, all big-endian.
"""

from __future__ import annotations

import queue
import struct
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
TRAILER = struct.pack(">h", -1)
EPOCH_MICROSECONDS = 946_684_800_000_000
"""2000-01-01, from which Postgres counts, in microseconds since 1970-01-01."""
EPOCH_DAYS = 10_957

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Field:
    """A column of one batch whose values all have the width of their dtype.

    `values` are int64, int32, int16, float32, float64, bool or uint8 (one character); `valid` is False where null.
    """

    values: NDArray[Any]
    valid: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A column of one batch of UTF-8 text: row i is `data[offsets[i]:offsets[i + 1]]`."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    valid: NDArray[np.bool_] | None = None


def texts(values: Sequence[bytes | None]) -> Text:
    """A column of texts (or of bytes, which have the same form), null where None."""
    lengths = [0 if value is None else len(value) for value in values]
    return Text(
        data=np.frombuffer(b"".join(value for value in values if value is not None), np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        valid=np.array([value is not None for value in values], np.bool_),
    )


def timestamps(microseconds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Postgres's timestamp from microseconds since 1970-01-01."""
    return microseconds - EPOCH_MICROSECONDS


def dates(days: NDArray[np.int32]) -> NDArray[np.int32]:
    """Postgres's date from days since 1970-01-01."""
    return days - np.int32(EPOCH_DAYS)


def encode(fields: Sequence[Field]) -> bytes:
    """Rows of fields of fixed width, without header and trailer.

    Args:
        fields: at least one, arrays of one length N.
    """
    layout: list[tuple[str, str]] = [("count", ">i2")]
    for i, field in enumerate(fields):
        layout += [(f"length{i}", ">i4"), (f"value{i}", field.values.dtype.newbyteorder(">").str)]
    rows = np.empty(len(fields[0].values), layout)
    rows["count"] = len(fields)
    for i, field in enumerate(fields):
        size = field.values.dtype.itemsize
        rows[f"length{i}"] = size if field.valid is None else np.where(field.valid, size, -1)
        rows[f"value{i}"] = field.values
    if all(field.valid is None or field.valid.all() for field in fields):
        return rows.tobytes()
    present = np.ones((len(rows), rows.dtype.itemsize), np.bool_)
    for i, field in enumerate(fields):
        if field.valid is not None:
            start = int(rows.dtype.fields[f"value{i}"][1])  # type: ignore[index]
            present[:, start : start + field.values.dtype.itemsize] = field.valid[:, None]
    return rows.view(np.uint8).reshape(present.shape)[present].tobytes()


def encode_mixed(fields: Sequence[Field | Text]) -> bytes:
    """Rows of fields of which some are text, without header and trailer."""
    count = len(fields[0].values) if isinstance(fields[0], Field) else len(fields[0].offsets) - 1
    lengths = [_lengths(field, count) for field in fields]
    sizes = [np.maximum(length, 0) for length in lengths]
    ends = np.cumsum(2 + 4 * len(fields) + np.sum(sizes, axis=0, dtype=np.int64))
    out = np.empty(int(ends[-1]) if count else 0, np.uint8)
    at = np.concatenate([[0], ends[:-1]]).astype(np.int64) if count else np.empty(0, np.int64)
    _scatter(out, at, np.full(count, len(fields), ">i2"))
    at = at + 2
    for field, length, size in zip(fields, lengths, sizes, strict=True):
        _scatter(out, at, length.astype(">i4"))
        at = at + 4
        if isinstance(field, Field):
            big = field.values.astype(field.values.dtype.newbyteorder(">"))
            held = length > 0
            _scatter(out, at[held], big[held])
        else:
            taken = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
            out[np.repeat(at, size) + taken] = field.data[np.repeat(field.offsets[:-1], size) + taken]
        at = at + size
    return out.tobytes()


def _lengths(field: Field | Text, count: int) -> NDArray[np.int64]:
    if isinstance(field, Field):
        lengths = np.full(count, field.values.dtype.itemsize, np.int64)
    else:
        lengths = np.diff(field.offsets).astype(np.int64)
    return lengths if field.valid is None else np.where(field.valid, lengths, -1)


def _scatter(out: NDArray[np.uint8], at: NDArray[np.int64], values: NDArray[Any]) -> None:
    """Write each value's bytes at its place."""
    as_bytes = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), values.dtype.itemsize)
    for i in range(values.dtype.itemsize):
        out[at + i] = as_bytes[:, i]


def copy_in(
    connection: Connection, table: str, columns: Sequence[str], chunks: Iterable[bytes], *, options: str = ""
) -> None:
    """COPY encoded rows into a table, in the connection's transaction.

    Args:
        connection: whose transaction it is.
        table: its name, as SQL.
        columns: their names in the order of the encoded fields.
        chunks: what `encode` or `encode_mixed` returned.
        options: further options of COPY, e.g. `FREEZE`.
    """
    from app.store.session import raw

    more = f", {options}" if options else ""
    statement = f"COPY {table} ({', '.join(columns)}) FROM STDIN (FORMAT binary{more})"
    with raw(connection).cursor().copy(statement.encode()) as copy:
        copy.write(HEADER)
        for chunk in chunks:
            copy.write(chunk)
        copy.write(TRAILER)


def index_statements(connection: Connection, table: str) -> tuple[list[str], list[str]]:
    """Statements that drop a table's indexes, keys and foreign keys, and those that make them again.

    Filling a table without them, which then are built and checked set-wise, is several times faster than row by row; it
    locks the table's readers out until the transaction ends.
    """
    from sqlalchemy import text

    constraints = connection.execute(
        text(
            "SELECT quote_ident(conname), pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE conrelid = to_regclass(:table) AND contype IN ('p', 'u', 'f') ORDER BY conname"
        ),
        {"table": table},
    ).all()
    indexes = connection.execute(
        text(
            "SELECT i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid) FROM pg_index i "
            "WHERE i.indrelid = to_regclass(:table) AND NOT EXISTS "
            "(SELECT 1 FROM pg_constraint c WHERE c.conindid = i.indexrelid) ORDER BY 1"
        ),
        {"table": table},
    ).all()
    drop = [f"ALTER TABLE {table} DROP CONSTRAINT {name}" for name, _ in constraints]
    drop += [f"DROP INDEX {name}" for name, _ in indexes]
    make = [f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}" for name, definition in constraints]
    return drop, make + [definition for _, definition in indexes]


class Ahead(Generic[T]):
    """The same items, made by a thread of their own from now on, up to `depth` ahead of their use; its errors are
    raised to whoever takes them. To be closed."""

    def __init__(self, items: Iterator[T], depth: int = 8) -> None:
        self._items = items
        self._made: queue.Queue[Any] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while (item := self._made.get()) is not _DONE:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Make no more, and let go of what the items hold."""
        self._stopped.set()
        self._thread.join()

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._made.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def _run(self) -> None:
        try:
            with closing(self._items) if isinstance(self._items, Generator) else nullcontext():
                for item in self._items:
                    if not self._put(item):
                        return
            self._put(_DONE)
        except BaseException as error:  # handed over, not swallowed
            self._put(error)


_DONE = object()


class Later(Generic[T]):
    """What a thread of its own makes from now on; leaving it waits for the thread."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._coming = self._thread.submit(make)

    def get(self) -> T:
        """What was made, once it is there; or the error."""
        return self._coming.result()

    def __enter__(self) -> Later[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


def ahead(items: Iterator[T], depth: int = 8) -> Iterator[T]:
    """The items of an `Ahead` that begins with the first of them and is closed after the last."""
    with closing(Ahead(items, depth)) as coming:
        yield from coming


def copy_out(connection: Connection, query: str, layout: Sequence[tuple[str, str]]) -> Iterator[NDArray[Any]]:
    """Rows of a query without nulls, as structured arrays of native byte order.

    Args:
        connection: whose transaction it is.
        query: SQL whose columns have the widths of `layout` and are never null.
        layout: (name, dtype) of each column as the binary format holds it, e.g. `("person_id", "i8")`.
    """
    from app.store.session import raw

    parts: list[tuple[str, str]] = [("count", ">i2")]
    for name, kind in layout:
        parts += [(f"length_{name}", ">i4"), (name, np.dtype(kind).newbyteorder(">").str)]
    row = np.dtype(parts)
    native = np.dtype([(name, kind) for name, kind in layout])
    rest = b""
    begun = False
    with raw(connection).cursor().copy(f"COPY ({query}) TO STDOUT (FORMAT binary)".encode()) as copy:
        pending: list[bytes] = []
        size = 0
        for block in copy:
            pending.append(bytes(block))
            size += len(pending[-1])
            if size < 1 << 22:
                continue
            rest, begun, rows = _whole_rows(rest + b"".join(pending), row, begun=begun)
            pending, size = [], 0
            yield _native(rows, native)
        rest, _, rows = _whole_rows(rest + b"".join(pending), row, begun=begun)
    yield _native(rows, native)


def _whole_rows(data: bytes, row: np.dtype[Any], *, begun: bool) -> tuple[bytes, bool, NDArray[Any]]:
    """What is left over, True, and the whole rows of some bytes; the trailer is shorter than a row."""
    data = data if begun else data[len(HEADER) :]
    count = len(data) // row.itemsize
    return data[count * row.itemsize :], True, np.frombuffer(data, row, count)


def _native(rows: NDArray[Any], native: np.dtype[Any]) -> NDArray[Any]:
    out = np.empty(len(rows), native)
    for name in native.names or ():
        out[name] = rows[name]
    return out
