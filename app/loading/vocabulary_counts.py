"""Count a source's events by concept when it is published: out of the decoder where it holds them all, else by SQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from app.loading import rows
from app.loading.cdm import EVENTS
from app.store.copy import copy_in
from app.store.vocabulary import forget_counts, recount

if TYPE_CHECKING:
    import duckdb
    from sqlalchemy import Connection

COLUMNS = ("concept_id", "num_events", "num_persons", "num_source_events", "num_value_events", "source_id")

_COUNT = """
WITH e AS NOT MATERIALIZED ({events})
SELECT concept_id, sum(events)::BIGINT, sum(persons)::BIGINT, sum(source_events)::BIGINT, sum(value_events)::BIGINT
FROM (
    SELECT concept_id, count(*) AS events, count(DISTINCT person_id) AS persons, 0 AS source_events, 0 AS value_events
    FROM e GROUP BY 1
    UNION ALL SELECT source_concept_id, 0, 0, count(*), 0 FROM e GROUP BY 1
    UNION ALL SELECT value_as_concept_id, 0, 0, 0, count(*) FROM e WHERE value_as_concept_id IS NOT NULL GROUP BY 1
    UNION ALL SELECT unit_concept_id, 0, 0, 0, count(*) FROM e WHERE unit_concept_id IS NOT NULL GROUP BY 1
) GROUP BY 1 ORDER BY 1
"""


def count_concepts(
    connection: Connection,
    decoder: duckdb.DuckDBPyConnection,
    source_id: int,
    shown: Mapping[str, int],
    *,
    whole: bool,
) -> None:
    """Bring omop.concept_count up to date for one source, in the publishing transaction.

    Args:
        connection: the publishing transaction, in which the source's new loads are in the books already.
        decoder: holds `t_<table>` for the tables of `shown`.
        source_id: the source.
        shown: event tables in the decoder, with their rows.
        whole: the decoder holds every event that the source shows from now on.
    """
    if not whole:
        recount(connection, source_id)
        return
    forget_counts(connection, source_id)
    columns = "person_id, concept_id, source_concept_id, value_as_concept_id, unit_concept_id"
    events = " UNION ALL ".join(f"SELECT {columns} FROM t_{table}" for table, count in shown.items() if count)
    if not events:
        return

    def chunks() -> Iterator[bytes]:
        for chunk, _ in rows.stream(decoder, _COUNT.replace("{events}", events), (np.int32(source_id),)):
            yield chunk

    copy_in(connection, "omop.concept_count", COLUMNS, chunks())


def covers(judged: Mapping[str, Any], published: Mapping[str, Any], mode: str) -> bool:
    """True where a delivery brings every event table that its source shows."""
    return mode == "snapshot" and all(table in judged for table in published if table in EVENTS)
