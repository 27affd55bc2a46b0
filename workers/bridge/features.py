"""What the stage `features` reads of the store as arrays.

Shape suffix: N = cohort member, ascending by its key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.store import coded_outcomes, names
from app.store import features as store
from app.tasks.spec import TaskSpec
from ml.features import Events
from ml.labelling import ConceptTasks
from workers.bridge import Members, binary_cursor, coded
from workers.bridge import labelling as bridge

if TYPE_CHECKING:
    from sqlalchemy import Connection

LOOK_BACK_ROW = np.dtype(
    [("member", "i8"), ("time", "i8"), ("concept", "i4"), ("unit", "i4"), ("number", "f8"), ("place", "i8")]
)

LookBack = Mapping[str, NDArray[Any]]
"""What the statement tells, by kind (open, hidden, value): arrays of LOOK_BACK_ROW; place is that of the member."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTasks:
    """Tasks by whose concepts events are counted."""

    names: list[str]
    groups: ConceptTasks
    """Concepts → positions; rows that statements choose are of the negative concept -1 - position."""
    chosen: Events
    """(N stretches) these rows, before each member's index."""


def read_dates_alone(connection: Connection, cohort_id: int) -> NDArray[np.bool_]:
    """(N,) whether only the day of a member's scan is known."""
    statement = "SELECT index_date_only FROM label.cohort_member WHERE cohort_id = %s ORDER BY cohort_member_id"
    return np.array([row[0] for row in binary_cursor(connection).execute(statement, (cohort_id,))], np.bool_)


def read_look_back(
    connection: Connection, cohort_id: int, members: Members, number: int, *, truncated: bool
) -> LookBack:
    """Open visits, hidden conditions and last values, by one statement over omop.event."""
    found: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    values = {"cohort_id": cohort_id, "values": number}
    for kind, *row in binary_cursor(connection).execute(store.look_back(truncated=truncated), values):
        found[kind].append((*row, 0))
    made = {kind: np.array(found[kind], LOOK_BACK_ROW) for kind in ("open", "hidden", "value")}
    for rows in made.values():
        rows["place"] = np.searchsorted(members.member, rows["member"])
    return made


def stretches(size: int, place: NDArray[np.int64], time: NDArray[np.int64], concept: NDArray[np.int64]) -> Events:
    """Rows of members as `size` stretches, each ascending in (time, concept)."""
    order = np.lexsort((concept, time, place))
    ptr = np.searchsorted(place[order], np.arange(size + 1))
    return Events(ptr=ptr.astype(np.int64), time=time[order], concept=concept[order].astype(np.int32))


def hidden_events(looked: LookBack, members: Members) -> Events:
    """Conditions of visits that are open at a member's index, a stretch a member."""
    rows = looked["hidden"]
    return stretches(len(members.member), rows["place"], rows["time"], rows["concept"].astype(np.int64))


def read_feature_tasks(
    connection: Connection, cohort_id: int, members: Members, task_set: names.Version | None, *, truncated: bool
) -> FeatureTasks:
    """Names, concepts and chosen rows of the tasks of a set; of none where there is none."""
    empty = np.zeros(0, np.int64)
    if task_set is None:
        return FeatureTasks(
            names=[], groups=ConceptTasks.of_pairs(empty, empty), chosen=Events.none(len(members.member))
        )
    tasks = bridge.read_label_tasks(connection, task_set.id)
    statement = "SELECT name FROM label.task WHERE task_set_id = %s ORDER BY position"
    called = [row[0] for row in binary_cursor(connection).execute(statement, (task_set.id,))]
    rows = list(_chosen_rows(connection, cohort_id, members, tasks, truncated=truncated))
    place, time, concept = (np.concatenate([empty, *(row[n] for row in rows)]) for n in range(3))
    return FeatureTasks(
        names=called,
        groups=bridge.read_concept_tasks(connection, task_set.id, tasks),
        chosen=stretches(len(members.member), place, time, concept),
    )


Rows = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _chosen_rows(
    connection: Connection, cohort_id: int, members: Members, tasks: bridge.LabelTasks, *, truncated: bool
) -> Iterable[Rows]:
    """(place, coded time, concept) of the rows of tasks that concepts alone do not describe."""
    together, apart = coded_outcomes.split(tasks.by_statement)
    if together:
        statement = store.chosen_by_codes(truncated=truncated)
        for member, time, positions in coded.read_rows(connection, statement, together, {"cohort_id": cohort_id}):
            yield np.searchsorted(members.member, member), time, -1 - positions
    by_visits = {}
    for position, definition in apart.items():
        if not TaskSpec.from_dict({k: v for k, v in definition.items() if k != "resolved"}).by_codes:
            by_visits[position] = definition
            continue
        statement, values = store.chosen_before(definition, truncated=truncated)
        found = binary_cursor(connection).execute(statement, values | {"cohort_id": cohort_id}).fetchall()
        rows = np.array(found, np.int64).reshape(-1, 2)
        yield np.searchsorted(members.member, rows[:, 0]), rows[:, 1], np.full(len(rows), -1 - position)
    if by_visits:  # starts of visits and stays, a row a person: each of its members gets them
        only = bridge.LabelTasks(rules=tasks.rules, by_statement=by_visits, clocks={})
        events = bridge.read_statement_events(connection, cohort_id, only)
        begin, end = (np.searchsorted(events.person, members.person, side=side) for side in ("left", "right"))
        place = np.repeat(np.arange(len(begin)), end - begin)
        take = np.arange(len(place)) + np.repeat(begin - (np.cumsum(end - begin) - (end - begin)), end - begin)
        time = events.time[take]
        kept = time >> 1 < members.index_seconds[place] if truncated else np.ones(len(place), np.bool_)
        yield place[kept], time[kept], events.concept[take][kept].astype(np.int64)
