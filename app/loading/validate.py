"""Judge decoded tables set-wise in DuckDB: which rows are rejected by which rule, and what is remarkable in the rest.

Nothing a real extract has is rejected: unknown visits, concepts outside the vocabulary, events before birth, after
death, in the future or outside observation periods are kept and counted.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.loading.cdm import EVENTS, VOCABULARY
from app.loading.decode import Decoded, query_batches
from app.loading.parse import Plan
from app.store.forgetting import RULE as FORGOTTEN
from app.store.loads import Reject

if TYPE_CHECKING:
    import duckdb

UNKNOWN_PERSON = "unknown_person"
DUPLICATE_KEY = "duplicate_key"
DUPLICATE_ROW = "duplicate_row"

OF_FORGOTTEN = "EXISTS (FROM forgotten_person f WHERE f.person_id = t.person_id)"
NEEDS_UPSERT = "key_shown_needs_upsert"

LATER = (UNKNOWN_PERSON, DUPLICATE_KEY, DUPLICATE_ROW, FORGOTTEN, NEEDS_UPSERT)
"""Rules that need more than the row itself; their codes follow those of the plan."""
HARMLESS = frozenset({DUPLICATE_ROW, FORGOTTEN})
"""Rules that do not count at the gate: nothing is lost that should be there."""

BEST_FIRST = {
    "death": "time",
    "concept_relationship": "invalid_reason NULLS FIRST, valid_end_date DESC NULLS FIRST",
    "concept": "invalid_reason NULLS FIRST, valid_end_date DESC NULLS FIRST",
    "concept_ancestor": "min_levels_of_separation",
}
"""Tables of which one row of a key is kept whatever the others say (the earliest death), and which one that is."""


@dataclass(slots=True)
class Judged:
    """A decoded table without its rejected rows."""

    table: str
    decoded: Decoded
    rules: list[tuple[str, str | None]]
    """(rule, column) by code."""
    rejects_by_rule: dict[str, int]
    num_loaded: int
    num_same: int = 0
    """Records of a delta that say what is already shown."""
    num_deleted: int = 0
    """Records of a delta that take a row away."""
    flags_by_rule: dict[str, int] = field(default_factory=dict)
    first_time: dt.datetime | None = None
    last_time: dt.datetime | None = None

    @property
    def num_read(self) -> int:
        return self.decoded.num_read

    @property
    def num_rejected(self) -> int:
        return sum(self.rejects_by_rule.values())

    @property
    def num_gated(self) -> int:
        """Rejected rows that count at the gate."""
        return sum(count for rule, count in self.rejects_by_rule.items() if rule not in HARMLESS)

    def rejects(self, connection: duckdb.DuckDBPyConnection) -> Iterator[Reject]:
        """Every row that is not loaded."""
        for read in self.decoded.files:
            for number, rule in read.broken:
                yield Reject(table_name=self.table, file=read.file.name, record=number, rule=rule)
        cursor = connection.cursor()
        cursor.execute(f"SELECT row, code, key FROM r_{self.table} ORDER BY row")
        while rows := cursor.fetchmany(10_000):
            for row, code, key in rows:
                file, number = self.decoded.locate(row)
                rule, column = self.rules[code]
                yield Reject(
                    table_name=self.table, file=file, record=number, rule=rule, row_key=key, column_name=column
                )


def one(connection: duckdb.DuckDBPyConnection, statement: str) -> tuple[Any, ...]:
    """The one row of a statement."""
    rows = connection.execute(statement).fetchall()  # all of it: a result in hand keeps other work off the connection
    return tuple(rows[0]) if rows else ()


def judge(connection: duckdb.DuckDBPyConnection, table: str, decoded: Decoded, plan: Plan, *, persons: bool) -> Judged:
    """Reject rows of one decoded table and delete them from it.

    Args:
        connection: holds `t_<table>`, and `known_person` (see `context`) where `persons`.
        table: its name in the CDM.
        decoded: where its rows came from.
        plan: the rules that its column `bad` points to.
        persons: reject rows of persons that are not in `known_person`.
    """
    base = len(plan.rules)
    rules = [(rule.rule, rule.column) for rule in plan.rules] + [(rule, _column(table, rule)) for rule in LATER]
    key = key_text(table)
    connection.execute(
        f"CREATE TABLE r_{table} AS SELECT rowid AS row, CAST(bad AS INTEGER) AS code, {key} AS key FROM t_{table} "
        "WHERE bad IS NOT NULL"
    )
    if persons or table == "person":
        connection.execute(
            f"INSERT INTO r_{table} SELECT rowid, {base + LATER.index(FORGOTTEN)}, NULL FROM t_{table} t "
            f"WHERE bad IS NULL AND {OF_FORGOTTEN}"
        )
    if persons:
        connection.execute(
            f"INSERT INTO r_{table} SELECT rowid, {base}, {key} FROM t_{table} t WHERE bad IS NULL "
            "AND NOT EXISTS (FROM known_person p WHERE p.person_id = t.person_id)"
            f" AND NOT {OF_FORGOTTEN}"
        )
    if table != "cdm_source":
        _reject_duplicates(connection, table, base, key)
    if persons or table == "person":  # the key of a death is its person
        connection.execute(
            f"UPDATE r_{table} SET key = NULL WHERE row IN (SELECT rowid FROM t_{table} t WHERE {OF_FORGOTTEN})"
        )
    by_rule: dict[str, int] = {}
    for code, count in connection.execute(f"SELECT code, count(*) FROM r_{table} GROUP BY 1 ORDER BY 1").fetchall():
        by_rule[rules[code][0]] = by_rule.get(rules[code][0], 0) + count
    for read in decoded.files:
        for _, rule in read.broken:
            by_rule[rule] = by_rule.get(rule, 0) + 1
    if by_rule:
        connection.execute(f"DELETE FROM t_{table} WHERE rowid IN (SELECT row FROM r_{table})")
    (loaded,) = one(connection, f"SELECT count(*) FROM t_{table}")
    return Judged(table, decoded, rules, by_rule, loaded)


def _keys(table: str) -> Sequence[str]:
    return VOCABULARY[table].key if table in VOCABULARY else ("key",)


def _column(table: str, rule: str) -> str | None:
    if rule in (UNKNOWN_PERSON, FORGOTTEN):
        return "person_id"
    if table in VOCABULARY:
        return VOCABULARY[table].key[0]
    return EVENTS[table].key if table in EVENTS else f"{table}_id"


def key_text(table: str) -> str:
    """SQL: the row's key as text, where it is a number."""
    if table == "cdm_source":
        return "CAST(NULL AS VARCHAR)"
    keys = [
        f"CAST({name} AS VARCHAR)" for name in _keys(table) if name == "key" or name.endswith("_id") or "_id_" in name
    ]
    keys = [k for k in keys if "relationship_id" not in k]
    return " || '/' || ".join(keys)


