"""The stages cohort, tasks and label together, on a real store, against the slow oracle."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from app.store import cohorts, tasks
from app.store.work import InlineWork
from app.tasks import TaskSpec, builtin
from app.tasks.spec import DOMAINS
from tests.app.store.records import Records, rows
from tests.reference import labels as oracle
from workers import bridge
from workers.stages.label import label

Make = Callable[..., InlineWork]

START = dt.datetime(2010, 1, 1)
ROOT, CHILD, GRANDCHILD, OTHER, LAB, SOURCE = 100, 101, 102, 103, 300, 2_000_000_001
WORDS = oracle.Vocabulary(
    descendants={ROOT: frozenset({CHILD, GRANDCHILD}), CHILD: frozenset({GRANDCHILD}), 9201: frozenset({8717})},
    source_concepts={"ICD10CM/c2000000001": SOURCE},
)
EVENT_CONCEPTS = [ROOT, CHILD, GRANDCHILD, OTHER, LAB, 0]

SPECS: list[dict[str, Any]] = [
    {"name": "default", "concepts": [ROOT]},
    {"name": "child", "concepts": [CHILD]},
    {"name": "alone", "concepts": [ROOT], "descendants": False},
    {"name": "next", "concepts": [ROOT], "occurrence": "next", "same_day": "after"},
    {"name": "look_back", "concepts": [ROOT], "prior_days": 2, "start_days": 1},
    {"name": "competing", "concepts": [OTHER], "death": "competing", "prior": "keep", "follow_up": "data_cut"},
    {"name": "record", "concepts": [OTHER], "washout_days": 3, "min_follow_up_days": 4, "prior": "keep"},
    {"name": "source", "concepts": [OTHER], "source_codes": ["ICD10CM/c2000000001"], "prior": "keep"},
    {"name": "domain", "concepts": [ROOT], "domains": ["procedure", "drug"], "prior": "keep"},
    {"name": "low", "concepts": [LAB], "values": [{"below": 7.1, "unit": 8713}], "prior": "keep"},
    {"name": "coded", "concepts": [LAB], "values": [{"at_least": 9, "unit": 0}, {"value_concepts": [45]}]},
    {"name": "inpatient", "concepts": [ROOT], "visit_concepts": [9201], "prior": "keep"},
    {"name": "only_9201", "concepts": [CHILD], "visit_concepts": [9201], "descendants": False, "prior": "keep"},
    {"name": "after_discharge", "concepts": [ROOT], "clock": "discharge", "occurrence": "next"},
    {"name": "admission", "visit_concepts": [9201, 262], "occurrence": "next"},
]


def specs() -> list[TaskSpec]:
    return [*(TaskSpec.from_dict(fields) for fields in SPECS), builtin("mortality"), builtin("readmission")]


def draw_time(random_: random.Random) -> tuple[dt.datetime, bool]:
    """A moment on a coarse grid, so that ties and shared days are common; sometimes a day alone."""
    day = START + dt.timedelta(days=random_.randrange(24))
    if random_.random() < 0.4:
        return day + dt.timedelta(seconds=86_399), True
    return day + dt.timedelta(hours=random_.choice([0, 8, 12, 12, 16])), False


def draw_person(random_: random.Random, keys: Any) -> oracle.Person:
    visits, events = [], []
    for _ in range(random_.randrange(4)):
        start, date_only = draw_time(random_)
        length = dt.timedelta(hours=random_.choice([0, 4, 24, 60, 200]))
        end_date_only = random_.random() < 0.4
        end: dt.datetime | None = start + length
        if end_date_only and end is not None:
            end = oracle.end_of_day(end.date())
        if random_.random() < 0.1:
            end, end_date_only = None, False
        visits.append(
            oracle.Visit(next(keys), random_.choice([9201, 8717, 262, 9202]), start, end, date_only, end_date_only)
        )
    for _ in range(random_.choice([0, 1, 3, 8, 15])):
        time, date_only = draw_time(random_)
        concept = random_.choice(EVENT_CONCEPTS)
        lab = concept == LAB
        events.append(
            oracle.Event(
                time, concept, date_only, random_.choice(["condition", "procedure", "drug"]),
                random_.choice([0, 0, SOURCE]), random_.choice([6.9, 7.1, 12.0, None]) if lab else None,
                random_.choice([8713, None]) if lab else None, random_.choice([45, None]) if lab else None,
                random_.choice(visits).key if visits and random_.random() < 0.5 else None,
            )
        )  # fmt: skip
    death, death_date_only = draw_time(random_) if random_.random() < 0.4 else (None, False)
    if death is not None:
        events.append(oracle.Event(death, 4306655, death_date_only, "death"))
    events += [oracle.Event(v.start, v.concept, v.start_date_only, "visit", visit=v.key) for v in visits]
    periods = []
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        first = START.date() + dt.timedelta(days=random_.randrange(-5, 15))
        periods.append((first, first + dt.timedelta(days=random_.choice([1, 8, 20, 40]))))
    return oracle.Person(events, visits, periods, death, death_date_only)


def write_person(records: Records, person_id: int, person: oracle.Person) -> None:
    records.person(person_id)
    for first, last in person.periods:
        records.period(person_id, first, last)
    for v in person.visits:
        records.visit(
            person_id, v.start, v.end, v.concept, key=v.key, date_only=v.start_date_only, end_date_only=v.end_date_only
        )
    for e in person.events:
        if e.domain != "visit":
            records.event(
                person_id, e.time, e.concept, date_only=e.date_only, domain=DOMAINS[e.domain],
                source=e.source_concept, value=e.value, unit=e.unit, coded=e.value_concept, visit=e.visit,
            )  # fmt: skip


def write_vocabulary(records: Records) -> None:
    records.concepts([ROOT, CHILD, GRANDCHILD, OTHER, LAB])
    records.concepts([SOURCE], "ICD10CM", None)
    records.ancestors([(ROOT, CHILD, 1), (ROOT, GRANDCHILD, 2), (CHILD, GRANDCHILD, 1), (ROOT, ROOT, 0)])
    records.ancestors([(9201, 8717, 1)])


def run_stages(work: Make, follow_up: str = "observation_period", **cohort: Any) -> dict[str, Any]:
    cohorts.build(work(name="c", follow_up=follow_up, **cohort))
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict() for spec in specs()]))
    return label(work(name="l", cohort="c", tasks="t"))


@pytest.mark.parametrize("follow_up", ["observation_period", "last_event", "data_cut"])
def test_stored_labels_agree_with_the_oracle_for_every_member_and_task(
    engine: Engine, work: Make, follow_up: str
) -> None:
    random_ = random.Random(follow_up)
    persons: dict[int, oracle.Person] = {}
    scans: dict[int, list[tuple[dt.datetime, bool]]] = {}
    cut = dt.date(2010, 1, 22) if follow_up != "last_event" else None
    with engine.begin() as connection:
        records = Records(connection, data_cut=cut)
        write_vocabulary(records)
        for person_id in range(1, 151):
            persons[person_id] = draw_person(random_, records.ids)
            write_person(records, person_id, persons[person_id])
            scans[person_id] = list(dict.fromkeys(draw_time(random_) for _ in range(random_.choice([1, 1, 2]))))
            for time, date_only in scans[person_id]:
                records.scan(person_id, time, date_only=date_only)
        records.pack()
    run_stages(work, follow_up)

    found = rows(engine, "SELECT * FROM label.tte_long JOIN label.cohort_member USING (cohort_member_id)")
    assert len(found) == len(specs()) * sum(map(len, scans.values()))
    by_name = {spec.name: spec for spec in specs()}
    seen = set()
    for row in found:
        person = persons[row.person_id]
        member = oracle.follow(person, row.index_time, row.index_date_only, follow_up, cut)
        assert (member.eligible, member.end, member.cut_end) == (row.eligible, row.follow_up_end, row.data_cut_end)
        expected = oracle.label(by_name[row.task], member, person, WORDS)
        got = (row.status, None if row.time_days is None else round(row.time_days * 86_400))
        assert got == (expected.status, expected.seconds), (row.task, member, person)
        seen.add(row.status)
    assert seen == {"event", "competing", "censored", "prior", "ineligible"}
    check_arrays(engine, persons, follow_up, cut)


def check_arrays(engine: Engine, persons: dict[int, oracle.Person], follow_up: str, cut: dt.date | None) -> None:
    """What only the arrays show: history, visits and windows; and what the bridge makes of them."""
    from ml.labelling import STATUSES, task_outcomes

    with engine.connect() as connection:
        info = bridge.find_label_set(connection, "l")
        arrays = bridge.read_labels(connection, info)
        members = bridge.read_members(connection, info.cohort_id)
    assert (arrays.member == members.member).all()
    dates = {r.cohort_member_id: r.index_date_only for r in rows(engine, "SELECT * FROM label.cohort_member")}
    for position, spec in enumerate(specs()):
        outcomes = task_outcomes(arrays, position)
        for n in range(len(arrays.member)):
            person = persons[int(members.person[n])]
            index = dt.datetime(1970, 1, 1) + dt.timedelta(seconds=int(members.index_seconds[n]))
            member = oracle.follow(person, index, dates[int(arrays.member[n])], follow_up, cut)
            expected = oracle.label(spec, member, person, WORDS)
            assert STATUSES[outcomes.status[n]] == expected.status
            assert outcomes.start_days[n] * 86_400 == pytest.approx(expected.opens)
            for sparse, want in ((arrays.priors, expected.prior), (arrays.visits, expected.in_visit)):
                has = position in sparse.task[sparse.ptr[n] : sparse.ptr[n + 1]]
                assert has == want, (spec.name, member, person)
