"""Engine, plain SQL and the oracle on stores that hypothesis draws: no difference, in any field of any task."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as options
from sqlalchemy import Engine

from app.settings import Settings
from app.store import cohorts, tasks
from app.store.splits import fraction, split_at
from app.store.work import InlineWork
from tests.app.store.records import Records, rows
from tests.reference import labels as oracle
from tests.reference.labels_sql import LABELS
from tests.workers.label_worlds import HORIZONS, World, worlds, write_vocabulary
from workers.stages.label import label

Make = Callable[..., InlineWork]

EMPTY = """
TRUNCATE label.label_set, label.cohort, label.task_set CASCADE;
DELETE FROM omop.image_occurrence; DELETE FROM omop.event; DELETE FROM omop.timeline; DELETE FROM omop.person;
DELETE FROM omop.observation_period; DELETE FROM omop.visit_occurrence;
"""

MEMBERS = """
SELECT image_occurrence_id, eligible, date_trunc('second', follow_up_end) AS ends,
       date_trunc('second', data_cut_end) AS cut_ends
FROM label.cohort_member
"""

LISTS = """
SELECT m.image_occurrence_id, t.name AS task, t.position = ANY (y.prior_tasks) AS prior,
       t.position = ANY (y.visit_tasks) AS in_visit,
       coalesce(y.window_seconds[array_position(y.window_tasks, t.position)], t.start_seconds) AS opens
FROM label.tte y JOIN label.cohort_member m USING (cohort_member_id) CROSS JOIN label.task t
"""

Cell = tuple[int, str]


class Quiet(InlineWork):
    """Hundreds of stores without an event are no news."""

    def log(self, message: str) -> None:
        pass


@pytest.fixture
def silent(engine: Engine, settings: Settings, tmp_path: Path) -> Make:
    return lambda **args: Quiet(engine, args=args, folder=tmp_path / "work", settings=settings)


@pytest.fixture
def records(engine: Engine) -> Iterator[Records]:
    with engine.begin() as connection:
        made = write_vocabulary(connection)
    yield made


def made(engine: Engine, silent: Make, records: Records, world: World) -> None:
    """The store of a world, labelled by the stages."""
    with engine.begin() as connection:
        connection.exec_driver_sql(EMPTY)
        records.connection = connection
        world.write(records)
    cut = None if world.cut is None else str(world.cut)
    cohorts.build(silent(name="c", follow_up=world.follow_up, data_cut=cut, per="series"))
    tasks.build(silent(name="t", cohort="c", specs=[task.to_dict() for task in world.tasks]))
    label(silent(name="l", cohort="c", tasks="t"))


def by_oracle(engine: Engine, world: World) -> dict[Cell, tuple[oracle.Member, oracle.Label]]:
    expected = world.expected()
    return {
        (r.image_occurrence_id, task.name): expected[r.person_id, r.acquired_at, r.date_only, task.name]
        for r in rows(engine, "SELECT * FROM omop.image_occurrence")
        for task in world.tasks
    }


def check_statement(engine: Engine, world: World, expected: dict[Cell, tuple[oracle.Member, oracle.Label]]) -> None:
    """The plain statement says what the oracle says."""
    given = {"tasks": json.dumps([task.to_dict() for task in world.tasks]), "follow_up": world.follow_up}
    found = rows(engine, LABELS, **given, cut=world.cut)
    assert len(found) == len(expected)
    for r in found:
        member, want = expected[r.scan, r.task]
        cell = f"{r.task} of person {r.person_id}"
        assert (r.eligible, r.ends, r.cut_ends) == (member.eligible, member.end, member.cut_end), cell
        assert (r.status, r.seconds) == (want.status, want.seconds), cell
        assert (r.has_prior, r.in_visit, r.opens) == (want.prior, want.in_visit, want.opens), cell


def check_engine(engine: Engine, expected: dict[Cell, tuple[oracle.Member, oracle.Label]]) -> None:
    """The stored labels, in words and in arrays, and their binary form say what the oracle says."""
    members = {r.image_occurrence_id: r for r in rows(engine, MEMBERS)}
    long = {(r.image_occurrence_id, r.task): r for r in rows(engine, "SELECT * FROM label.tte_long")}
    assert long.keys() == expected.keys()
    for cell, (member, want) in expected.items():
        r = members[cell[0]]
        assert (r.eligible, r.ends, r.cut_ends) == (member.eligible, member.end, member.cut_end), cell
        days = long[cell].time_days
        assert (long[cell].status, None if days is None else round(days * 86_400)) == (want.status, want.seconds), cell
    for r in rows(engine, LISTS):
        want = expected[r.image_occurrence_id, r.task][1]
        assert (r.prior, r.in_visit, r.opens) == (want.prior, want.in_visit, want.opens), r.task
    for horizon in HORIZONS:
        for r in rows(engine, "SELECT * FROM label.binary('l', :h)", h=horizon):
            wanted = oracle.binary(expected[r.image_occurrence_id, r.task][1], horizon)
            assert (r.status, r.label) == (wanted, {"event": 1, "negative": 0}.get(wanted)), (r.task, horizon)


def check_counts(engine: Engine, expected: dict[Cell, tuple[oracle.Member, oracle.Label]]) -> None:
    """Scans, persons and time at risk, as counted beside."""
    owner = {r.image_occurrence_id: r.person_id for r in rows(engine, "SELECT * FROM omop.image_occurrence")}
    scans: Counter[tuple[str, str, str]] = Counter()
    persons: defaultdict[tuple[str, str, str], set[int]] = defaultdict(set)
    seconds: Counter[tuple[str, str, str]] = Counter()
    for (scan, task), (_, want) in expected.items():
        key = task, split_at(fraction(owner[scan])), want.status
        scans[key] += 1
        persons[key].add(owner[scan])
        seconds[key] += 0 if want.seconds is None else want.seconds - want.opens
    stored = {(r.task, r.split, r.status): r for r in rows(engine, "SELECT * FROM label.task_count")}
    assert {key: (r.n, r.persons, round(r.person_days * 86_400)) for key, r in stored.items() if r.n} == {
        key: (n, len(persons[key]), seconds[key]) for key, n in scans.items()
    }


def check_all(engine: Engine, silent: Make, records: Records, world: World) -> None:
    made(engine, silent, records, world)
    expected = by_oracle(engine, world)
    check_statement(engine, world, expected)
    check_engine(engine, expected)
    check_counts(engine, expected)


often = options(
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@options(often, max_examples=40)
@given(world=worlds())
def test_engine_statement_and_oracle_agree(engine: Engine, silent: Make, records: Records, world: World) -> None:
    check_all(engine, silent, records, world)


@pytest.mark.long
@options(often, max_examples=3_000)
@given(world=worlds())
def test_engine_statement_and_oracle_agree_on_thousands_of_stores(
    engine: Engine, silent: Make, records: Records, world: World
) -> None:
    check_all(engine, silent, records, world)