def _reject_duplicates(connection: duckdb.DuckDBPyConnection, table: str, base: int, key: str) -> None:
    """Reject copies of a row but the first, and every row of a key that comes with different content."""
    keys = ", ".join(_keys(table))
    sound = f"FROM t_{table} t WHERE NOT EXISTS (FROM r_{table} r WHERE r.row = t.rowid)"
    if _ascending(connection, table):
        return
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE twice AS SELECT {keys} {sound} GROUP BY {keys} HAVING count(*) > 1"
    )
    if not one(connection, "SELECT count(*) FROM twice")[0]:
        return
    best = BEST_FIRST.get(table, "")
    columns = [row[0] for row in connection.execute(f"DESCRIBE t_{table}").fetchall()]
    content = f"hash({', '.join(columns)})"
    same = " AND ".join(f"w.{name} = t.{name}" for name in _keys(table))
    order = ", ".join(filter(None, (best, "rowid")))
    conflict = f"CASE WHEN same THEN {base + 2} ELSE {base + 1} END"
    rejected = "n > 1" if best else "n > 1 OR NOT same"
    connection.execute(
        f"INSERT INTO r_{table} SELECT row, {conflict}, key FROM (SELECT t.rowid AS row, {key} AS key, "
        f"row_number() OVER (PARTITION BY {keys} ORDER BY {order}) AS n, "
        f"{content} = first_value({content}) OVER (PARTITION BY {keys} ORDER BY {order}) AS copy, "
        f"min({content}) OVER (PARTITION BY {keys}) = max({content}) OVER (PARTITION BY {keys}) AS all_same, "
        f"{'copy' if best else 'all_same'} AS same "
        f"{sound} AND EXISTS (FROM twice w WHERE {same})) WHERE {rejected}"
    )


def _ascending(connection: duckdb.DuckDBPyConnection, table: str) -> bool:
    """True where keys only grow, row by row, as exports mostly write them: then none comes twice, without sorting."""
    import numpy as np

    if table in VOCABULARY:
        return False
    last: int | None = None
    for batch in query_batches(connection, f"SELECT key FROM t_{table} WHERE bad IS NULL", 1_000_000):
        keys = batch.column(0).to_numpy()
        if not len(keys):
            continue
        if (last is not None and keys[0] <= last) or not bool(np.all(keys[1:] > keys[:-1])):
            return False
        last = int(keys[-1])
    return True


