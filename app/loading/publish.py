"""Publish a judged delivery in one transaction: what it replaces goes; partitions are filled, indexed, attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from app.loading import rows
from app.loading.cdm import EVENTS, VOCABULARY
from app.loading.deltas import KEYED, is_delta
from app.loading.removal import Removal, remove
from app.loading.validate import Judged
from app.loading.vocabulary_complete import complete
from app.store import shown as store
from app.store import timelines
from app.store.copy import ahead, copy_in, index_statements
from app.store.loads import (
    LoadRow,
    Published,
    Shown,
    load_ids,
    num_shown,
    partitions,
    record_load,
    record_rejects,
    reserve_load_ids,
    supersede,
)
from app.store.shown import Difference

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

    from app.settings import Settings

ANEW_ROWS = 20_000
"""From so many incoming rows on, indexes are dropped and built anew."""


@dataclass(frozen=True, slots=True)
class Target:
    """A table to fill by COPY: where, which columns, with what, and what is done before and after."""

    label: str
    """What progress calls it."""
    table: str
    columns: Sequence[str]
    chunks: Callable[[], Iterator[rows.Chunk]]
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    options: str = ""


@dataclass(slots=True)
class Delivery:
    """What is to be published, and afterwards what came of it.

    A loader of another format decodes its rows into the DuckDB tables that `judge` names (`t_person`,
    `t_<event table>`, `t_observation_period`, …), makes the tables of `context.fill_former`, `context.fill_persons`
    and `context.fill`, and calls `publish` under the publishing lock, where `published` is still what is shown.
    """

    settings: Settings
    source_id: int
    job_id: int | None
    mode: str
    """snapshot: the delivered tables replace what the source shows of them, and persons who are not in `known_person`
    go with all their rows. append, upsert: `deltas.settle` has put aside what is already so; the rows of `x_<table>`
    go, those of `t_<table>` come."""
    judged: Mapping[str, Judged]
    digests: Mapping[str, bytes]
    published: Shown
    """What the source shows now."""
    kind: str = "omop"
    """What `ops.load.kind` says of tables that are no vocabulary."""
    load_ids: dict[str, int] = field(default_factory=dict)
    """Set by `publish`, as are the following."""
    changes: dict[str, Change] = field(default_factory=dict)
    """What changed, by table; tables of which only rows of vanished persons went are among them."""
    num_orphans: int = 0
    """Rows that went with their persons out of tables that were not delivered."""

    @property
    def replaced(self) -> list[str]:
        """Tables whose earlier loads go as a whole."""
        whole = not is_delta(self.mode)
        return [table for table in self.judged if table in self.published and (whole or table not in KEYED)]

    @property
    def staying(self) -> dict[str, Sequence[Published]]:
        """Loads that go on being shown, at least in part."""
        return {t: loads for t, loads in self.published.items() if t not in self.replaced}


@dataclass(frozen=True, slots=True)
class Change:
    """Rows of one table, after against before."""

    before: int
    after: int
    added: int
    changed: int
    removed: int


def partition(load_id: int) -> str:
    """The partition of a load."""
    return f"omop.event_{load_id}"


def publish(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    delivery: Delivery,
    report: Callable[[int, str], None],
) -> None:
    """Write a delivery; the caller holds the publishing lock and commits.

    Args:
        connection: the publishing transaction.
        decoder: holds the judged tables.
        delivery: what to publish; its `load_ids` are set.
        report: called with (rows written since the last call, what is being written); may raise to stop.
    """
    names = list(delivery.judged)
    delivery.load_ids = dict(zip(names, reserve_load_ids(connection, len(names)), strict=True))
    old = load_ids(delivery.published, *delivery.replaced)
    before = {table: num_shown(delivery.published, table) for table in delivery.published if table in KEYED}
    _keep_books(connection, decoder, delivery)
    removal = remove(connection, decoder, delivery)
    targets = [*_events(decoder, delivery), *_tables(connection, decoder, delivery)]
    fill(connection, [*targets, _timelines(decoder), *_vocabulary(connection, decoder, delivery)], report)
    report(0, "comparing")
    delivery.changes = _changes(connection, delivery, removal, before)
    delivery.num_orphans = sum(count for table, count in removal.orphans.items() if table not in delivery.judged)
    record_changes(connection, delivery)
    supersede(connection, [*old, *emptied(connection, delivery.source_id)])
    complete(connection, decoder, delivery, report)
    _swap(connection, delivery)


def fill(connection: Connection, targets: Sequence[Target], report: Callable[[int, str], None]) -> None:
    """Fill tables one after the other, while a thread makes the next rows ready."""

    def made() -> Iterator[tuple[int, rows.Chunk | None]]:
        for i, target in enumerate(targets):
            for chunk in target.chunks():
                yield i, chunk
            yield i, None

    stream = ahead(made())

    def chunks_of(target: Target) -> Iterator[bytes]:
        for _, chunk in stream:
            if chunk is None:
                return
            report(chunk[1], f"writing {target.label}")
            yield chunk[0]

    try:
        for target in targets:
            for statement in target.before:
                connection.exec_driver_sql(statement)
            copy_in(connection, target.table, target.columns, chunks_of(target), options=target.options)
            for statement in target.after:
                report(0, f"indexing {target.label}")
                connection.exec_driver_sql(statement)
    finally:
        stream.close()  # type: ignore[attr-defined]


def _keep_books(connection: Connection, decoder: duckdb.DuckDBPyConnection, delivery: Delivery) -> None:
    for table, judged in delivery.judged.items():
        load_id = delivery.load_ids[table]
        has_partition = table in EVENTS and judged.num_loaded > 0
        row = LoadRow(
            kind="vocabulary" if table in VOCABULARY else delivery.kind,
            mode=delivery.mode,
            table_name=table,
            files=[read.record for read in judged.decoded.files],
            content_sha256=delivery.digests[table],
            num_read=judged.num_read,
            num_loaded=judged.num_loaded,
            rejects_by_rule=judged.rejects_by_rule,
            flags_by_rule=judged.flags_by_rule,
            first_time=judged.first_time,
            last_time=judged.last_time,
            partition_name=partition(load_id) if has_partition else None,
            num_same=judged.num_same,
            num_deleted=judged.num_deleted,
            num_shown=judged.num_loaded if table in KEYED else None,
        )
        first = min(delivery.load_ids.values())
        record_load(connection, delivery.source_id, delivery.job_id, row, load_id=load_id, delivery_id=first)
        if judged.rejects_by_rule:
            record_rejects(connection, load_id, delivery.job_id, judged.rejects(decoder))


def partition_statements(load_id: int, table: str) -> tuple[list[str], list[str]]:
    """Statements before and after a partition is filled.

    The constraint on load_id lets ATTACH PARTITION skip a scan; the one on domain lets queries of one domain, such as
    the views of OMOP's names, skip the other partitions. The indexes are those of omop.event, which attaching adopts.
    """
    name = partition(load_id)
    before = [
        f"CREATE TABLE {name} (LIKE omop.event INCLUDING COMMENTS INCLUDING STORAGE INCLUDING DEFAULTS, "
        f"CONSTRAINT event_{load_id}_load_id CHECK (load_id = {load_id}), "
        f"CONSTRAINT event_{load_id}_domain CHECK (domain = '{EVENTS[table].domain}'))",
        f"COMMENT ON TABLE {name} IS 'Events of load {load_id} ({table})'",
    ]
    after = [
        f"CREATE INDEX ON {name} (person_id, time)",
        f"CREATE INDEX ON {name} (concept_id, person_id, time)",
        f"ANALYZE {name}",
    ]
    return before, after


def _events(decoder: duckdb.DuckDBPyConnection, delivery: Delivery) -> Iterator[Target]:
    for table, judged in delivery.judged.items():
        if table not in EVENTS or not judged.num_loaded:
            continue
        load_id = delivery.load_ids[table]
        before, after = partition_statements(load_id, table)
        unknown = judged.flags_by_rule.get("unknown_visit", 0) > 0

        def chunks(table: str = table, load_id: int = load_id, unknown: bool = unknown) -> Iterator[rows.Chunk]:
            return rows.events(decoder, table, load_id, unknown_visits=unknown)

        yield Target(
            table,
            partition(load_id),
            rows.event_columns(table, unknown_visits=unknown),
            chunks,
            before=before,
            after=after,
            options="FREEZE",
        )


def _timelines(decoder: duckdb.DuckDBPyConnection) -> Target:
    """Timelines of `touched` persons, from the events that come and those that stay (see `removal`)."""
    tables = [row[0] for row in decoder.execute("SELECT name FROM timeline_source ORDER BY 1").fetchall()]

    def chunks() -> Iterator[rows.Chunk]:
        if tables:
            for chunk in timelines.pack(rows.timeline_batches(decoder, tables)):
                yield chunk, 0

    return Target("timelines", "omop.timeline", timelines.COLUMNS, chunks, after=["ANALYZE omop.timeline"])


def rebuilding(connection: Connection, table: str, incoming: int) -> tuple[list[str], list[str]]:
    """Statements around the filling of a table whose indexes are better built anew: few rows of it stay."""
    if incoming < ANEW_ROWS or connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one() > incoming:
        return [], []
    return index_statements(connection, table)


def _tables(connection: Connection, decoder: duckdb.DuckDBPyConnection, delivery: Delivery) -> Iterator[Target]:
    """Persons, periods and visits."""
    for table, (names, make) in rows.KEPT.items():
        if table not in delivery.judged:
            continue
        load_id = delivery.load_ids[table]

        def chunks(
            make: Callable[[Any, int], Iterator[rows.Chunk]] = make, load_id: int = load_id
        ) -> Iterator[rows.Chunk]:
            return make(decoder, load_id)

        drop, rebuild = rebuilding(connection, f"omop.{table}", delivery.judged[table].num_loaded)
        yield Target(table, f"omop.{table}", names, chunks, before=drop, after=[*rebuild, f"ANALYZE omop.{table}"])


def _vocabulary(connection: Connection, decoder: duckdb.DuckDBPyConnection, delivery: Delivery) -> Iterator[Target]:
    """Vocabulary is shared by all sources: new rows are added and changed ones updated, none is removed."""
    for table, judged in delivery.judged.items():
        if table not in VOCABULARY or not judged.num_loaded:
            continue
        names = [name for name, _ in VOCABULARY[table].columns]

        def chunks(table: str = table) -> Iterator[rows.Chunk]:
            return rows.vocabulary(decoder, table)

        analyze = f"ANALYZE omop.{table}"
        if not connection.exec_driver_sql(f"SELECT EXISTS (SELECT 1 FROM omop.{table})").scalar():
            drop, rebuild = rebuilding(connection, f"omop.{table}", judged.num_loaded)
            yield Target(table, f"omop.{table}", names, chunks, before=drop, after=[*rebuild, analyze])
            continue
        staged = f"omop.staged_{table}_{delivery.load_ids[table]}"
        before = [f"CREATE TABLE {staged} (LIKE omop.{table})"]
        after = [merge_statement(table, staged), f"DROP TABLE {staged}", analyze]
        yield Target(table, staged, names, chunks, before=before, after=after)


def merge_statement(table: str, staged: str) -> str:
    """Add the rows of a staged vocabulary table, and update those that differ."""
    spec = VOCABULARY[table]
    names = [name for name, _ in spec.columns]
    rest = [name for name in names if name not in spec.key]
    changed = "DO NOTHING"
    if rest:
        sets = ", ".join(f"{name} = excluded.{name}" for name in rest)
        mine, theirs = (", ".join(f"{which}.{name}" for name in rest) for which in ("t", "excluded"))
        changed = f"DO UPDATE SET {sets} WHERE ({mine}) IS DISTINCT FROM ({theirs})"
    listed = ", ".join(names)
    same = " AND ".join(f"o.{n} {'=' if n in spec.key else 'IS NOT DISTINCT FROM'} s.{n}" for n in names)
    return (
        f"INSERT INTO omop.{table} AS t ({listed}) SELECT {listed} FROM {staged} s "
        f"WHERE NOT EXISTS (SELECT 1 FROM omop.{table} o WHERE {same}) ON CONFLICT ({', '.join(spec.key)}) {changed}"
    )


def _changes(
    connection: Connection, delivery: Delivery, removal: Removal, before: Mapping[str, int]
) -> dict[str, Change]:
    """What the delivery changed, by table, while what it replaces is still there."""
    changes = {}
    for table in dict.fromkeys((*before, *delivery.judged)):
        if table not in KEYED:
            continue
        was, gone = before.get(table, 0), removal.orphans.get(table, 0)
        if table not in delivery.judged:
            if gone:
                changes[table] = Change(was, was - gone, 0, 0, gone)
            continue
        found = difference(connection, delivery, removal, table)
        now = was + found.added - found.removed
        changes[table] = Change(was, now, found.added, found.changed, found.removed)
    return changes


def difference(connection: Connection, delivery: Delivery, removal: Removal, table: str) -> Difference:
    """Rows of a delivered table by primary key, against what was shown before."""
    judged, load_id = delivery.judged[table], delivery.load_ids[table]
    if is_delta(delivery.mode):
        changed = removal.changed.get(table, 0)
        removed = removal.taken.get(table, 0) - changed + removal.orphans.get(table, 0)
        return Difference(judged.num_loaded - changed, changed, removed)
    shown = delivery.published.get(table, ())
    if not num_shown(delivery.published, table):
        return Difference(added=judged.num_loaded)
    if len(shown) == 1 and shown[0].is_whole and shown[0].content_sha256 == delivery.digests[table]:
        return Difference()
    if table in store.KEPT:
        rows_found = store.compare(connection, f"TABLE former_{table}", store.kept_rows(table, [load_id]))
        if table not in EVENTS:
            return rows_found
    new = [partition(load_id)] if judged.num_loaded else []
    found = store.compare(connection, store.event_rows(partitions(delivery.published, table)), store.event_rows(new))
    if table in store.KEPT:  # a visit has changed where its row or its event has; nearly always both
        return Difference(found.added, max(found.changed, rows_found.changed), found.removed)
    return found


def record_changes(connection: Connection, delivery: Delivery) -> None:
    """Keep in the books what the delivery changed."""
    from sqlalchemy import text

    statement = text(
        "INSERT INTO ops.load_change (delivery_id, table_name, source_id, num_before, num_after, num_added, "
        "num_changed, num_removed) VALUES (:delivery, :table, :source, :before, :after, :added, :changed, :removed)"
    )
    delivery_id = min(delivery.load_ids.values())
    found = [
        {"delivery": delivery_id, "source": delivery.source_id, "table": table, **asdict(change)}
        for table, change in delivery.changes.items()
    ]
    if found:
        connection.execute(statement, found)


def emptied(connection: Connection, source_id: int) -> list[int]:
    """Loads of a source that brought rows of which none is left."""
    return [
        int(row[0])
        for row in connection.exec_driver_sql(
            "SELECT load_id FROM ops.load WHERE source_id = %s AND state = 'published' AND num_shown = 0 "
            "AND num_loaded > 0",
            (source_id,),
        )
    ]


def _swap(connection: Connection, delivery: Delivery) -> None:
    """Attach new partitions, drop those that hold nothing any more: last, for it locks omop.event for readers."""
    store.drop_unnamed(connection, partitions(delivery.published, *delivery.published))
    for table, judged in delivery.judged.items():
        if table in EVENTS and judged.num_loaded:
            load_id = delivery.load_ids[table]
            name = partition(load_id)
            connection.exec_driver_sql(f"ALTER TABLE omop.event ATTACH PARTITION {name} FOR VALUES IN ({load_id})")
            connection.exec_driver_sql(f"ALTER TABLE {name} DROP CONSTRAINT event_{load_id}_load_id")
            if is_delta(delivery.mode):
                store.merge_partitions(connection, delivery.source_id, table)
