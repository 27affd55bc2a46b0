"""Checks of leakage that look at features: made anew without the future, and too good to be true."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.store import features as store
from app.store.features import Column
from app.store.leakage import Answer, Check
from app.store.work import Work
from ml.labelling import COMPETING, EVENT, INELIGIBLE, PRIOR, TaskOutcomes, task_outcomes
from ml.pairs import concordance
from workers.bridge import LabelSetInfo, read_labels
from workers.stages.features import asked_before, compute

if TYPE_CHECKING:
    from sqlalchemy import Connection

TOO_GOOD = 0.95
"""A single feature that tells who has the outcome better than this was probably recorded after it."""
FEWEST = 20
"""Events, and scans without, below which no share is estimated."""
MAX_TASKS = 50
SHOWN = 5

LOOK_BACK = Check(
    name="features_look_back",
    asks="features do not change when everything from the index on is taken away",
    mend="make them again: `lachesis features COHORT` replaces what others put into label.feature",
)
TOO_GOOD_CHECK = Check(
    name="no_feature_is_too_good",
    asks=f"no single feature tells an outcome with a C or an AUC over {TOO_GOOD}",
    mend="look at when the feature is recorded: it may be a consequence of the outcome, or a code of the same act",
)
NO_FEATURES = "the cohort has no features; `lachesis features COHORT` makes them"


def features_look_back(work: Work, connection: Connection, cohort_id: int) -> Answer:
    """Features of every member, made anew without anything from its index on, are those that are stored."""
    made = store.stored(connection, cohort_id)
    if made is None:
        return LOOK_BACK.not_made(NO_FEATURES)
    asked = asked_before(connection, made.definition)
    anew = compute(work, connection, cohort_id, asked, truncated=True)
    found = store.read_columns(connection, cohort_id, anew.members.member)
    wrong = differences(anew.columns, found)
    rows = sum(len(union(anew.columns.get(name), found.get(name))) for name in anew.columns.keys() | found.keys())
    if wrong and made.is_intact:
        now = compute(work, connection, cohort_id, asked)
        if not differences(anew.columns, now.columns):
            return LOOK_BACK.not_made("the records have changed since the features were made; make them again")
    said = f"{sum(wrong.values()):,} of {rows:,} values differ"
    if wrong:
        worst = sorted(wrong, key=lambda name: (-wrong[name], name))
        said += ": " + ", ".join(f"{name} ({wrong[name]:,})" for name in worst[:SHOWN])
        said += "" if made.is_intact else "; rows were changed by others than `lachesis features`"
    return LOOK_BACK.counted(rows, sum(wrong.values()), said)


def union(one: Column | None, other: Column | None) -> NDArray[np.int64]:
    """Members that have a feature in either."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *(c.place for c in (one, other) if c is not None)]))


def differences(ours: dict[str, Column], theirs: dict[str, Column]) -> dict[str, int]:
    """How many members differ in a feature, by name; those without any are left out."""
    found = {}
    for name in ours.keys() | theirs.keys():
        one, other = ours.get(name), theirs.get(name)
        place = union(one, other)
        differ = int((_at(one, place) != _at(other, place)).sum())
        if differ:
            found[name] = differ
    return found


def _at(column: Column | None, place: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Bits of a feature at some members; all ones, which no number has, where there is no value."""
    bits = np.full(len(place), np.iinfo(np.uint32).max, np.uint32)
    if column is not None:
        bits[np.searchsorted(place, column.place)] = column.value.view(np.uint32)
    return bits


def no_feature_is_too_good(work: Work, connection: Connection, info: LabelSetInfo) -> Answer:
    """No single feature, nor whether it is known, tells almost surely who has an outcome, or who has it first."""
    from sqlalchemy import text

    if len(info.task_names) > MAX_TASKS:
        return TOO_GOOD_CHECK.not_made(f"over {MAX_TASKS} tasks; ask a label set of clinical ones")
    labels = read_labels(connection, info)
    columns = store.read_columns(connection, info.cohort_id, labels.member)
    if not columns:
        return TOO_GOOD_CHECK.not_made(NO_FEATURES)
    statement = "SELECT name FROM label.feature_definition WHERE cohort_id = :cohort AND absent_is_zero"
    counts = set(connection.execute(text(statement), {"cohort": info.cohort_id}).scalars())
    tried, suspects = 0, []
    for position, task in enumerate(info.task_names):
        work.progress(position, len(info.task_names), "tasks", "looking at features one by one")
        outcomes = task_outcomes(labels, position)
        for name, column in columns.items():
            work.check()
            for numbers, known in looks(column, len(labels.member), absent_is_zero=name in counts):
                score = separation(outcomes, numbers, known)
                tried += score is not None
                if score is not None and score > TOO_GOOD:
                    suspects.append(f"{name} for {task} ({score:.3f})")
    said = f"{len(suspects):,} of {tried:,} pairs of feature and task are too good"
    said += ": " + ", ".join(suspects[:SHOWN]) if suspects else ""
    if not tried:
        return TOO_GOOD_CHECK.not_made(f"no task has {FEWEST} events and {FEWEST} scans without among known features")
    return TOO_GOOD_CHECK.counted(tried, len(suspects), said)


def looks(
    column: Column, size: int, *, absent_is_zero: bool
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """A feature as numbers (N,) and where they are known (N,); where absence is not nought, that it is known, too."""
    numbers, known = np.zeros(size), np.zeros(size, np.bool_)
    numbers[column.place], known[column.place] = column.value, np.isfinite(column.value)
    numbers[~known] = 0.0
    if absent_is_zero:
        yield numbers, np.ones(size, np.bool_)
        return
    if len(np.unique(numbers[known])) > 1:
        yield numbers, known
    if not known.all():
        yield known.astype(np.float64), np.ones(size, np.bool_)


def separation(outcomes: TaskOutcomes, numbers: NDArray[np.float64], known: NDArray[np.bool_]) -> float | None:
    """The larger of C and AUC (event or not), whichever way round; None where there are too few scans."""
    rows = np.flatnonzero(known & (outcomes.status != PRIOR) & (outcomes.status != INELIGIBLE))
    status, risk, time = outcomes.status[rows], numbers[rows], outcomes.time_days[rows]
    event, free = status == EVENT, (status != EVENT) & (status != COMPETING)
    if min(event.sum(), free.sum()) < FEWEST:
        return None
    area = auc(risk[event], risk[free])
    alone = np.arange(len(rows))
    concordant, comparable = concordance(
        time, event, risk, alone, np.ones(len(rows)), np.ones((len(rows), 1), np.uint16)
    )
    c = float(concordant[0] / comparable[0]) if comparable[0] else 0.5
    return max(area, 1 - area, c, 1 - c)


def auc(event: NDArray[np.float64], none: NDArray[np.float64]) -> float:
    """Chance that a scan with the event has the larger value, ties half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([event, none]))
    return float((ranks[: len(event)].sum() - len(event) * (len(event) + 1) / 2) / (len(event) * len(none)))
