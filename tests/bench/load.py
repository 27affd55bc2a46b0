"""Loading OMOP CSV, validated, indexed, packed, against COPY BINARY of the same rows from memory and the same indexes.

LACHESIS_BENCH_EVENTS sets the number of events (default 2,000,000; the row of docs/benchmarks.md uses 20,000,000).
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from app.loading import rows
from app.loading.omop import load
from app.loading.publish import partition, partition_statements
from app.store.copy import copy_in
from app.store.session import make_engine
from app.store.work import InlineWork
from tests.bench import Row, seconds

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from app.settings import Settings

EVENTS = int(os.environ.get("LACHESIS_BENCH_EVENTS") or 2_000_000)
PERSONS = max(EVENTS // 1000, 100)
PAIRS = 5
MEDS_ETL_EVENTS_PER_SECOND = 0.27e6
"""meds_etl on the same kind of machine; measured apart, because it does not run beside us."""

SHARES = {"measurement": 60, "drug_exposure": 15, "condition_occurrence": 15, "procedure_occurrence": 10}

COMMON = """
r AS {table}_id, (r * 7919) % {persons} + 1 AS person_id, 300000 + (r * 31) % 5000 AS {concept}_concept_id,
CAST(t AS DATE) AS {start}_date, strftime(t, '%Y-%m-%d %H:%M:%S') AS {start}_datetime,
32817 AS {concept}_type_concept_id,
NULL AS provider_id, r % {visits} + 1 AS visit_occurrence_id, NULL AS visit_detail_id,
'code ' || (r % 5000) AS {concept}_source_value, 0 AS {concept}_source_concept_id
"""
MEASURED = """
, 4172703 AS operator_concept_id, (r % 1000) / 10.0 AS value_as_number, NULL AS value_as_concept_id,
8840 AS unit_concept_id, NULL AS range_low, NULL AS range_high, 'mg/dL' AS unit_source_value
"""
LASTING = ", CAST(t AS DATE) + 7 AS {end}_date, NULL AS {end}_datetime"


def write_extract(folder: Path, events: int) -> None:
    """An extract of so many events: four event tables, persons, periods, visits."""
    import duckdb

    visits = max(events // 10, 10)
    connection = duckdb.connect()

    def write(name: str, query: str) -> None:
        connection.execute(f"COPY ({query}) TO '{folder}/{name}.csv' (HEADER)")

    person = "SELECT r AS person_id, 8507 AS gender_concept_id, 1940 + r % 60 AS year_of_birth, 0 AS race_concept_id"
    write("person", f"{person} FROM range(1, {PERSONS + 1}) t(r)")
    span = "'2009-12-01' AS observation_period_start_date, '2021-01-01' AS observation_period_end_date"
    write(
        "observation_period",
        f"SELECT r AS observation_period_id, r AS person_id, {span} FROM range(1, {PERSONS + 1}) t(r)",
    )
    moment = "TIMESTAMP '2010-01-01' + to_days(CAST((r * 13) % 3650 AS INTEGER)) + to_seconds((r * 37) % 86400)"
    write(
        "visit_occurrence",
        f"SELECT r AS visit_occurrence_id, r % {PERSONS} + 1 AS person_id, 9202 AS visit_concept_id, "
        "CAST(t AS DATE) AS visit_start_date, CAST(t AS DATE) AS visit_end_date "
        f"FROM (SELECT r, {moment} AS t FROM range(1, {visits + 1}) t(r))",
    )
    for table, share in SHARES.items():
        concept = table.split("_")[0]
        start = {"measurement": table, "procedure_occurrence": "procedure"}.get(table, f"{table}_start")
        start = start.replace("condition_occurrence", "condition")
        columns = COMMON.format(table=table, persons=PERSONS, concept=concept, start=start, visits=visits)
        if table == "measurement":
            columns += MEASURED
        elif table != "procedure_occurrence":
            columns += LASTING.format(end=start.replace("_start", "_end"))
        source = f"SELECT r, {moment} AS t FROM range(1, {events * share // 100 + 1}) t(r)"
        write(table, f"SELECT {columns} FROM ({source})")


def reset(engine: Engine) -> None:
    """An empty store again."""
    with engine.begin() as connection:
        for (name,) in connection.exec_driver_sql(
            "SELECT relname FROM pg_class WHERE relnamespace = 'omop'::regnamespace AND relname ~ '^event_[0-9]+$'"
        ).all():
            connection.exec_driver_sql(f"DROP TABLE omop.{name}")
        tables = "omop.person, omop.observation_period, omop.visit_occurrence, omop.timeline, ops.reject, ops.load"
        connection.exec_driver_sql(f"TRUNCATE {tables}, ops.source CASCADE")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("CHECKPOINT")


def in_memory(folder: Path, extract: Path, settings: Settings, engine: Engine) -> dict[str, list[bytes]]:
    """The encoded rows of omop.event, by table, as the loader writes them."""
    import app.loading.publish as publishing

    kept: dict[str, list[bytes]] = {}
    original = rows.events

    def keep(connection: object, table: str, load_id: int, *, unknown_visits: bool) -> Iterator[rows.Chunk]:
        for chunk in original(connection, table, 1, unknown_visits=unknown_visits):  # type: ignore[arg-type]
            kept.setdefault(table, []).append(chunk[0])
        return original(connection, table, load_id, unknown_visits=unknown_visits)  # type: ignore[arg-type]

    publishing.rows.events = keep  # type: ignore[assignment]
    try:
        load(InlineWork(engine, args={"path": str(extract)}, folder=folder, settings=settings))
    finally:
        publishing.rows.events = original
    return kept


def copy_rows(engine: Engine, kept: dict[str, list[bytes]]) -> None:
    """COPY BINARY of rows in memory into tables like the partitions of omop.event, then their indexes."""
    with engine.begin() as connection:
        for number, (table, chunks) in enumerate(kept.items(), 1):
            before, after = partition_statements(number, table)
            for statement in before:
                connection.exec_driver_sql(statement.replace(f"CHECK (load_id = {number})", "CHECK (load_id = 1)"))
            copy_in(connection, partition(number), rows.event_columns(table), chunks, options="FREEZE")
            for statement in after:
                connection.exec_driver_sql(statement)


def run() -> list[Row]:
    """Rows `load` (share of the limit's speed) and `load-rate` (million events a second)."""
    from app.embedded import ensure_up, stop
    from app.settings import Settings

    folder = Path(tempfile.mkdtemp(prefix="lachesis-bench-"))
    folder.chmod(0o711)
    settings = Settings(home=folder / "home", home_is_named=True)
    extract = folder / "extract"
    extract.mkdir()
    try:
        write_extract(extract, EVENTS)
        engine = make_engine(ensure_up(settings).database_url)
        kept = in_memory(folder / "work", extract, settings, engine)
        ours, limit = [], []
        for _ in range(PAIRS):
            reset(engine)
            work = InlineWork(engine, args={"path": str(extract)}, folder=folder / "work", settings=settings)
            ours.append(seconds(lambda work=work: load(work)))
            reset(engine)
            limit.append(seconds(lambda: copy_rows(engine, kept)))
        stop(settings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    total = EVENTS + max(EVENTS // 10, 10)
    share = statistics.median(theirs / mine for mine, theirs in zip(ours, limit, strict=True))
    rate = total / statistics.median(ours) / 1e6
    return [
        Row(row="load", figure=share, unit="of COPY BINARY's speed", target=0.5),
        Row(row="load-rate", figure=rate, unit="M events/s", target=MEDS_ETL_EVENTS_PER_SECOND / 1e6),
    ]
