"""One figure of several checkpoints side by side, and what is said where there is none."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from app.errors import InputError, UnknownName
from app.settings import Settings
from app.store.comparison import Figure, compare
from tests.app.store.command import lachesis
from tests.migrations.rows import add_checkpoint, add_labels

INSERT = """
INSERT INTO model.metric (checkpoint_id, reference_checkpoint_id, label_set_id, head, inputs, task, metric,
                          horizon_days, split, value, ci_low, ci_high, n,
                          num_events, num_persons, flags, unit, seed, reason)
VALUES (:c, :r, :s, 'cox', 'image', :task, :metric, :days, :split, :v, :low, :high, 7, 3, 7, :flags, 'person',
        0, :reason)
"""


def judge(connection: Connection, c: int, value: float | None, **more: Any) -> None:
    values = {"c": c, "r": None, "s": 2, "task": "late", "metric": "harrell_c", "days": None, "split": "held_out"}
    values |= {"v": value, "low": None, "high": None, "flags": [], "reason": None}
    connection.execute(text(INSERT), values | more)


def three(connection: Connection) -> list[int]:
    """Checkpoints a, b, c; a and b are judged by outcomes@2, and b less a was resampled in pairs; c by nothing."""
    add_labels(connection)
    a, b, c = (add_checkpoint(connection, name, 4) for name in "abc")
    for key, value in ((a, 0.6), (b, 0.7)):
        judge(connection, key, value, low=value - 0.1, high=value + 0.1)
        mean = {"task": None, "metric": "mean_harrell_c"}
        judge(connection, key, value + 0.01, **mean, flags=["simulated"])
        judge(connection, key, 0.1, split="tuning")
    judge(connection, b, 0.1, r=a, low=-0.05, high=0.25)
    return [a, b, c]


def test_figures_stand_in_the_order_given_with_the_mean_first(engine: Engine) -> None:
    with engine.begin() as connection:
        three(connection)
        found = compare(connection, ["a", "b"], None, Figure())
        turned = compare(connection, ["b", "a"], "outcomes", Figure())
    assert (found["labels"], found["flags"], [one["name"] for one in found["checkpoints"]]) == (
        "outcomes@2", ["simulated"], ["a", "b"],
    )  # fmt: skip
    assert [(row["task"], [one["value"] for one in row["figures"]]) for row in found["rows"]] == [
        (None, [0.61, 0.71]), ("late", [0.6, 0.7]),
    ]  # fmt: skip
    assert [one["difference"] for one in found["rows"][0]["figures"]] == [None, None]
    less = {"value": 0.1, "ci_low": -0.05, "ci_high": 0.25, "reason": None}
    assert [one["difference"] for one in found["rows"][1]["figures"]] == [None, less]
    assert [one["value"] for one in turned["rows"][1]["figures"]] == [0.7, 0.6]
    other = {"value": -0.1, "ci_low": -0.25, "ci_high": 0.05, "reason": None}
    assert [one["difference"] for one in turned["rows"][1]["figures"]] == [None, other]


def test_each_horizon_has_a_row_and_what_cannot_be_estimated_its_reason(engine: Engine) -> None:
    with engine.begin() as connection:
        a, b, _ = three(connection)
        for key, days, value in ((a, 365, 0.6), (a, 730, 0.65), (b, 365, None), (b, 730, 0.7)):
            judge(connection, key, value, metric="auroc", days=days, reason=None if value else "few_events")
        found = compare(connection, ["a", "b"], None, Figure(metric="auroc"))
    assert [(row["horizon_days"], [one["value"] for one in row["figures"]]) for row in found["rows"]] == [
        (365, [0.6, None]), (730, [0.65, 0.7]),
    ]  # fmt: skip
    assert found["rows"][0]["figures"][1]["reason"] == "few_events"


def test_what_was_not_judged_or_not_meant_is_refused(engine: Engine) -> None:
    with engine.begin() as connection:
        a, *_ = three(connection)
        judge(connection, a, 0.9, s=1)
        for given, labels, figure, said in (
            (["c"], None, Figure(), "figures of 'c', found none"),
            (["a", "c"], "outcomes", Figure(), r"harrell_c of 'c' by labels outcomes@2 \(cox, image\), found none"),
            (["a", "b"], "outcomes@1", Figure(), "of 'b' by labels outcomes@1"),
            (["a", "a"], None, Figure(), "each checkpoint once"),
        ):
            with pytest.raises(InputError, match=said):
                compare(connection, given, labels, figure)
        for given, labels, figure, said in (
            (["aa"], None, Figure(), "No checkpoint named 'aa'"),
            (["a"], "outcoms", Figure(), "Did you mean 'outcomes'"),
            (["a"], None, Figure(metric="harel_c"), "No metric named 'harel_c'. Did you mean 'harrell_c'"),
            (["a"], None, Figure(head="cx"), "No head named 'cx'. Did you mean 'cox'"),
            (["a"], None, Figure(inputs="imge"), "No inputs named 'imge'. Did you mean 'image'"),
        ):
            with pytest.raises(UnknownName, match=said.replace(".", r"\.")):
                compare(connection, given, labels, figure)


def test_the_command_shows_a_table_rows_or_an_object(engine: Engine, settings: Settings) -> None:
    with engine.begin() as connection:
        three(connection)

    ran = partial(lachesis, settings)
    shown = ran("compare", "a", "b").out
    assert "0.700 (0.600 to 0.800)" in shown and "+0.100 (-0.050 to 0.250)" in shown and "b less a" in shown
    assert "mean over tasks" in shown and "beware: simulated" in shown and "horizon_days" not in shown
    lines = ran("compare", "a", "b", "--csv").out.splitlines()
    assert len(lines) == 5 and lines[4] == "b,tte,late,,7,3,0.7,0.6,0.8,,0.1,-0.05,0.25"
    assert json.loads(ran("compare", "a", "b", "--json").out)["rows"][1]["figures"][1]["difference"]["value"] == 0.1
    assert ran("compare", "a", "c").code == ran("compare").code == 2
