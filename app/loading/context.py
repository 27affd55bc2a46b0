"""What the store already holds that a delivery is judged by: visits, deaths, periods, concepts, other sources' ids."""

from __future__ import annotations

import datetime as dt
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.errors import InputError
from app.loading.validate import Judged, one
from app.store.copy import copy_out
from app.store.loads import Shown, load_ids, partitions
from app.store.shown import listed
from app.store.vocabulary import Release, current_release

if TYPE_CHECKING:
    import duckdb
    from numpy.typing import NDArray
    from sqlalchemy import Connection


@dataclass(slots=True)
class Known:
    """What a source shows, and the concepts of the store; times as Postgres counts."""

    persons: list[NDArray[Any]] = field(default_factory=list)
    """(person_id, birth_time), birth_time `NO_TIME` where unknown."""
    visits: list[NDArray[Any]] = field(default_factory=list)
    """(visit_occurrence_id, person_id)."""
    deaths: list[NDArray[Any]] = field(default_factory=list)
    """(person_id, time, date_only)."""
    periods: list[NDArray[Any]] = field(default_factory=list)
    """(key, person_id, start_date, end_date)."""
    concepts: list[NDArray[Any]] = field(default_factory=list)
    """(concept_id)."""
    release: Release | None = None
    """The vocabulary beside the store, out of which publishing completes it."""


NO_TIME = -(2**63)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """What is known of a source."""

    data_cut: dt.date | None
    data_cut_source: str | None
    simulated: bool


def source_row(connection: Connection, source_id: int) -> SourceRow:
    """The row of a source; nothing known where there is none yet."""
    from sqlalchemy import text

    row = connection.execute(
        text("SELECT data_cut, data_cut_source, simulated FROM ops.source WHERE source_id = :id"), {"id": source_id}
    ).one_or_none()
    return SourceRow(*row) if row else SourceRow(None, None, False)


def read(connection: Connection, shown: Shown) -> Known:
    """What a source shows, as far as a delivery is judged by it."""
    concepts = copy_out(connection, "SELECT concept_id FROM omop.concept", [("concept_id", "i4")])
    known = Known(concepts=list(concepts), release=current_release(connection))
    if ids := load_ids(shown, "person"):
        query = f"SELECT person_id, coalesce(birth_time, '-infinity') FROM omop.person WHERE load_id IN ({listed(ids)})"
        known.persons = list(copy_out(connection, query, (("person_id", "i8"), ("birth_time", "i8"))))
    if ids := load_ids(shown, "visit_occurrence"):
        query = f"SELECT visit_occurrence_id, person_id FROM omop.visit_occurrence WHERE load_id IN ({listed(ids)})"
        known.visits = list(copy_out(connection, query, (("visit_occurrence_id", "i8"), ("person_id", "i8"))))
    for partition in partitions(shown, "death"):
        query = f"SELECT person_id, time, date_only FROM {partition}"
        known.deaths += copy_out(connection, query, (("person_id", "i8"), ("time", "i8"), ("date_only", "u1")))
    if ids := load_ids(shown, "observation_period"):
        query = (
            "SELECT observation_period_id, person_id, start_date, end_date FROM omop.observation_period "
            f"WHERE load_id IN ({listed(ids)})"
        )
        layout = (("key", "i8"), ("person_id", "i8"), ("start_date", "i4"), ("end_date", "i4"))
        known.periods = list(copy_out(connection, query, layout))
    return known


