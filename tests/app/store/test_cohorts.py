"""Cohorts: one member a study, an index, an end of follow-up, a split; what was left out is counted."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from app.errors import InputError
from app.store import cohorts
from app.store.splits import fraction, split_at
from app.store.work import InlineWork
from tests.app.store.records import Records, rows

Make = Callable[..., InlineWork]

MEMBERS = "SELECT m.* FROM label.cohort c JOIN label.cohort_member m USING (cohort_id) WHERE c.is_current"


def members(engine: Engine) -> dict[int, Any]:
    return {row.image_occurrence_id: row for row in rows(engine, MEMBERS)}


def attrition(engine: Engine) -> dict[str, tuple[int, int]]:
    (row,) = rows(engine, "SELECT attrition FROM label.cohort WHERE is_current")
    return {step["step"]: (step["scans"], step["persons"]) for step in row.attrition}


def test_of_a_study_the_preferred_series_is_the_member(engine: Engine, work: Make) -> None:
    """Axial before thin before many slices before a soft kernel before the UID; none is left out for lacking one."""
    ladder: list[dict[str, Any]] = [
        {"orientation": "coronal", "slice_thickness_mm": 2.0, "slices": 900, "kernel": "B30f"},
        {"orientation": "axial", "slice_thickness_mm": 5.0, "slices": 800, "kernel": "B30f"},
        {"orientation": "LPS", "slice_thickness_mm": 3.0, "slices": 100, "kernel": "B30f"},
        {"orientation": "axial", "slice_thickness_mm": 1.0, "slices": 200, "kernel": "B70f"},
        {"orientation": "axial", "slice_thickness_mm": 1.5, "slices": 200, "kernel": "STANDARD", "image_key": "b"},
        {"orientation": "axial", "slice_thickness_mm": 1.5, "slices": 200, "kernel": "Br40d", "image_key": "a"},
    ]
    best = {}
    with engine.begin() as connection:
        records = Records(connection)
        for person in range(1, len(ladder) + 1):
            records.person(person)
            for row in ladder[:person]:
                best[person] = records.scan(person, "2020-01-01 10:00:00", study_uid="1.2", **row)
    cohorts.build(work(name="c", follow_up="last_event"))
    assert {m.person_id: i for i, m in members(engine).items()} == best


def test_a_study_is_its_uid_or_without_one_its_time_and_per_series_takes_all(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        records = Records(connection)
        records.person(1)
        records.person(2)
        records.scan(1, "2020-01-01 10:00:00", study_uid="1.2")
        records.scan(1, "2020-01-01 10:05:00", study_uid="1.2")  # the same study
        records.scan(1, "2020-01-01 10:05:00", study_uid="1.3")
        records.scan(2, "2020-01-01 10:00:00")
        records.scan(2, "2020-01-01 10:00:00")  # the same moment
        records.scan(2, "2020-01-01 10:00:01")
    assert cohorts.build(work(name="c"))["members"] == 4
    assert cohorts.build(work(name="c", per="series"))["members"] == 6


PERIODS = {
    "observation_period": {1: "2020-12-31 23:59:59", 2: "2020-06-01 08:00:00", 3: None, 4: "2020-03-01 23:59:59"},
    "last_event": {1: "2021-05-05 05:00:00", 2: "2020-06-01 08:00:00", 3: None, 4: "2020-02-01 09:00:00"},
    "data_cut": {
        1: "2021-12-31 23:59:59",
        2: "2020-06-01 08:00:00",
        3: "2021-12-31 23:59:59",
        4: "2021-12-31 23:59:59",
    },
}
REASONS = {
    "observation_period": {3: "index outside every observation period", 4: "follow-up ends on the index day"},
    "last_event": {3: "no event recorded", 4: "follow-up ends before the index"},
    "data_cut": {},
}  # fmt: skip


@pytest.mark.parametrize("follow_up", list(PERIODS))
def test_each_rule_ends_follow_up_where_it_says_and_at_death(engine: Engine, work: Make, follow_up: str) -> None:
    with engine.begin() as connection:
        records = Records(connection)
        for person in (1, 2, 3, 4):
            records.person(person)
            records.scan(person, "2020-03-01 12:00:00")
        records.period(1, "2019-01-01", "2020-02-28")
        records.period(1, "2020-02-29", "2020-12-31")  # next day: one period
        records.period(1, "2021-01-02", "2021-12-31")  # two days apart: another one
        records.event(1, "2021-05-05 05:00:00", 7)
        records.period(2, "2019-01-01", "2023-01-01")
        records.death(2, "2020-06-01 08:00:00")
        records.event(2, "2020-07-01 08:00:00", 7)  # recorded after death
        records.period(4, "2020-01-01", "2020-03-01")
        records.event(4, "2020-02-01 09:00:00", 7)
    cut = "2021-12-31" if follow_up == "data_cut" else None
    cohorts.build(work(name="c", follow_up=follow_up, data_cut=cut))
    found = {m.person_id: m for m in members(engine).values()}
    ends = {p: None if m.follow_up_end is None else str(m.follow_up_end) for p, m in found.items()}
    assert ends == PERIODS[follow_up]
    assert {p: m.reason for p, m in found.items() if not m.eligible} == REASONS[follow_up]


def test_a_data_cut_ends_follow_up_under_every_rule_and_is_that_of_the_extract_by_default(
    engine: Engine, work: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine.begin() as connection:
        records = Records(connection, data_cut=dt.date(2020, 6, 30))
        records.person(1)
        records.period(1, "2019-01-01", "2023-01-01")
        records.scan(1, "2020-03-01 12:00:00")
    cohorts.build(work(name="c"))
    (member,) = members(engine).values()
    assert str(member.follow_up_end) == str(member.data_cut_end) == "2020-06-30 23:59:59"
    assert "came with the extract, 2020-06-30; --data-cut gives another" in capsys.readouterr().err
    cohorts.build(work(name="c", data_cut="2020-05-31"))
    assert "data cut" not in capsys.readouterr().err
    (member,) = members(engine).values()
    assert str(member.follow_up_end) == "2020-05-31 23:59:59"


def test_following_to_a_data_cut_that_nobody_knows_is_refused(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        records = Records(connection)
        records.person(1)
        records.scan(1, "2020-03-01 12:00:00")
    with pytest.raises(InputError, match="--data-cut"):
        cohorts.build(work(name="c", follow_up="data_cut"))


def choices(engine: Engine) -> None:
    with engine.begin() as connection:
        records = Records(connection)
        for person in range(1, 9):
            records.person(person, birth=None if person == 8 else f"{1990 + person}-03-01")
            records.period(person, "2015-01-01", "2022-01-01")
            verdict = {1: "unusable", 2: "suspect"}.get(person, "ok")
            records.scan(person, "2015-03-01 12:00:00", verdict=verdict, slices=10 * person)
        records.scan(99, "2015-03-01 12:00:00")  # of nobody known


def test_what_was_left_out_is_counted_at_its_step(engine: Engine, work: Make) -> None:
    choices(engine)
    cohorts.build(work(name="c", where="i.slices > 30 AND p.person_id % 2 = 0", min_age=20))
    assert attrition(engine) == {
        "scans loaded": (9, 9), "of a known person": (8, 8), "of a wanted verdict": (7, 7),
        "that meet --where": (3, 3), "old enough": (1, 1), "one a study": (1, 1), "eligible": (1, 1),
    }  # fmt: skip
    assert {m.person_id for m in members(engine).values()} == {4}
    cohorts.build(work(name="c"))
    assert "old enough" not in attrition(engine) and attrition(engine)["eligible"] == (7, 7)


def test_the_birthday_counts_and_unknown_birth_is_not_old_enough(engine: Engine, work: Make) -> None:
    choices(engine)
    cohorts.build(work(name="c", min_age=19))
    assert {m.person_id for m in members(engine).values()} == {2, 3, 4, 5, 6}  # 6 turns 19 that day; 8 is unknown


def test_only_scans_of_a_named_verdict(engine: Engine, work: Make) -> None:
    choices(engine)
    cohorts.build(work(name="c", verdict="suspect"))
    assert {m.person_id for m in members(engine).values()} == {2}


@pytest.mark.parametrize(
    "where",
    [
        "i.nothing = 1",
        "i.slices",
        "true); DELETE FROM omop.person; SELECT (true",
        "(SELECT count(*) FROM (DELETE FROM omop.person RETURNING 1) d) > 0",
        "set_config('transaction_read_only', 'off', true) = 'off' AND nextval('label.cohort_cohort_id_seq') > 0",
        "p.race_concept_id / 0 = 1",
        "",
    ][:-1],
)
def test_a_condition_that_is_none_is_answered_and_writes_nothing(engine: Engine, work: Make, where: str) -> None:
    choices(engine)
    with pytest.raises(InputError, match="--where") as caught:
        cohorts.build(work(name="c", where=where))
    assert "\n" not in str(caught.value)
    assert rows(engine, "SELECT count(*) AS n FROM omop.person")[0].n == 8
    assert not rows(engine, "SELECT 1 FROM label.cohort")


def test_a_failing_condition_never_quotes_a_value(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        records = Records(connection)
        records.person(1)
        records.do("UPDATE omop.person SET person_source_value = 'Jane Doe'")
        records.scan(1, "2020-03-01 12:00:00")
    with pytest.raises(InputError) as caught:
        cohorts.build(work(name="c", where="p.person_source_value::int > 3"))
    assert "Jane" not in str(caught.value)


def test_a_comment_in_the_condition_hides_nothing(engine: Engine, work: Make) -> None:
    choices(engine)
    assert cohorts.build(work(name="c", where="i.slices > 70 -- the last one"))["members"] == 1


def test_persons_who_share_a_scan_share_a_split_unless_too_many_do(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        records = Records(connection)
        for person in range(1, 101):
            records.person(person, split="valid" if person == 100 else None)
            records.period(person, "2019-01-01", "2023-01-01")
            shared = {"path": "shared.nii"} if person in (10, 20) else {}
            series = {"series_uid": "1.9"} if person in (20, 30) else {}
            records.scan(person, "2020-03-01 12:00:00", **shared, **series)
    cohorts.build(work(name="c"))
    split = {m.person_id: m.split for m in members(engine).values()}
    assert split[10] == split[20] == split[30] == split_at(fraction(10))
    assert split[100] == "tuning"
    assert all(split[p] == split_at(fraction(p)) for p in split if p not in (20, 30, 100))
    (row,) = rows(engine, "SELECT definition -> 'split' AS split FROM label.cohort")
    assert row.split == {"by": "unit", "persons_sharing": 3, "largest_unit": 3, "shared_volumes": False}

    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE omop.image_occurrence SET path = 'shared.nii' WHERE person_id <= 30")
    cohorts.build(work(name="c"))
    split = {m.person_id: m.split for m in members(engine).values()}
    assert all(split[p] == split_at(fraction(p)) for p in split if p != 100)
    (row,) = rows(engine, "SELECT definition -> 'split' AS split FROM label.cohort WHERE is_current")
    assert row.split["by"] == "person" and row.split["shared_volumes"] and row.split["largest_unit"] == 30


def test_a_split_time_holds_out_what_comes_later(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        records = Records(connection)
        for person in range(1, 41):
            records.person(person)
            records.period(person, "2018-01-01", "2023-01-01")
            records.scan(person, "2019-03-01 12:00:00")
            if person % 4 == 0:
                records.scan(person, "2020-01-01 00:00:00")
    cohorts.build(work(name="c", split_time="2020-01-01"))
    for m in members(engine).values():
        assert (m.split == "held_out") == (m.person_id % 4 == 0)
        early = m.person_id % 4 == 0 and m.index_time.year == 2019
        assert m.reason == ("before the split time" if early else None)
    assert {m.split for m in members(engine).values()} == {"train", "tuning", "held_out"}


def test_the_same_again_is_unchanged_and_other_inputs_move_the_name(engine: Engine, work: Make) -> None:
    choices(engine)
    first = cohorts.build(work(name="c"))
    again = cohorts.build(work(name="c"))
    assert (again["cohort_id"], again["unchanged"], first["unchanged"]) == (first["cohort_id"], True, False)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE omop.observation_period SET end_date = end_date + 1 WHERE person_id = 5")
    moved = cohorts.build(work(name="c"))
    assert (moved["version"], moved["unchanged"]) == (2, False)
    found = rows(engine, "SELECT version, is_current FROM label.cohort ORDER BY version")
    assert [(r.version, r.is_current) for r in found] == [(1, False), (2, True)]


def test_an_empty_store_makes_an_empty_cohort_and_says_so(
    engine: Engine, work: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cohorts.build(work(name="c"))["members"] == 0
    assert "no eligible member" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "a b", "a@2", None, "../x"])
def test_a_name_that_cannot_be_typed_is_refused(work: Make, name: str | None) -> None:
    with pytest.raises(InputError, match="name of letters"):
        cohorts.build(work(name=name))
