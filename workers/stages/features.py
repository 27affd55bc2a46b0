"""Stage `features`: what is known of each scan's person at its index, from timelines and one statement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.errors import InputError
from app.store import features as store
from app.store import names
from app.store.features import Definition
from app.store.work import Work
from ml.features import EVER, Events, count_before, first_and_last
from ml.labelling import DAY_SECONDS, ConceptTasks
from workers.bridge import Members, binary_cursor, read_members, read_timelines
from workers.bridge import labelling as bridge

if TYPE_CHECKING:
    from sqlalchemy import Connection

WINDOWS = (30, 365)
LAST_VALUES = 20
CHUNK_MEMBERS = 2_048
MAX_TASKS = 1_000

Values = dict[str, list[tuple[int, float]]]
"""Feature → (row of the member, value), members ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What features were asked for."""

    windows: tuple[int, ...]
    values: int
    task_set: names.Version | None

    def definition(self) -> dict[str, Any]:
        tasks = self.task_set and f"{self.task_set.name}@{self.task_set.version}"
        return {"windows_days": list(self.windows), "values": self.values, "tasks": tasks}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Features of a cohort."""

    definitions: list[Definition]
    values: Values
    members: Members


def features(work: Work) -> dict[str, Any]:
    """Make the features of `args["cohort"]`; the same again changes nothing.

    Raises:
        UnknownName: no such cohort or task set.
        InputError: windows or the number of last values make no sense.
    """
    windows = tuple(sorted({int(days) for days in work.args.get("windows") or WINDOWS}))
    number = int(work.args.get("values", LAST_VALUES))
    if not windows or windows[0] < 1 or windows[-1] > 36_525 or not 0 <= number <= 1_000:
        raise InputError("Expected windows from 1 to 36,525 days and 0 to 1,000 last values; give others.")
    with work.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        cohort = names.find(connection, "cohort", str(work.args.get("cohort")))
        tasks = work.args.get("tasks")
        asked = Asked(
            windows=windows,
            values=number,
            task_set=names.find(connection, "task set", str(tasks)) if tasks else None,
        )
        found = compute(work, connection, cohort.id, asked)
        connection.rollback()
    digest = store.digest_of(cohort.digest, found.definitions, found.values)
    result = {
        "cohort": cohort.name,
        "version": cohort.version,
        "members": len(found.members.member),
        "features": len(found.definitions),
        "values": sum(map(len, found.values.values())),
    }
    with work.transaction() as connection:
        names.lock(connection, "cohort", cohort.name)
        if store.current_digest(connection, cohort.id) == digest:
            return result | {"unchanged": True}
        rows = member_rows(found)
        store.replace(connection, cohort.id, found.definitions, rows, digest, asked.definition(), work.job_id)
    return result | {"unchanged": False}


def member_rows(found: Found) -> Iterator[tuple[int, str, float]]:
    """Rows of label.feature."""
    keys = found.members.member.tolist()
    for name, values in found.values.items():
        for place, value in values:
            yield keys[place], name, value


def compute(work: Work, connection: Connection, cohort_id: int, asked: Asked, *, truncate: bool = False) -> Found:
    """All features of a cohort; with `truncate` every event from the index on is taken away first."""
    members = read_members(connection, cohort_id)
    looked = look_back(connection, cohort_id, asked.values)
    index_date_only = dates_alone(connection, cohort_id)
    task_names, groups = concept_groups(connection, asked.task_set)
    definitions = definitions_of(task_names, asked, looked)
    values: Values = {definition.name: [] for definition in definitions}
    put_dense(values, "age_years", members.age_years)
    put_dense(values, "sex_female", members.female)
    hidden = hidden_events(looked, members)
    windows = np.array([*(days * DAY_SECONDS for days in asked.windows), EVER], np.int64)
    for part in parts(members):
        work.progress(int(part[0]), len(members.member), "scans", "counting")
        index, alone = members.index_seconds[part], index_date_only[part]
        timelines = read_timelines(connection, members.person[part])
        events = Events(ptr=timelines.ptr, time=timelines.time, concept=timelines.concept)
        place = np.searchsorted(timelines.person, members.person[part])
        if truncate:
            events, place = truncated(events, place, index)
        counts = count_before(index, alone, place, events, groups, len(task_names), windows)
        counts -= count_before(index, alone, part, hidden, groups, len(task_names), windows)
        put_counts(values, part, counts, task_names, asked.windows)
        first, last = first_and_last(index, alone, place, events)
        put_dense(values, "days_since_first_event", first, part)
        put_dense(values, "days_since_last_event", last, part)
    put_looked(values, looked, members)
    return Found(definitions=definitions, values=values, members=members)


