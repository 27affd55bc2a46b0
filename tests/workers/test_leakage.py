"""The checks of leakage: a sound store passes, and each planted leak fails its check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from app.errors import InputError, UnknownName
from app.settings import Settings
from app.store.work import InlineWork
from tests.app.store.records import rows
from tests.workers import judged_store, sound_store
from tests.workers.sound_store import change, repack
from workers.stages.features import features
from workers.stages.label import label
from workers.stages.leakage import leakage

Make = Callable[..., InlineWork]


@pytest.fixture
def sound(engine: Engine, work: Make) -> Engine:
    sound_store.write(engine, work)
    return engine


def checks(work: Make, **args: Any) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in leakage(work(labels="l", **args))["checks"]}


def with_verdict(work: Make, verdict: str) -> set[str]:
    return {name for name, check in checks(work).items() if check["verdict"] == verdict}


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
        "null_outcomes_tell_nothing": "not_checked",
        "permuted_volumes_tell_nothing": "not_checked",
    }
    assert all(check["num_rows"] > 0 for check in result["checks"] if check["verdict"] == "passed")
    kept = rows(sound, "SELECT name, verdict, mend FROM label.leakage_check ORDER BY leakage_check_id")
    assert [tuple(row) for row in kept] == [(c["name"], c["verdict"], c["mend"]) for c in result["checks"]]
    assert all(row.mend for row in kept)
    assert result["summary"] == "these 7 checks passed, 0 failed, 2 could not be made"


FUTURE_FEATURE = """
INSERT INTO label.feature (cohort_member_id, name, value)
SELECT cohort_member_id, 'events_30d_after', count(e.*) FROM label.cohort_member m
LEFT JOIN omop.event e ON e.person_id = m.person_id AND e.time > m.index_time
     AND e.time < m.index_time + interval '30 days' GROUP BY 1
"""
MORE_MEMBERS = """
INSERT INTO label.cohort_member (cohort_id, person_id, image_occurrence_id, index_time, index_date_only, follow_up_end,
                                 split, eligible)
