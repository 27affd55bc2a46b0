"""What must not change labels does not, and what must, does so as it should: no oracle is asked."""

from __future__ import annotations

import datetime as dt
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from app.settings import Settings
from app.store.session import make_engine
from app.store.work import InlineWork
from tests.app.store.records import Records, rows
from tests.reference import labels as oracle
from tests.workers.test_label_kept import empty
from tests.workers.test_label_stage import draw_person, draw_time, run_stages, write_person, write_vocabulary

Make = Callable[..., InlineWork]
Found = dict[tuple[int, str, str], tuple[str, float | None]]

PERSONS = 60
LATER = dt.timedelta(days=37)


class Drawn:
    """Persons and their scans, drawn once a test."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        keys = itertools.count(1_000)
        self.persons = {n: draw_person(draw, keys) for n in range(1, PERSONS + 1)}
        self.scans = {n: [draw_time(draw)] for n in self.persons}


def moved(person: oracle.Person, by: dt.timedelta) -> oracle.Person:
    """The same life, so much later."""
    return replace(
        person,
        events=[replace(e, time=e.time + by) for e in person.events],
        visits=[replace(v, start=v.start + by, end=v.end and v.end + by) for v in person.visits],
        periods=[(first + by, last + by) for first, last in person.periods],
        death=person.death and person.death + by,
    )


def labels_of(
    engine: Engine,
    work: Make,
    persons: dict[int, oracle.Person],
    scans: dict[int, list[tuple[dt.datetime, bool]]],
    *,
    cut: dt.date | None = None,
    follow_up: str = "observation_period",
) -> Found:
    """Status and seconds by person, index and task, in a store made anew."""
    empty(engine)
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE omop.concept_ancestor, omop.concept"))
        records = Records(connection, data_cut=cut)
        write_vocabulary(records)
        for number, person in persons.items():
            write_person(records, number, person)
            for time, date_only in scans[number]:
                records.scan(number, time, date_only=date_only, path=f"{number}.nii", image_key=f"i/{number}.nii")
        records.pack()
    run_stages(work, follow_up)
    statement = "SELECT person_id, index_time, task, status, time_days FROM label.tte_long WHERE label_set = 'l'"
    return {(r.person_id, str(r.index_time), r.task): (r.status, r.time_days) for r in rows(engine, statement)}


@pytest.mark.parametrize("follow_up", ["observation_period", "last_event"])
def test_lives_that_happen_later_have_the_same_labels(engine: Engine, work: Make, follow_up: str) -> None:
    drawn = Drawn(1)
    one = labels_of(engine, work, drawn.persons, drawn.scans, follow_up=follow_up)
    persons = {n: moved(person, LATER) for n, person in drawn.persons.items()}
    scans = {n: [(time + LATER, date_only) for time, date_only in some] for n, some in drawn.scans.items()}
    other = labels_of(engine, work, persons, scans, follow_up=follow_up)
    back = {(n, str(dt.datetime.fromisoformat(t) - LATER), task): v for (n, t, task), v in other.items()}
    assert one == back and {status for status, _ in one.values()} > {"event", "censored", "prior", "ineligible"}


def test_other_persons_other_codes_and_the_time_after_follow_up_do_not_matter(engine: Engine, work: Make) -> None:
    drawn = Drawn(2)
    one = labels_of(engine, work, drawn.persons, drawn.scans)
    noise = itertools.count()
    strangers = {n + 1_000: draw_person(random.Random(n), itertools.count(100_000 + n * 50)) for n in range(1, 10)}
    persons = {}
    for n, person in drawn.persons.items():
        last = max(last for _, last in person.periods)
        late = dt.datetime.combine(last, dt.time()) + dt.timedelta(days=50)
        more = [oracle.Event(late, concept, False, "condition") for concept in (100, 101, 103)]
        more += [oracle.Event(e.time, 999_000 + next(noise) % 7, e.date_only, "condition") for e in person.events[:3]]
        persons[n] = replace(person, events=[*person.events, *more])
    scans = drawn.scans | {n: [draw_time(random.Random(n))] for n in strangers}
    other = labels_of(engine, work, persons | strangers, scans)
    assert one == {key: value for key, value in other.items() if key[0] <= PERSONS}


def test_a_row_that_is_there_twice_and_rows_in_another_order_change_nothing(engine: Engine, work: Make) -> None:
    drawn = Drawn(3)
    one = labels_of(engine, work, drawn.persons, drawn.scans)
    draw = random.Random(0)
    persons = {}
    for n in draw.sample(list(drawn.persons), PERSONS):
        person = drawn.persons[n]
        events = [e for e in person.events if e.domain not in ("visit", "death")]
        twice = [*person.events, *draw.sample(events, len(events) // 2)]
        persons[n] = replace(person, events=draw.sample(twice, len(twice)))
    assert labels_of(engine, work, persons, drawn.scans) == one


def test_a_follow_up_cut_short_turns_later_events_into_censoring_and_nothing_else(engine: Engine, work: Make) -> None:
    drawn = Drawn(4)
    one = labels_of(engine, work, drawn.persons, drawn.scans)
    cut = dt.date(2010, 1, 20)
    end = dt.datetime.combine(cut, dt.time(23, 59, 59))
    other = labels_of(engine, work, drawn.persons, drawn.scans, cut=cut)
    assert one.keys() == other.keys()
    changed = 0
    for key, (status, days) in other.items():
        before, days_before = one[key]
        index = dt.datetime.fromisoformat(key[1])
        if key[2] in ("mortality", "competing") or (status, days) == (before, days_before):
            continue  # tasks that are followed to the data cut have none without it
        changed += 1
        if status == "ineligible":  # the window opens after the cut, or too little follow-up is left
            continue
        assert status == "censored" and before in ("event", "censored", "competing"), key
        assert days is not None and days_before is not None and days < days_before
        assert index + dt.timedelta(days=days) <= end + dt.timedelta(seconds=1)
    assert changed > 20


@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Apia"])
def test_the_zone_of_session_and_machine_does_not_matter(
    engine: Engine, work: Make, settings: Settings, tmp_path: Path, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    drawn = Drawn(5)
    one = labels_of(engine, work, drawn.persons, drawn.scans, cut=dt.date(2010, 1, 22))
    elsewhere = make_engine(engine.url.render_as_string(hide_password=False))

    @event.listens_for(elsewhere, "connect")
    def _zone(connection: Any, _: Any) -> None:
        connection.execute(f"SET TimeZone = '{zone}'")
        connection.commit()

    def made(**args: Any) -> InlineWork:
        return InlineWork(elsewhere, args=args, folder=tmp_path / "work", settings=settings)

    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        with elsewhere.connect() as connection:
            assert connection.execute(text("SHOW TimeZone")).scalar() == zone
        assert labels_of(elsewhere, made, drawn.persons, drawn.scans, cut=dt.date(2010, 1, 22)) == one
    finally:
        monkeypatch.undo()
        time.tzset()
