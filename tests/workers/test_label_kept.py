"""Labels made again: byte for byte what they were, and of changed data what computing every member gives."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as options
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text

from app.store import cohorts, tasks
from app.store.session import raw
from app.store.work import InlineWork
from ml.label_counts import count_members
from tests.app.store.records import Records, rows
from workers import bridge
from workers.bridge.kept import read_counts
from workers.stages import label_kept
from workers.stages.label import label

Make = Callable[..., InlineWork]

CONTENT = """
COPY (SELECT person_id, image_key, index_time, split, eligible, reason, event_tasks, event_seconds, prior_tasks,
             ineligible_tasks, window_tasks, window_seconds, visit_tasks, follow_up_seconds, data_cut_seconds,
             death_seconds
      FROM label.tte_at('{name}') JOIN omop.image_occurrence USING (image_occurrence_id, person_id)
      ORDER BY 1, 3, 2) TO STDOUT (FORMAT BINARY)
"""
COUNTS = """
SELECT position, split, status, n, persons, person_days FROM label.task_status_count
WHERE label_set_id = label.find_label_set(:name) ORDER BY 1, 2, 3
"""
KEPT = """
SELECT m.person_id, m.index_time, m.split, d.digest, d.timeline_digest, d.input_digest, d.label_digest
FROM label.member_digest d JOIN label.cohort_member m USING (cohort_member_id)
WHERE d.label_set_id = label.find_label_set(:name) ORDER BY m.person_id, m.index_time, d.input_digest
"""

SPECS: list[dict[str, Any]] = [
    {"name": "next", "concepts": [1], "prior": "keep", "occurrence": "next", "same_day": "after"},
    {"name": "first", "concepts": [2], "death": "competing", "start_days": 30},
    {"name": "washed", "concepts": [1, 3], "washout_days": 400, "min_follow_up_days": 20},
    {"name": "high", "concepts": [4], "values": [{"above": 5, "unit": 0}]},
    {"name": "back", "visit_concepts": [9201], "clock": "discharge", "prior": "keep"},
    {"name": "dead", "concepts": [4306655], "follow_up": "data_cut"},
]


def content(engine: Engine, name: str) -> tuple[bytes, bytes, list[Any], list[Any]]:
    """Rows by who they are, digest, counts and what is kept of each member: nothing with a key of the store in it."""
    with engine.connect() as connection:
        with raw(connection).cursor().copy(CONTENT.format(name=name)) as copy:
            data = b"".join(bytes(block) for block in copy)
        digest = connection.execute(
            text("SELECT digest FROM label.label_set WHERE label_set_id = label.find_label_set(:name)"), {"name": name}
        ).scalar_one()
    counts, kept = (rows(engine, statement, name=name) for statement in (COUNTS, KEPT))
    return data, bytes(digest), [tuple(row) for row in counts], [tuple(row) for row in kept]


def again(connection: Connection) -> Records:
    """Records into the store that is there."""
    records = Records.__new__(Records)
    records.connection = connection
    records.load_id = records.value("SELECT min(load_id) FROM ops.load")
    records.source_id = records.value("SELECT min(source_id) FROM ops.source")
    records.ids = itertools.count(records.value("SELECT 1000 + nextval('ops.load_load_id_seq') * 1000"))
    return records


def fill(connection: Connection, order: list[int]) -> None:
    """Persons with conditions, values, visits, deaths; the third with two scans."""
    records = Records(connection, data_cut=dt.date(2019, 6, 30))
    records.concepts([1, 2, 3, 4])
    for person in order:
        records.person(person)
        records.period(person, "2013-01-01", f"201{5 + person % 4}-12-31")
        for year in range(2013, 2019):
            records.event(person, f"{year}-0{1 + person % 8}-11 10:00:00", 1 + (person * year) % 3)
            records.event(person, f"{year}-03-1{person % 9} 10:00:00", 4, value=float((person + year) % 10))
        records.visit(person, "2015-03-01 08:00", f"2015-03-0{2 + person % 6} 09:00")
        records.visit(person, f"2015-0{4 + person % 5}-01 08:00", f"2015-0{4 + person % 5}-05 09:00")
        if person % 4 == 0:
            records.death(person, f"201{5 + person % 4}-11-1{person % 9} 03:00")
        records.scan(person, "2015-03-02 12:00:00", path=f"{person}.nii", image_key=f"i/{person}.nii")
        if person % 3 == 0:
            records.scan(person, "2016-03-02 12:00:00", path=f"{person}b.nii", image_key=f"i/{person}b.nii")
    records.pack()


def make(work: Make, name: str, **args: Any) -> dict[str, Any]:
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", specs=SPECS, allow_absent=True))
    return label(work(name=name, cohort="c", tasks="t", **args))


def empty(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in ("label.label_set", "label.cohort", "label.task_set", "omop.image_occurrence"):
            connection.exec_driver_sql(f"TRUNCATE {table} CASCADE")
        partitions = connection.exec_driver_sql(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'omop.event'::regclass"
        ).scalars()
        for partition in list(partitions):
            connection.exec_driver_sql(f"DROP TABLE {partition}")
        connection.exec_driver_sql(
            "TRUNCATE omop.person, omop.observation_period, omop.visit_occurrence, omop.timeline, omop.concept CASCADE"
        )
        connection.exec_driver_sql("DELETE FROM ops.load; DELETE FROM ops.source")


def test_a_version_that_is_dropped_and_made_again_is_the_same_byte_for_byte(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        fill(connection, list(range(1, 13)))
    made = make(work, "l")
    first = content(engine, "l")
    assert len(first[0]) > 1000 and made["recomputed"] == made["members"] == 16
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE label.label_set CASCADE")
    assert make(work, "l")["version"] == 1
    assert content(engine, "l") == first


def test_an_extract_loaded_in_another_order_under_other_keys_gives_the_same_bytes(engine: Engine, work: Make) -> None:
    found = []
    for order in (list(range(1, 13)), [7, 3, 12, 1, 9, 2, 11, 4, 10, 5, 8, 6]):
        empty(engine)
        with engine.begin() as connection:
            fill(connection, order)
        make(work, "l")
        found.append(content(engine, "l"))
    assert found[0] == found[1]


DELTAS: dict[str, str] = {
    "later event": "UPDATE omop.event SET time = time + interval '40 days' WHERE person_id = {p} AND concept_id = 2",
    "gone events": "DELETE FROM omop.event WHERE person_id = {p} AND concept_id = 1",
    "other values": "UPDATE omop.event SET value_as_number = 9 - value_as_number "
    "WHERE person_id = {p} AND concept_id = 4",
    "shorter period": "UPDATE omop.observation_period SET end_date = '2015-09-30' WHERE person_id = {p}",
    "longer period": "UPDATE omop.observation_period SET end_date = '2019-12-31' WHERE person_id = {p}",
    "no period": "DELETE FROM omop.observation_period WHERE person_id = {p}",
    "longer stay": "UPDATE omop.visit_occurrence SET visit_end_datetime = visit_end_datetime + interval '9 days' "
    "WHERE person_id = {p}",
    "transfer": "INSERT INTO omop.visit_occurrence (visit_occurrence_id, person_id, visit_concept_id, "
    "visit_start_datetime, visit_end_datetime, date_only, end_date_only, load_id) SELECT 900000 + visit_occurrence_id, "
    "person_id, 9201, visit_end_datetime + interval '12 hours', visit_end_datetime + interval '90 days', false, false, "
    "load_id FROM omop.visit_occurrence WHERE person_id = {p} AND visit_start_datetime < '2015-03-02' "
    "AND visit_occurrence_id < 900000 ON CONFLICT DO NOTHING",
    "gone visits": "DELETE FROM omop.visit_occurrence WHERE person_id = {p}",
    "later scan": "UPDATE omop.image_occurrence SET acquired_at = acquired_at + interval '1 day' WHERE person_id = {p}",
    "other split": "UPDATE omop.person SET split = CASE WHEN split = 'held_out' THEN 'tuning' ELSE 'held_out' END "
    "WHERE person_id = {p}",
    "later cut": "UPDATE ops.source SET data_cut = data_cut + 10",
    "unusable scan": "UPDATE omop.image_occurrence SET verdict = 'unusable' WHERE person_id = {p}",
}


def change(engine: Engine, what: str, person: int) -> None:
    """One change of one person's rows, or of the source."""
    with engine.begin() as connection:
        records = again(connection)
        if what == "death":
            records.death(person, "2015-08-08 03:00")
        elif what == "new scan":
            number = next(records.ids)
            records.scan(person, "2015-06-02 12:00:00", path=f"{number}.nii", image_key=f"i/{number}.nii")
        elif what == "new event":
            records.event(person, "2015-07-07 07:00:00", 1)
        else:
            records.do(DELTAS[what].format(p=person))
        records.pack()


