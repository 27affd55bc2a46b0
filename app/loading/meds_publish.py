"""Publish a judged MEDS delivery in one transaction: one partition of events, persons, visits and static facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from app.loading import meds_codes, meds_rows, rows, vocabulary_counts
from app.loading.meds_files import CODES, DATA
from app.loading.meds_rows import Books, Read
from app.loading.publish import Target, fill, partition, rebuilding
from app.loading.vocabulary_complete import bring_seeds
from app.store import codes_meds, timelines
from app.store.loads import LoadRow, Published, Reject, record_load, record_rejects, reserve_load_ids, supersede

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

    from app.loading.meds_codes import Codes
    from app.settings import Settings
    from app.store.vocabulary import Release

KIND = "meds"
"""In ops.load.kind."""

PERSON = ("person_id", "birth_time", "gender_concept_id", "race_concept_id", "ethnicity_concept_id", "split", "load_id")
STATIC = ("person_id", "source_row_id", "concept_id", "value_as_number", "unit_concept_id", "fills", "at_birth")
EVENT = (
    *("person_id", "time", "date_only", "concept_id", "source_concept_id", "value_as_number", "value_as_concept_id"),
    *("unit_concept_id", "end_time", "visit_occurrence_id", "domain", "source_row_id"),
)
KEPT_TABLES = ("person", "visit_occurrence", "static_fact")


@dataclass(kw_only=True, slots=True)
class MedsDelivery:
    """What is to be published."""

    settings: Settings
    source_id: int
    job_id: int | None
    reads: Sequence[Read]
    """The shards."""
    books: Mapping[str, Books]
    digests: Mapping[str, bytes]
    shown: Mapping[str, Published]
    """What the source shows now."""
    codes: Codes
    described: Mapping[str, tuple[str | None, list[str]]]
    rejects: Mapping[str, list[Reject]]
    """Of the metadata files."""
    release: Release | None
    final: bool
    """The codes came with those of the source beside them, and are concepts already."""
    load_ids: dict[str, int] = field(default_factory=dict)


def name_concepts(connection: Connection, decoder: duckdb.DuckDBPyConnection, delivery: MedsDelivery) -> int:
    """Give every code its concept, and make `t_data`, `t_person` and `t_visit_occurrence`; how many concepts are new.

    The caller holds the publishing lock: ids of the site's own are given out here, and stay with their codes for ever.
    """
    beside = delivery.release is not None and not delivery.release.is_full
    new = meds_codes.allocate(connection, decoder, delivery.codes, delivery.described)
    meds_codes.allocate_units(connection, decoder, beside=beside)
    meds_codes.make_map(decoder, delivery.codes)
    meds_rows.assign_visits(decoder)
    books = delivery.books[DATA]
    meds_rows.flag(decoder, books, delivery.reads)
    source = "coalesce(s.own_id, 0)" if delivery.final else "k.own_id"
    decoder.execute(
        "CREATE VIEW t_data AS SELECT m.person_id, m.time, m.date_only, "
        f"CASE WHEN m.unmapped THEN 0 ELSE k.concept_id END AS concept_id, {source} AS source_concept_id, "
        "m.number AS value_as_number, v.own_id AS value_as_concept_id, u.concept_id AS unit_concept_id, m.end_time, "
        "o.key AS visit_occurrence_id, "
        "ascii(CASE WHEN k.letter = 'x' THEN 'x' WHEN m.tab = 'x' THEN k.letter ELSE coalesce(m.tab, k.letter) END) "
        'AS domain, m."row" AS source_row_id '
        "FROM m JOIN m_map k ON k.code_id = m.code_id LEFT JOIN m_map s ON s.code_id = m.source_code_id "
        "LEFT JOIN m_map v ON v.code_id = m.value_code_id LEFT JOIN m_unit_map u ON u.unit_id = m.unit_id "
        'LEFT JOIN m_visit_key y ON y."row" = m."row" '
        "LEFT JOIN t_visit_occurrence o ON o.key = coalesce(m.visit_id, y.visit_id)"
    )
    return new


def publish(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    delivery: MedsDelivery,
    report: Callable[[int, str], None],
) -> int:
    """Write a delivery; the caller holds the publishing lock and commits.

    Returns:
        How many parent codes were left out because they close a circle.
    """
    names = list(delivery.books)
    delivery.load_ids = dict(zip(names, reserve_load_ids(connection, len(names)), strict=True))
    old = [load.load_id for load in delivery.shown.values()]
    above, circles = meds_codes.ancestors(connection, delivery.codes, delivery.described)
    if circles:
        delivery.books[CODES].flags_by_rule["parent_circle"] = circles
    codes_meds.add_ancestors(connection, above)
    _keep_books(connection, decoder, delivery)
    _remove(connection, old)
    fill(connection, [*_targets(connection, decoder, delivery)], report)
    supersede(connection, old)
    report(0, "counting concepts")
    count = int(decoder.execute("SELECT count(*) FROM m").fetchall()[0][0])
    vocabulary_counts.count_concepts(connection, decoder, delivery.source_id, {DATA: count}, whole=True)
    if delivery.release is not None and not delivery.release.is_full:
        bring_seeds(connection, decoder, delivery.settings, delivery.release, report)
    _swap(connection, delivery, has_events=count > 0)
    return circles


def _keep_books(connection: Connection, decoder: duckdb.DuckDBPyConnection, delivery: MedsDelivery) -> None:
    for table, books in delivery.books.items():
        load_id = delivery.load_ids[table]
        row = LoadRow(
            kind=KIND,
            mode="snapshot",
            table_name=table,
            files=books.files,
            content_sha256=delivery.digests[table],
            num_read=books.num_read,
            num_loaded=books.num_loaded,
            rejects_by_rule=books.rejects_by_rule,
            flags_by_rule=books.flags_by_rule,
            first_time=books.first_time,
            last_time=books.last_time,
            partition_name=partition(load_id) if table == DATA and books.first_time is not None else None,
        )
        record_load(connection, delivery.source_id, delivery.job_id, row, load_id=load_id)
        if books.rejects_by_rule:
            found: Iterator[Reject] | list[Reject] = delivery.rejects.get(table, [])
            found = meds_rows.rejects(decoder, delivery.reads) if table == DATA else found
            record_rejects(connection, load_id, delivery.job_id, found)


def _remove(connection: Connection, old: list[int]) -> None:
    """Delete the rows that this delivery replaces, but the partition."""
    from sqlalchemy import text

    timelines.delete_timelines(connection, old)
    for table in KEPT_TABLES:
        connection.execute(text(f"DELETE FROM omop.{table} WHERE load_id = ANY (:old)"), {"old": old})


def _targets(connection: Connection, decoder: duckdb.DuckDBPyConnection, delivery: MedsDelivery) -> Iterator[Target]:
    load_id = delivery.load_ids[DATA]
    constants = (np.int32(load_id),)

    def stream(query: str) -> Callable[[], Iterator[rows.Chunk]]:
        return lambda: rows.stream(decoder, query, constants)

    if delivery.books[DATA].first_time is not None:
        name = partition(load_id)
        like = "LIKE omop.event INCLUDING COMMENTS INCLUDING STORAGE INCLUDING DEFAULTS"
        yield Target(
            "events",
            name,
            (*EVENT, "load_id"),
            stream(_event_query()),
            before=(
                f"CREATE TABLE {name} ({like}, CONSTRAINT event_{load_id}_load_id CHECK (load_id = {load_id}))",
                f"COMMENT ON TABLE {name} IS 'Events of load {load_id} (MEDS)'",
            ),
            after=(
                f"CREATE INDEX ON {name} (person_id, time)",
                f"CREATE INDEX ON {name} (concept_id, person_id, time)",
                f"ANALYZE {name}",
            ),
            options="FREEZE",
        )

    def packed() -> Iterator[rows.Chunk]:
        for chunk in timelines.pack(rows.timeline_batches(decoder, ["t_data"])):
            yield chunk, 0

    yield Target("timelines", "omop.timeline", timelines.COLUMNS, packed, after=["ANALYZE omop.timeline"])
    visits = f"SELECT {', '.join(rows.VISIT.values())} FROM t_visit_occurrence ORDER BY person_id, time"
    for table, columns, query in (
        ("person", PERSON, _person_query()),
        ("visit_occurrence", (*rows.VISIT, "load_id"), visits),
        ("static_fact", (*STATIC, "load_id"), _static_query()),
    ):
        (count,) = decoder.execute(f"SELECT count(*) FROM ({query})").fetchall()[0]
        drop, rebuild = rebuilding(connection, f"omop.{table}", count)
        after = [*rebuild, f"ANALYZE omop.{table}"]
        yield Target(table, f"omop.{table}", columns, stream(query), before=drop, after=after)


def _event_query() -> str:
    listed = ", ".join("CAST(domain AS UTINYINT) AS domain" if name == "domain" else name for name in EVENT)
    return f"SELECT {listed} FROM t_data ORDER BY person_id, time"


def _person_query() -> str:
    """Persons, with the first of each of their demographic facts."""
    of_kind = ", ".join(
        f"coalesce(CAST(min_by(k.concept_id, s.\"row\") FILTER (WHERE s.kind = '{kind}') AS INTEGER), 0) "
        f"AS {kind}_concept_id"
        for kind in meds_rows.DEMOGRAPHICS
    )
    return (
        f"SELECT p.person_id, any_value(p.birth_time) AS birth_time, {of_kind}, any_value(p.split) AS split "
        "FROM t_person p LEFT JOIN m_static s ON s.person_id = p.person_id "
        "LEFT JOIN m_map k ON k.code_id = s.code_id GROUP BY p.person_id ORDER BY p.person_id"
    )


def _static_query() -> str:
    return (
        'SELECT s.person_id, s."row", coalesce(nullif(k.own_id, 0), k.concept_id) AS concept_id, s.number, '
        "u.concept_id AS unit_concept_id, s.kind, s.at_birth FROM m_static s JOIN m_map k ON k.code_id = s.code_id "
        'LEFT JOIN m_unit_map u ON u.unit_id = s.unit_id ORDER BY s.person_id, s."row"'
    )


def _swap(connection: Connection, delivery: MedsDelivery, *, has_events: bool) -> None:
    """Attach the new partition and drop the one it replaces: last, because it locks omop.event for readers."""
    for load in delivery.shown.values():
        if load.partition_name:
            connection.exec_driver_sql(f"DROP TABLE {load.partition_name}")
    if has_events:
        load_id = delivery.load_ids[DATA]
        name = partition(load_id)
        connection.exec_driver_sql(f"ALTER TABLE omop.event ATTACH PARTITION {name} FOR VALUES IN ({load_id})")
        connection.exec_driver_sql(f"ALTER TABLE {name} DROP CONSTRAINT event_{load_id}_load_id")
