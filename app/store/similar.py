"""Scans that look like one: nearest by a checkpoint's embeddings, and what became of their persons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.errors import InputError, UnknownName
from app.store.artifacts import find_checkpoint

if TYPE_CHECKING:
    from sqlalchemy import Connection

FEWEST_PERSONS = 11
"""What became of fewer persons is not told: they could be recognised."""
GENDERS = {"male": 8507, "female": 8532}


@dataclass(frozen=True, kw_only=True, slots=True)
class Among:
    """Which scans may be neighbours."""

    cohort: str | None = None
    split: str | None = None
    sex: str | None = None
    min_age: float | None = None
    max_age: float | None = None
    same_person: bool = False
    verdict: str | None = None


_NEAREST = """
SELECT n.*, p.gender_concept_id, floor(extract(epoch FROM n.acquired_at - p.birth_time) / 31557600)::int AS age
FROM model.neighbours(:image, :checkpoint, :k, :cohort, :split, :gender, :min_age, :max_age,
                      :same_person, :verdict) n
LEFT JOIN omop.person p USING (person_id) ORDER BY n.distance, n.image_occurrence_id
"""


def nearest(connection: Connection, image: int, checkpoint: str, k: int, among: Among) -> list[dict[str, Any]]:
    """Scan, person, time, age, gender and distance of the k nearest. Raises InputError for what cannot be asked."""
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    if among.sex is not None and among.sex not in GENDERS:
        raise UnknownName("sex", among.sex, GENDERS)
    find_checkpoint(connection, checkpoint)  # which knows the nearest name
    values = {"image": image, "checkpoint": checkpoint, "k": k, "cohort": among.cohort, "split": among.split}
    values |= {"gender": GENDERS[among.sex] if among.sex else None, "min_age": among.min_age}
    values |= {"max_age": among.max_age, "same_person": among.same_person, "verdict": among.verdict}
    try:
        return [dict(row) for row in connection.execute(text(_NEAREST), values).mappings()]
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", "") not in ("P0002", "22023"):
            raise
        raise InputError(str(error.orig).splitlines()[0]) from None


_TASKS = """
SELECT t.name FROM label.label_set l JOIN label.task t USING (task_set_id)
WHERE l.label_set_id = label.find_label_set(:labels) ORDER BY t.position
"""
_OUTCOMES = """
SELECT t.image_occurrence_id, t.person_id, t.status, t.time_days FROM label.tte_long(:labels) t
WHERE t.task = :task AND t.image_occurrence_id = ANY(:images)
"""


def outcomes(
    connection: Connection, rows: Sequence[dict[str, Any]], labels: str, task: str, horizon_days: int
) -> dict[str, Any]:
    """Add `status` and `time_days` to the rows, and sum them up: one scan a person, the nearest.

    Returns:
        persons, events by the horizon, and `incidence` by it (Aalen-Johansen: other deaths compete where the task says
        so); the last two null, and the rows left as they were, where fewer than 11 persons are behind them.
    """
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    try:
        known = list(connection.execute(text(_TASKS), {"labels": labels}).scalars())
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", "") not in ("P0002", "42704"):
            raise
        raise InputError(str(error.orig).splitlines()[0]) from None
    if task not in known:
        raise UnknownName("task", task, known)
    values = {"labels": labels, "task": task, "images": [row["image_occurrence_id"] for row in rows]}
    found = {row.image_occurrence_id: row for row in connection.execute(text(_OUTCOMES), values)}
    first: dict[int, Any] = {}
    for row in rows:
        one = found.get(row["image_occurrence_id"])
        if one is not None and one.status in ("event", "competing", "censored"):
            first.setdefault(one.person_id, one)
    summary: dict[str, Any] = {"task": task, "horizon_days": horizon_days, "persons": len(first)}
    if len(first) < FEWEST_PERSONS:
        return summary | {"events": None, "incidence": None}
    for row in rows:
        one = found.get(row["image_occurrence_id"])
        row["status"], row["time_days"] = (one.status, one.time_days) if one is not None else (None, None)
    told = [(one.time_days, one.status) for one in first.values()]
    events = sum(status == "event" and time <= horizon_days for time, status in told)
    return summary | {"events": events, "incidence": incidence(told, horizon_days)}


def incidence(told: Sequence[tuple[float, str]], horizon_days: float) -> float:
    """Aalen-Johansen's probability of the event by a time: (days, event | competing | censored) of each person."""
    free, happened = 1.0, 0.0
    for time in sorted({time for time, _ in told if time <= horizon_days}):
        at_risk = sum(other >= time for other, _ in told)
        events = sum((other, status) == (time, "event") for other, status in told)
        competing = sum((other, status) == (time, "competing") for other, status in told)
        happened += free * events / at_risk
        free *= 1 - (events + competing) / at_risk
    return happened
