"""The books of loading: sources, loads, rejects; and the lock under which a delivery is published."""

from __future__ import annotations

import datetime as dt
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

PUBLISH_LOCK = 0x4C41_4348
"""Key of the transaction-level advisory lock that publishing holds: one delivery at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file as it was read."""

    name: str
    """Path relative to the delivery's folder."""
    sha256: str
    size: int
    records: int
    """Counted without the decoder's help."""
    dialect: str

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "bytes": self.size,
            "records": self.records,
            "dialect": self.dialect,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A row that is not loaded; never a value of it."""

    table_name: str
    file: str
    record: int | None
    rule: str
    row_key: str | None = None
    column_name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRow:
    """What `ops.load` says about one table of a delivery."""

    kind: str
    mode: str
    table_name: str
    files: Sequence[FileRecord]
    content_sha256: bytes
    num_read: int
    num_loaded: int
    rejects_by_rule: Mapping[str, int] = field(default_factory=dict)
    flags_by_rule: Mapping[str, int] = field(default_factory=dict)
    first_time: dt.datetime | None = None
    last_time: dt.datetime | None = None
    partition_name: str | None = None

    @property
    def num_rejected(self) -> int:
        return sum(self.rejects_by_rule.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A load whose rows are the ones seen."""

    load_id: int
    kind: str
    table_name: str
    content_sha256: bytes
    num_loaded: int
    partition_name: str | None


def content_digest(files: Iterable[FileRecord], options: str = "") -> bytes:
    """Digest over the files' digests, in the order of their names, and over what changes how they are read."""
    digest = hashlib.sha256(options.encode())
    for file in sorted(files, key=lambda f: f.name):
        digest.update(f"\n{file.name}\t{file.sha256}".encode())
    return digest.digest()


def open_source(connection: Connection, name: str) -> int:
    """The key of a source, made where it is new."""
    from sqlalchemy import text

    found = find_source(connection, name)
    if found is None:
        connection.execute(
            text("INSERT INTO ops.source (name) VALUES (:name) ON CONFLICT (name) DO NOTHING"), {"name": name}
        )
        found = find_source(connection, name)
    return int(found or 0)


def find_source(connection: Connection, name: str) -> int | None:
    """The key of a source, None where nothing was ever loaded from it."""
    from sqlalchemy import text

    found = connection.scalar(text("SELECT source_id FROM ops.source WHERE name = :name"), {"name": name})
    return None if found is None else int(found)


def published_loads(connection: Connection, source_id: int | None) -> dict[str, Published]:
    """What a source shows now, by table."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT load_id, kind, table_name, content_sha256, num_loaded, partition_name FROM ops.load "
            "WHERE source_id = :source AND state = 'published' ORDER BY load_id"
        ),
        {"source": source_id},
    ).mappings()
    return {row["table_name"]: Published(**{**row, "content_sha256": bytes(row["content_sha256"])}) for row in rows}


def reserve_load_ids(connection: Connection, count: int) -> list[int]:
    """Keys for loads whose rows are written before their books."""
    from sqlalchemy import text

    statement = text(
        "SELECT nextval(pg_get_serial_sequence('ops.load', 'load_id'))::int FROM generate_series(1, :count)"
    )
    return [int(row[0]) for row in connection.execute(statement, {"count": count})]


def record_load(
    connection: Connection, source_id: int, job_id: int | None, load: LoadRow, *, load_id: int | None = None
) -> int:
    """Write one row of `ops.load`, published; its key (`load_id`, where it was reserved)."""
    from sqlalchemy import bindparam, text
    from sqlalchemy.dialects.postgresql import JSONB

    (load_id,) = [load_id] if load_id is not None else reserve_load_ids(connection, 1)
    statement = text(
        "INSERT INTO ops.load (load_id, source_id, job_id, kind, mode, table_name, state, files, content_sha256, "
        "num_read, num_loaded, num_rejected, rejects_by_rule, flags_by_rule, first_time, last_time, partition_name) "
        "VALUES (:load_id, :source_id, :job_id, :kind, :mode, :table_name, 'published', :files, :content_sha256, "
        ":num_read, :num_loaded, :num_rejected, :rejects_by_rule, :flags_by_rule, :first_time, :last_time, "
        ":partition_name)"
    )
    json_columns = ("files", "rejects_by_rule", "flags_by_rule")
    connection.execute(
        statement.bindparams(*(bindparam(name, type_=JSONB) for name in json_columns)),
        {
            "load_id": load_id,
            "source_id": source_id,
            "job_id": job_id,
            "kind": load.kind,
            "mode": load.mode,
            "table_name": load.table_name,
            "files": [file.to_json() for file in load.files],
            "content_sha256": load.content_sha256,
            "num_read": load.num_read,
            "num_loaded": load.num_loaded,
            "num_rejected": load.num_rejected,
            "rejects_by_rule": dict(load.rejects_by_rule),
            "flags_by_rule": dict(load.flags_by_rule),
            "first_time": load.first_time,
            "last_time": load.last_time,
            "partition_name": load.partition_name,
        },
    )
    return load_id


def record_rejects(connection: Connection, load_id: int | None, job_id: int | None, rows: Iterable[Reject]) -> int:
    """Write rejected rows by COPY; how many. `load_id` is None where the delivery stopped before publishing."""
    from app.store.session import raw

    count = 0
    statement = "COPY ops.reject (load_id, job_id, table_name, file, record, rule, row_key, column_name) FROM STDIN"
    with raw(connection).cursor().copy(statement) as copy:
        for row in rows:
            copy.write_row(
                (load_id, job_id, row.table_name, row.file, row.record, row.rule, row.row_key, row.column_name)
            )
            count += 1
    return count


def supersede(connection: Connection, load_ids: Sequence[int]) -> None:
    """Say of loads that their rows are no longer the ones seen."""
    from sqlalchemy import text

    connection.execute(
        text(
            "UPDATE ops.load SET state = 'superseded', superseded_at = clock_timestamp(), partition_name = NULL "
            "WHERE load_id = ANY (:ids)"
        ),
        {"ids": list(load_ids)},
    )


def lock_publishing(connection: Connection, check: Callable[[], None], *, seconds: float = 0.5) -> None:
    """Wait for the publishing lock, which this transaction then holds to its end; `check` may end the wait."""
    from sqlalchemy import text

    while not connection.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": PUBLISH_LOCK}):
        check()
        time.sleep(seconds)


def describe_source(
    connection: Connection,
    source_id: int,
    *,
    data_cut: dt.date | None,
    data_cut_source: str | None,
    simulated: bool,
    details: Mapping[str, Any],
) -> None:
    """Keep what an extract says of itself; `details` are merged into those known."""
    from sqlalchemy import bindparam, text
    from sqlalchemy.dialects.postgresql import JSONB

    connection.execute(
        text(
            "UPDATE ops.source SET data_cut = :data_cut, data_cut_source = :data_cut_source, simulated = :simulated, "
            "details = details || :details WHERE source_id = :source_id"
        ).bindparams(bindparam("details", type_=JSONB)),
        {
            "source_id": source_id,
            "data_cut": data_cut,
            "data_cut_source": data_cut_source,
            "simulated": simulated,
            "details": dict(details),
        },
    )