def truncated(
    events: Events, place: NDArray[np.int64], index_seconds: NDArray[np.int64]
) -> tuple[Events, NDArray[np.int64]]:
    """A stretch of its own for each member, without what happened from its index on."""
    times, concepts, ptr = [], [], [0]
    for n, where in enumerate(place):
        stretch = slice(events.ptr[where], events.ptr[where + 1])
        seconds = events.time[stretch] >> 1
        kept = seconds < index_seconds[n]
        times.append(events.time[stretch][kept])
        concepts.append(events.concept[stretch][kept])
        ptr.append(ptr[-1] + int(kept.sum()))
    made = Events(
        ptr=np.array(ptr, np.int64),
        time=np.concatenate(times) if times else events.time[:0],
        concept=np.concatenate(concepts) if concepts else events.concept[:0],
    )
    return made, np.arange(len(place), dtype=np.int64)


def parts(members: Members) -> Iterator[NDArray[np.int64]]:
    """Rows of members, some at a time."""
    order = np.arange(len(members.member), dtype=np.int64)
    for begin in range(0, len(order), CHUNK_MEMBERS):
        yield order[begin : begin + CHUNK_MEMBERS]


def dates_alone(connection: Connection, cohort_id: int) -> NDArray[np.bool_]:
    """(N,) whether only the day of a member's scan is known, members ascending."""
    statement = "SELECT index_date_only FROM label.cohort_member WHERE cohort_id = %s ORDER BY cohort_member_id"
    return np.array([row[0] for row in binary_cursor(connection).execute(statement, (cohort_id,))], np.bool_)


def concept_groups(connection: Connection, task_set: names.Version | None) -> tuple[list[str], ConceptTasks]:
    """Names of the tasks that concepts alone describe, and which concepts are theirs."""
    if task_set is None:
        return [], ConceptTasks.of_pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    tasks = bridge.read_label_tasks(connection, task_set.id)
    statement = "SELECT name FROM label.task WHERE task_set_id = %s ORDER BY position"
    found = [row[0] for row in binary_cursor(connection).execute(statement, (task_set.id,))]
    if len(found) > MAX_TASKS:
        raise InputError(f"Expected at most {MAX_TASKS:,} tasks to count by, got {len(found):,}; give a smaller set.")
    pairs = bridge.read_concept_tasks(connection, task_set.id, tasks)
    known = pairs.concept >= 0  # rows that statements choose have negative ones
    concept = np.repeat(pairs.concept, np.diff(pairs.ptr)).astype(np.int64)
    kept = np.repeat(known, np.diff(pairs.ptr))
    return found, ConceptTasks.of_pairs(concept[kept], pairs.task[kept].astype(np.int64))


Looked = dict[str, list[tuple[int, int, int, int, float]]]
"""What the statement tells, by kind: (cohort_member_id, time, concept, unit, number)."""


def look_back(connection: Connection, cohort_id: int, number: int) -> Looked:
    """The one statement over omop.event."""
    found: Looked = defaultdict(list)
    values = {"cohort_id": cohort_id, "values": number}
    for kind, *row in binary_cursor(connection).execute(store.LOOK_BACK, values):
        found[kind].append((row[0], row[1], row[2], row[3], row[4]))
    return found


def hidden_events(looked: Looked, members: Members) -> Events:
    """Conditions of visits that are open at a member's index, a stretch a member."""
    rows = sorted((member, time, concept) for member, time, concept, _, _ in looked["hidden"])
    member = np.array([row[0] for row in rows], np.int64)
    return Events(
        ptr=np.concatenate([np.searchsorted(member, members.member), [len(rows)]]).astype(np.int64),
        time=np.array([row[1] for row in rows], np.int64),
        concept=np.array([row[2] for row in rows], np.int32),
    )


