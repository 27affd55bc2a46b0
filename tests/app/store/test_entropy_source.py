"""Source concepts as pretraining tasks: children of the concepts that they map to, counted the slow way beside."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from app.errors import InputError
from app.store import cohorts, tasks
from app.store.entropy import score
from app.store.work import InlineWork
from tests.app.store.records import Records, rows
from workers.stages.label import label

Make = Callable[..., InlineWork]

INDEX, END = dt.datetime(2020, 1, 1, 10), dt.date(2021, 1, 1)
STANDARD, FINE, COARSE, LOCAL, ALONE = 10, 101, 102, 103, 104
MAPS = {FINE: STANDARD, COARSE: STANDARD, ALONE: 99}
"""FINE and COARSE are two codes of one concept, LOCAL maps to none, ALONE to one that nobody has."""


@pytest.fixture
def had(engine: Engine) -> list[tuple[int, dt.datetime, int, int]]:
    """80 train persons and 20 others with drawn rows: (person, time, concept, source concept)."""
    draw = random.Random(5)
    events = []
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([STANDARD, 99])
        records.concepts([FINE, COARSE, LOCAL, ALONE], "ICD10CM", None)
        for source, concept in MAPS.items():
            records.do(
                "INSERT INTO omop.concept_relationship (concept_id_1, concept_id_2, relationship_id) "
                "VALUES (:a, :b, 'Maps to')", a=source, b=concept,
            )  # fmt: skip
        for person in range(1, 101):
            records.person(person, split="train" if person <= 80 else "test")
            records.period(person, "2010-01-01", END)
            for index in indexes(person):
                records.scan(person, index)
            for _ in range(draw.randint(0, 4)):
                source = draw.choice([FINE, FINE, COARSE, LOCAL, ALONE, 0, STANDARD, 777])
                concept = 0 if source in (LOCAL, ALONE, 777) else STANDARD
                time = INDEX + dt.timedelta(seconds=draw.choice([-86_400 * 9, 0, 1, 86_400 * 30, 86_400 * 500]))
                events.append((person, time, concept, source))
                records.event(person, time, concept, source=source)
        records.pack()
    return events


def indexes(person: int) -> list[dt.datetime]:
    """Each fifth person was scanned before, too."""
    return [INDEX - dt.timedelta(days=20), INDEX] if person % 5 == 0 else [INDEX]


def by_hand(had: list[tuple[int, dt.datetime, int, int]]) -> dict[int, tuple[int, int, int]]:
    """Concept → train persons with it, those after the index, those of its parent."""
    found = {}
    end = dt.datetime.combine(END, dt.time()) + dt.timedelta(days=1)
    train = [row for row in had if row[0] <= 80]
    holders = {row[0] for row in train if row[2] == STANDARD}
    for source in (FINE, COARSE, LOCAL, ALONE):
        mine = [row for row in train if row[3] == source]
        after = {person for person, time, _, _ in mine if indexes(person)[0] < time < end}
        base = {STANDARD: len(holders), 99: 0, None: 80}[MAPS.get(source)]
        found[source] = len({row[0] for row in mine}), len(after), base
    return found


def test_source_concepts_are_weighed_as_children_of_what_they_map_to(
    engine: Engine, work: Make, had: list[tuple[int, dt.datetime, int, int]]
) -> None:
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", size=9, source_concepts=True))
    weighed = {r.concept_id: r for r in rows(engine, "SELECT * FROM label.task_candidate WHERE concept_id > 99")}
    expected = {c: counted for c, counted in by_hand(had).items() if 0 < counted[0] < counted[2]}
    assert expected.keys() == weighed.keys() == {FINE, COARSE, LOCAL}
    for concept, (n, after, base) in expected.items():
        r = weighed[concept]
        assert (r.persons, r.num_train_events, r.base_persons) == (n, after, base)
        assert r.entropy == pytest.approx(score(n, base, 80))


def test_such_a_task_has_the_rows_that_the_source_wrote_so(
    engine: Engine, work: Make, had: list[tuple[int, dt.datetime, int, int]]
) -> None:
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", size=9, source_concepts=True))
    label(work(name="l", cohort="c", tasks="t", allow_unknown_concepts=True))
    (task,) = rows(engine, "SELECT * FROM label.task WHERE name = :name", name=f"ICD10CM/c{FINE}")
    assert task.concept_id is None and task.prevalence == by_hand(had)[FINE][0] / 80
    counted = "SELECT sum(persons) FROM label.task_count WHERE task = :name AND status = 'event' AND split = 'train'"
    assert rows(engine, counted, name=f"ICD10CM/c{FINE}")[0][0] == by_hand(had)[FINE][1] == task.num_train_events


def test_banned_codes_go_with_the_source_concepts_that_map_to_them(
    engine: Engine, work: Make, had: list[tuple[int, dt.datetime, int, int]]
) -> None:
    cohorts.build(work(name="c"))
    tasks.build(work(name="no", cohort="c", specs=[{"name": "x", "concepts": [STANDARD]}]))
    tasks.build(work(name="t", cohort="c", size=9, ban="no", source_concepts=True))
    verdicts = rows(engine, "SELECT concept_id, verdict FROM label.task_candidate")
    assert {r.concept_id: r.verdict for r in verdicts if r.verdict == "banned"}.keys() == {STANDARD, FINE, COARSE}


def test_without_the_option_none_is_chosen(engine: Engine, work: Make, had: object) -> None:
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", size=9))
    assert {r.concept_id for r in rows(engine, "SELECT concept_id FROM label.task")} == {STANDARD}
    with pytest.raises(InputError, match="either a size or specs"):
        tasks.build(work(name="t", cohort="c", source_concepts=True))
