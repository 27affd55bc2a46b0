"""Embeddings: partitions, the index, and the search that uses it."""

from __future__ import annotations

import numpy as np
import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from app.store.embeddings import replace_embeddings
from tests.migrations.rows import add_checkpoint

WIDTH = 64


def clustered(n: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """(n, width) float32 vectors in clusters, as embeddings of scans are."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((200, width))
    return (centres[generator.integers(0, 200, n)] + 0.5 * generator.standard_normal((n, width))).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors as stored in halves, scaled to length 1."""
    stored = vectors.astype(np.float16).astype(np.float64)
    return stored / np.linalg.norm(stored, axis=1, keepdims=True)


def nearest(vectors: np.ndarray, scan: int, k: int) -> set[int]:
    """The k scans nearest to a scan (numbered from 1) by cosine distance, found by comparing all."""
    directions = unit(vectors)
    distance = 1 - directions @ directions[scan - 1]
    distance[scan - 1] = np.inf
    return {int(i) + 1 for i in np.argsort(distance, kind="stable")[:k]}


def fill(engine: Engine, n: int, *, indexed: bool = True, width: int = WIDTH) -> int:
    """A checkpoint `tiny` with n embeddings."""
    with engine.begin() as connection:
        checkpoint = add_checkpoint(connection, "tiny", width)
        connection.execute(text("SELECT model.add_embedding_partition(:c, :w)"), {"c": checkpoint, "w": width})
        replace_embeddings(connection, checkpoint, np.arange(1, n + 1), clustered(n, width=width))
    if indexed:
        with engine.begin() as connection:
            made = connection.execute(text("SELECT model.index_embedding_partition(:c)"), {"c": checkpoint}).scalar()
            assert made is True
    return checkpoint


def test_neighbours_of_twenty_thousand_come_from_the_index_and_are_the_right_ones(engine: Engine) -> None:
    checkpoint = fill(engine, 20_000)
    queries = range(1, 20_001, 400)
    with engine.begin() as connection:
        plan = connection.execute(text("SELECT model.neighbours_sql(5, 'tiny', 10)")).scalar_one()
        explained = "\n".join(connection.execute(text("EXPLAIN " + plan.replace(":", r"\:"))).scalars())
        assert f"embedding_{checkpoint}_hnsw" in explained
        near = text("SELECT image_occurrence_id FROM model.neighbours(:i, 'tiny', 10)")
        found = {i: set(connection.execute(near, {"i": i}).scalars()) for i in queries}
    exact = {i: nearest(clustered(20_000), i, 10) for i in queries}
    assert all(len(some) == 10 and i not in some for i, some in found.items())
    recall = np.mean([len(found[i] & exact[i]) / 10 for i in queries])
    assert recall >= 0.99


def test_more_neighbours_than_the_index_looks_at_by_itself_are_found(engine: Engine) -> None:
    fill(engine, 3_000)
    with engine.begin() as connection:
        statement = text("SELECT distance FROM model.neighbours(1, 'tiny', 1000)")
        distances = list(connection.execute(statement).scalars())
    assert len(distances) == 1000
    assert distances == sorted(distances)


def test_distances_are_cosine_distances(engine: Engine) -> None:
    fill(engine, 50, indexed=False)
    directions = unit(clustered(50))
    expected = np.sort(1 - directions[1:] @ directions[0])[:5]
    with engine.begin() as connection:
        rows = connection.execute(text("SELECT distance FROM model.neighbours(1, 'tiny', 5)")).scalars().all()
    np.testing.assert_allclose(rows, expected, atol=2e-3)


def test_a_checkpoint_may_be_named_by_name_id_digest_or_alias(engine: Engine) -> None:
    checkpoint = fill(engine, 10, indexed=False)
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO model.alias (alias, checkpoint_id) VALUES ('champion', :c)"), {"c": checkpoint}
        )
        digest = connection.execute(text("SELECT left(sha256, 8) FROM model.checkpoint")).scalar_one()
        for name in ("tiny", str(checkpoint), digest, "champion"):
            assert connection.execute(text("SELECT model.find_checkpoint(:n)"), {"n": name}).scalar() == checkpoint


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("model.neighbours(1, 'large', 5)", "No checkpoint named 'large'"),
        ("model.neighbours(99, 'tiny', 5)", "Scan 99 has no embedding by checkpoint 'tiny'"),
        ("model.neighbours(1, 'tiny', 0)", "Expected k of 1 or more, found 0"),
        ("model.add_embedding_partition(1, 7)", "has embeddings of length 64, found 7"),
        ("model.index_embedding_partition(9)", "Checkpoint 9 has no embeddings"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(engine: Engine, call: str, message: str) -> None:
    fill(engine, 10, indexed=False)
    with engine.connect() as connection, pytest.raises(DBAPIError, match=message):
        connection.execute(text(f"SELECT * FROM {call}"))


def test_a_partition_takes_vectors_of_its_length_only_and_keeps_them_in_the_page(engine: Engine) -> None:
    checkpoint = fill(engine, 10, indexed=False)
    with engine.connect() as connection, pytest.raises(IntegrityError):
        connection.execute(text(f"INSERT INTO model.embedding VALUES ({checkpoint}, 99, '[1,2,3]')"))
    with engine.begin() as connection:
        connection.execute(text("SELECT model.add_embedding_partition(:c, :w)"), {"c": checkpoint, "w": WIDTH})
        storage = (
            "SELECT attstorage::text FROM pg_attribute WHERE attrelid = 'model.embedding_1'::regclass AND attname = "
        )
        assert connection.execute(text(storage + "'embedding'")).scalar() == "p"


def test_a_plain_worker_may_add_and_index_partitions(store: object, engine: Engine) -> None:
    with engine.begin() as connection:
        checkpoint = add_checkpoint(connection, "tiny", 3)
        connection.execute(text("SET LOCAL ROLE lachesis_worker"))
        connection.execute(text("SELECT model.add_embedding_partition(:c, 3)"), {"c": checkpoint})
        connection.execute(text(f"INSERT INTO model.embedding VALUES ({checkpoint}, 1, '[1,2,3]')"))
        assert connection.execute(text("SELECT model.index_embedding_partition(:c)"), {"c": checkpoint}).scalar()
    with engine.connect() as connection, pytest.raises(DBAPIError) as refused:
        connection.execute(text("SET LOCAL ROLE lachesis_worker"))
        connection.execute(text(f"DROP TABLE model.embedding_{checkpoint}"))
    assert isinstance(refused.value.orig, psycopg.errors.InsufficientPrivilege)


def test_functions_that_act_as_the_owner_cannot_be_led_astray(engine: Engine) -> None:
    statement = """
        SELECT p.oid::regprocedure::text, p.proconfig FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname IN ('omop', 'label', 'model', 'ops') AND p.prosecdef
    """
    with engine.connect() as connection:
        found = connection.execute(text(statement)).all()
        public = "SELECT count(*) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace, "
        public += "aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a "
        public += "WHERE n.nspname IN ('omop', 'label', 'model', 'ops') AND a.grantee = 0"
        assert connection.execute(text(public)).scalar() == 0
    assert len(found) == 5
    assert all(config[0].startswith("search_path=pg_catalog") and config[0].endswith("pg_temp") for _, config in found)
