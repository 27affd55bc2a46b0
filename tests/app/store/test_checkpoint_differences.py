"""What differs between two checkpoints, found and said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from app.cli import checkpoint_differences as said
from app.errors import InputError, UnknownName
from app.store import checkpoint_differences, jobs
from tests.migrations.rows import add_checkpoint, add_labels

FIGURE = """
INSERT INTO model.metric (checkpoint_id, reference_checkpoint_id, label_set_id, head, inputs, task, metric, split,
                          value, ci_low, ci_high, n, num_events, num_persons, flags, unit, seed, reason)
VALUES (:c, :r, :s, 'cox', 'image', :task, 'harrell_c', 'held_out', :v, :low, :high, 7, 3, 7, '{}', 'person', 0,
        :reason)
"""


def add(connection: Connection, name: str, recipe: dict[str, Any], validation: dict[str, Any] | None = None) -> int:
    checkpoint = add_checkpoint(connection, name, 4)
    connection.execute(
        text("UPDATE model.checkpoint SET recipe = :r, validation = :v, label_set_id = 2 WHERE checkpoint_id = :c"),
        {"r": json.dumps(recipe), "v": json.dumps(validation or {}), "c": checkpoint},
    )
    return checkpoint


def judge(connection: Connection, c: int, value: float | None, *, against: int | None = None, **more: Any) -> None:
    values = {"c": c, "r": against, "s": 2, "task": None, "v": value, "low": None, "high": None, "reason": None} | more
    connection.execute(text(FIGURE), values)


def compare(connection: Connection, a: str, b: str | None) -> dict[str, Any]:
    return checkpoint_differences.compare(connection, checkpoint_differences.chosen(connection, a, b))


ONE = {"settings": {"batch": 4, "rank": 32}, "tasks": ["x", "y"], "torch": "2.13", "num_train": 10, "identity": "1"}
OTHER = {"settings": {"batch": 8, "rank": 32, "ema": 0.9}, "tasks": ["y", "z"], "torch": "2.14", "num_train": 10}


def test_settings_versions_tasks_and_losses_that_differ_are_found_and_equal_ones_left_out(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        losses = {"tuning_loss": 2.0, "tuning_gain": 0.1, "epochs": [{"epoch": 1}]}
        one = add(connection, "a", ONE, losses)
        other = add(connection, "b", OTHER, {"tuning_loss": 1.5})
        connection.execute(
            text("UPDATE model.checkpoint SET label_set_id = 1, seed = 7 WHERE checkpoint_id = :c"), {"c": other}
        )
        found = compare(connection, "a", "b")
    assert found["settings"] == [{"what": "batch", "a": 4, "b": 8}, {"what": "ema", "a": None, "b": 0.9}]
    assert found["facts"] == [
        {"what": "seed", "a": 0, "b": 7},
        {"what": "label_set", "a": "outcomes@2", "b": "outcomes@1"},
        {"what": "torch", "a": "2.13", "b": "2.14"},
    ]
    assert found["tasks"] == {"only_a": ["x"], "only_b": ["z"]}
    assert found["validation"] == [
        {"what": "tuning_gain", "a": 0.1, "b": None, "difference": None},
        {"what": "tuning_loss", "a": 2.0, "b": 1.5, "difference": -0.5},
    ]
    assert (found["a"]["checkpoint_id"], found["b"]["name"], found["same_weights"]) == (one, "b", False)
    lines = said.sentences(found)
    assert "Labels: two versions; `lachesis diff labels outcomes@2 outcomes@1` says what changed." in lines
    assert "Tasks of a alone: x." in lines and "Tasks of b alone: z." in lines


def test_figures_stand_side_by_side_with_the_interval_of_their_paired_difference(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        one, other = add(connection, "a", ONE), add(connection, "b", ONE)
        judge(connection, one, 0.6, low=0.5, high=0.7)
        judge(connection, other, 0.75)
        judge(connection, one, None, task="late", reason="few_events")
        judge(connection, other, 0.8, task="late")
        judge(connection, other, 0.9, s=1)
        judge(connection, one, -0.15, against=other, low=-0.2, high=-0.1)
        found, turned = compare(connection, "a", "b"), compare(connection, "b", "a")
    assert [(row["task"], row["value_a"], row["value_b"], row["difference"]) for row in found["figures"]] == [
        (None, 0.6, 0.75, pytest.approx(0.15)), ("late", None, 0.8, None),
    ]  # fmt: skip
    assert [(row["difference"], row["ci_low"], row["ci_high"]) for row in found["paired"]] == [(0.15, 0.1, 0.2)]
    assert [(row["difference"], row["ci_low"], row["ci_high"]) for row in turned["paired"]] == [(-0.15, -0.2, -0.1)]
    assert found["judged_by_one"] == {"a": [], "b": ["outcomes@1"]}
    said.show(found)
    out = capsys.readouterr().out
    assert "0.6000 (0.5000 to 0.7000)" in out and "+0.1500 (0.1000 to 0.2000)" in out and "few_events" in out
    assert "Settings: the same." in out and "Judged by outcomes@1: b alone." in out


def test_a_checkpoint_alone_is_compared_with_what_it_followed(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        parent, first = add(connection, "base", ONE), add(connection, "a", ONE)
        with pytest.raises(InputError, match="got 'a' alone, which is the first of its name"):
            compare(connection, "a", None)
        set_parent = text("UPDATE model.checkpoint SET parent_id = :p WHERE checkpoint_id = :c")
        connection.execute(set_parent, {"p": parent, "c": first})
        assert compare(connection, "a", None)["a"]["name"] == "base"
        job = jobs.insert(connection, kind="pretrain", queue="gpu", args={})
        second = add(connection, "a", ONE)
        connection.execute(
            text("UPDATE model.checkpoint SET job_id = :j WHERE checkpoint_id = :c"), {"j": job, "c": second}
        )
        found = compare(connection, "a", None)
        assert (found["a"]["checkpoint_id"], found["b"]["checkpoint_id"], found["same_weights"]) == (
            first,
            second,
            True,
        )
        with pytest.raises(UnknownName, match="Did you mean 'base'"):
            compare(connection, "a", "bas")


def test_a_stop_on_the_way_has_the_losses_of_its_step(engine: Engine) -> None:
    with engine.begin() as connection:
        add_labels(connection)
        job = jobs.insert(connection, kind="pretrain", queue="gpu", args={})
        add(connection, "a", ONE, {"tuning_loss": 2.0})
        stop = add(connection, "b", ONE)
        connection.execute(
            text("UPDATE model.checkpoint SET job_id = :j, step = 30, is_final = false WHERE checkpoint_id = :c"),
            {"j": job, "c": stop},
        )
        insert = text("INSERT INTO ops.training_step (job_id, step, name, epoch, value) VALUES (:j, :s, :n, 1, :v)")
        for step, name, value in ((30, "tuning_loss", 2.5), (20, "tuning_loss", 9.0), (30, "train_loss", 1.0)):
            connection.execute(insert, {"j": job, "s": step, "n": name, "v": value})
        found = compare(connection, "a", str(stop))
    assert found["validation"] == [{"what": "tuning_loss", "a": 2.0, "b": 2.5, "difference": 0.5}]
