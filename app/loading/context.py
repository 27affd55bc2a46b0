"""What the store already holds that a delivery is judged by: visits, deaths, periods, concepts, other sources' ids."""

from __future__ import annotations

import datetime as dt
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.loading.cdm import EVENTS
from app.loading.validate import Judged, one
from app.store.copy import copy_out
from app.store.loads import Published
from app.store.vocabulary import Release, current_release

if TYPE_CHECKING:
    import duckdb
    from numpy.typing import NDArray
    from sqlalchemy import Connection


@dataclass(slots=True)
class Known:
    """Rows that stay because their tables are not in the folder, and the concepts of the store."""

    visits: list[NDArray[Any]] = field(default_factory=list)
    """(visit_occurrence_id)."""
    deaths: list[NDArray[Any]] = field(default_factory=list)
    """(person_id, time, date_only), time as Postgres counts."""
    periods: list[NDArray[Any]] = field(default_factory=list)
    """(person_id, start_date, end_date), days as Postgres counts."""
    concepts: list[NDArray[Any]] = field(default_factory=list)
    """(concept_id)."""
    release: Release | None = None
    """The vocabulary beside the store, out of which publishing completes it."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """What is known of a source."""

    data_cut: dt.date | None
    data_cut_source: str | None
    simulated: bool


EVENT_LAYOUT = (("person_id", "i8"), ("time", "i8"), ("date_only", "u1"), ("concept_id", "i4"))


def source_row(connection: Connection, source_id: int) -> SourceRow:
    """The row of a source; nothing known where there is none yet."""
    from sqlalchemy import text

    row = connection.execute(
        text("SELECT data_cut, data_cut_source, simulated FROM ops.source WHERE source_id = :id"), {"id": source_id}
    ).one_or_none()
    return SourceRow(*row) if row else SourceRow(None, None, False)


def read(connection: Connection, shown: Mapping[str, Published], tables: set[str]) -> Known:
    """What stays of a source when a folder holds only `tables`."""
    concepts = copy_out(connection, "SELECT concept_id FROM omop.concept", [("concept_id", "i4")])
    known = Known(concepts=list(concepts), release=current_release(connection))

    def load_of(table: str) -> int | None:
        return shown[table].load_id if table in shown and table not in tables else None

    if (load_id := load_of("visit_occurrence")) is not None:
        query = f"SELECT visit_occurrence_id FROM omop.visit_occurrence WHERE load_id = {load_id}"
        known.visits = list(copy_out(connection, query, [("visit_occurrence_id", "i8")]))
    if (load_id := load_of("death")) is not None:
        query = f"SELECT person_id, time, date_only FROM omop.event WHERE load_id = {load_id}"
        known.deaths = list(copy_out(connection, query, EVENT_LAYOUT[:3]))
    if (load_id := load_of("observation_period")) is not None:
        query = f"SELECT person_id, start_date, end_date FROM omop.observation_period WHERE load_id = {load_id}"
        layout = [("person_id", "i8"), ("start_date", "i4"), ("end_date", "i4")]
        known.periods = list(copy_out(connection, query, layout))
    return known


def fill(connection: duckdb.DuckDBPyConnection, known: Known, judged: Mapping[str, Judged]) -> None:
    """Make `known_visit`, `known_concept`, and `t_death` and `t_observation_period` where the folder has none."""
    connection.execute("CREATE TABLE known_visit (visit_occurrence_id BIGINT)")
    if "visit_occurrence" in judged:
        connection.execute("INSERT INTO known_visit SELECT key FROM t_visit_occurrence")
    append(connection, "known_visit", known.visits, "visit_occurrence_id")
    connection.execute("CREATE TABLE known_concept (concept_id INTEGER)")
    append(connection, "known_concept", known.concepts, "concept_id")
    if "concept" in judged:
        connection.execute(
            "INSERT INTO known_concept SELECT concept_id FROM t_concept c "
            "WHERE NOT EXISTS (FROM known_concept k WHERE k.concept_id = c.concept_id)"
        )
    if known.deaths:
        connection.execute("CREATE TABLE t_death (person_id BIGINT, time TIMESTAMP, date_only BOOLEAN)")
        append(connection, "t_death", known.deaths, f"person_id, {moment('time')}, date_only = 1")
    if known.periods:
        connection.execute("CREATE TABLE t_observation_period (person_id BIGINT, start_date DATE, end_date DATE)")
        listed = ", ".join(f"DATE '2000-01-01' + {name}" for name in ("start_date", "end_date"))
        append(connection, "t_observation_period", known.periods, f"person_id, {listed}")


def moment(column: str) -> str:
    """DuckDB's timestamp from Postgres's count of microseconds."""
    return f"make_timestamp({column} + 946684800000000)"


def append(
    connection: duckdb.DuckDBPyConnection, table: str, batches: Iterable[NDArray[Any]], select: str, where: str = "true"
) -> None:
    """Insert structured arrays into a DuckDB table."""
    import numpy as np
    import pyarrow as pa

    for batch in batches:
        names = batch.dtype.names or ()
        given = pa.table({name: np.ascontiguousarray(batch[name]) for name in names})
        connection.register("given", given)
        connection.execute(f"INSERT INTO {table} SELECT {select} FROM given WHERE {where}")
        connection.unregister("given")


IDS = {"person": "person_id", "visit_occurrence": "visit_occurrence_id", "observation_period": "observation_period_id"}


def refuse_collisions(
    connection: Connection, decoder: duckdb.DuckDBPyConnection, source_id: int, judged: Container[str]
) -> None:
    """Refuse ids that another source brought: two sources' persons never mix.

    Raises:
        InputError: naming the table and how many ids.
    """
    for table, key in IDS.items():
        if table not in judged:
            continue
        query = (
            f"SELECT t.{key} FROM omop.{table} t JOIN ops.load l USING (load_id) WHERE l.source_id <> {int(source_id)}"
        )
        decoder.execute("CREATE OR REPLACE TABLE other (id BIGINT)")
        append(decoder, "other", copy_out(connection, query, [("id", "i8")]), "id")
        (count,) = one(decoder, f"SELECT count(*) FROM t_{table} t WHERE t.key IN (SELECT id FROM other)")
        if count:
            raise InputError(
                f"Expected {key}s that no other source uses, found {count:,} of {table} that another source brought; "
                "load it under that source's name with --source, or give the extract ids of its own."
            )


def refuse_other_format(shown: Mapping[str, Published], *kinds: str) -> None:
    """Refuse a source that loads of another kind brought: tables of the two would lie over each other.

    Raises:
        InputError: the source shows tables of one of `kinds`.
    """
    found = sorted({load.kind for load in shown.values()} & set(kinds))
    if found:
        raise InputError(
            f"Expected a source of its own for this kind of load, found one that `load {found[0]}` brought; "
            "give another name with --source."
        )


def persons_gone(connection: Connection, decoder: duckdb.DuckDBPyConnection, load_id: int) -> tuple[int, int]:
    """How many persons of an earlier load are not in this delivery, and of how many."""
    decoder.execute("CREATE OR REPLACE TABLE former (id BIGINT)")
    query = f"SELECT person_id FROM omop.person WHERE load_id = {int(load_id)}"
    append(decoder, "former", copy_out(connection, query, [("id", "i8")]), "id")
    gone, before = one(
        decoder,
        "SELECT count_if(NOT EXISTS (FROM t_person p WHERE p.person_id = f.id)), count(*) FROM former f",
    )
    return int(gone or 0), int(before)


def read_stayed(
    connection: Connection, decoder: duckdb.DuckDBPyConnection, shown: Mapping[str, Published], tables: set[str]
) -> list[str]:
    """Bring events of tables that the folder lacks into the decoder, for the timelines; the DuckDB tables' names."""
    made = []
    for table, found in shown.items():
        if table in tables or table not in EVENTS or not found.partition_name:
            continue
        name = f"s_{table}"
        decoder.execute(
            f"CREATE TABLE {name} (person_id BIGINT, time TIMESTAMP, date_only BOOLEAN, concept_id INTEGER)"
        )
        query = f"SELECT person_id, time, date_only, concept_id FROM {found.partition_name}"
        batches = copy_out(connection, query, EVENT_LAYOUT)
        select = f"person_id, {moment('time')}, date_only = 1, concept_id"
        append(decoder, name, batches, select, "person_id IN (SELECT person_id FROM t_person)")
        made.append(name)
    return made
