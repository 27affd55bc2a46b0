"""Rows `neighbours`: the ten scans nearest to one among 20,000 x 1,024 clustered embeddings, against comparing all.

Once among all of them, once among those that meet a condition.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psycopg
from numpy.typing import NDArray

from app.embedded import ensure_up, stop
from app.settings import Settings
from app.store import embedding_index
from app.store.embeddings import add_partition, replace_embeddings
from app.store.session import make_engine
from tests.bench import Row, seconds
from tests.migrations.rows import add_checkpoint, add_scans

SCANS, WIDTH, K, QUERIES = 20_000, 1024, 10, 50

EXACT = f"""
SELECT image_occurrence_id FROM model.embedding e {{}}
WHERE e.checkpoint_id = %(c)s AND image_occurrence_id <> %(i)s AND {{}}
ORDER BY embedding <=> (SELECT embedding FROM model.embedding
                        WHERE checkpoint_id = %(c)s AND image_occurrence_id = %(i)s) LIMIT {K}
"""
"""Without the cast to a length no index can serve it: every vector is compared."""
SCAN = "JOIN omop.image_occurrence i USING (image_occurrence_id)"
PERSON = f"{SCAN} JOIN omop.person p USING (person_id)"
INDEXED = f"SELECT image_occurrence_id FROM model.neighbours(%(i)s, 'bench', {K}{{}})"
CONDITIONS = {
    "": ("", "true"),
    ", gender_concept_id := 8507": (PERSON, "p.gender_concept_id = 8507"),
    ", split := 'held_out', cohort := 'chest'": (
        "JOIN label.cohort_member m USING (image_occurrence_id)",
        "m.split = 'held_out'",
    ),
    ", verdict := 'ok', min_age := 50, same_person := false": (
        PERSON,
        "i.verdict = 'ok' AND i.acquired_at >= p.birth_time + interval '50 years'",
    ),
    ", verdict := 'unusable'": (SCAN, "i.verdict = 'unusable'"),
}
"""Arguments of model.neighbours → the same in SQL, tables and condition.

All scans, a half, a quarter, a quarter, 134 of them.
"""


@dataclass
class Answers:
    """What one question was answered, each way, and how long it took."""

    exact: list[set[int]] = field(default_factory=list)
    indexed: list[set[int]] = field(default_factory=list)
    exact_ms: list[float] = field(default_factory=list)
    indexed_ms: list[float] = field(default_factory=list)

    @property
    def recall(self) -> float:
        return statistics.mean(len(one & other) / K for one, other in zip(self.exact, self.indexed, strict=True))


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
    """A checkpoint with indexed embeddings of scans of persons; its key."""
    images = np.arange(1, SCANS + 1)
    engine = make_engine(url)
    with engine.begin() as connection:
        checkpoint = add_checkpoint(connection, "bench", WIDTH)
        add_partition(connection, checkpoint, WIDTH)
        replace_embeddings(connection, checkpoint, images, embeddings())
        add_scans(connection, SCANS)
    with engine.begin() as connection:
        embedding_index.index(connection, checkpoint, images)
    return checkpoint


def measure(url: str, checkpoint: int) -> list[Row]:
    """Ask each question both ways in turn; the first round warms the caches and is not counted."""
    answers = {arguments: Answers() for arguments in CONDITIONS}
    with psycopg.connect(url) as connection:

        def ask(statement: str, scan: int) -> tuple[set[int], float]:
            found: set[int] = set()

            def once() -> None:
                rows = connection.execute(statement, {"c": checkpoint, "i": scan})  # type: ignore[call-overload]
                found.update(row[0] for row in rows)

            return found, 1000 * seconds(once)

        for round_ in range(2):
            for scan in range(2, SCANS, SCANS // QUERIES):
                for arguments, condition in CONDITIONS.items():
                    exact, exact_ms = ask(EXACT.format(*condition), scan)
                    indexed, indexed_ms = ask(INDEXED.format(arguments), scan)
                    if round_:
                        one = answers[arguments]
                        one.exact.append(exact)
                        one.indexed.append(indexed)
                        one.exact_ms.append(exact_ms)
                        one.indexed_ms.append(indexed_ms)
    everywhere = answers.pop("")
    return [*rows("neighbours", [everywhere], 10), *rows("neighbours-filtered", list(answers.values()), 30)]


def rows(name: str, answers: list[Answers], most_ms: float) -> list[Row]:
    """The lowest recall of some questions, and the time of the slowest."""
    slowest = max(answers, key=lambda one: statistics.median(one.indexed_ms))
    ours, exact = statistics.median(slowest.indexed_ms), statistics.median(slowest.exact_ms)
    recall = min(one.recall for one in answers)
    return [
        Row(row=f"{name}-recall", figure=recall, unit=f"recall@{K}", target=0.99),
        Row(row=name, figure=ours, unit=f"ms (exact: {exact:.1f} ms)", target=most_ms, at_least=False),
    ]
