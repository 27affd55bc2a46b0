"""Bring what newly used concepts need out of the kept vocabulary, inside the transaction that publishes a delivery."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from app.loading import rows, vocabulary_kept
from app.loading.cdm import EVENTS, VOCABULARY
from app.loading.validate import Judged, one
from app.loading.vocabulary_counts import count_concepts, covers
from app.store.vocabulary import Release, current_release, mark_completed, to_complete

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

    from app.loading.publish import Delivery, Target
    from app.settings import Settings

FIRST_LOCAL = 2_000_000_000
"""From here on ids are a site's own; no release replaces what is said about them."""


def complete(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    delivery: Delivery,
    report: Callable[[int, str], None],
) -> None:
    """Count a delivery's concepts, and bring those that are new out of the vocabulary release, if one was loaded.

    The one thing that publishing calls; its loads are in the books, its partitions filled but not attached.
    """
    report(0, "counting concepts")
    shown = {table: found.num_loaded for table, found in delivery.judged.items() if table in EVENTS}
    whole = covers(delivery.judged, delivery.published, delivery.mode)
    count_concepts(connection, decoder, delivery.source_id, shown, whole=whole)
    release = current_release(connection)
    if release is None:
        return
    again = "concept" in delivery.judged and delivery.judged["concept"].num_loaded > 0
    if again:  # the extract's own rows went in before: where the release has a concept, its words count
        vocabulary_kept.views(decoder, delivery.settings, release)
        decoder.execute("CREATE OR REPLACE TABLE v_concept AS FROM k_concept SEMI JOIN t_concept USING (concept_id)")
        bring(connection, decoder, ["concept"], "again", report)
    if release.is_full:
        return
    bring_seeds(connection, decoder, delivery.settings, release, report)


def bring_seeds(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    settings: Settings,
    release: Release,
    report: Callable[[int, str], None],
    *,
    before: Callable[[], None] | None = None,
) -> dict[str, int]:
    """Complete every concept in use that was not looked up in the release yet; rows brought, by table.

    `before` is called once `v_concept` and the others are there, before the store is written.
    """
    from sqlalchemy import text

    seeds = to_complete(connection)
    if not seeds:
        return {}
    report(0, "completing the vocabulary")
    vocabulary_kept.views(decoder, settings, release)
    vocabulary_kept.add_seeds(decoder, "v_seed", seeds)
    done = connection.execute(text("SELECT concept_id FROM omop.concept_completed")).scalars()
    vocabulary_kept.add_seeds(decoder, "v_done", done)
    vocabulary_kept.select(decoder)
    if before is not None:
        before()
    brought = bring(connection, decoder, list(VOCABULARY), "new", report)
    mark_completed(connection, [row[0] for row in decoder.execute("SELECT concept_id FROM v_keep").fetchall()])
    return brought


def bring(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    tables: list[str],
    label: str,
    report: Callable[[int, str], None],
) -> dict[str, int]:
    """Add the rows of `v_<table>` to the store's tables, and correct those that differ; how many came, by table."""
    from app.loading.publish import fill

    counts = {table: int(one(decoder, f"SELECT count(*) FROM v_{table}")[0]) for table in tables}
    targets = [target(connection, decoder, table, count, label) for table, count in counts.items() if count]
    fill(connection, targets, report)
    return counts


def target(
    connection: Connection, decoder: duckdb.DuckDBPyConnection, table: str, count: int, label: str, given: str = "v_"
) -> Target:
    """How the rows of a DuckDB table go into a vocabulary table of the store."""
    from app.loading.publish import Target, merge_statement, rebuilding

    names = [name for name, _ in VOCABULARY[table].columns]
    query = f"SELECT {', '.join(names)} FROM {given}{table} ORDER BY {', '.join(VOCABULARY[table].key)}"

    def chunks() -> Iterator[rows.Chunk]:
        for chunk, _ in rows.stream(decoder, query):
            yield chunk, 0

    analyze = f"ANALYZE omop.{table}"
    drop, rebuild = rebuilding(connection, f"omop.{table}", count)
    if not connection.exec_driver_sql(f"SELECT EXISTS (SELECT 1 FROM omop.{table})").scalar():
        return Target(table, f"omop.{table}", names, chunks, before=drop, after=[*rebuild, analyze])
    staged = f"omop.staged_{table}_{label}"
    before = [f"CREATE TABLE {staged} (LIKE omop.{table})"]
    # the key stays, for merging needs it
    after = [f"ANALYZE {staged}", *(s for s in drop if s.startswith("DROP INDEX")), merge_statement(table, staged)]
    after += [f"DROP TABLE {staged}", *(s for s in rebuild if s.startswith("CREATE")), analyze]
    return Target(table, staged, names, chunks, before=before, after=after)


def know(
    decoder: duckdb.DuckDBPyConnection, judged: Mapping[str, Judged], settings: Settings, release: Release | None
) -> None:
    """Let `known_concept` hold what the release has of the concepts that events name: publishing will bring it."""
    tables = [table for table, found in judged.items() if table in EVENTS and found.num_loaded]
    if release is None or not tables:
        return
    vocabulary_kept.views(decoder, settings, release)
    named = " UNION ".join(
        f"SELECT {column} FROM t_{table}" for table in tables for column in ("concept_id", "source_concept_id")
    )
    decoder.execute(
        f"CREATE OR REPLACE TABLE v_named AS SELECT concept_id FROM ({named}) n (concept_id) "
        "ANTI JOIN known_concept USING (concept_id)"
    )
    decoder.execute("INSERT INTO known_concept SELECT concept_id FROM k_concept SEMI JOIN v_named USING (concept_id)")
