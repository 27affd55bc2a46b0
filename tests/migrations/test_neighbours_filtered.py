"""Filtered neighbours of many scans: from the index where many are left, by comparing all where few are; recall."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sqlalchemy import Engine, text

from app.store import embedding_index
from tests.migrations.rows import add_scans
from tests.migrations.test_embeddings import clustered, fill, nearest, unit

N = 12_000
QUERIES = range(1, N + 1, 300)

FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {
    "gender_concept_id := 8507": (lambda n: n % 2 == 0, True),
    "cohort := 'chest', split := 'held_out'": (lambda n: n % 4 == 0, True),
    "verdict := 'ok'": (lambda n: (n % 3 != 0) & (n % 100 != 1), True),
    "verdict := 'suspect', same_person := false": (lambda n: n % 3 == 0, True),
    "min_age := 40, max_age := 69, gender_concept_id := 8532": (
        lambda n: (n % 2 == 1) & (n % 80 >= 40) & (n % 80 <= 69),
        True,
    ),
    "verdict := 'unusable'": (lambda n: (n % 100 == 1) & (n % 3 != 0), False),
    "gender_concept_id := 8507, max_age := 9": (lambda n: (n % 2 == 0) & (n % 80 <= 9), False),
}
"""Conditions → scans that meet them, and whether more than 2,000 do, so that the index is walked."""


def test_filtered_neighbours_come_from_the_index_where_many_are_left_and_are_the_right_ones(engine: Engine) -> None:
    checkpoint = fill(engine, N)
    with engine.begin() as connection:
        add_scans(connection, N)
        embedding_index.tune(connection, checkpoint, list(range(1, N, 500)))
    directions, scans = unit(clustered(N)), np.arange(1, N + 1)
    for conditions, (keep, many) in FILTERS.items():
        wanted = keep(scans)
        assert (wanted.sum() > 2_000) == many
        with engine.begin() as connection:
            ask = f"SELECT model.neighbours_sql(5, 'tiny', 10, {conditions})"
            statement = connection.exec_driver_sql(ask).scalar_one()
            plan = "\n".join(connection.exec_driver_sql("EXPLAIN " + statement).scalars())
            near = f"SELECT image_occurrence_id FROM model.neighbours(%(i)s, 'tiny', 10, {conditions})"
            found = {i: list(connection.exec_driver_sql(near, {"i": i}).scalars()) for i in QUERIES}
        assert (f"embedding_{checkpoint}_hnsw" in plan) == many, plan
        assert ("SubPlan" in plan) == many, "few scans are joined, many are asked one by one as the index gives them"
        assert "Incremental Sort" not in plan, "what the index gives is not sorted yet"
        hits = []
        for i, some in found.items():
            distance = np.where(wanted, 1 - directions @ directions[i - 1], np.inf)
            distance[i - 1] = np.inf
            exact = set((np.argsort(distance, kind="stable")[:10] + 1).tolist())
            assert len(some) == 10 and all(wanted[s - 1] for s in some)
            hits.append(len(exact & set(some)) / 10)
        assert np.mean(hits) >= (0.99 if many else 0.9999), (conditions, np.mean(hits))


def test_an_index_is_searched_as_narrowly_as_finds_ninety_nine_in_a_hundred(engine: Engine) -> None:
    checkpoint = fill(engine, 5_000)
    images = list(range(1, 5_000, 50))
    with engine.begin() as connection:
        judged = embedding_index.tune(connection, checkpoint, images)
        row = connection.execute(text("SELECT * FROM model.embedding_index")).mappings().one()
        near = text("SELECT image_occurrence_id FROM model.neighbours(:i, 'tiny', 10)")
        exact = {i: nearest(clustered(5_000), i, 10) for i in images}

        def recall(ef_search: int) -> float:
            connection.execute(text("UPDATE model.embedding_index SET ef_search = :e"), {"e": ef_search})
            found = (set(connection.execute(near, {"i": i}).scalars()) for i in images)
            return float(np.mean([len(some & exact[i]) / 10 for i, some in zip(images, found, strict=True)]))

        assert recall(judged.ef_search) == pytest.approx(judged.recall, abs=0.003) and judged.recall >= 0.99
        narrower = [ef for ef in embedding_index.LADDER if ef < judged.ef_search]
        assert all(recall(ef) < 0.993 for ef in narrower)
    assert (row["ef_search"], row["recall"], row["num_queries"], row["num_embeddings"]) == (
        judged.ef_search,
        judged.recall,
        100,
        5_000,
    )


def test_neighbours_are_found_where_none_near_the_scan_meets_the_condition(engine: Engine) -> None:
    width = 256
    checkpoint = fill(engine, N, width=width)
    directions = unit(clustered(N, width=width))
    drawn = np.random.default_rng(0)  # as `clustered` draws
    drawn.standard_normal((200, width))
    far = drawn.integers(0, 200, N) >= 100  # half of the clusters, and the queries are of the others
    queries = np.flatnonzero(~far)[:80].tolist()
    with engine.begin() as connection:
        add_scans(connection, N)
        embedding_index.tune(connection, checkpoint, list(range(1, N, 500)))
        mark = "UPDATE omop.image_occurrence SET verdict = CASE WHEN image_occurrence_id = ANY (:i) "
        ids = (np.flatnonzero(far) + 1).tolist()
        connection.execute(text(f"{mark} THEN 'ok' ELSE 'suspect' END"), {"i": ids})
    hits = []
    with engine.begin() as connection:
        near = "SELECT image_occurrence_id FROM model.neighbours(%(i)s, 'tiny', 10, verdict := 'ok')"
        for row in queries:
            found = set(connection.exec_driver_sql(near, {"i": row + 1}).scalars())
            distance = np.where(far, 1 - directions @ directions[row], np.inf)
            hits.append(len(found & set((np.argsort(distance)[:10] + 1).tolist())) / 10)
    assert np.mean(hits) >= 0.99, np.mean(hits)
