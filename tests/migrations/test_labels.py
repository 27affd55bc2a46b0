"""Views of labels say what docs/science.md, sections 1 and 2, defines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from tests.migrations.rows import add_labels

EXPECTED = {
    "plain": ["event 1", "censored 100", "censored 50", "prior", "ineligible", "censored 20", "censored 100"],
    "late": ["event 31", "censored 100", "competing 50", "event 40", "ineligible", "ineligible", "censored 100"],
    "readmission": [
        "event 5",
        "censored 100",
        "competing 50",
        "censored 100",
        "ineligible",
        "ineligible",
        "ineligible",
    ],
    "mortality": [
        "event 150",
        "censored 200",
        "event 50",
        "censored 200",
        "ineligible",
        "censored 200",
        "censored 100",
    ],
}
"""Status and time of members 1 to 7."""


def rows(engine: Engine, statement: str) -> list[dict[str, Any]]:
    """Rows on the hand-made labels."""
    with engine.begin() as connection:
        add_labels(connection)
        return [dict(row) for row in connection.execute(text(statement)).mappings()]


def brief(row: dict[str, Any]) -> str:
    return row["status"] if row["time_days"] is None else f"{row['status']} {row['time_days']:g}"


@pytest.mark.parametrize("source", ["label.tte_long", "label.tte_long('outcomes')", "label.tte_long('outcomes@2')"])
def test_every_member_has_the_status_that_goes_first(engine: Engine, source: str) -> None:
    found = rows(engine, f"SELECT * FROM {source} ORDER BY task, cohort_member_id")
    assert {task: [brief(row) for row in found if row["task"] == task] for task in EXPECTED} == EXPECTED
    assert len(found) == 28


def test_the_long_form_and_the_training_side_read_the_same_labels(engine: Engine) -> None:
    """One definition, two readers: SQL for people, arrays for training and evaluation."""
    from ml.labelling import STATUSES, task_outcomes
    from workers.bridge import find_label_set, read_labels

    found = rows(engine, "SELECT * FROM label.tte_long ORDER BY task, cohort_member_id")
    with engine.connect() as connection:
        info = find_label_set(connection, "outcomes")
        labels = read_labels(connection, info)
    for position, task in enumerate(info.task_names):
        outcomes = task_outcomes(labels, position)
        shown = [row for row in found if row["task"] == task]
        assert [STATUSES[status] for status in outcomes.status] == [row["status"] for row in shown]
        days = [np.nan if row["time_days"] is None else row["time_days"] for row in shown]
        np.testing.assert_allclose(outcomes.time_days, days)


def test_event_is_one_zero_or_null_and_the_rest_has_a_reason(engine: Engine) -> None:
    meaning = {"event": 1, "competing": 0, "censored": 0, "prior": None, "ineligible": None}
    found = rows(engine, "SELECT * FROM label.tte_long")
    assert all(row["event"] == meaning[row["status"]] for row in found)
    assert all((row["reason"] is None) == (row["event"] is not None) for row in found)
    assert {row["reason"] for row in found if row["cohort_member_id"] == 5} == {
        "index outside every observation period"
    }


def test_the_columns_of_the_long_form_are_public(engine: Engine) -> None:
    columns = (
        "label_set task cohort_member_id person_id image_occurrence_id index_time split status reason event time_days"
    )
    assert list(rows(engine, "SELECT * FROM label.tte_long LIMIT 1")[0]) == columns.split()
    types = """
        SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
        WHERE attrelid = 'label.tte_long'::regclass AND attname IN ('event', 'time_days')
    """
    with engine.connect() as connection:
        assert dict(connection.execute(text(types)).tuples().all()) == {
            "event": "smallint",
            "time_days": "double precision",
        }


def test_views_show_the_version_that_the_name_means(engine: Engine) -> None:
    assert {row["label_set"] for row in rows(engine, "SELECT label_set FROM label.tte_long")} == {"outcomes"}
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM label.tte_long('outcomes@1')")).scalar() == 0
        assert connection.execute(text("SELECT label.find_label_set('outcomes@1')")).scalar() == 1


ASKED = [
    "label.find_label_set({})",
    "label.tte_long({})",
    "label.outcome({})",
    "label.task_count({})",
    "label.tte_at({})",
    "label.binary({}, 365)",
    "label.incidence({}, 'plain')",
]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("'outcoms'", "did you mean 'outcomes'?"),
        ("'Outcomes'", "did you mean 'outcomes'?"),
        ("'outcomes@7'", "did you mean 'outcomes@1'?"),
        ("'xyz'", "known: outcomes."),
        ("NULL", "known: outcomes."),
    ],
)
def test_functions_refuse_a_label_set_that_is_not_there(engine: Engine, asked: str, name: str, hint: str) -> None:
    with pytest.raises(ProgrammingError) as refused:
        rows(engine, f"SELECT * FROM {asked.format(name)}")
    assert str(refused.value.orig).startswith(f"Expected a label set, found none called {name}; {hint}")


def test_functions_refuse_names_where_there_are_no_labels_at_all(engine: Engine) -> None:
    for asked in ASKED:
        with engine.connect() as connection, pytest.raises(ProgrammingError, match="there is none yet"):
            connection.exec_driver_sql(f"SELECT * FROM {asked.format(chr(39) + 'outcomes' + chr(39))}").all()


def test_incidence_refuses_tasks_and_splits_that_are_not_there(engine: Engine) -> None:
    rows(engine, "SELECT 1")
    for asked, said in (
        ("'outcomes', 'mortalty'", "Expected a task of the label set, found none called 'mortalty'; did you mean 'mor"),
        ("'outcomes', 'x'", "found none called 'x'; known: plain, late, readmission, mortality."),
        ("'outcomes', 'plain', 'heldout'", "Expected a split, found none called 'heldout'; did you mean 'held_out'?"),
        ("'outcomes', 'plain', 'test'", "found none called 'test'; known: train, tuning, held_out."),
    ):
        with engine.connect() as connection, pytest.raises(ProgrammingError) as refused:
            connection.exec_driver_sql(f"SELECT * FROM label.incidence({asked})").all()
        assert said in str(refused.value.orig)


def test_outcomes_are_the_events_of_the_long_form(engine: Engine) -> None:
    found = rows(engine, "SELECT task, cohort_member_id, time_days, outcome_time::text FROM label.outcome")
    with engine.connect() as connection:
        long = connection.execute(text("SELECT task, cohort_member_id, time_days FROM label.tte_long WHERE event = 1"))
        expected = {tuple(row) for row in long}
    assert {(row["task"], row["cohort_member_id"], row["time_days"]) for row in found} == expected
    assert "2020-01-02 12:00:00" in {row["outcome_time"] for row in found}


def test_binary_labels_at_a_horizon(engine: Engine) -> None:
    found = rows(engine, "SELECT task, cohort_member_id, label FROM label.binary('outcomes', 60) ORDER BY 1, 2")
    by_task = {task: [row["label"] for row in found if row["task"] == task] for task in EXPECTED}
    assert by_task == {
        "plain": [1, 0, None, None, None, None, 0],  # member 3 is censored by death before the horizon
        "late": [1, 0, 0, 1, None, None, 0],  # death competes: it can no longer happen
        "readmission": [1, 0, 0, 0, None, None, None],
        "mortality": [0, 0, 1, 0, None, 0, 0],  # member 1 has the event after the horizon
    }


def test_observation_until_the_horizon_itself_is_enough(engine: Engine) -> None:
    statement = "SELECT label, status FROM label.binary('outcomes', 100) WHERE task = 'plain' AND cohort_member_id = 2"
    assert rows(engine, statement) == [{"label": 0, "status": "negative"}]
    with engine.connect() as connection:
        later = connection.execute(text(statement.replace("100", "101"))).one()
    assert tuple(later) == (None, "censored")


def test_stored_counts_are_shown_by_name(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        connection.execute(
            text("INSERT INTO label.status_count VALUES (2, 'train', 'event', '{1,0}', '{1,0}', '{1.0,0}'), "
                 "(2, 'train', 'censored', '{40,0}', '{30,0}', '{9.0,0}')")
        )  # fmt: skip
        shown = connection.execute(text("SELECT * FROM label.task_count ORDER BY n")).all()
        public = connection.execute(
            text("SELECT status, n, persons FROM label.task_count_public ORDER BY status")
        ).all()
    assert [tuple(row) for row in shown] == [
        ("outcomes", "plain", "train", "event", 1, 1, 1.0),
        ("outcomes", "plain", "train", "censored", 40, 30, 9.0),
    ]
    assert [tuple(row) for row in public] == [("censored", 40, 30), ("event", None, None)]


def test_one_task_of_many_members_is_answered_at_once(engine: Engine) -> None:
    import time

    with engine.begin() as connection:
        add_labels(connection)
        connection.execute(
            text("""
            INSERT INTO label.cohort_member (cohort_id, person_id, image_occurrence_id, index_time, index_date_only,
                                             split, eligible)
            SELECT 1, i, i, '2020-01-01', false, 'train', true FROM generate_series(1001, 4000) i;
            INSERT INTO label.tte
            SELECT 2, cohort_member_id, ARRAY(SELECT generate_series(4, 400)), ARRAY(SELECT generate_series(4, 400)),
                   '{}', '{}', '{}', '{}', '{}', 100 * 86400, null, null
            FROM label.cohort_member WHERE cohort_member_id > 7;
            ANALYZE label.tte; ANALYZE label.cohort_member; ANALYZE label.task;
        """)
        )
        start = time.monotonic()
        statement = "SELECT count(*) FROM label.tte_long WHERE label_set = 'outcomes' AND task = 'plain' AND event = 0"
        assert connection.execute(text(statement)).scalar() == 3_004
        assert time.monotonic() - start < 1.0


def test_one_versions_rows_are_asked_for_by_its_name_and_number(engine: Engine) -> None:
    found = rows(engine, "SELECT * FROM label.tte_at('outcomes@2') ORDER BY cohort_member_id")
    with engine.connect() as connection:
        count = "SELECT count(*) FROM label.tte_at(:name)"
        sizes = [connection.execute(text(count), {"name": name}).scalar() for name in ("outcomes", "outcomes@1")]
        arrays = connection.execute(text("SELECT * FROM label.tte WHERE label_set_id = 2 ORDER BY cohort_member_id"))
        stored = [dict(row) for row in arrays.mappings()]
    assert sizes == [7, 0] and {row["label_set"] for row in found} == {"outcomes@2"}
    assert [{name: row[name] for name in stored[0] if name != "label_set_id"} for row in found] == [
        {name: value for name, value in row.items() if name != "label_set_id"} for row in stored
    ]
    assert [row["eligible"] for row in found] == [True] * 4 + [False] + [True] * 2


def test_a_label_looks_for_its_task_once_however_much_is_asked_of_it(engine: Engine) -> None:
    asked = "SELECT status, event, time_days FROM label.tte_long WHERE task = 'x' AND event = 1 AND time_days < 9"
    with engine.connect() as connection:
        plan = "\n".join(connection.execute(text(f"EXPLAIN (VERBOSE, COSTS OFF) {asked}")).scalars())
    assert "Output: array_position(y.event_tasks" in plan, "no node of the plan computes it for those above"
