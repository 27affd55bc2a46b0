"""What differs between two versions of labels, why, and what came of it, against the views."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.cli import label_differences as said
from app.errors import InputError, UnknownName
from app.store import cohorts, label_cells, label_differences, tasks
from app.store.work import InlineWork
from tests.app.store.records import rows
from tests.workers.test_label_kept import SPECS, again, change, fill, make
from workers.stages.label import label

Make = Callable[..., InlineWork]

CELLS = """
SELECT person_id, image_occurrence_id, task, a.status AS before, b.status AS after, a.time_days AS days_before,
       b.time_days AS days_after
FROM label.tte_long(:a) a JOIN label.tte_long(:b) b USING (person_id, image_occurrence_id, task)
"""


@pytest.fixture
def first(engine: Engine, work: Make) -> dict[str, Any]:
    with engine.begin() as connection:
        fill(connection, list(range(1, 13)))
    return make(work, "l")


def differ(engine: Engine, a: str | None = None, b: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the command says as one object, and each cell that it tells."""
    told: list[dict[str, Any]] = []
    with engine.connect() as connection:
        pair = label_differences.chosen(connection, a, b)
        why = label_differences.compare(connection, pair)
        effect = label_cells.measure(connection, pair, why, label_cells.common_tasks(why), told.append)
        return said.found(pair, why, effect, label_differences.counts(connection, pair)), told


def expected(engine: Engine, a: str, b: str) -> list[Any]:
    """Cells whose status differs, or whose event or competing death moved, by the long views."""
    return [
        row
        for row in rows(engine, CELLS, a=a, b=b)
        if row.before != row.after or (row.before in ("event", "competing") and row.days_before != row.days_after)
    ]


def agree(engine: Engine, a: str, b: str) -> dict[str, Any]:
    """The command and the views say the same; what the command says."""
    found, told = differ(engine, a, b)
    wanted = expected(engine, a, b)
    cells = {(t["person_id"], t["image_occurrence_id"], t["task"], t["status_before"], t["status_after"]) for t in told}
    assert cells == {(r.person_id, r.image_occurrence_id, r.task, r.before, r.after) for r in wanted}
    assert len(told) == len(wanted)
    statuses = Counter((r.before, r.after) for r in wanted if r.before != r.after)
    shown = {(row["before"], row["after"]): row["cells"] for row in found["effect"]["statuses"]}
    assert shown == statuses and found["effect"]["status_changed"] == sum(statuses.values())
    by_task = Counter(r.task for r in wanted)
    for row in found["effect"]["tasks"]:
        if row["status_changed"] is not None:
            assert row["status_changed"] + row["time_changed"] == by_task[row["task"]]
    return found


def test_every_cell_that_differs_is_told_and_no_other(engine: Engine, work: Make, first: dict[str, Any]) -> None:
    for what, person in (
        ("later event", 5), ("gone events", 11), ("other values", 2), ("shorter period", 3), ("longer period", 4),
        ("no period", 7), ("transfer", 1), ("other split", 12), ("death", 9),
    ):  # fmt: skip
        change(engine, what, person)
    make(work, "l")
    found = agree(engine, "l@1", "l@2")
    assert found["effect"]["status_changed"] > 10 and found["effect"]["follow_up_alone_changed"] > 0
    causes = found["members"]["causes"]
    assert causes["split"] == {"members": 2, "persons": 1} and causes["death"] == {"members": 2, "persons": 1}
    assert causes["timeline"]["persons"] == 3 and causes["eligibility"]["persons"] == 3
    assert causes["visits, values or start of the record"]["persons"] == 2  # transfer, other values
    assert found["members"]["new"] == found["members"]["gone"] == 0 and not found["equal"]
    assert "Definition: tasks and the cohort's rule are the same." in found["summary"]


def test_versions_apart_and_backwards_are_compared_too(engine: Engine, work: Make, first: dict[str, Any]) -> None:
    change(engine, "later event", 5)
    make(work, "l")
    change(engine, "new scan", 6)
    change(engine, "unusable scan", 7)
    make(work, "l")
    found = agree(engine, "l@1", "l@3")
    assert (found["members"]["new"], found["members"]["gone"], found["members"]["both"]) == (1, 1, 15)
    back = agree(engine, "l@3", "l@1")
    assert (back["members"]["new"], back["members"]["gone"]) == (1, 1)
    assert back["effect"]["status_changed"] == found["effect"]["status_changed"]


def test_the_last_two_versions_are_meant_where_none_is_named(engine: Engine, work: Make, first: dict[str, Any]) -> None:
    with engine.connect() as connection:
        for names in ((None, None), ("l", None)):
            with pytest.raises(InputError, match="two versions"):
                label_differences.chosen(connection, *names)
        with pytest.raises(UnknownName, match="No label set named 'x'"):
            label_differences.chosen(connection, "x", None)
    for _ in range(2):
        change(engine, "later event", 5)
        make(work, "l")
    with engine.connect() as connection:
        for a, b in ((None, None), ("l", None), ("l@2", None), ("l@2", "l")):
            pair = label_differences.chosen(connection, a, b)
            assert (pair.before["name"], pair.after["name"]) == ("l@2", "l@3")


