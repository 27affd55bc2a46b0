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
    num_same: int = 0
    num_deleted: int = 0
    num_shown: int | None = None
    """None where its rows are not counted one by one."""

    @property
    def num_rejected(self) -> int:
        return sum(self.rejects_by_rule.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A load whose rows, or some of them, are seen."""

    load_id: int
    kind: str
    table_name: str
    content_sha256: bytes
    num_loaded: int
    num_shown: int | None
    """Rows of it that are still seen; None where they are not counted one by one."""
    partition_name: str | None
    """Several loads of one table may share a partition."""

    @property
    def is_whole(self) -> bool:
        """True while all its rows are seen."""
        return self.num_shown in (None, self.num_loaded)


Shown = Mapping[str, Sequence[Published]]
"""What a source shows, by table: the loads of it, oldest first; a snapshot has one, deltas add more."""


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


def published_loads(connection: Connection, source_id: int | None) -> dict[str, list[Published]]:
    """What a source shows now: its loads by table, oldest first."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT load_id, kind, table_name, content_sha256, num_loaded, num_shown, partition_name FROM ops.load "
            "WHERE source_id = :source AND state = 'published' ORDER BY load_id"
        ),
        {"source": source_id},
    ).mappings()
    found: dict[str, list[Published]] = {}
    for row in rows:
        load = Published(**{**row, "content_sha256": bytes(row["content_sha256"])})
        found.setdefault(load.table_name, []).append(load)
    return found


def load_ids(shown: Shown, *tables: str) -> list[int]:
    """Keys of the loads of some tables."""
    return [load.load_id for table in tables for load in shown.get(table, ())]


def partitions(shown: Shown, *tables: str) -> list[str]:
    """Partitions of omop.event that hold rows of some tables, each once."""
    names = (load.partition_name for table in tables for load in shown.get(table, ()))
    return list(dict.fromkeys(name for name in names if name))


def num_shown(shown: Shown, table: str) -> int:
    """Rows of a table that a source shows."""
    return sum(load.num_loaded if load.num_shown is None else load.num_shown for load in shown.get(table, ()))


def last_delivery(connection: Connection, source_id: int) -> tuple[str, dict[str, bytes]] | None:
    """Mode, and digest by table, of the newest delivery of an extract that a source published."""
    from sqlalchemy import text

    rows = connection.execute(
        text(
            "SELECT mode, table_name, content_sha256 FROM ops.load WHERE delivery_id = (SELECT max(delivery_id) "
            "FROM ops.load WHERE source_id = :source AND kind NOT IN ('images', 'inspect'))"
        ),
        {"source": source_id},
    ).all()
    return (rows[0].mode, {row.table_name: bytes(row.content_sha256) for row in rows}) if rows else None


def reserve_load_ids(connection: Connection, count: int) -> list[int]:
    """Keys for loads whose rows are written before their books."""
    from sqlalchemy import text

    statement = text(
        "SELECT nextval(pg_get_serial_sequence('ops.load', 'load_id'))::int FROM generate_series(1, :count)"
    )
    return [int(row[0]) for row in connection.execute(statement, {"count": count})]


def record_load(
    connection: Connection,
    source_id: int,
    job_id: int | None,
    load: LoadRow,
    *,
    load_id: int | None = None,
    delivery_id: int | None = None,
) -> int:
    """Write one row of `ops.load`, published; its key (`load_id`, where it was reserved).

    `delivery_id` is the smallest load_id of its delivery, its own where it comes alone.
    """
    from sqlalchemy import bindparam, text
    from sqlalchemy.dialects.postgresql import JSONB

    (load_id,) = [load_id] if load_id is not None else reserve_load_ids(connection, 1)
    statement = text(
        "INSERT INTO ops.load (load_id, source_id, job_id, kind, mode, table_name, state, files, content_sha256, "
        "num_read, num_loaded, num_rejected, rejects_by_rule, flags_by_rule, first_time, last_time, partition_name, "
        "delivery_id, num_same, num_deleted, num_shown) "
        "VALUES (:load_id, :source_id, :job_id, :kind, :mode, :table_name, 'published', :files, :content_sha256, "
        ":num_read, :num_loaded, :num_rejected, :rejects_by_rule, :flags_by_rule, :first_time, :last_time, "
        ":partition_name, :delivery_id, :num_same, :num_deleted, :num_shown)"
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
            "delivery_id": delivery_id or load_id,
            "num_same": load.num_same,
            "num_deleted": load.num_deleted,
            "num_shown": load.num_shown,
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
            "UPDATE ops.load SET state = 'superseded', superseded_at = clock_timestamp(), partition_name = NULL, "
            "num_shown = CASE WHEN num_shown IS NOT NULL THEN 0 END "
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