ALL = ["death", "new scan", "new event", *DELTAS]
CHANGES = st.tuples(st.sampled_from(ALL), st.integers(1, 12))


def test_each_kind_of_change_is_seen_where_it_matters(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        fill(connection, list(range(1, 13)))
    make(work, "l")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_kept, "MOST_COMPUTED", 1.0)
        for n, what in enumerate(ALL):
            before = content(engine, "l")[0]
            for person in range(1 + n % 2, 13, 2):
                change(engine, what, person)
            made = make(work, "l")
            make(work, "whole", full=True)
            assert content(engine, "l") == content(engine, "whole"), what
            changed = content(engine, "l")[0] != before
            assert changed, what
            assert what == "later cut" or (made["recomputed"] > 0) == (what != "unusable scan"), what


@options(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.lists(CHANGES, min_size=1, max_size=4), min_size=1, max_size=3))
def test_computing_what_changed_gives_what_computing_all_gives(
    engine: Engine, work: Make, steps: list[list[tuple[str, int]]]
) -> None:
    empty(engine)
    with engine.begin() as connection:
        fill(connection, list(range(1, 13)))
    make(work, "l")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_kept, "MOST_COMPUTED", 1.0)
        for step in steps:
            for what, person in step:
                change(engine, what, person)
            made, whole = make(work, "l"), make(work, "whole", full=True)
            assert whole["recomputed"] in (whole["members"], 0) and whole["taken_over_from"] is None
            assert content(engine, "l") == content(engine, "whole")
            if not made["unchanged"]:
                assert made["taken_over_from"] == f"l@{made['version'] - 1}"
                touched = {person for what, person in step if what != "later cut"}
                if all(what != "later cut" for what, _ in step):
                    assert made["recomputed"] <= 3 * len(touched)


