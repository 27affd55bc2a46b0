"""What a finished job is said to have done."""

from __future__ import annotations

from app.cli.endings import ending


def test_a_kind_has_a_sentence_with_unchanged_said_first() -> None:
    result = {"members": 1500, "persons": 1490, "eligible": 1480, "version": 2, "unchanged": True}
    assert ending("cohort", result) == "unchanged: 1,500 scans of 1,490 persons, 1,480 eligible; version 2"
    assert ending("load", {"summary": "240 scans, unchanged", "unchanged": True}) == "240 scans, unchanged"


def test_unreadable_scans_and_the_mean_c_are_told() -> None:
    result = {"num_scans": 20, "width": 64, "newly_embedded": 7, "checkpoint_id": 3, "num_failed": 2}
    assert ending("embed", result) == (
        "20 scans as vectors of 64, 7 made now; checkpoint 3; 2 scans cannot be read (its log says why of each)"
    )
    judged = {"estimable": 1, "tasks": 2, "metrics": 264, "checkpoint_id": 3, "mean_harrell_c": [0.61234, 0.55, 0.7]}
    assert ending("evaluate", judged).endswith("; mean Harrell's C 0.612 (0.550 to 0.700)")


def test_a_result_of_another_shape_is_told_by_its_numbers() -> None:
    assert ending("cohort", {"members": 3, "cohort_id": 1200}) == "members 3, cohort id 1200"
    assert ending("unheard", {}) == "done"


def test_fewer_tasks_than_asked_for_is_a_warning_with_both_numbers() -> None:
    assert ending("tasks", {"tasks": 141, "version": 1, "asked": 400}).startswith(
        "141 tasks; version 1; warning: 400 were asked for"
    )
    assert ending("tasks", {"tasks": 400, "version": 1, "asked": 400}) == "400 tasks; version 1"
