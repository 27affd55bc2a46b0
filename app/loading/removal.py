"""What goes when a delivery is published: replaced loads and rows, the rows of vanished persons, touched timelines."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.loading.cdm import EVENTS
from app.loading.context import append, moment
from app.loading.deltas import KEYED, is_delta, keys
from app.loading.validate import one
from app.store import shown as store
from app.store.loads import load_ids, partitions

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

    from app.loading.publish import Delivery


@dataclass(slots=True)
class Removal:
    """How many rows went, by table."""

    taken: Counter[str] = field(default_factory=Counter)
    """Rows that a delta replaces or deletes."""
    changed: Counter[str] = field(default_factory=Counter)
    """Those of `taken` whose key comes again."""
    orphans: Counter[str] = field(default_factory=Counter)
    """Rows that went because their person did."""


def remove(connection: Connection, decoder: duckdb.DuckDBPyConnection, delivery: Delivery) -> Removal:
    """Take away what a delivery replaces, but whole partitions, which stay to be compared and are dropped last.

    Makes the DuckDB tables `touched` (person_id) and `timeline_source` (name): the tables whose events are the
    timelines of touched persons. Visits that came or went are linked to, or unlinked from, the events that stay.
    """
    removal, taken = Removal(), Counter[int]()
    persons = "SELECT person_id FROM former_person WHERE person_id NOT IN (SELECT person_id FROM known_person)"
    store.stage_keys(connection, "gone_person_now", keys(decoder, persons))
    if is_delta(delivery.mode):
        _take_rows(connection, decoder, delivery, removal, taken)
    else:
        _take_loads(connection, delivery)
    if one(decoder, f"SELECT count(*) FROM ({persons})")[0]:
        _take_orphans(connection, delivery, removal, taken)
    store.count_away(connection, taken)
    _relink_visits(connection, decoder, delivery)
    _touch(connection, decoder, delivery)
    return removal


def _take_loads(connection: Connection, delivery: Delivery) -> None:
    """Delete the rows that a snapshot replaces in tables with rows of their own; what they held is kept to compare."""
    for table in store.KEPT:
        old = load_ids(delivery.published, table)
        if table in delivery.judged and old:
            store.keep_former(connection, table, old)
            connection.exec_driver_sql(f"DELETE FROM omop.{table} WHERE load_id IN ({store.listed(old)})")


def _take_rows(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    delivery: Delivery,
    removal: Removal,
    taken: Counter[int],
) -> None:
    """Delete the rows that a delta replaces or deletes."""
    for table in delivery.judged:
        old = load_ids(delivery.published, table)
        if table not in KEYED or not old:
            continue
        parts = partitions(delivery.published, table)
        store.index_keys(connection, parts)
        staged = f"x_{table}"
        store.stage_keys(connection, staged, keys(decoder, f"SELECT key FROM x_{table}"))
        counts = Counter[int]()
        if table in EVENTS:
            for part in parts:
                counts += store.take_away(connection, part, "source_row_id", staged, old)
        if table in store.KEPT:
            rows = store.take_away(connection, f"omop.{table}", store.KEPT[table][0], staged, old)
            counts = counts if table in EVENTS else rows
        taken += counts
        removal.taken[table] = counts.total()
        removal.changed[table] = one(
            decoder, f"SELECT count(*) FROM x_{table} WHERE key IN (SELECT key FROM t_{table})"
        )[0]


def _take_orphans(connection: Connection, delivery: Delivery, removal: Removal, taken: Counter[int]) -> None:
    """Delete the rows of vanished persons out of what stays shown."""
    for table in KEYED:
        old = load_ids(delivery.staying, table)
        if not old or table == "person":
            continue
        counts = Counter[int]()
        for part in partitions(delivery.staying, table):
            counts += store.take_away(connection, part, "person_id", "gone_person_now", old)
        if table in store.KEPT:
            rows = store.take_away(connection, f"omop.{table}", "person_id", "gone_person_now", old)
            counts = counts if table in EVENTS else rows
        taken += counts
        removal.orphans[table] = counts.total()


def _relink_visits(connection: Connection, decoder: duckdb.DuckDBPyConnection, delivery: Delivery) -> None:
    """Let the events that stay point to the visits there are now, as if all had been loaded at once."""
    tables = [table for table in EVENTS if table != "visit_occurrence" and EVENTS[table].visit]
    parts = partitions(delivery.staying, *tables)
    if not parts:
        return
    new, old = ("SELECT visit_occurrence_id FROM known_visit", "SELECT visit_occurrence_id FROM former_visit")
    come, gone = f"{new} EXCEPT {old}", f"{old} EXCEPT {new}"
    if one(decoder, f"SELECT count(*) FROM ({come})")[0]:
        if is_delta(delivery.mode):
            store.index_keys(connection, parts)
        store.stage_keys(connection, "come_visit_now", keys(decoder, come))
        store.link_visits(connection, parts, "come_visit_now")
    if one(decoder, f"SELECT count(*) FROM ({gone})")[0]:
        store.stage_keys(connection, "gone_visit_now", keys(decoder, gone))
        store.unlink_visits(connection, parts, "gone_visit_now")


def _touch(connection: Connection, decoder: duckdb.DuckDBPyConnection, delivery: Delivery) -> None:
    """Delete the timelines of the persons whose events change, and bring what stays of their events."""
    incoming = [f"t_{table}" for table in delivery.judged if table in EVENTS]
    if is_delta(delivery.mode):
        parts = [f"SELECT person_id FROM {name}" for name in incoming]
        parts += [f"SELECT person_id FROM x_{table}" for table in delivery.judged if table in EVENTS]
        parts += ["SELECT person_id FROM former_person WHERE person_id NOT IN (SELECT person_id FROM known_person)"]
        query = " UNION ".join(parts)
    else:
        query = "SELECT person_id FROM former_person UNION SELECT person_id FROM known_person"
    decoder.execute(f"CREATE TABLE touched AS {query}")
    store.stage_keys(connection, "touched_person", keys(decoder, "SELECT person_id FROM touched"))
    store.delete_timelines(connection, "touched_person")
    staying = load_ids(delivery.staying, *(table for table in delivery.staying if table in EVENTS))
    decoder.execute("CREATE TABLE timeline_source (name VARCHAR)")
    decoder.execute("CREATE TABLE s_event (person_id BIGINT, time TIMESTAMP, date_only BOOLEAN, concept_id INTEGER)")
    if staying:
        batches = store.events_of(connection, "touched_person", staying)
        append(decoder, "s_event", batches, f"person_id, {moment('time')}, date_only = 1, concept_id")
        incoming.append("s_event")
    for name in incoming:
        decoder.execute("INSERT INTO timeline_source VALUES (?)", [name])
