"""Checks of tasks: each fires on the fault that it is for, and a sound task has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.errors import UnknownName
from app.store import cohorts, task_checks, task_counts, tasks
from app.store.work import InlineWork
from app.tasks import TaskSpec
from tests.app.store.records import Records
from workers.stages.label import label

Make = Callable[..., InlineWork]


@pytest.fixture
def asked(engine: Engine) -> Engine:
    """Concepts 10 → 11, 12 … 20; lab 30 in two units; 40 is no standard concept; events of 11, 12, 30, 40."""
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([10, *range(11, 31)])
        records.concepts([40], "ICD10CM", None)
        records.ancestors([(10, concept, 1) for concept in range(11, 21)])
        for person in range(1, 101):
            records.person(person, split="train" if person <= 60 else "test")
            records.period(person, "2010-01-01", "2021-01-01")
            records.scan(person, "2020-01-01 10:00:00")
            records.event(person, "2020-03-01 10:00:00", 11)
            records.event(person, "2019-03-01 10:00:00" if person > 30 else "2020-05-01 10:00:00", 12)
            records.event(person, "2020-03-01 10:00:00", 30, domain="m", value=7.0, unit=8713 if person % 2 else 9000)
            records.event(person, "2020-03-01 10:00:00", 40)
        records.pack()
        connection.execute(
            text(
                "INSERT INTO omop.concept_count (source_id, concept_id, num_events, num_persons, num_source_events, "
                "num_value_events) SELECT 1, concept_id, count(*), count(DISTINCT person_id), 0, 0 FROM omop.event "
                "GROUP BY concept_id"
            )
        )
    return engine


def found(engine: Engine, *fields: dict[str, Any]) -> set[tuple[str, str, str]]:
    specs = [TaskSpec.from_dict({"name": f"t{n}", **given}) for n, given in enumerate(fields)]
    with engine.connect() as connection:
        return {(f.task, f.check, f.status) for f in task_checks.check_specs(connection, specs)}


def test_a_sound_task_has_no_findings(asked: Engine) -> None:
    assert found(asked, {"concepts": [10]}, {"concepts": [11]}, {"concepts": [10], "death": "competing"}) == set()
    values = [{"below": 8, "unit": 8713}, {"above": 1, "unit": "any"}]
    assert found(asked, {"concepts": [30], "values": values}) == set()


@pytest.mark.parametrize(
    ("fields", "check", "status"),
    [
        ({"concepts": [777]}, "absent_code", "fail"),
        ({"concepts": [40]}, "not_standard", "warn"),
        ({"concepts": [13]}, "never_seen", "fail"),
        ({"concepts": [30], "values": [{"below": 8, "unit": 8713}]}, "other_units", "warn"),
        ({"concepts": [30], "values": [{"below": 8, "unit": 8555}]}, "other_units", "fail"),
    ],
)
def test_each_fault_of_a_task_is_found_and_no_other(
    asked: Engine, fields: dict[str, Any], check: str, status: str
) -> None:
    assert found(asked, fields) == {("t0", check, status)}


def test_tasks_that_ask_the_same_of_the_same_codes_are_found(asked: Engine) -> None:
    every = [10, *range(11, 21)]
    assert found(asked, {"concepts": [10]}, {"concepts": every, "descendants": False}) == {("t1", "same_codes", "warn")}
    nearly = {"concepts": every[1:], "descendants": False}
    assert found(asked, {"concepts": [10]}, nearly) == {("t1", "overlap", "warn")}
    assert found(asked, {"concepts": [10]}, {**nearly, "prior": "keep"}) == set()


def test_counts_of_labels_tell_of_few_events_history_and_far_horizons(asked: Engine, work: Make) -> None:
    specs = [
        TaskSpec(name="often", concepts=(11,)),
        TaskSpec(name="before", concepts=(12,)),
        TaskSpec(name="far", concepts=(11,), horizons_days=(100, 3650)),
    ]
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict() for spec in specs]))
    label(work(name="l", cohort="c", tasks="t"))
    with asked.connect() as connection:
        findings = {(f.task, f.check, f.status) for f in task_checks.check_labels(connection, "l")}
        again = tasks.specs_of(connection, labels="l@1")
    assert findings == {
        ("often", "few_events", "warn"),  # forty in held out
        ("before", "few_events", "warn"),  # thirty in train
        ("before", "few_events", "fail"),  # none in held out
        ("before", "fires_before_index", "warn"),
        ("far", "few_events", "warn"),
        ("far", "horizon_beyond_follow_up", "fail"),
    }
    assert again == specs


def test_a_cohort_tells_before_there_are_labels_what_labels_would_tell(asked: Engine, work: Make) -> None:
    specs = [
        TaskSpec(name="often", concepts=(11,)),
        TaskSpec(name="before", concepts=(12,)),
        TaskSpec(name="late", concepts=(12,), prior="keep", start_seconds=86_400 * 100),
        TaskSpec(name="far", concepts=(10,), horizons_days=(100, 3650), same_day="after"),
        TaskSpec(name="low", concepts=(30,), values=({"below": 8, "unit": 8713},)),  # type: ignore[arg-type]
    ]
    specs = [TaskSpec.from_dict(spec.to_dict()) for spec in specs]
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict() for spec in specs]))
    label(work(name="l", cohort="c", tasks="t"))
    with asked.connect() as connection:
        before = task_counts.check_cohort(connection, "c", specs)
        after = task_checks.check_labels(connection, "l")
        assert {(f.task, f.check) for f in after} >= {
            ("before", "fires_before_index"),
            ("far", "horizon_beyond_follow_up"),
        }
        with pytest.raises(UnknownName, match="Did you mean 'c'"):
            task_counts.check_cohort(connection, "cc", specs)
    assert sorted(map(str, before)) == sorted(map(str, after))
