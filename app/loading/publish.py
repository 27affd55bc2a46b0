"""Publish a judged delivery in one transaction: partitions filled apart, indexed, attached; what they replace goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.loading import rows
from app.loading.cdm import EVENTS, VOCABULARY
from app.loading.validate import Judged
from app.loading.vocabulary_complete import complete
from app.store import timelines
from app.store.copy import ahead, copy_in, index_statements
from app.store.loads import LoadRow, Published, record_load, record_rejects, reserve_load_ids, supersede

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

    from app.settings import Settings

KEPT_TABLES = ("person", "observation_period", "visit_occurrence")
"""Tables with rows of their own; a snapshot replaces them by their load."""


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
    """What is to be published."""

    settings: Settings
    source_id: int
    job_id: int | None
    mode: str
    judged: Mapping[str, Judged]
    digests: Mapping[str, bytes]
    published: Mapping[str, Published]
    """What the source shows now."""
    stayed: Sequence[str] = ()
    """DuckDB tables (person_id, time, date_only, concept_id) of events that stay from earlier loads."""
    load_ids: dict[str, int] = field(default_factory=dict)


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
    old = [delivery.published[table].load_id for table in names if table in delivery.published]
    _keep_books(connection, decoder, delivery)
    _remove(connection, delivery, old)
    targets = [*_events(decoder, delivery), _timelines(decoder, delivery), *_tables(connection, decoder, delivery)]
    targets += _vocabulary(connection, decoder, delivery)
    fill(connection, targets, report)
    supersede(connection, old)
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
            kind="vocabulary" if table in VOCABULARY else "omop",
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
        )
        record_load(connection, delivery.source_id, delivery.job_id, row, load_id=load_id)
        if judged.rejects_by_rule:
            record_rejects(connection, load_id, delivery.job_id, judged.rejects(decoder))


def _remove(connection: Connection, delivery: Delivery, old: list[int]) -> None:
    """Delete the rows that this delivery replaces, but the partitions."""
    from sqlalchemy import text

    timelines.delete_timelines(connection, old)
    for table in KEPT_TABLES:
        if table in delivery.judged:
            connection.execute(text(f"DELETE FROM omop.{table} WHERE load_id = ANY (:old)"), {"old": old})


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
            rows.event_columns(table),
            chunks,
            before=before,
            after=after,
            options="FREEZE",
        )


def _timelines(decoder: duckdb.DuckDBPyConnection, delivery: Delivery) -> Target:
    tables = [f"t_{table}" for table in delivery.judged if table in EVENTS] + list(delivery.stayed)

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
    ids = delivery.load_ids
    columns: dict[str, tuple[Sequence[str], Callable[[Any, int], Iterator[rows.Chunk]]]] = {
        "person": (("person_id", *rows.PERSON, "load_id"), rows.persons),
        "observation_period": (
            ("observation_period_id", "person_id", "start_date", "end_date", "load_id"),
            rows.periods,
        ),
        "visit_occurrence": ((*rows.VISIT, "load_id"), rows.visits),
    }
    for table, (names, make) in columns.items():
        if table in delivery.judged:

            def chunks(
                make: Callable[[Any, int], Iterator[rows.Chunk]] = make, load_id: int = ids[table]
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


def _swap(connection: Connection, delivery: Delivery) -> None:
    """Attach the new partitions and drop those they replace: last, because it locks omop.event for readers."""
    for table, judged in delivery.judged.items():
        replaced = delivery.published.get(table)
        if replaced is not None and replaced.partition_name:
            connection.exec_driver_sql(f"DROP TABLE {replaced.partition_name}")
        if table in EVENTS and judged.num_loaded:
            load_id = delivery.load_ids[table]
            name = partition(load_id)
            connection.exec_driver_sql(f"ALTER TABLE omop.event ATTACH PARTITION {name} FOR VALUES IN ({load_id})")
            connection.exec_driver_sql(f"ALTER TABLE {name} DROP CONSTRAINT event_{load_id}_load_id")
