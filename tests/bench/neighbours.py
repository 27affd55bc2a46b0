"""Row `neighbours`: the ten scans nearest to one among 20,000 x 1,024 clustered embeddings, against comparing all."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import psycopg
from numpy.typing import NDArray

from app.embedded import ensure_up, stop
from app.settings import Settings
from app.store.embeddings import replace_embeddings
from app.store.session import make_engine
from tests.bench import Row, seconds
from tests.migrations.rows import add_checkpoint

SCANS, WIDTH, K, QUERIES = 20_000, 1024, 10, 50

EXACT = f"""
SELECT image_occurrence_id FROM model.embedding
WHERE checkpoint_id = %(c)s AND image_occurrence_id <> %(i)s
ORDER BY embedding <=> (SELECT embedding FROM model.embedding
                        WHERE checkpoint_id = %(c)s AND image_occurrence_id = %(i)s) LIMIT {K}
"""
"""Without the cast to a length no index can serve it: every vector is compared."""
INDEXED = f"SELECT image_occurrence_id FROM model.neighbours(%(i)s, 'bench', {K})"


def run() -> list[Row]:
    """Recall against exact search, and the median time of both."""
    with tempfile.TemporaryDirectory(prefix="lachesis-bench-") as folder:
        settings = Settings(home=Path(folder), home_is_named=True)
        try:
            url = ensure_up(settings).database_url
            checkpoint = fill(url)
            return measure(url, checkpoint)
        finally:
            stop(settings)


def embeddings() -> NDArray[np.float32]:
    """(SCANS, WIDTH) vectors in clusters, as embeddings of scans are."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((200, WIDTH))
    noise = generator.standard_normal((SCANS, WIDTH))
    return (centres[generator.integers(0, len(centres), SCANS)] + 0.5 * noise).astype(np.float32)


def fill(url: str) -> int:
    """A checkpoint with indexed embeddings; its key."""
    from sqlalchemy import text

    engine = make_engine(url)
    with engine.begin() as connection:
        checkpoint = add_checkpoint(connection, "bench", WIDTH)
        connection.execute(text("SELECT model.add_embedding_partition(:c, :w)"), {"c": checkpoint, "w": WIDTH})
        replace_embeddings(connection, checkpoint, np.arange(1, SCANS + 1), embeddings())
    with engine.begin() as connection:
        connection.execute(text("SELECT model.index_embedding_partition(:c)"), {"c": checkpoint})
    return checkpoint


def measure(url: str, checkpoint: int) -> list[Row]:
    """Ask each query both ways in turn; the first round warms the caches and is not timed."""
    found: dict[tuple[str, int], set[int]] = {}
    times: dict[str, list[float]] = {EXACT: [], INDEXED: []}
    with psycopg.connect(url) as connection:

        def ask(statement: str, scan: int) -> None:
            rows = connection.execute(statement, {"c": checkpoint, "i": scan})  # type: ignore[call-overload]
            found[statement, scan] = {row[0] for row in rows}

        scans = range(1, SCANS, SCANS // QUERIES)
        for round_ in range(2):
            for scan in scans:
                for statement, taken in times.items():
                    one = seconds(lambda s=statement, i=scan: ask(s, i))  # type: ignore[misc]
                    if round_:
                        taken.append(one)
    recall = statistics.mean(len(found[EXACT, scan] & found[INDEXED, scan]) / K for scan in scans)
    ours, exact = (1000 * statistics.median(times[statement]) for statement in (INDEXED, EXACT))
    return [
        Row(row="neighbours-recall", figure=recall, unit=f"recall@{K}", target=0.99),
        Row(row="neighbours", figure=ours, unit=f"ms (exact: {exact:.1f} ms)", target=10, at_least=False),
    ]
