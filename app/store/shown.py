"""Rows that a source shows already: found by primary key, taken away, compared; and the partitions that hold them.

A delta touches few rows of large partitions. They are found by an index on source_row_id that a partition gets when the
first delta comes, so that sources which deliver whole snapshots never pay for it. Rows are staged in temporary tables
with statistics: the planner then reads the index for few keys and the whole partition for many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.store.copy import Field, copy_in, copy_out, encode

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

EVENT_COLUMNS = (
    *("person_id", "time", "date_only", "concept_id", "source_concept_id", "value_as_number", "value_as_concept_id"),
    *("unit_concept_id", "end_time", "visit_occurrence_id", "domain", "source_row_id", "load_id", "unknown_visit_id"),
)
CONTENT = tuple(c for c in EVENT_COLUMNS[:9] if c not in ("domain", "source_row_id", "load_id"))
"""What makes two events of one key the same, beside the visit they name."""
VISIT = "coalesce({0}.visit_occurrence_id, {0}.unknown_visit_id)"

KEPT = {
    "person": (
        "person_id",
        ("birth_time", "gender_concept_id", "race_concept_id", "ethnicity_concept_id", "person_source_value"),
    ),
    "observation_period": ("observation_period_id", ("person_id", "start_date", "end_date")),
    "visit_occurrence": (
        "visit_occurrence_id",
        (
            *("person_id", "visit_concept_id", "visit_start_datetime", "visit_end_datetime", "date_only"),
            *("end_date_only", "discharged_to_concept_id", "preceding_visit_occurrence_id"),
        ),
    ),
}
"""Tables with rows of their own: primary key, and the columns that make two rows of a key the same."""

FOUND = (("key", "i8"), ("person_id", "i8"), ("same", "u1"))


@dataclass(frozen=True, slots=True)
class Difference:
    """Rows by primary key, after against before."""

    added: int = 0
    changed: int = 0
    removed: int = 0


def stage_rows(connection: Connection, name: str, like: str, columns: Sequence[str], chunks: Iterable[bytes]) -> None:
    """A temporary table of some columns of `like`, filled with encoded rows; gone when the transaction ends."""
    connection.exec_driver_sql(
        f"CREATE TEMPORARY TABLE {name} ON COMMIT DROP AS SELECT {', '.join(columns)} FROM {like} LIMIT 0"
    )
    copy_in(connection, name, columns, chunks)
    connection.exec_driver_sql(f"ANALYZE {name}")


def stage_keys(connection: Connection, name: str, batches: Iterable[NDArray[Any]]) -> None:
    """A temporary table with the column `key` (int64), each key once; gone when the transaction ends."""
    connection.exec_driver_sql(f"CREATE TEMPORARY TABLE {name} (key bigint PRIMARY KEY) ON COMMIT DROP")
    copy_in(connection, name, ("key",), (encode([Field(batch)]) for batch in batches if len(batch)))
    connection.exec_driver_sql(f"ANALYZE {name}")


def index_keys(connection: Connection, partitions: Iterable[str]) -> None:
    """Let rows of partitions be found by their key, and by a visit that is not known yet."""
    for partition in partitions:
        name = partition.removeprefix("omop.")
        connection.exec_driver_sql(f"CREATE INDEX IF NOT EXISTS {name}_row ON {partition} (source_row_id)")
        connection.exec_driver_sql(
            f"CREATE INDEX IF NOT EXISTS {name}_unknown_visit ON {partition} (unknown_visit_id) "
            "WHERE unknown_visit_id IS NOT NULL"
        )


def find_events(
    connection: Connection, partitions: Sequence[str], staged: str, columns: Sequence[str]
) -> Iterator[NDArray[Any]]:
    """(key, person_id, same) of the shown events whose key is staged; `columns` are those of the staged rows."""
    compared = [c for c in CONTENT if c in columns]
    mine, theirs = (", ".join(f"{which}.{c}" for c in compared) for which in ("e", "i"))
    same = f"(({mine}) IS NOT DISTINCT FROM ({theirs})"
    if "visit_occurrence_id" in columns:
        same += f" AND {VISIT.format('e')} IS NOT DISTINCT FROM i.visit_occurrence_id"
    for partition in partitions:
        query = (
            f"SELECT i.source_row_id, e.person_id, {same}) FROM {staged} i "
            f"JOIN {partition} e ON e.source_row_id = i.source_row_id"
        )
        yield from copy_out(connection, query, FOUND)


def find_kept(connection: Connection, table: str, staged: str, load_ids: Sequence[int]) -> Iterator[NDArray[Any]]:
    """(key, person_id, same) of the shown rows of one of `KEPT` whose key is staged."""
    key, columns = KEPT[table]
    mine, theirs = (", ".join(f"{which}.{c}" for c in columns) for which in ("t", "i"))
    query = (
        f"SELECT t.{key}, t.person_id, ({mine}) IS NOT DISTINCT FROM ({theirs}) FROM {staged} i "
        f"JOIN omop.{table} t USING ({key}) WHERE t.load_id IN ({listed(load_ids)})"
    )
    yield from copy_out(connection, query, FOUND)


def find_keys(
    connection: Connection, relations: Sequence[str], key: str, staged: str, load_ids: Sequence[int]
) -> Iterator[NDArray[Any]]:
    """(key, person_id, 0) of the rows that some loads show in some tables, and whose key is staged."""
    for relation in relations:
        query = (
            f"SELECT e.{key}, e.person_id, false FROM {staged} k JOIN {relation} e ON e.{key} = k.key "
            f"WHERE e.load_id IN ({listed(load_ids)})"
        )
        yield from copy_out(connection, query, FOUND)


def take_away(connection: Connection, relation: str, column: str, staged: str, load_ids: Sequence[int]) -> Counter[int]:
    """Delete the rows of some loads whose `column` is a staged key; how many, by load."""
    rows = connection.exec_driver_sql(
        f"WITH gone AS (DELETE FROM {relation} e USING {staged} k WHERE e.{column} = k.key "
        f"AND e.load_id IN ({listed(load_ids)}) RETURNING e.load_id) SELECT load_id, count(*) FROM gone GROUP BY 1"
    )
    return Counter({int(load_id): int(count) for load_id, count in rows})


def count_away(connection: Connection, taken: Mapping[int, int]) -> None:
    """Keep in the books how many rows of each load are still seen."""
    from sqlalchemy import text

    if taken:
        connection.execute(
            text("UPDATE ops.load SET num_shown = num_shown - :count WHERE load_id = :load"),
            [{"load": load, "count": count} for load, count in taken.items()],
        )


def link_visits(connection: Connection, partitions: Iterable[str], staged: str) -> None:
    """Visits that have come: events that named them before point to them now."""
    for partition in partitions:
        connection.exec_driver_sql(
            f"UPDATE {partition} e SET visit_occurrence_id = e.unknown_visit_id, unknown_visit_id = NULL "
            f"FROM {staged} k WHERE e.unknown_visit_id = k.key"
        )


def unlink_visits(connection: Connection, partitions: Iterable[str], staged: str) -> None:
    """Visits that have gone: events that named them point nowhere, and remember what they named."""
    for partition in partitions:
        connection.exec_driver_sql(
            f"UPDATE {partition} e SET unknown_visit_id = e.visit_occurrence_id, visit_occurrence_id = NULL "
            f"FROM {staged} k WHERE e.visit_occurrence_id = k.key"
        )


def keep_former(connection: Connection, table: str, load_ids: Sequence[int]) -> str:
    """A temporary table (key, hash) of what one of `KEPT` shows, to be compared after it is replaced; its name."""
    key, columns = KEPT[table]
    name = f"former_{table}"
    connection.exec_driver_sql(
        f"CREATE TEMPORARY TABLE {name} ON COMMIT DROP AS SELECT {key} AS key, "
        f"hash_record_extended(ROW({', '.join(columns)}), 0) AS hash FROM omop.{table} "
        f"WHERE load_id IN ({listed(load_ids)})"
    )
    return name


def kept_rows(table: str, load_ids: Sequence[int]) -> str:
    """A query (key, hash) of the rows that some loads show in one of `KEPT`."""
    key, columns = KEPT[table]
    return (
        f"SELECT {key} AS key, hash_record_extended(ROW({', '.join(columns)}), 0) AS hash FROM omop.{table} "
        f"WHERE load_id IN ({listed(load_ids)})"
    )


def event_rows(partitions: Iterable[str]) -> str:
    """A query (key, hash) of the events of some partitions."""
    content = f"ROW({', '.join(f'e.{c}' for c in CONTENT)}, {VISIT.format('e')})"
    parts = [
        f"SELECT e.source_row_id AS key, hash_record_extended({content}, 0) AS hash FROM {partition} e"
        for partition in partitions
    ]
    return " UNION ALL ".join(parts) or "SELECT 0::bigint AS key, 0::bigint AS hash WHERE false"


def compare(connection: Connection, before: str, after: str) -> Difference:
    """Rows of two queries (key, hash), by key."""
    row = connection.exec_driver_sql(
        "SELECT count(*) FILTER (WHERE b.key IS NULL), count(*) FILTER (WHERE b.hash <> a.hash), "
        f"count(*) FILTER (WHERE a.key IS NULL) FROM ({before}) b FULL JOIN ({after}) a ON a.key = b.key"
    ).one()
    return Difference(*map(int, row))


def events_of(connection: Connection, staged: str, load_ids: Sequence[int]) -> Iterator[NDArray[Any]]:
    """(person_id, time, date_only, concept_id) of the events of staged persons in some loads."""
    layout = (("person_id", "i8"), ("time", "i8"), ("date_only", "u1"), ("concept_id", "i4"))
    query = (
        f"SELECT e.person_id, e.time, e.date_only, e.concept_id FROM {staged} k "
        f"JOIN omop.event e ON e.person_id = k.key WHERE e.load_id IN ({listed(load_ids)})"
    )
    yield from copy_out(connection, query, layout)


def delete_timelines(connection: Connection, staged: str) -> None:
    """Drop the timelines of staged persons."""
    connection.exec_driver_sql(f"DELETE FROM omop.timeline t USING {staged} k WHERE t.person_id = k.key")


def drop_unnamed(connection: Connection, partitions: Iterable[str]) -> None:
    """Drop those of some partitions that no load names any more."""
    from sqlalchemy import text

    for partition in partitions:
        named = "SELECT EXISTS (SELECT FROM ops.load WHERE partition_name = :name)"
        if not connection.scalar(text(named), {"name": partition}):
            connection.exec_driver_sql(f"DROP TABLE {partition}")


def merge_partitions(connection: Connection, source_id: int, table: str) -> None:
    """Put the newest partitions of a table together, while the next older one holds at most twice their rows.

    So their number stays under the logarithm of the rows, however many deltas come, and a row is rewritten as rarely.
    Rows keep the load that brought them; the caller holds the publishing lock, and the partitions are attached.
    """
    from sqlalchemy import text

    parts = connection.execute(
        text(
            "SELECT partition_name, array_agg(load_id ORDER BY load_id), sum(num_shown), max(load_id) FROM ops.load "
            "WHERE source_id = :source AND table_name = :table AND state = 'published' AND partition_name IS NOT NULL "
            "GROUP BY 1 ORDER BY max(load_id) DESC"
        ),
        {"source": source_id, "table": table},
    ).all()
    count, rows = 0, 0
    for _, _, shown, _ in parts:
        if count and shown > 2 * rows:
            break
        count, rows = count + 1, rows + int(shown)
    if count < 2:
        return
    chosen = parts[:count]
    ids = sorted(load for _, loads, _, _ in chosen for load in loads)
    name = f"omop.event_{chosen[0][3]}_merged"
    _merge(connection, name, table, [part for part, *_ in chosen], ids)
    connection.execute(
        text("UPDATE ops.load SET partition_name = :name WHERE load_id = ANY (:ids)"), {"name": name, "ids": ids}
    )


def _merge(connection: Connection, name: str, table: str, parts: Sequence[str], ids: Sequence[int]) -> None:
    columns = ", ".join(EVENT_COLUMNS)
    union = " UNION ALL ".join(f"SELECT {columns} FROM {part}" for part in parts)
    domain = connection.exec_driver_sql(f"SELECT domain FROM ({union}) e LIMIT 1").scalar_one()
    short = name.removeprefix("omop.")
    for statement in (
        f"CREATE TABLE {name} (LIKE omop.event INCLUDING COMMENTS INCLUDING STORAGE INCLUDING DEFAULTS, "
        f"CONSTRAINT {short}_load_id CHECK (load_id IN ({listed(ids)})), "
        f"CONSTRAINT {short}_domain CHECK (domain = '{domain}'))",
        f"COMMENT ON TABLE {name} IS 'Events of {len(ids)} loads ({table})'",
        f"INSERT INTO {name} ({columns}) SELECT {columns} FROM ({union}) e ORDER BY person_id, time",
        f"CREATE INDEX ON {name} (person_id, time)",
        f"CREATE INDEX ON {name} (concept_id, person_id, time)",
        *(f"DROP TABLE {part}" for part in parts),
    ):
        connection.exec_driver_sql(statement)
    index_keys(connection, [name])
    connection.exec_driver_sql(f"ANALYZE {name}")
    connection.exec_driver_sql(f"ALTER TABLE omop.event ATTACH PARTITION {name} FOR VALUES IN ({listed(ids)})")
    connection.exec_driver_sql(f"ALTER TABLE {name} DROP CONSTRAINT {short}_load_id")


def listed(ids: Iterable[int]) -> str:
    """Keys for an IN list, which holds none of ours where there are none."""
    return ", ".join(str(int(i)) for i in ids) or "-1"