def make_life(connection: duckdb.DuckDBPyConnection, *, periods: bool, deaths: bool) -> None:
    """The table `life`: for each of `known_person` birth, death, and the span of their observation periods."""
    span = (
        "SELECT person_id, min(start_date) AS first_day, max(end_date) AS last_day, count(*) AS periods "
        "FROM known_period GROUP BY 1"
        if periods
        else "SELECT 0::BIGINT AS person_id, NULL::DATE AS first_day, NULL::DATE AS last_day, 0 AS periods WHERE false"
    )
    death = (
        "SELECT person_id, min(time) AS death_time, arg_min(date_only, time) AS death_date_only "
        "FROM known_death GROUP BY 1"
        if deaths
        else "SELECT 0::BIGINT AS person_id, NULL::TIMESTAMP AS death_time, false AS death_date_only WHERE false"
    )
    connection.execute(
        "CREATE TABLE life AS SELECT p.person_id, p.birth_time, d.death_time, d.death_date_only, s.first_day, "
        f"s.last_day, coalesce(s.periods, 0) AS periods FROM known_person p LEFT JOIN ({span}) s USING (person_id) "
        f"LEFT JOIN ({death}) d USING (person_id)"
    )


AFTER_DEATH = (
    "CASE WHEN t.date_only OR p.death_date_only THEN CAST(t.time AS DATE) > CAST(p.death_time AS DATE) "
    "ELSE t.time > p.death_time END"
)


def flag(connection: duckdb.DuckDBPyConnection, judged: Judged, *, periods: bool) -> None:
    """Count what is remarkable in the rows of an event table that stay; sets flags and the span of times.

    Needs the tables `life`, `known_visit(visit_occurrence_id)` and `known_concept(concept_id)`.
    """
    table = judged.table
    if not judged.num_loaded:
        return
    counts = {
        "concept_zero": "t.concept_id = 0",
        "number_unusable": "t.flag & 1 = 1",
        "end_out_of_range": "t.flag & 2 = 2",
        "end_before_start": "t.end_time < t.time",
        "in_the_future": "t.time > now()::TIMESTAMP + INTERVAL 1 DAY",
        "before_birth": "t.time < p.birth_time",
    }
    if table != "death":
        counts["after_death"] = AFTER_DEATH
        if periods:
            counts["outside_observation_period"] = (
                "p.periods = 0 OR NOT (CAST(t.time AS DATE) BETWEEN p.first_day AND p.last_day)"
            )
    listed = ", ".join(f"count_if({condition})" for condition in counts.values())
    row = one(connection, f"SELECT min(t.time), max(t.time), {listed} FROM t_{table} t JOIN life p USING (person_id)")
    judged.first_time, judged.last_time = row[0], row[1]
    flags = dict(zip(counts, row[2:], strict=True))
    if periods and table != "death":
        flags["outside_observation_period"] += _between_periods(connection, table)
    for name, column in (("concept_absent", "concept_id"), ("source_concept_absent", "source_concept_id")):
        (flags[name],) = one(
            connection,
            f"SELECT count(*) FROM t_{table} t WHERE {column} <> 0 "
            f"AND NOT EXISTS (FROM known_concept k WHERE k.concept_id = t.{column})",
        )
    if table != "visit_occurrence":
        (flags["unknown_visit"],) = one(
            connection,
            f"SELECT count(*) FROM t_{table} t WHERE visit_occurrence_id IS NOT NULL "
            "AND NOT EXISTS (FROM known_visit v WHERE v.visit_occurrence_id = t.visit_occurrence_id)",
        )
    judged.flags_by_rule = {name: int(count) for name, count in flags.items() if count}


def _between_periods(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    """Events of persons with several periods that lie between two of them."""
    (several,) = one(connection, "SELECT count(*) FROM life WHERE periods > 1")
    if not several:
        return 0
    (count,) = one(
        connection,
        f"SELECT count(*) FROM t_{table} t JOIN life p USING (person_id) WHERE p.periods > 1 "
        "AND CAST(t.time AS DATE) BETWEEN p.first_day AND p.last_day AND NOT EXISTS (FROM known_period o "
        "WHERE o.person_id = t.person_id AND CAST(t.time AS DATE) BETWEEN o.start_date AND o.end_date)",
    )
    return int(count)
