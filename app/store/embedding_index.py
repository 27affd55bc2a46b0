"""The index of a checkpoint's embeddings: built, judged against comparing all, and searched as wide as it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sqlalchemy import Connection

K = 10
LEAST_RECALL = 0.99
QUERIES = 100
"""Scans by which an index is judged."""
LADDER = (40, 80, 120, 200, 400, 700, 1000)
"""hnsw.ef_search that are tried, narrowest first; pgvector allows no more than the last."""


@dataclass(frozen=True, slots=True)
class Judged:
    """How an index is searched from now on, and the share of the ten exactly nearest scans it finds so."""

    ef_search: int
    recall: float


_EXACT = """
SELECT q.image, n.farthest, n.num
FROM unnest(CAST(:images AS bigint[])) q(image)
JOIN model.embedding o ON o.checkpoint_id = :id AND o.image_occurrence_id = q.image
CROSS JOIN LATERAL (
    SELECT max(x.distance) AS farthest, count(*) AS num FROM (
        SELECT e.embedding <=> o.embedding AS distance FROM model.embedding e
        WHERE e.checkpoint_id = :id AND e.image_occurrence_id <> q.image
        ORDER BY (e.embedding <=> o.embedding) + 0 LIMIT :k) x) n
"""
_FOUND = """
SELECT avg(CASE WHEN q.num = 0 THEN 1 ELSE (
    SELECT count(*) FROM model.neighbours(q.image, :checkpoint, :k) n WHERE n.distance <= q.farthest)::float8 / q.num
    END)
FROM unnest(CAST(:images AS bigint[]), CAST(:farthest AS float8[]), CAST(:nums AS int[])) q(image, farthest, num)
"""
_SET = """
INSERT INTO model.embedding_index (checkpoint_id, ef_search, recall, num_queries, num_embeddings)
VALUES (:id, :ef, :recall, :queries, (SELECT count(*) FROM model.embedding WHERE checkpoint_id = :id))
ON CONFLICT (checkpoint_id) DO UPDATE SET ef_search = excluded.ef_search, recall = excluded.recall,
    num_queries = excluded.num_queries, num_embeddings = excluded.num_embeddings, created_at = clock_timestamp()
"""


def index(connection: Connection, checkpoint_id: int, images: NDArray[np.int64]) -> Judged | None:
    """Make the index where it is absent, and find how wide to search it; None where vectors are too long for one.

    Args:
        connection: its transaction holds all of it.
        checkpoint_id: whose embeddings.
        images: (N,) scans that have one, of which some are asked for.
    """
    import numpy as np
    from sqlalchemy import text

    made = connection.execute(text("SELECT model.index_embedding_partition(:c)"), {"c": checkpoint_id}).scalar_one()
    if not made:
        return None
    some = np.random.default_rng(0).permutation(images)[:QUERIES]
    return tune(connection, checkpoint_id, some.tolist())


def tune(connection: Connection, checkpoint_id: int, images: list[int]) -> Judged:
    """Search by the narrowest of LADDER whose recall over some scans is .99, or by the widest; it is kept."""
    from sqlalchemy import text

    rows = connection.execute(text(_EXACT), {"images": images, "id": checkpoint_id, "k": K}).all()
    exact = {
        "images": [row.image for row in rows],
        "farthest": [row.farthest for row in rows],
        "nums": [row.num for row in rows],
    }
    values = {"id": checkpoint_id, "queries": len(rows)}
    for ef_search in LADDER:
        connection.execute(text(_SET), values | {"ef": ef_search, "recall": 0.0})  # model.neighbours reads it
        found = connection.execute(text(_FOUND), exact | {"checkpoint": str(checkpoint_id), "k": K}).scalar()
        recall = 1.0 if found is None else float(found)
        if recall >= LEAST_RECALL:
            break
    connection.execute(text(_SET), values | {"ef": ef_search, "recall": recall})
    return Judged(ef_search, recall)
