"""Labels of two versions cell by cell (member and task): which statuses and times differ.

Rows are streamed, a pair of members at a time, and read as arrays over the tasks that both versions have; what is kept
does not grow with the number of members. Shape suffixes: K = task of a version, C = task of both.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.store.label_differences import Pair, Why

if TYPE_CHECKING:
    from sqlalchemy import Connection

STATUSES = ("event", "competing", "censored", "prior", "ineligible")
EVENT, COMPETING, CENSORED, PRIOR, INELIGIBLE = range(5)
DAY_SECONDS = 86_400.0
NONE = np.iinfo(np.int64).min
"""A time that a status has not."""
MOST_SHOWN = 10
COLUMNS = (
    *("person_id", "image_occurrence_id", "index_time", "split", "task", "status_before", "status_after"),
    *("time_days_before", "time_days_after"),
)
"""Of a row a cell."""

RULES = """
SELECT start_seconds, prior = 'exclude', death = 'competing', follow_up = 'data_cut'
FROM label.task JOIN label.label_set USING (task_set_id) WHERE label_set_id = %s ORDER BY position
"""

SCALARS = ("follow_up_seconds", "data_cut_seconds", "death_seconds")
LISTS = ("event_tasks", "event_seconds", "prior_tasks", "ineligible_tasks", "window_tasks", "window_seconds")
WIDTH = 1 + len(SCALARS) + len(LISTS)


def _side(letter: str) -> str:
    columns = ", ".join(f"y{letter}.{name} AS {letter}_{name}" for name in (*SCALARS, *LISTS))
    return f"m{letter}.eligible AS {letter}_eligible, {columns}"


def _sent(letter: str) -> str:
    columns = [f"{letter}_eligible", *(f"{letter}_{name}" for name in SCALARS)]
    return ", ".join(columns + [f"array_send({letter}_{name})" for name in LISTS])


# Pairs of members, both sides' rows in one; sorted before arrays are unpacked, so that pointers alone are sorted.
PAIRS = f"""
SELECT person_id, image_occurrence_id, index_time, split, {_sent("a")}, {_sent("b")}
FROM (
    SELECT ma.person_id, ma.image_occurrence_id, mb.index_time, mb.split, {_side("a")},
           {_side("b")}
    FROM unnest(%(before)s::int8[], %(after)s::int8[]) WITH ORDINALITY k(before, after, place)
    JOIN label.tte ya ON ya.label_set_id = %(a)s AND ya.cohort_member_id = k.before
    JOIN label.tte yb ON yb.label_set_id = %(b)s AND yb.cohort_member_id = k.after
    JOIN label.cohort_member ma ON ma.cohort_member_id = k.before
    JOIN label.cohort_member mb ON mb.cohort_member_id = k.after
    ORDER BY k.place
) pair
"""


@dataclass(frozen=True, slots=True)
class Rules:
    """How one version's tasks read its rows, and where the common tasks stand in it."""

    start: NDArray[np.int64]
    excludes_prior: NDArray[np.bool_]
    competing: NDArray[np.bool_]
    to_data_cut: NDArray[np.bool_]
    common: NDArray[np.int64]
    """(C,) positions."""


@dataclass(slots=True)
class Effect:
    """What differs over all cells of both versions."""

    tasks: list[str]
    crosstab: NDArray[np.int64]
    """(5, 5) cells by status before and after, those alone whose status differs."""
    status_changed: NDArray[np.int64]
    """(C,) members."""
    time_changed: NDArray[np.int64]
    """(C,) members with the same status and another time of the event or of the competing death."""
    follow_up_alone: int = 0
    """Cells censored on both sides whose follow-up ends elsewhere."""
    members: int = 0
    """Members with a status or such a time that differs."""
    largest: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cells:
    """One member of both versions: (C,) statuses, and seconds from the index (NONE where prior or ineligible)."""

    person_id: int
    image_occurrence_id: int
    index_time: Any
    split: str
    status: Sequence[NDArray[np.int8]]
    seconds: Sequence[NDArray[np.int64]]


def array_of(sent: bytes, kind: str) -> NDArray[Any]:
    """A one-dimensional array as Postgres sends it: a head of 20 bytes, then length and value of each element."""
    if len(sent) < 20:
        return np.empty(0, kind)
    (count,) = struct.unpack_from(">i", sent, 12)
    return np.frombuffer(sent, np.dtype([("length", ">i4"), ("value", f">{kind}")]), count, 20)["value"]