def test_a_vocabulary_that_means_more_is_told_from_a_definition(
    engine: Engine, work: Make, first: dict[str, Any]
) -> None:
    with engine.begin() as connection:
        again(connection).ancestors([(2, 3, 1), (2, 2, 0)])
    make(work, "l")
    found = agree(engine, "l@1", "l@2")
    assert found["tasks"]["other_concepts"] == [{"task": "first", "added": 1, "removed": 0, "definition_too": False}]
    assert found["tasks"]["defined_otherwise"] == [] and found["members"]["made_of_other_data"] == 0
    assert any(line.startswith("Vocabulary: 1 tasks mean other concepts: first (+1 −0)") for line in found["summary"])

    specs = [SPECS[0] | {"prior": "exclude"}, SPECS[2], {"name": "new", "concepts": [2]}, SPECS[1] | {"concepts": [1]}]
    cohorts.build(work(name="c", min_age=10))
    tasks.build(work(name="t", cohort="c", specs=specs, allow_absent=True))
    label(work(name="l", cohort="c", tasks="t"))
    found = agree(engine, "l@2", "l@3")
    assert found["tasks"]["new"] == ["new"] and sorted(found["tasks"]["gone"]) == ["back", "dead", "high"]
    fields = {task["task"]: task["fields"] for task in found["tasks"]["defined_otherwise"]}
    assert fields["next"] == {"prior": ["keep", "exclude"]} and set(fields) == {"next", "first"}
    assert found["cohort_rule"] == {"min_age": [None, 10]}
    first_task = next(task for task in found["tasks"]["other_concepts"] if task["task"] == "first")
    assert (first_task["added"], first_task["removed"], first_task["definition_too"]) == (1, 2, True)
    (line,) = [line for line in found["summary"] if line.startswith("Definition")]
    assert "prior keep → exclude" in line and "min_age None → 10" in line


def test_labels_of_before_digests_were_kept_say_that_nobody_knows(
    engine: Engine, work: Make, first: dict[str, Any]
) -> None:
    change(engine, "later event", 5)
    make(work, "l")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM label.member_digest WHERE label_set_id = 1"))
        connection.execute(text("DELETE FROM label.label_meaning WHERE label_set_id = 1"))
    found = agree(engine, "l@1", "l@2")
    assert found["members"]["made_of_other_data"] is None and found["tasks"]["other_concepts"] is None
    assert [line.split(":")[1][:18] for line in found["summary"][1:3]] == [" one of the two ke"] * 2


def test_loads_between_the_two_are_named_with_how_many_persons_they_touch(
    engine: Engine, work: Make, first: dict[str, Any]
) -> None:
    with engine.begin() as connection:
        load = again(connection).value(
            "INSERT INTO ops.load (source_id, kind, mode, table_name, state, files, content_sha256, num_read, "
            "num_loaded, num_rejected) SELECT source_id, 'omop', 'append', 'condition_occurrence', 'published', '[]', "
            "'', 0, 0, 0 FROM ops.source RETURNING load_id"
        )
        records = again(connection)
        records.do(f"CREATE TABLE omop.event_test_{load} PARTITION OF omop.event FOR VALUES IN ({load})")
        records.load_id = load
        for person in (2, 5):
            records.event(person, "2015-07-07 07:00:00", 1)
        records.pack()
    make(work, "l")
    found = agree(engine, "l@1", "l@2")
    assert [(row["load_id"], row["persons"]) for row in found["loads"]] == [(load, 2)]
    assert (
        f"Loads between the two: 1; those with rows of these persons: {load} (condition_occurrence, 2 of them)."
        in (found["summary"][1])
    )


def test_the_command_prints_sentences_an_object_or_a_row_a_cell(
    engine: Engine,
    work: Make,
    first: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from app.cli import diff, look

    change(engine, "later event", 5)
    change(engine, "longer period", 4)
    make(work, "l")
    monkeypatch.setattr(look, "connect", lambda: engine)
    diff.diff_labels(None, None, task=None, as_csv=False, as_json=False)
    assert capsys.readouterr().out.startswith("l@1 → l@2: 16 members before, 16 after; 0 new, 0 gone.\nData: ")
    diff.diff_labels("l", None, task=None, as_csv=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["before"]["name"] == "l@1"
    diff.diff_labels("l@1", "l@2", task=None, as_csv=True, as_json=False)
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(read) == len(expected(engine, "l@1", "l@2")) and set(read[0]) == set(label_cells.COLUMNS)
    diff.diff_labels("l@1", "l@2", task="dead", as_csv=False, as_json=True)
    assert [row["task"] for row in json.loads(capsys.readouterr().out)["effect"]["tasks"]] == ["dead"]
    with pytest.raises(UnknownName, match=r"No task of both named 'ded'\. Did you mean 'dead'"):
        diff.diff_labels("l@1", "l@2", task="ded", as_csv=False, as_json=False)