def test_what_is_counted_of_stored_labels_is_what_was_counted_while_labelling(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        fill(connection, list(range(1, 13)))
    make(work, "l")
    with engine.connect() as connection:
        info = bridge.find_label_set(connection, "l")
        labels, members = bridge.read_labels(connection, info), bridge.read_members(connection, info.cohort_id)
        stored = read_counts(connection, info.label_set_id, len(SPECS))
    counted = count_members(labels, members.person, members.split)
    assert counted[:, :, 0].sum() == 16 * len(SPECS) and len(np.unique(np.nonzero(counted)[1])) == 5
    np.testing.assert_array_equal(counted, stored)


def test_only_touched_persons_are_computed_and_the_ending_says_so(engine: Engine, work: Make) -> None:
    from app.cli.endings import ending

    with engine.begin() as connection:
        fill(connection, list(range(1, 13)))
    make(work, "l")
    change(engine, "new event", 3)
    made = make(work, "l")
    assert (made["version"], made["recomputed"], made["taken_over_from"]) == (2, 2, "l@1")
    assert ending("label", made).endswith("version 2; 2 of 16 members recomputed, the others as in l@1")
    for person in range(1, 10):
        change(engine, "new event", person)
    assert make(work, "l")["recomputed"] == 16  # more than half: all, by one way


def test_other_tasks_take_nothing_over(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        fill(connection, list(range(1, 13)))
    make(work, "l")
    change(engine, "new event", 3)
    tasks.build(work(name="t", cohort="c", specs=SPECS[:2], allow_absent=True))
    made = label(work(name="l", cohort="c", tasks="t"))
    assert (made["recomputed"], made["taken_over_from"]) == (16, None)
    made = make(work, "l")  # back to the tasks of the first version, whose labels are still there
    assert (made["version"], made["recomputed"], made["taken_over_from"]) == (3, 2, "l@1")


def test_a_vocabulary_that_means_more_takes_nothing_over_and_is_kept_by_task(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        fill(connection, list(range(1, 13)))
    make(work, "l")
    with engine.begin() as connection:
        again(connection).ancestors([(2, 3, 1), (2, 2, 0)])
    assert make(work, "l")["taken_over_from"] is None
    concepts = rows(
        engine,
        "SELECT s.version, t.name, k.concepts FROM label.label_concept k JOIN label.label_set s USING (label_set_id) "
        "JOIN label.task t USING (task_set_id, position) WHERE t.name IN ('first', 'washed', 'high') ORDER BY 1, 2",
    )
    assert [tuple(row) for row in concepts] == [
        (1, "first", [2]),
        (1, "high", [4]),
        (1, "washed", [1, 3]),
        (2, "first", [2, 3]),
        (2, "high", [4]),
        (2, "washed", [1, 3]),
    ]


def test_a_name_alone_makes_its_labels_again_from_the_newest_cohort_and_tasks(engine: Engine, work: Make) -> None:
    from app.errors import InputError

    with engine.begin() as connection:
        fill(connection, list(range(1, 13)))
    with pytest.raises(InputError, match="--cohort and --tasks for labels that are new"):
        label(work(name="l"))
    make(work, "l")
    assert label(work(name="l"))["unchanged"]
    change(engine, "new scan", 5)
    cohorts.build(work(name="c"))
    made = label(work(name="l"))
    assert (made["version"], made["members"], made["recomputed"]) == (2, 17, 2)