def fill_former(connection: duckdb.DuckDBPyConnection, known: Known) -> None:
    """Make `former_person`, `former_visit`, `former_death`, `former_period` and `known_concept` of the decoder."""
    for statement in (
        "CREATE TABLE former_person (person_id BIGINT, birth_time TIMESTAMP)",
        "CREATE TABLE former_visit (visit_occurrence_id BIGINT, person_id BIGINT)",
        "CREATE TABLE former_death (person_id BIGINT, time TIMESTAMP, date_only BOOLEAN)",
        "CREATE TABLE former_period (key BIGINT, person_id BIGINT, start_date DATE, end_date DATE)",
        "CREATE TABLE known_concept (concept_id INTEGER)",
    ):
        connection.execute(statement)
    birth = f"CASE WHEN birth_time <> {NO_TIME} THEN {moment('birth_time')} END"
    append(connection, "former_person", known.persons, f"person_id, {birth}")
    append(connection, "former_visit", known.visits, "visit_occurrence_id, person_id")
    append(connection, "former_death", known.deaths, f"person_id, {moment('time')}, date_only = 1")
    days = ", ".join(f"DATE '2000-01-01' + {name}" for name in ("start_date", "end_date"))
    append(connection, "former_period", known.periods, f"key, person_id, {days}")
    append(connection, "known_concept", known.concepts, "concept_id")


def fill_persons(connection: duckdb.DuckDBPyConnection, *, delivered: bool, delta: bool) -> None:
    """Make `known_person` (person_id, birth_time): the persons there are once the delivery is published.

    Needs `t_person` where PERSON is `delivered`, and `x_person` (see `deltas.settle`) where a delta delivers it.
    """
    new = "SELECT person_id, birth_time FROM t_person"
    old = "SELECT person_id, birth_time FROM former_person"
    if not delivered:
        query = old
    elif delta:
        query = f"{old} WHERE person_id NOT IN (SELECT key FROM x_person) UNION ALL {new}"
    else:
        query = new
    connection.execute(f"CREATE TABLE known_person AS {query}")


def fill(connection: duckdb.DuckDBPyConnection, judged: Mapping[str, Judged], *, delta: bool) -> tuple[bool, bool]:
    """Make `known_visit`, `known_death` and `known_period`: what there is of `known_person` once it is published.

    Returns:
        Whether there are observation periods, and deaths.
    """
    columns = {
        "visit_occurrence": ("visit", "visit_occurrence_id", "visit_occurrence_id", "key AS visit_occurrence_id"),
        "death": ("death", "person_id", "person_id, time, date_only", "person_id, time, date_only"),
        "observation_period": (
            "period",
            "key",
            "person_id, start_date, end_date",
            "person_id, start_date, end_date",
        ),
    }
    for table, (name, key, kept, new) in columns.items():
        parts = []
        if table not in judged or delta:
            gone = f" AND {key} NOT IN (SELECT key FROM x_{table})" if table in judged else ""
            parts.append(
                f"SELECT {kept} FROM former_{name} WHERE person_id IN (SELECT person_id FROM known_person){gone}"
            )
        if table in judged:
            parts.append(f"SELECT {new} FROM t_{table}")
        connection.execute(f"CREATE TABLE known_{name} AS {' UNION ALL '.join(parts)}")
    if "concept" in judged:
        connection.execute(
            "INSERT INTO known_concept SELECT concept_id FROM t_concept c "
            "WHERE NOT EXISTS (FROM known_concept k WHERE k.concept_id = c.concept_id)"
        )
    periods, deaths = (
        table in judged or bool(one(connection, f"SELECT count(*) FROM known_{name}")[0])
        for table, name in (("observation_period", "period"), ("death", "death"))
    )
    return periods, deaths


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


def refuse_other_format(shown: Shown, *kinds: str) -> None:
    """Refuse a source that loads of another kind brought: tables of the two would lie over each other.

    Raises:
        InputError: the source shows tables of one of `kinds`.
    """
    found = sorted({load.kind for loads in shown.values() for load in loads} & set(kinds))
    if found:
        raise InputError(
            f"Expected a source of its own for this kind of load, found one that `load {found[0]}` brought; "
            "give another name with --source."
        )


def persons_gone(decoder: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """How many persons that the source shows would be gone after this delivery, and of how many."""
    gone, before = one(
        decoder,
        "SELECT count_if(NOT EXISTS (FROM known_person p WHERE p.person_id = f.person_id)), count(*) "
        "FROM former_person f",
    )
    return int(gone or 0), int(before)
