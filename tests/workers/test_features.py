"""Features of a cohort, against the slow twin, and the checks of leakage, each with its fault planted."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.errors import InputError
from app.store import cohorts, tasks
from app.store.work import InlineWork
from app.tasks import TaskSpec
from tests.app.store.records import Records, rows
from tests.reference.features import Event, Visit
from tests.reference.features import features as slow
from workers.stages.features import features
from workers.stages.label import label
from workers.stages.leakage import leakage

Make = Callable[..., InlineWork]

START = dt.datetime(2019, 12, 1)
ROOT, CHILD, LAB = 100, 101, 300
WINDOWS = (2, 30)


def draw_time(random_: random.Random) -> tuple[dt.datetime, bool]:
    """A moment on a coarse grid, so that ties and shared days are common; sometimes a day alone."""
    day = START + dt.timedelta(days=random_.randrange(60))
    if random_.random() < 0.4:
        return day + dt.timedelta(seconds=86_399), True
    return day + dt.timedelta(hours=random_.choice([0, 8, 12, 16])), False


def draw_person(random_: random.Random, keys: list[int]) -> tuple[list[Event], list[Visit]]:
    visits = []
    for _ in range(random_.randrange(3)):
        start, date_only = draw_time(random_)
        if not date_only:
            keys.append(len(keys) + 1_000)
            end = start + dt.timedelta(hours=random_.choice([4, 60, 400]))
            visits.append(Visit(key=keys[-1], concept=random_.choice([9201, 9202]), start=start, end=end))
    events = []
    for _ in range(random_.choice([0, 2, 6, 15])):
        time, date_only = draw_time(random_)
        concept = random_.choice([ROOT, CHILD, LAB, 7])
        lab = concept == LAB
        events.append(
            Event(
                time=time, date_only=date_only, concept=concept, domain="m" if lab else random_.choice("cd"),
                value=float(random_.randrange(9)) if lab and random_.random() < 0.8 else None,
                unit=random_.choice([0, 8713]) if lab else 0,
                visit=random_.choice([v.key for v in visits]) if visits and random_.random() < 0.6 else None,
            )
        )  # fmt: skip
    # the last of two values of one second is that of the larger row id: one a second keeps the twin plain
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for event in events:
        key = (event.time, event.unit) if event.value is not None else None
        if key is None or key not in seen:
            kept.append(event)
        if key is not None:
            seen.add(key)
    return kept, visits


@pytest.mark.parametrize("seed", range(6))
def test_features_are_those_of_the_slow_twin(engine: Engine, work: Make, seed: int) -> None:
    random_, keys = random.Random(seed), list[int]()
    people: dict[int, tuple[list[Event], list[Visit]]] = {}
    scans: dict[int, tuple[int, dt.datetime, bool]] = {}
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([ROOT, CHILD, LAB, 7])
        records.ancestors([(ROOT, CHILD, 1)])
        for person in range(1, 41):
            records.person(person, gender=random_.choice([8507, 8532]), birth="1960-01-01")
            records.period(person, "2010-01-01", "2022-01-01")
            events, visits = people[person] = draw_person(random_, keys)
            for visit in visits:
                records.visit(person, visit.start, visit.end, visit.concept, key=visit.key)
                events.append(
                    Event(time=visit.start, date_only=False, concept=visit.concept, domain="v", visit=visit.key)
                )
            for e in events:
                if e.domain != "v":
                    records.event(
                        person, e.time, e.concept, date_only=e.date_only, domain=e.domain, value=e.value,
                        unit=e.unit or None, visit=e.visit,
                    )  # fmt: skip
            for _ in range(random_.randrange(1, 3)):
                time, date_only = draw_time(random_)
                time = time.replace(hour=0, minute=0, second=0) if date_only else time
                scans[records.scan(person, time, date_only=date_only)] = person, time, date_only
        records.pack()
    cohorts.build(work(name="c", per="series"))
    spec = TaskSpec(name="root", concepts=(ROOT,))
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict()]))
    made = features(work(cohort="c", tasks="t", windows=WINDOWS, values=4))
    pairs = [
        (row.concept_id, row.unit_concept_id)
        for row in rows(engine, "SELECT concept_id, unit_concept_id FROM label.feature_definition WHERE kind = 'value'")
    ]
    found: dict[int, dict[str, float]] = {scan: {} for scan in scans}
    statement = (
        "SELECT m.image_occurrence_id AS scan, f.name, f.value FROM label.feature f "
        "JOIN label.cohort_member m USING (cohort_member_id)"
    )
    for row in rows(engine, statement):
        found[row.scan][row.name] = row.value
    assert sum(map(len, found.values())) == made["values"] > 100
    for scan, (person, time, date_only) in scans.items():
        expected = slow(
            *people[person], time, index_date_only=date_only, windows=WINDOWS,
            groups={"root": frozenset({ROOT, CHILD})}, pairs=pairs,
        )  # fmt: skip
        ours = {name: value for name, value in found[scan].items() if name not in ("age_years", "sex_female")}
        assert ours == pytest.approx(expected, rel=1e-6), (scan, time, date_only)
        assert found[scan]["age_years"] == pytest.approx((time - dt.datetime(1960, 1, 1)).days / 365.25, abs=0.01)


@pytest.fixture
def sound(engine: Engine, work: Make) -> Engine:
    """Ninety persons with visits on the day of their scans, features and labels without a fault."""
    random_ = random.Random(3)
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([ROOT, CHILD])
        records.ancestors([(ROOT, CHILD, 1)])
        for person in range(1, 91):
            records.person(person, split=random_.choice(["train", "test"]))
            records.period(person, "2010-01-01", "2022-01-01")
            records.visit(person, "2020-01-01 08:00:00", "2020-01-01 18:00:00", 9202)
            records.scan(person, "2020-01-01 12:00:00")
            for _ in range(4):
                day = dt.datetime(2020, 1, 1, 12) + dt.timedelta(days=random_.randrange(-300, 300), hours=1)
                records.event(person, day, random_.choice([CHILD, 7, 7]))
        records.pack()
    cohorts.build(work(name="c"))
    spec = TaskSpec(name="root", concepts=(ROOT,), prior="keep")
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict()]))
    label(work(name="l", cohort="c", tasks="t"))
    features(work(cohort="c", tasks="t"))
    return engine


def failed(work: Make) -> set[str]:
    return {check["name"] for check in leakage(work(labels="l"))["checks"] if check["verdict"] == "failed"}


def change(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        assert connection.execute(text(statement)).rowcount > 0


def test_a_sound_store_passes_and_the_answers_stay(sound: Engine, work: Make) -> None:
    result = leakage(work(labels="l"))
    assert {check["name"]: check["verdict"] for check in result["checks"]} == {
        "features_look_back": "passed",
        "labels_look_forward": "passed",
        "labels_need_no_past": "passed",
        "scans_meet_records": "passed",
        "persons_in_one_split": "passed",
        "volumes_in_one_split": "passed",
        "no_feature_is_too_good": "passed",
        "permuted_volumes_tell_nothing": "not_checked",
    }
    assert all(check["num_rows"] > 0 for check in result["checks"] if check["verdict"] == "passed")
    kept = rows(sound, "SELECT name, verdict FROM label.leakage_check ORDER BY leakage_check_id")
    assert [(row.name, row.verdict) for row in kept] == [(c["name"], c["verdict"]) for c in result["checks"]]
    assert "checks passed" in result["summary"] and "no leakage" not in result["summary"].lower()


OUTCOME_AS_FEATURE = """
INSERT INTO label.feature (cohort_member_id, name, value)
SELECT cohort_member_id, 'events_ever_after', event FROM label.tte_long WHERE label_set = 'l' AND event = 1
"""
FAULTS = {
    "features_look_back": ["UPDATE label.feature SET value = value + 1 WHERE name = 'events_30d'"],
    "labels_look_forward": ["UPDATE label.tte SET event_seconds = ARRAY[0::int8] WHERE event_tasks <> '{}'"],
    "labels_need_no_past": [
        "UPDATE label.tte SET event_seconds = ARRAY[event_seconds[1] + 1] WHERE event_tasks <> '{}'"
    ],
    "scans_meet_records": ["DELETE FROM omop.visit_occurrence"],
    "persons_in_one_split": [
        "INSERT INTO label.cohort_member (cohort_id, person_id, image_occurrence_id, index_time, index_date_only, "
        "follow_up_end, split, eligible) SELECT cohort_id, person_id, 10000 + cohort_member_id, index_time, "
        "index_date_only, follow_up_end, 'tuning', false FROM label.cohort_member"
    ],
    "volumes_in_one_split": ["UPDATE omop.image_occurrence SET series_uid = '1.2.3'"],
    "no_feature_is_too_good": [OUTCOME_AS_FEATURE],
}
ALONG = {
    "labels_look_forward": {"labels_need_no_past"},  # an outcome moved to the index is none of the future's
    "persons_in_one_split": {"features_look_back"},  # members without features
    "scans_meet_records": {"features_look_back"},  # visits were open
    "no_feature_is_too_good": {"features_look_back"},  # a future feature cannot be made from the past
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_each_planted_leak_fails_its_check_and_no_other(sound: Engine, work: Make, fault: str) -> None:
    for statement in FAULTS[fault]:
        change(sound, statement)
    assert failed(work) == {fault} | ALONG.get(fault, set())


def test_features_again_change_nothing_and_other_windows_replace_them(sound: Engine, work: Make) -> None:
    assert features(work(cohort="c", tasks="t"))["unchanged"] is True
    again = features(work(cohort="c", windows=[7], values=0))
    assert again["unchanged"] is False
    names = {row.name for row in rows(sound, "SELECT DISTINCT name FROM label.feature")}
    assert "events_7d" in names and not names & {"events_30d", "root_ever"}
    with pytest.raises(InputError, match="windows"):
        features(work(cohort="c", windows=[0]))


def test_without_features_their_checks_say_how_to_make_them(sound: Engine, work: Make) -> None:
    change(sound, "DELETE FROM label.feature_set")
    change(sound, "DELETE FROM label.feature")
    found = {check["name"]: check for check in leakage(work(labels="l"))["checks"]}
    assert found["features_look_back"]["verdict"] == "not_checked"
    assert "lachesis features" in found["features_look_back"]["found"]
