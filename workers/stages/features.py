"""Stage `features`: what is known of each scan's person at its index, from timelines and one statement."""

from __future__ import annotations

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.errors import InputError
from app.store import features as store
from app.store import names
from app.store.features import Column, Definition
from app.store.work import Work
from ml.features import EVER, Counter, Events, Moments
from ml.labelling import DAY_SECONDS
from workers.bridge import Members, read_members, read_timelines
from workers.bridge.features import (
    LookBack,
    hidden_events,
    read_dates_alone,
    read_feature_tasks,
    read_look_back,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection

WINDOWS = (30, 365)
LAST_VALUES = 20
CHUNK_MEMBERS = 1_024
MAX_TASKS = 1_000


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
    columns: dict[str, Column]
    members: Members


def features(work: Work) -> dict[str, Any]:
    """Make the features of `args["cohort"]`; the same again changes nothing.

    Raises:
        UnknownName: no such cohort or task set.
        InputError: windows or the number of last values make no sense, or two features would have one name.
    """
    windows = tuple(sorted({int(days) for days in work.args.get("windows") or WINDOWS}))
    number = int(work.args.get("values", LAST_VALUES))
    if not windows or windows[0] < 1 or windows[-1] > 36_525 or not 0 <= number <= 1_000:
        raise InputError("Expected windows from 1 to 36,525 days and 0 to 1,000 last values; give others.")
    with work.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        cohort = names.find(connection, "cohort", str(work.args.get("cohort")))
        tasks = work.args.get("tasks")
        task_set = names.find(connection, "task set", str(tasks)) if tasks else None
        asked = Asked(windows=windows, values=number, task_set=task_set)
        found = compute(work, connection, cohort.id, asked)
        connection.rollback()
    digest = store.digest_of(cohort.digest, found.definitions, found.columns)
    result = {
        "cohort": cohort.name,
        "version": cohort.version,
        "members": len(found.members.member),
        "features": len(found.definitions),
        "values": sum(len(column.place) for column in found.columns.values()),
    }
    with work.transaction() as connection:
        names.lock(connection, "cohort", cohort.name)
        before = store.stored(connection, cohort.id)
        if before is not None and before.digest == digest and before.is_intact:
            return result | {"unchanged": True}
        store.replace(
            connection, cohort.id, found.definitions, found.columns, found.members.member,
            digest=digest, asked=asked.definition(), job_id=work.job_id,
        )  # fmt: skip
    return result | {"unchanged": False}


def compute(work: Work, connection: Connection, cohort_id: int, asked: Asked, *, truncated: bool = False) -> Found:
    """All features of a cohort; with `truncated`, everything from each member's index on is taken away first."""
    members = read_members(connection, cohort_id)
    looked = read_look_back(connection, cohort_id, members, asked.values, truncated=truncated)
    tasks = read_feature_tasks(connection, cohort_id, members, asked.task_set, truncated=truncated)
    if len(tasks.names) > MAX_TASKS:
        raise InputError(
            f"Expected at most {MAX_TASKS:,} tasks to count by, got {len(tasks.names):,}; give a smaller set."
        )
    definitions = definitions_of(tasks.names, asked, looked)
    made = Making(asked.windows, tasks.names)
    made.put("age_years", members.age_years)
    made.put("sex_female", members.female)
    day_alone = read_dates_alone(connection, cohort_id)
    hidden = hidden_events(looked, members)
    windows = np.array([*(days * DAY_SECONDS for days in asked.windows), EVER], np.int64)
    counter = Counter(tasks.groups, len(tasks.names), windows)
    for part in parts(len(members.member)):
        work.progress(part.start, len(members.member), "scans", "counting")
        timelines = read_timelines(connection, members.person[part])
        events = Events(ptr=timelines.ptr, time=timelines.time, concept=timelines.concept)
        row = np.searchsorted(timelines.person, members.person[part])
        index = members.index_seconds[part]
        if truncated:
            events, row = events.before(row, index), np.arange(len(row))
        moments = Moments(index_seconds=index, index_date_only=day_alone[part], row=row)
        counted = counter.count(moments, events, stretches_of(hidden, part), stretches_of(tasks.chosen, part))
        made.put_counts(counted.counts, part.start)
        made.put("days_since_first_event", counted.first_days, part.start)
        made.put("days_since_last_event", counted.last_days, part.start)
    made.put_looked(looked)
    return Found(definitions=definitions, columns=made.columns(definitions), members=members)


def parts(size: int) -> Iterator[slice]:
    """Stretches of members."""
    for begin in range(0, size, CHUNK_MEMBERS):
        yield slice(begin, min(size, begin + CHUNK_MEMBERS))


def stretches_of(events: Events, part: slice) -> Events:
    """The stretches of some members; events are not copied."""
    return Events(ptr=events.ptr[part.start : part.stop + 1], time=events.time, concept=events.concept)


def definitions_of(task_names: Sequence[str], asked: Asked, looked: LookBack) -> list[Definition]:
    """Every feature that is made, in the order in which they are shown. Raises InputError where two have one name."""
    made = [
        Definition(name="age_years", kind="demographic", description="Age at the scan, years"),
        Definition(name="sex_female", kind="demographic", description="1 female, 0 male"),
        Definition(name="days_since_first_event", kind="time", description="Days from the first event to the scan"),
        Definition(name="days_since_last_event", kind="time", description="Days from the last event to the scan"),
    ]
    for group, what in (("events", "Events"), *((name, f"Events of the task {name}") for name in task_names)):
        for days in (*asked.windows, None):
            said = f"{what} in the {days} days before the scan" if days else f"{what} before the scan"
            name = count_name(group, days)
            made.append(Definition(name=name, kind="count", description=said, window_days=days, absent_is_zero=True))
    for concept, unit in sorted(set(looked["value"][["concept", "unit"]].tolist())):
        for prefix, kind, said in (
            ("value", "value", "Last value before the scan"),
            ("value_days", "time", "Days from that value to the scan"),
        ):
            name = f"{prefix}_{concept}_{unit}"
            made.append(Definition(name=name, kind=kind, description=said, concept_id=concept, unit_concept_id=unit))
    said = "1: a visit is open at the scan"
    made.append(Definition(name="visit_open", kind="visit", description=said, absent_is_zero=True))
    made.append(Definition(name="visit_open_days", kind="visit", description="Days since the longest of them began"))
    for concept in sorted(set(looked["open"]["concept"].tolist())):
        said, name = f"1: a visit of concept {concept} is open at the scan", f"visit_open_{concept}"
        made.append(Definition(name=name, kind="visit", description=said, concept_id=concept, absent_is_zero=True))
    twice = [name for name, times in Tally(d.name for d in made).items() if times > 1]
    if twice:
        raise InputError(f"Expected features of different names, got {twice[0]} twice; give that task another name.")
    return made


def count_name(group: str, days: int | None) -> str:
    """The name of a count within some days, or of all."""
    return f"{group}_{days}d" if days else f"{group}_ever"


class Making:
    """Columns of features as their parts come in."""

    def __init__(self, windows: Sequence[int], task_names: Sequence[str]) -> None:
        self._parts: dict[str, list[tuple[NDArray[np.int64], NDArray[Any]]]] = defaultdict(list)
        self._counts = [[count_name(group, days) for days in (*windows, None)] for group in ("events", *task_names)]

    def put(self, name: str, numbers: NDArray[np.float64], begin: int = 0) -> None:
        """What is known of a feature of the members from `begin` on."""
        known = np.flatnonzero(np.isfinite(numbers))
        self._parts[name].append((begin + known, numbers[known]))

    def put_counts(self, counts: NDArray[np.int32], begin: int) -> None:
        """Counts (N, K, W) that are not zero."""
        for group, by_window in enumerate(self._counts):
            for window, name in enumerate(by_window):
                some = np.flatnonzero(counts[:, group, window])
                self._parts[name].append((begin + some, counts[some, group, window]))

    def put_looked(self, looked: LookBack) -> None:
        """Last values and open visits."""
        values = looked["value"]
        for concept, unit in sorted(set(values[["concept", "unit"]].tolist())):
            rows = values[(values["concept"] == concept) & (values["unit"] == unit)]
            self._parts[f"value_{concept}_{unit}"].append((rows["place"], rows["number"]))
            self._parts[f"value_days_{concept}_{unit}"].append((rows["place"], rows["time"] / DAY_SECONDS))
        visits = looked["open"]
        longest = np.sort(visits, order=["place", "number"])
        longest = longest[np.diff(longest["place"], append=-1) != 0]
        self._parts["visit_open"].append((longest["place"], np.ones(len(longest))))
        self._parts["visit_open_days"].append((longest["place"], longest["number"]))
        for concept in sorted(set(visits["concept"].tolist())):
            place = np.unique(visits["place"][visits["concept"] == concept])
            self._parts[f"visit_open_{concept}"].append((place, np.ones(len(place))))

    def columns(self, definitions: Sequence[Definition]) -> dict[str, Column]:
        """All features, also such as nobody has."""
        return {definition.name: _column(self._parts.get(definition.name, [])) for definition in definitions}


def _column(parts_of: Sequence[tuple[NDArray[np.int64], NDArray[Any]]]) -> Column:
    place = np.concatenate([np.zeros(0, np.int64), *(place for place, _ in parts_of)])
    value = np.concatenate([np.zeros(0, np.float32), *(value.astype(np.float32) for _, value in parts_of)])
    order = np.argsort(place, kind="stable")
    return Column(place=place[order], value=value[order])


def asked_before(connection: Connection, definition: Mapping[str, Any]) -> Asked:
    """How a cohort's features were asked for. Raises UnknownName where their task set is gone."""
    tasks = definition.get("tasks")
    return Asked(
        windows=tuple(definition["windows_days"]),
        values=int(definition["values"]),
        task_set=names.find(connection, "task set", tasks) if tasks else None,
    )