SELECT cohort_id, person_id, 10000 + cohort_member_id, index_time, index_date_only, follow_up_end, 'tuning', false
FROM label.cohort_member
"""
FAULTS = {
    "features_look_back": {
        "a value": ["UPDATE label.feature SET value = value + 1 WHERE name = 'events_30d'"],
        "a feature of the future": [FUTURE_FEATURE],
        "a missing value": ["DELETE FROM label.feature WHERE name = 'age_years' AND cohort_member_id < 5"],
    },
    "labels_need_no_past": {
        "a time": ["UPDATE label.tte SET event_seconds[1] = event_seconds[1] + 1 WHERE event_tasks <> '{}'"],
        "an outcome out of nowhere": [
            "UPDATE label.tte SET event_tasks = '{0}', event_seconds = '{5}' WHERE event_tasks = '{}'"
        ],
        "an outcome that went": ["UPDATE label.tte SET event_tasks = '{}', event_seconds = '{}'"],
    },
    "scans_meet_records": {
        "no visit": ["DELETE FROM omop.visit_occurrence"],
        "shifted dates": [
            "UPDATE omop.visit_occurrence SET visit_start_datetime = visit_start_datetime + interval '3 days', "
            "visit_end_datetime = visit_end_datetime + interval '3 days'"
        ],
    },
    "persons_in_one_split": {"a second scan": [MORE_MEMBERS]},
    "volumes_in_one_split": {
        "one series": ["UPDATE omop.image_occurrence SET series_uid = '1.2.3'"],
        "one file": ["UPDATE omop.image_occurrence SET path = 'same.nii'"],
        "one content": ["UPDATE omop.image_occurrence SET sha256 = '\\x00'"],
    },
}


@pytest.mark.parametrize(("check", "fault"), [(check, fault) for check in FAULTS for fault in FAULTS[check]])
def test_each_planted_leak_fails_its_check_and_no_other(sound: Engine, work: Make, check: str, fault: str) -> None:
    change(sound, *FAULTS[check][fault])
    assert with_verdict(work, "failed") == {check}


def test_an_outcome_before_its_window_is_found_by_both_checks_of_labels(sound: Engine, work: Make) -> None:
    change(sound, "UPDATE label.tte SET event_seconds[1] = 0 WHERE event_tasks <> '{}'")
    assert with_verdict(work, "failed") == {"labels_look_forward", "labels_need_no_past"}


def test_a_visit_two_days_off_is_too_far_and_one_day_is_not(sound: Engine, work: Make) -> None:
    shift = (
        "UPDATE omop.visit_occurrence SET visit_start_datetime = visit_start_datetime + interval '1 day', "
        "visit_end_datetime = visit_end_datetime + interval '1 day'"
    )
    change(sound, shift)
    assert checks(work)["scans_meet_records"]["verdict"] == "passed"
    change(sound, shift)
    assert checks(work)["scans_meet_records"]["num_violations"] == 90


def test_a_code_of_the_outcome_itself_before_the_scan_is_too_good(sound: Engine, work: Make) -> None:
    change(
        sound,
        "INSERT INTO omop.event (person_id, time, date_only, concept_id, source_concept_id, domain, source_row_id, "
        "load_id) SELECT person_id, index_time - interval '1 hour', false, 8, 0, 'd', 500000 + person_id, 1 "
        "FROM label.tte_long JOIN label.cohort_member USING (cohort_member_id, person_id, index_time) "
        "CROSS JOIN generate_series(1, 9) WHERE label_set = 'l' AND task = 'root' AND event = 1",
    )
    repack(sound)
    label(work(name="l", cohort="c", tasks="t"))
    features(work(cohort="c", tasks="t"))
    assert with_verdict(work, "failed") == {"no_feature_is_too_good"}
    assert "events_30d for root" in checks(work)["no_feature_is_too_good"]["found"]


def test_whether_a_feature_is_known_may_tell_too_much(sound: Engine, work: Make) -> None:
    change(
        sound,
        "DELETE FROM label.feature WHERE name = 'age_years' AND cohort_member_id IN (SELECT cohort_member_id "
        "FROM label.tte_long WHERE label_set = 'l' AND task = 'root' AND event = 1)",
    )
    assert "age_years for root (1.000)" in checks(work)["no_feature_is_too_good"]["found"]


def test_after_new_data_what_is_stored_is_out_of_date_and_not_called_a_leak(sound: Engine, work: Make) -> None:
    change(sound, "UPDATE omop.event SET time = time - interval '400 days' WHERE domain = 'c'")
    repack(sound)
    found = checks(work)
    for name in ("features_look_back", "labels_need_no_past"):
        assert found[name]["verdict"] == "not_checked" and "have changed since" in found[name]["found"]


def test_without_features_their_checks_say_how_to_make_them(sound: Engine, work: Make) -> None:
    change(sound, "DELETE FROM label.feature_set", "DELETE FROM label.feature")
    found = checks(work)
    for name in ("features_look_back", "no_feature_is_too_good"):
        assert found[name]["verdict"] == "not_checked" and "lachesis features" in found[name]["found"]


def test_permuted_outcomes_tell_nothing_to_a_head_on_embeddings(engine: Engine, settings: Settings, work: Make) -> None:
    judged_store.write(engine, settings, judged_store.draw(900, seed=1))
    found = leakage(work(labels="outcomes", checkpoints=["seeing", "blind"]))["checks"]
    (check,) = [check for check in found if check["name"] == "null_outcomes_tell_nothing"]
    assert (check["verdict"], check["num_rows"]) == ("passed", 2)
    assert "seeing: mean C 0.5" in check["found"] or "seeing: mean C 0.4" in check["found"]


def test_wrong_names_are_refused(sound: Engine, work: Make) -> None:
    with pytest.raises(UnknownName):
        leakage(work(labels="k"))
    with pytest.raises(UnknownName):
        checks(work, checkpoints=["nothing"])
    with pytest.raises(InputError, match="each checkpoint once"):
        checks(work, checkpoints=["a", "a"])
