"""What a delivery does to the store: gate, guard, snapshots, sources, vocabulary, and a stop midway."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.errors import InputError
from app.loading.omop import load
from app.store.work import InlineWork
from tests.app.loading.extracts import (
    CONDITION_HEADER,
    CONDITIONS,
    CONTENT,
    DEATH_HEADER,
    MEASUREMENT_HEADER,
    PERIODS,
    PERSONS,
    VISIT_HEADER,
    conditions,
    extract,
    one,
    rows,
    write,
)

Make = Callable[..., InlineWork]


def test_the_gate_stops_a_table_with_many_rejects_and_leaves_them_readable(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    before = rows(engine, CONTENT), one(engine, "SELECT count(*) FROM ops.load")
    bad = extract(
        tmp_path / "b", condition_occurrence=conditions("21,1,x,2015-01-01,,,,0,,0", "22,9,1,2015-01-01,,,,0,,0")
    )
    with pytest.raises(InputError, match="2 of 22"):
        load(work(path=str(bad)))
    assert (rows(engine, CONTENT), one(engine, "SELECT count(*) FROM ops.load")) == before
    assert rows(engine, "SELECT load_id, record, rule FROM ops.reject ORDER BY record") == [
        (None, 21, "unparsable_id"),
        (None, 22, "unknown_person"),
    ]
    assert load(work(path=str(bad), max_rejects=0.1))["rejected"] == 2


def test_observation_periods_of_unknown_persons_pass_the_gate(tmp_path: Path, work: Make, engine: Engine) -> None:
    periods = [*PERIODS, *(f"{i},{i},2010-01-01,2020-12-31,0" for i in range(100, 150))]
    result = load(work(path=str(extract(tmp_path, observation_period=periods)), max_rejects=0))
    assert result["rejected"] == 50
    assert one(engine, "SELECT count(*) FROM omop.observation_period") == 5


def test_a_snapshot_that_shrinks_stops_unless_it_may(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    before = rows(engine, CONTENT)
    fewer = extract(tmp_path / "b", condition_occurrence=CONDITIONS[:-2])
    with pytest.raises(InputError, match="20 → 18"):
        load(work(path=str(fewer)))
    others = extract(
        tmp_path / "c",
        person=[PERSONS[0], *(f"1{line}" for line in PERSONS[1:])],
        observation_period=[PERIODS[0], *(f"{i},1{i},2010-01-01,2020-12-31,0" for i in range(1, 6))],
        condition_occurrence=[
            CONDITION_HEADER,
            *(f"{i},1{i % 5 + 1},300,2015-03-{i:02d},,,,0,,0" for i in range(1, 21)),
        ],
    )
    with pytest.raises(InputError, match="5 of 5"):
        load(work(path=str(others)))
    assert rows(engine, CONTENT) == before
    assert load(work(path=str(fewer), allow_shrink=True))["events"] == 18
    assert rows(engine, "SELECT count(*), sum(num_events) FROM omop.timeline") == [(5, 18)]


def test_last_months_folder_goes_back_and_this_months_again_is_unchanged(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    october = extract(tmp_path / "october")
    november = extract(tmp_path / "november", condition_occurrence=conditions("21,1,301,2016-01-01,,,,0,,0"))
    load(work(path=str(october)))
    first = rows(engine, CONTENT)
    assert load(work(path=str(november)))["events"] == 21
    assert load(work(path=str(november)))["unchanged"]
    assert load(work(path=str(october)))["unchanged"] is False
    assert rows(engine, CONTENT)[0][:5] == first[0][:5]
    states = rows(engine, "SELECT state, count(*) FROM ops.load WHERE table_name = 'person' GROUP BY 1 ORDER BY 1")
    assert states == [("published", 1), ("superseded", 2)]
    partitions = one(engine, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'omop.event'::regclass")
    tables = one(engine, "SELECT count(*) FROM pg_class WHERE relname ~ '^(event|staged)_' AND relkind = 'r'")
    assert partitions == tables == 1


def test_tables_that_are_absent_stay_and_are_named(tmp_path: Path, work: Make, engine: Engine) -> None:
    measurements = [MEASUREMENT_HEADER, "1,1,3000,2015-01-01,,7,,,10,0"]
    visits = [VISIT_HEADER, "10,1,9202,2015-01-01,,2015-01-01,,0,,"]
    whole = extract(
        tmp_path / "a", measurement=measurements, visit_occurrence=visits, death=[DEATH_HEADER, "1,2016-01-01,,0,"]
    )
    load(work(path=str(whole)))
    part = write(
        tmp_path / "b", {"person": PERSONS, "condition_occurrence": conditions("21,1,300,2017-01-01,,,,0,10,0")}
    )
    result = load(work(path=str(part)))
    assert result["stayed"] == ["death", "measurement", "observation_period", "visit_occurrence"]
    assert one(engine, "SELECT count(*) FROM omop.event") == 24
    assert one(engine, "SELECT sum(num_events) FROM omop.timeline") == 24
    assert one(engine, "SELECT visit_occurrence_id FROM omop.event WHERE domain = 'c' AND source_row_id = 21") == 10
    flags = one(
        engine, "SELECT flags_by_rule FROM ops.load WHERE table_name = 'condition_occurrence' AND state = 'published'"
    )
    assert flags["after_death"] == 1 and "unknown_visit" not in flags and "outside_observation_period" not in flags


def test_rows_of_persons_who_are_gone_go_from_tables_that_were_not_delivered(
    tmp_path: Path, work: Make, engine: Engine
) -> None:
    measurements = [MEASUREMENT_HEADER, "1,1,3000,2015-01-01,,7,,,10,0", "2,2,3000,2015-01-01,,7,,,10,0"]
    load(work(path=str(extract(tmp_path / "a", measurement=measurements))))
    fewer = [PERSONS[0], *PERSONS[2:]]
    of_others = [line for line in CONDITIONS if line.split(",")[1] != "1"]
    folder = extract(tmp_path / "b", person=fewer, condition_occurrence=of_others)
    result = load(work(path=str(folder), allow_shrink=True))
    assert (result["stayed"], result["rows_of_vanished_persons"]) == (["measurement"], 1)
    assert "1 rows of persons who are gone went with them (measurement)" in result["summary"]
    assert one(engine, "SELECT sum(num_events) FROM omop.timeline") == one(engine, "SELECT count(*) FROM omop.event")
    assert rows(engine, "SELECT person_id FROM omop.measurement") == [(2,)]
    books = "SELECT num_loaded, num_shown, state FROM ops.load WHERE table_name = 'measurement'"
    assert rows(engine, books) == [(2, 1, "published")]
    changes = "SELECT table_name, num_before, num_after, num_removed FROM ops.load_change WHERE delivery_id > 1"
    assert ("measurement", 2, 1, 1) in rows(engine, changes)


def test_a_query_of_one_domain_reads_its_partition_alone(tmp_path: Path, work: Make, engine: Engine) -> None:
    measurements = [MEASUREMENT_HEADER, "1,1,3000,2015-01-01,,7,,,10,0"]
    load(work(path=str(extract(tmp_path, measurement=measurements))))
    (name,) = [row[0] for row in rows(engine, "SELECT partition_name FROM ops.load WHERE table_name = 'measurement'")]
    plan = "\n".join(row[0] for row in rows(engine, "EXPLAIN SELECT * FROM omop.measurement WHERE person_id = 1"))
    assert name.removeprefix("omop.") in plan and len(set(re.findall(r"event_\d+", plan)) - {"event_1"}) == 1, plan
    assert rows(engine, "SELECT measurement_id, value_as_number FROM omop.measurement") == [(1, 7.0)]


def test_ids_that_another_source_brought_are_refused(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a")), source="north"))
    before = rows(engine, CONTENT)
    with pytest.raises(InputError, match="another source"):
        load(work(path=str(extract(tmp_path / "b")), source="south"))
    assert rows(engine, CONTENT) == before
    assert one(engine, "SELECT count(*) FROM ops.source") == 1


def test_two_sources_live_side_by_side(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a")), source="north"))
    south = write(
        tmp_path / "b",
        {
            "person": [PERSONS[0], "-9223372036854775808,8507,1950,1,1,0,0,"],
            "condition_occurrence": [CONDITION_HEADER, "1,-9223372036854775808,300,2015-01-01,,,,0,,0"],
        },
    )
    load(work(path=str(south), source="south"))
    assert rows(engine, "SELECT count(*), count(DISTINCT load_id) FROM omop.event") == [(21, 2)]
    assert one(engine, "SELECT min(person_id) FROM omop.timeline") == -(2**63)


def test_the_last_day_of_the_data_is_given_or_read(tmp_path: Path, work: Make, engine: Engine) -> None:
    says = ["cdm_source_name,source_release_date", "A simulated cohort,2021-02-03"]
    folder = str(extract(tmp_path, cdm_source=says))
    assert load(work(path=folder))["data_cut"] == "2021-02-03"
    row = "SELECT data_cut, data_cut_source, simulated FROM ops.source"
    assert rows(engine, row) == [(dt.date(2021, 2, 3), "cdm_source", True)]
    again = load(work(path=folder, data_cut="2020-12-31"))
    assert (again["unchanged"], again["data_cut"]) == (True, "2020-12-31")
    assert rows(engine, row) == [(dt.date(2020, 12, 31), "option", True)]


def test_a_release_before_shifted_dates_is_no_last_day(tmp_path: Path, work: Make, engine: Engine) -> None:
    says = ["cdm_source_name,source_release_date", "Some clinic,2009-02-03"]
    row = "SELECT data_cut, data_cut_source FROM ops.source"
    assert load(work(path=str(extract(tmp_path / "a", cdm_source=says))))["data_cut"] is None
    assert rows(engine, row) == [(None, None)]
    assert load(work(path=str(tmp_path / "a"), data_cut="2020-12-31"))["data_cut"] == "2020-12-31"
    late = [PERIODS[0], *(line.replace("2010-01-01", "2005-01-01") for line in PERIODS[1:4]), *PERIODS[4:]]
    load(work(path=str(extract(tmp_path / "b", cdm_source=says, observation_period=late))))
    assert rows(engine, row) == [(dt.date(2009, 2, 3), "cdm_source")]  # most were observed before it
    load(work(path=str(tmp_path / "a")))
    assert rows(engine, row) == [(None, None)]


def test_a_release_date_is_read_where_no_observation_periods_are(tmp_path: Path, work: Make) -> None:
    without_periods = {
        "person": PERSONS,
        "condition_occurrence": CONDITIONS,
        "cdm_source": ["cdm_source_name,source_release_date", "Some clinic,2021-02-03"],
    }
    assert load(work(path=str(write(tmp_path, without_periods))))["data_cut"] == "2021-02-03"


def test_a_vocabulary_grows_and_is_corrected_but_loses_nothing(tmp_path: Path, work: Make, engine: Engine) -> None:
    header = (
        "concept_id,concept_name,domain_id,vocabulary_id,concept_class_id,standard_concept,concept_code,"
        "valid_start_date,valid_end_date,invalid_reason"
    )
    first = [header, "1,One,Condition,SNOMED,x,S,1,1970-01-01,2099-12-31,", '2,"Two, é ""q""",Condition,SNOMED,x,,2,,,']
    second = [header, "2,Zwei,Condition,SNOMED,x,S,2,,,", "3,Three,Condition,SNOMED,x,S,3,,,U", "3,Alt,C,S,x,S,3,,,"]
    ancestors = [
        "ancestor_concept_id,descendant_concept_id,min_levels_of_separation,max_levels_of_separation",
        "1,2,1,1",
    ]
    load(work(path=str(extract(tmp_path / "a", concept=first, concept_ancestor=ancestors))))
    assert rows(engine, "SELECT concept_name, standard_concept FROM omop.concept ORDER BY 1") == [
        ("One", "S"),
        ('Two, é "q"', None),
    ]
    load(work(path=str(extract(tmp_path / "b", concept=second, concept_ancestor=[*ancestors, "1,3,1,2"]))))
    assert rows(engine, "SELECT concept_id, concept_name FROM omop.concept ORDER BY 1") == [
        (1, "One"),
        (2, "Zwei"),
        (3, "Alt"),
    ]
    assert one(engine, "SELECT count(*) FROM omop.concept_ancestor") == 2


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["reading", "writing condition", "indexing", "writing timelines"])
def test_a_load_that_is_stopped_midway_leaves_nothing(where: str, tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    before = rows(engine, CONTENT), rows(engine, "SELECT relname FROM pg_class WHERE relname LIKE 'event%' ORDER BY 1")
    stopped = work(path=str(extract(tmp_path / "b", condition_occurrence=conditions("21,1,301,2016-01-01,,,,0,,0"))))
    seen = []

    def progress(done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        seen.append(note)
        if note.startswith(where):
            raise Interrupted

    stopped.progress = progress  # type: ignore[method-assign]
    if where == "writing timelines":
        stopped.check = lambda: None  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        load(stopped)
    after = rows(engine, CONTENT), rows(engine, "SELECT relname FROM pg_class WHERE relname LIKE 'event%' ORDER BY 1")
    assert after == before
    assert not any((tmp_path / "work").rglob("*"))
