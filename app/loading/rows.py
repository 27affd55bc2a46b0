"""Rows of the store's tables as encoded chunks for COPY, streamed out of DuckDB."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from app.loading.cdm import EVENTS, VOCABULARY
from app.loading.decode import query_batches
from app.store import timelines
from app.store.copy import Field, Text, dates, encode, encode_mixed, timestamps

if TYPE_CHECKING:
    import duckdb

CHUNK_ROWS = 65_536
Chunk = tuple[bytes, int]
"""Encoded rows, and how many."""

PERSON = ("birth_time", "gender_concept_id", "race_concept_id", "ethnicity_concept_id", "person_source_value")
VISIT = {
    "visit_occurrence_id": "key",
    "person_id": "person_id",
    "visit_concept_id": "concept_id",
    "visit_start_datetime": "time",
    "visit_end_datetime": "end_time",
    "date_only": "date_only",
    "end_date_only": "end_date_only",
    "discharged_to_concept_id": "discharged_to_concept_id",
    "preceding_visit_occurrence_id": "preceding_visit_occurrence_id",
}


def field(column: Any) -> Field | Text:
    """A column of an Arrow batch, as COPY wants it."""
    import pyarrow as pa

    valid = None if column.null_count == 0 else column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or column.type == pa.string_view():
        return _text(column.cast(pa.large_string()), valid)
    values: Any
    if pa.types.is_timestamp(column.type):
        values = timestamps(_numbers(column.cast(pa.int64())))
    elif pa.types.is_date(column.type):
        values = dates(_numbers(column.cast(pa.int32())))
    else:
        values = _numbers(column)
    return Field(values, valid)


def _numbers(column: Any) -> Any:
    if column.null_count:
        column = column.fill_null(False if str(column.type) == "bool" else 0)
    return column.to_numpy(zero_copy_only=False)


def _text(column: Any, valid: Any) -> Text:
    _, offsets, data = column.buffers()
    edges = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    held = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return Text(held, edges, valid)


def stream(
    connection: duckdb.DuckDBPyConnection, query: str, constants: Sequence[Any] = (), rows: int = CHUNK_ROWS
) -> Iterator[Chunk]:
    """Encoded chunks of a query's rows; each constant (a NumPy scalar) is a further column."""
    for batch in query_batches(connection, query, rows):
        if not batch.num_rows:
            continue
        fields = [field(column) for column in batch.columns]
        fields += [Field(np.full(batch.num_rows, constant)) for constant in constants]
        fixed = [f for f in fields if isinstance(f, Field)]
        yield encode(fixed) if len(fixed) == len(fields) else encode_mixed(fields), batch.num_rows


def event_columns(table: str, *, unknown_visits: bool = False) -> list[str]:
    """Columns of omop.event that rows of a table fill, load_id last; `unknown_visits` where some name unknown ones."""
    event = EVENTS[table]
    columns = ["person_id", "time", "date_only", "concept_id", "source_concept_id"]
    columns += ["value_as_number"] if event.number else []
    columns += ["value_as_concept_id"] if event.value_concept else []
    columns += ["unit_concept_id"] if event.unit else []
    columns += ["end_time"] if event.end_date else []
    columns += ["visit_occurrence_id"] if event.visit else []
    columns += ["unknown_visit_id"] if event.visit and unknown_visits else []
    return [*columns, "source_row_id", "domain", "load_id"]


def events(connection: duckdb.DuckDBPyConnection, table: str, load_id: int, *, unknown_visits: bool) -> Iterator[Chunk]:
    """Rows of omop.event, by person and time: so they lie on disk, and so their index is built fastest."""
    named = {"source_row_id": "t.key"}
    join = ""
    if unknown_visits:
        named["visit_occurrence_id"] = "v.visit_occurrence_id"
        named["unknown_visit_id"] = "CASE WHEN v.visit_occurrence_id IS NULL THEN t.visit_occurrence_id END"
        join = " LEFT JOIN known_visit v ON v.visit_occurrence_id = t.visit_occurrence_id"
    listed = ", ".join(named.get(c, f"t.{c}") for c in event_columns(table, unknown_visits=unknown_visits)[:-2])
    query = f"SELECT {listed} FROM t_{table} t{join} ORDER BY t.person_id, t.time"
    return stream(connection, query, (np.uint8(ord(EVENTS[table].domain)), np.int32(load_id)))


def persons(connection: duckdb.DuckDBPyConnection, load_id: int) -> Iterator[Chunk]:
    """Rows of omop.person."""
    query = f"SELECT person_id, {', '.join(PERSON)} FROM t_person ORDER BY person_id"
    return stream(connection, query, (np.int32(load_id),))


def periods(connection: duckdb.DuckDBPyConnection, load_id: int) -> Iterator[Chunk]:
    """Rows of omop.observation_period."""
    query = "SELECT key, person_id, start_date, end_date FROM t_observation_period ORDER BY person_id, start_date"
    return stream(connection, query, (np.int32(load_id),))


def visits(connection: duckdb.DuckDBPyConnection, load_id: int) -> Iterator[Chunk]:
    """Rows of omop.visit_occurrence."""
    query = f"SELECT {', '.join(VISIT.values())} FROM t_visit_occurrence ORDER BY person_id, time"
    return stream(connection, query, (np.int32(load_id),))


KEPT: dict[str, tuple[Sequence[str], Callable[[duckdb.DuckDBPyConnection, int], Iterator[Chunk]]]] = {
    "person": (("person_id", *PERSON, "load_id"), persons),
    "observation_period": (("observation_period_id", "person_id", "start_date", "end_date", "load_id"), periods),
    "visit_occurrence": ((*VISIT, "load_id"), visits),
}
"""Tables with rows of their own: the columns that are written, and what makes their chunks."""


def vocabulary(connection: duckdb.DuckDBPyConnection, table: str) -> Iterator[Chunk]:
    """Rows of a vocabulary table, by key: an index is filled fastest in its own order."""
    listed = ", ".join(name for name, _ in VOCABULARY[table].columns)
    return stream(connection, f"SELECT {listed} FROM t_{table} ORDER BY {', '.join(VOCABULARY[table].key)}")


def timeline_batches(connection: duckdb.DuckDBPyConnection, tables: Sequence[str]) -> Iterator[timelines.Batch]:
    """Every event of some DuckDB tables, sorted by (person, time, concept)."""
    parts = " UNION ALL ".join(
        "SELECT person_id, epoch_us(date_trunc('second', time)) // 1000000 * 2 + CAST(date_only AS BIGINT) AS time, "
        f"concept_id FROM {table}"
        for table in tables
    )
    query = f"SELECT * FROM ({parts}) ORDER BY person_id, time, concept_id"
    for batch in query_batches(connection, query, 1_000_000):
        person, time, concept = (column.to_numpy() for column in batch.columns)
        yield person, time, concept
