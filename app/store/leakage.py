"""Checks of leakage that SQL alone can answer, and where answers are kept (docs/science.md, section 6)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

NEAR_SHARE = 0.95
"""At least so many scans have a CT procedure, or a visit, within a day; else dates may have been shifted apart."""
SLACK_DAYS = 1

EARLY_OUTCOMES = """
SELECT count(*), count(*) FILTER (WHERE u.seconds <= coalesce(
           y.window_seconds[array_position(y.window_tasks, u.position)], t.start_seconds))
FROM label.tte y
CROSS JOIN LATERAL unnest(y.event_tasks, y.event_seconds) u(position, seconds)
JOIN label.label_set s USING (label_set_id)
JOIN label.task t ON t.task_set_id = s.task_set_id AND t.position = u.position
WHERE y.label_set_id = :label_set
"""

LABEL_SET = """
SELECT c.name || '@' || c.version AS cohort, t.name || '@' || t.version AS task_set, s.data_digest
FROM label.label_set s JOIN label.cohort c USING (cohort_id) JOIN label.task_set t USING (task_set_id)
WHERE s.label_set_id = :label_set
"""
"""The inputs of a label set, by their names, and the digest of the data it was made of."""

SPLIT_PERSONS = """
SELECT count(*), count(*) FILTER (WHERE splits > 1) FROM (
    SELECT person_id, count(DISTINCT split) AS splits FROM label.cohort_member WHERE cohort_id = :cohort GROUP BY 1) p
"""

SHARED_VOLUMES = """
WITH member AS (
    SELECT m.split, i.root, coalesce(i.details -> 'files' ->> 0, i.path) AS path, i.series_uid, i.sha256
    FROM label.cohort_member m JOIN omop.image_occurrence i USING (image_occurrence_id) WHERE m.cohort_id = :cohort
), shared AS (
    SELECT split, root || ':' || path AS volume FROM member
    UNION SELECT split, 'series ' || series_uid FROM member WHERE series_uid IS NOT NULL
    UNION SELECT split, 'content ' || sha256::text FROM member WHERE sha256 IS NOT NULL
)
SELECT count(*), count(*) FILTER (WHERE splits > 1)
FROM (SELECT volume, count(DISTINCT split) AS splits FROM shared GROUP BY 1) v
"""
"""Of series that lie scattered, the first file stands for all: their folder holds others, too."""

SCAN_DAYS = "SELECT person_id, index_time::date FROM label.cohort_member WHERE cohort_id = :cohort AND eligible"

CONTROLS = """
SELECT c.name, m.value, m.ci_low, m.ci_high FROM model.metric m
JOIN model.checkpoint c ON c.checkpoint_id = m.checkpoint_id
WHERE m.label_set_id = :label_set AND c.shuffled AND m.metric = 'mean_harrell_c' AND m.split = 'held_out'
  AND m.inputs = 'image' AND m.reference_checkpoint_id IS NULL AND m.subgroup IS NULL AND m.value IS NOT NULL
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question."""

    name: str
    asks: str
    mend: str
    """What to do where it fails, or could not be asked."""

    def counted(self, rows: int, violations: int, found: str, *, bound: int = 0) -> Answer:
        """Fails where more than `bound` of `rows` break it; where there are none it could not be made."""
        if not rows:
            return self.not_made(f"there is nothing to look at: {found}")
        return Answer(
            name=self.name, asks=self.asks, num_rows=rows, num_violations=violations,
            verdict="passed" if violations <= bound else "failed", found=found, mend=self.mend,
        )  # fmt: skip

    def not_made(self, why: str) -> Answer:
        """It could not be made."""
        return Answer(
            name=self.name, asks=self.asks, num_rows=0, num_violations=0, verdict="not_checked", found=why,
            mend=self.mend,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one check found."""

    name: str
    asks: str
    num_rows: int
    num_violations: int
    verdict: str
    """passed, failed or not_checked."""
    found: str
    mend: str


def pair(connection: Connection, statement: str, **values: Any) -> tuple[int, int]:
    """(rows, violations) that a statement counts."""
    from sqlalchemy import text

    row = connection.execute(text(statement), values).one()
    return int(row[0]), int(row[1])


def keep(connection: Connection, label_set_id: int, answers: Sequence[Answer], job_id: int | None) -> dt.datetime:
    """Store answers; the moment under which they stand."""
    from sqlalchemy import insert

    from app.schema.label import LeakageCheck

    now = dt.datetime.now(dt.UTC)
    rows = [
        {"label_set_id": label_set_id, "checked_at": now, "job_id": job_id}
        | {field: getattr(answer, field) for field in Answer.__dataclass_fields__}
        for answer in answers
    ]
    connection.execute(insert(LeakageCheck), rows)
    return now