def definitions_of(task_names: Sequence[str], asked: Asked, looked: Looked) -> list[Definition]:
    """Every feature that is made, in the order in which they are shown."""
    made = [
        Definition(name="age_years", kind="demographic", description="Age at the scan, years"),
        Definition(name="sex_female", kind="demographic", description="1 female, 0 male"),
        Definition(name="days_since_first_event", kind="time", description="Days from the first event to the scan"),
        Definition(name="days_since_last_event", kind="time", description="Days from the last event to the scan"),
    ]
    for group, what in (("events", "Events"), *((name, f"Events of the task {name}") for name in task_names)):
        for days in (*asked.windows, None):
            said = f"{what} in the {days} days before the scan" if days else f"{what} before the scan"
            name = f"{group}_{days}d" if days else f"{group}_ever"
            made.append(Definition(name=name, kind="count", description=said, window_days=days, absent_is_zero=True))
    for concept, unit in sorted({(row[2], row[3]) for row in looked["value"]}):
        for prefix, kind, said in (
            ("value", "value", "Last value before the scan"),
            ("value_days", "time", "Days from that value to the scan"),
        ):
            name = f"{prefix}_{concept}_{unit}"
            made.append(Definition(name=name, kind=kind, description=said, concept_id=concept, unit_concept_id=unit))
    made.append(
        Definition(name="visit_open", kind="visit", description="1: a visit is open at the scan", absent_is_zero=True)
    )
    made.append(Definition(name="visit_open_days", kind="visit", description="Days since the longest of them began"))
    for concept in sorted({row[2] for row in looked["open"]}):
        said = f"1: a visit of concept {concept} is open at the scan"
        made.append(
            Definition(
                name=f"visit_open_{concept}", kind="visit", description=said, concept_id=concept, absent_is_zero=True
            )
        )
    return made


def put_dense(values: Values, name: str, numbers: NDArray[np.float64], part: NDArray[np.int64] | None = None) -> None:
    """What is known of a feature, member by member."""
    places = np.arange(len(numbers)) if part is None else part
    known = np.isfinite(numbers)
    values[name] += zip(places[known].tolist(), numbers[known].tolist(), strict=True)


def put_counts(
    values: Values,
    part: NDArray[np.int64],
    counts: NDArray[np.int32],
    task_names: Sequence[str],
    windows: Sequence[int],
) -> None:
    """Counts that are not zero."""
    for group, name in enumerate(("events", *task_names)):
        for window, days in enumerate((*windows, None)):
            column = counts[:, group, window]
            some = np.flatnonzero(column)
            feature = f"{name}_{days}d" if days else f"{name}_ever"
            values[feature] += zip(part[some].tolist(), column[some].astype(float).tolist(), strict=True)


def put_looked(values: Values, looked: Looked, members: Members) -> None:
    """Last values and open visits."""
    place = {int(member): n for n, member in enumerate(members.member.tolist())}
    for member, seconds, concept, unit, number in sorted(looked["value"]):
        values[f"value_{concept}_{unit}"].append((place[member], number))
        values[f"value_days_{concept}_{unit}"].append((place[member], seconds / DAY_SECONDS))
    longest: dict[int, float] = {}
    kinds: set[tuple[int, int]] = set()
    for member, _, concept, _, days in looked["open"]:
        longest[place[member]] = max(days, longest.get(place[member], 0.0))
        kinds.add((concept, place[member]))
    for row, days in sorted(longest.items()):
        values["visit_open"].append((row, 1.0))
        values["visit_open_days"].append((row, days))
    for concept, row in sorted(kinds):
        values[f"visit_open_{concept}"].append((row, 1.0))


def asked_before(connection: Connection, definition: Mapping[str, Any]) -> Asked:
    """How a cohort's features were asked for. Raises UnknownName where their task set is gone."""
    tasks = definition.get("tasks")
    return Asked(
        windows=tuple(definition["windows_days"]),
        values=int(definition["values"]),
        task_set=names.find(connection, "task set", tasks) if tasks else None,
    )