def cells_of(row: Sequence[Any], rules: Rules) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Status and time of the common tasks at one member, by the definition of label.member_task."""
    eligible, follow_up, data_cut, death = row[:4]
    data_cut = follow_up if data_cut is None else data_cut
    lists = [array_of(row[4 + n], "i8" if n in (1, 5) else "i2") for n in range(6)]
    event_tasks, event_seconds, prior, ineligible, window_tasks, window_seconds = lists
    none = np.iinfo(np.int64).min // 2
    opens = rules.start.copy()
    opens[window_tasks] = window_seconds
    end = np.where(rules.to_data_cut, none if data_cut is None else data_cut, none if follow_up is None else follow_up)
    died = rules.competing & (death <= end) if death is not None else np.zeros(len(end), np.bool_)
    status = np.where(died, COMPETING, CENSORED).astype(np.int8)
    seconds = np.where(died, death or 0, end)
    status[event_tasks], seconds[event_tasks] = EVENT, event_seconds
    status[prior[rules.excludes_prior[prior]]] = PRIOR
    status[ineligible] = INELIGIBLE
    status[end <= opens] = INELIGIBLE
    if not eligible:
        status[:] = INELIGIBLE
    seconds[status > CENSORED] = NONE
    return status[rules.common], seconds[rules.common]


def read_rules(connection: Connection, label_set_id: int, common: Sequence[int]) -> Rules:
    """How a version's tasks read its rows."""
    from app.store.session import raw

    rows = raw(connection).execute(RULES.encode(), (label_set_id,)).fetchall()
    columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else [()] * 4
    return Rules(
        start=np.array(columns[0], np.int64),
        excludes_prior=np.array(columns[1], np.bool_),
        competing=np.array(columns[2], np.bool_),
        to_data_cut=np.array(columns[3], np.bool_),
        common=np.array(common, np.int64),
    )


def stream(connection: Connection, pair: Pair, why: Why, tasks: Sequence[str]) -> Iterator[Cells]:
    """Both versions' cells of some tasks, for the members whose labels may differ."""
    from app.store.session import raw

    place = {task.task: task for task in why.tasks}
    rules = (
        read_rules(connection, pair.ids["a"], [place[name].before for name in tasks]),
        read_rules(connection, pair.ids["b"], [place[name].after for name in tasks]),
    )
    members = why.candidates
    values = pair.ids | {"before": [m.before for m in members], "after": [m.after for m in members]}
    with raw(connection).cursor("label_cells", binary=True) as cursor:
        cursor.itersize = 500
        for row in cursor.execute(PAIRS, values):
            sides = [cells_of(row[4 + WIDTH * n : 4 + WIDTH * (n + 1)], rules[n]) for n in range(2)]
            statuses, seconds = zip(*sides, strict=True)
            yield Cells(row[0], row[1], row[2], row[3], statuses, seconds)


def common_tasks(why: Why) -> list[str]:
    """Tasks of both versions, in the order of the later one."""
    return [task.task for task in why.tasks if task.before is not None and task.after is not None]


def measure(
    connection: Connection,
    pair: Pair,
    why: Why,
    tasks: Sequence[str],
    tell: Callable[[dict[str, Any]], None] | None = None,
    *,
    censored_too: bool = False,
) -> Effect:
    """Count the cells that differ, and tell each of them where somebody listens.

    A cell that is censored on both sides is counted apart where its follow-up ends elsewhere, and told only with
    `censored_too`: a period that ends later moves it in all tasks.
    """
    effect = Effect(
        list(tasks), np.zeros((5, 5), np.int64), np.zeros(len(tasks), np.int64), np.zeros(len(tasks), np.int64)
    )
    told = 0
    for cells in stream(connection, pair, why, tasks):
        (before, after), (start, end) = cells.status, cells.seconds
        other = before != after
        moved = ~other & (start != end)
        apart = moved & (before == CENSORED)
        moved &= ~apart
        effect.follow_up_alone += int(np.count_nonzero(apart))
        if other.any() or moved.any():
            effect.members += 1
            effect.status_changed += other
            effect.time_changed += moved
            effect.crosstab += np.bincount(before[other] * 5 + after[other], minlength=25).reshape(5, 5)
            for c in np.flatnonzero(moved & (before == EVENT)).tolist():
                told += 1
                _keep_largest(effect, told, row_of(cells, effect.tasks, c))
        if tell is not None:
            for c in np.flatnonzero(other | moved | (apart if censored_too else False)).tolist():
                tell(row_of(cells, effect.tasks, c))
    return effect


def _keep_largest(effect: Effect, number: int, row: dict[str, Any]) -> None:
    entry = (abs(row["time_days_after"] - row["time_days_before"]), -number, row)
    (heapq.heappush if len(effect.largest) < MOST_SHOWN else heapq.heappushpop)(effect.largest, entry)


def row_of(cells: Cells, tasks: Sequence[str], c: int) -> dict[str, Any]:
    """One cell as a row."""
    statuses = [STATUSES[side[c]] for side in cells.status]
    days = [None if side[c] == NONE else float(side[c]) / DAY_SECONDS for side in cells.seconds]
    who = (cells.person_id, cells.image_occurrence_id, cells.index_time, cells.split)
    return dict(zip(COLUMNS, (*who, tasks[c], *statuses, *days), strict=True))


def largest(effect: Effect) -> list[dict[str, Any]]:
    """Events whose time moved most, the largest move first."""
    return [row for _, _, row in sorted(effect.largest, key=lambda entry: entry[:2], reverse=True)]


def crosstab(effect: Effect) -> list[dict[str, Any]]:
    """Cells by status before and after, the most first."""
    rows = [
        {"before": STATUSES[a], "after": STATUSES[b], "cells": int(effect.crosstab[a, b])}
        for a in range(5)
        for b in range(5)
        if effect.crosstab[a, b]
    ]
    return sorted(rows, key=lambda row: -row["cells"])
