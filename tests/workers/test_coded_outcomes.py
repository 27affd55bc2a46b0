"""Tasks of concepts and source codes are asked for by one statement, which finds what a statement each finds."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable

import numpy as np
import pytest
from sqlalchemy import Connection, Engine

from app.store import coded_outcomes, cohorts, features, names, outcomes, tasks
from app.store.work import InlineWork
from tests.app.store.records import Records
from workers import bridge
from workers.bridge import kept, labelling
from workers.bridge.features import read_feature_tasks

Make = Callable[..., InlineWork]

ROOT, CHILD, OTHER = 10, 11, 12
SOURCES = [101, 102, 103, 104, 105]
INDEX = dt.datetime(2020, 1, 1, 10)


def spec(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "occurrence": "next", "same_day": "after", **more}


SPECS = [
    spec("one", source_codes=["ICD10CM/c101"]),
    spec("two", source_codes=["ICD10CM/c101", "ICD10CM/c102"]),
    spec("beside", source_codes=["ICD10CM/c103"], concepts=[ROOT]),
    spec("alone", source_codes=["ICD10CM/c104"], concepts=[ROOT], descendants=False),
    spec("less", source_codes=["ICD10CM/c104"], concepts=[ROOT], exclude_concepts=[CHILD]),
    spec("concepts", concepts=[ROOT]),
    spec("nobody", source_codes=["ICD10CM/c105"]),
    spec("narrow", source_codes=["ICD10CM/c101"], domains=["drug"]),
    spec("visits", visit_concepts=[9201]),
]


@pytest.fixture
def filled(engine: Engine, work: Make) -> None:
    """60 persons with drawn rows, a cohort of their scans, and the tasks."""
    draw = random.Random(11)
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([ROOT, CHILD, OTHER])
        records.concepts(SOURCES, "ICD10CM", None)
        records.ancestors([(ROOT, ROOT, 0), (ROOT, CHILD, 1)])
        for person in range(1, 61):
            records.person(person)
            records.period(person, "2010-01-01", dt.date(2022, 1, 1))
            records.scan(person, INDEX)
            if person % 3 == 0:
                records.visit(person, INDEX - dt.timedelta(hours=4), INDEX + dt.timedelta(hours=4), 9201, key=person)
            for _ in range(draw.randint(0, 12)):
                records.event(
                    person,
                    INDEX + dt.timedelta(days=draw.choice([-3000, -2, 0, 3, 400]), hours=draw.randint(-3, 3)),
                    draw.choice([0, ROOT, CHILD, OTHER]),
                    domain=draw.choice("cdp"),
                    source=draw.choice([0, *SOURCES[:4]]),
                    visit=person if person % 3 == 0 and draw.random() < 0.3 else None,
                )
        records.pack()
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", specs=SPECS))


def found(connection: Connection) -> tuple[int, labelling.LabelTasks]:
    """The cohort's id, and its tasks."""
    task_set = names.find(connection, "task set", "t")
    return names.find(connection, "cohort", "c").id, labelling.read_label_tasks(connection, task_set.id)


def test_one_statement_finds_the_rows_that_a_statement_each_finds(engine: Engine, filled: None) -> None:
    with engine.connect() as connection:
        cohort_id, every = found(connection)
        together, apart = coded_outcomes.split(every.by_statement)
        assert [SPECS[n]["name"] for n in apart] == ["narrow", "visits"] and len(together) == 6
        for bounds in (labelling.EVERYBODY, (20, 40), (0, -1)):
            expected = set()
            for position, definition in every.by_statement.items():
                statement, values = outcomes.statement(definition)
                who = {"cohort_id": cohort_id, "from_person": bounds[0], "to_person": bounds[1]}
                rows = bridge.binary_cursor(connection).execute(statement, values | who).fetchall()
                expected |= {(person, time, -1 - position) for person, time in rows}
            events = labelling.read_statement_events(connection, cohort_id, every, bounds)
            rows_now = np.column_stack([events.person, events.time, events.concept]).tolist()
            assert [tuple(row) for row in rows_now] == sorted(expected)
            assert bool(expected) == (bounds[1] > 0)


def test_what_tasks_mean_is_found_as_by_a_statement_each(engine: Engine, filled: None) -> None:
    with engine.connect() as connection:
        _, every = found(connection)
        pairs = labelling.read_concept_tasks(connection, names.find(connection, "task set", "t").id, every)
        position, concept = kept.read_meaning(connection, pairs, every)
    meant = {(SPECS[n]["name"], c) for n, c in zip(position.tolist(), concept.tolist(), strict=True)}
    assert len(position) == len(meant)
    assert meant == {
        *[("one", 101), ("two", 101), ("two", 102), ("beside", 103), ("beside", ROOT), ("beside", CHILD)],
        *[("alone", 104), ("alone", ROOT), ("less", 104), ("less", ROOT), ("concepts", ROOT), ("concepts", CHILD)],
        *[("nobody", 105), ("narrow", 101)],
    }


@pytest.mark.parametrize("truncated", [False, True])
def test_features_count_each_row_once_a_task(engine: Engine, filled: None, truncated: bool) -> None:
    with engine.connect() as connection:
        cohort_id, every = found(connection)
        members = bridge.read_members(connection, cohort_id)
        chosen = read_feature_tasks(
            connection, cohort_id, members, names.find(connection, "task set", "t"), truncated=truncated
        ).chosen
        row = np.repeat(members.member, np.diff(chosen.ptr)).tolist()
        got = list(zip(row, chosen.time.tolist(), chosen.concept.tolist(), strict=True))
        expected = []
        for position, definition in every.by_statement.items():
            if SPECS[position]["name"] == "visits":
                continue
            statement, values = features.chosen_before(definition, truncated=truncated)
            rows = bridge.binary_cursor(connection).execute(statement, values | {"cohort_id": cohort_id}).fetchall()
            expected += [(member, time, -1 - position) for member, time in rows]
    visits = -1 - [s["name"] for s in SPECS].index("visits")
    assert sorted(one for one in got if one[2] != visits) == sorted(expected) and len(expected) > 100


def test_statements_do_not_grow_with_tasks(engine: Engine, work: Make, filled: None) -> None:
    many = [spec(f"{a}{b}{n}", source_codes=[f"ICD10CM/c{a}", f"ICD10CM/c{b}"], start_days=n)
            for a in SOURCES for b in SOURCES if a < b for n in range(20)]  # fmt: skip
    tasks.build(work(name="t", cohort="c", specs=many))
    asked: list[object] = []
    with engine.connect() as connection:
        cohort_id, every = found(connection)
        assert len(every.by_statement) == 200
        kind = type(bridge.binary_cursor(connection))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("execute", "stream"):
                patch.setattr(kind, name, counted(getattr(kind, name), asked))
            events = labelling.read_statement_events(connection, cohort_id, every)
    assert len(asked) == 2 and len(np.unique(events.concept)) > 150


def counted(method: Callable[..., object], asked: list[object]) -> Callable[..., object]:
    """The method, its statements noted."""

    def noted(*args: object, **more: object) -> object:
        asked.append(args[1])
        return method(*args, **more)

    return noted
