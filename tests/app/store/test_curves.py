"""Curves by epoch, of one training or several, and their figure."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from app.errors import InputError, UnknownName
from app.report.curve_figures import curves
from app.settings import Settings
from app.store import jobs
from app.store.curves import read
from tests.app.store.command import lachesis
from tests.migrations.rows import add_checkpoint


def training(
    connection: Connection, name: str, *, steps: tuple[int, int], epochs: int, parent: int | None = None, **more: Any
) -> int:
    """A training of ten steps an epoch whose curves are written from one step to another; its checkpoint."""
    first, last = steps
    job = jobs.insert(connection, kind="pretrain", queue="gpu", args={})
    checkpoint = add_checkpoint(connection, name, 4)
    recipe = {"settings": {"epochs": epochs}} | ({} if parent is None else {"continues": "x"})
    connection.execute(
        text(
            "UPDATE model.checkpoint SET job_id = :j, recipe = :r, num_steps = :n, step = :s, parent_id = :p, "
            "is_final = :final, arm = :arm WHERE checkpoint_id = :c"
        ),
        {"j": job, "r": json.dumps(recipe), "n": 10 * epochs, "s": last, "p": parent, "c": checkpoint}
        | {"final": more.get("final", True), "arm": more.get("arm", "tte")},
    )
    insert = text("INSERT INTO ops.training_step (job_id, step, name, epoch, value) VALUES (:j, :s, :n, 0, :v)")
    for step in range(first, last + 1, 5):
        connection.execute(insert, {"j": job, "s": step, "n": "train_loss", "v": 9 - step / 100})
        connection.execute(insert, {"j": job, "s": step, "n": "learning_rate", "v": 1e-4})
        if step % 10 == 0:
            for name_, value in (("tuning_loss", 9.1), ("tuning_gain", step / 100), ("tuning_probe_c", 0.6)):
                connection.execute(insert, {"j": job, "s": step, "n": name_, "v": value})
    return checkpoint


def gains(points: list[dict[str, Any]], run: str) -> list[tuple[float, float]]:
    return [(p["epoch"], p["value"]) for p in points if p["run"] == run and p["name"] == "tuning_gain"]


def test_a_step_is_a_share_of_its_trainings_epochs(engine: Engine) -> None:
    with engine.begin() as connection:
        training(connection, "a", steps=(5, 30), epochs=3)
        training(connection, "b", steps=(5, 20), epochs=2)
        points = read(connection, ["a", "b"])
    assert gains(points, "a") == [(1.0, 0.1), (2.0, 0.2), (3.0, 0.3)] and gains(points, "b") == [(1.0, 0.1), (2.0, 0.2)]
    assert [p["epoch"] for p in points if p["run"] == "b" and p["name"] == "train_loss"] == [0.5, 1.0, 1.5, 2.0]
    assert {p["name"] for p in points} == {"train_loss", "tuning_loss", "tuning_gain", "tuning_probe_c"}


def test_a_training_that_was_carried_on_comes_with_what_it_goes_on_from(engine: Engine) -> None:
    with engine.begin() as connection:
        parent = training(connection, "a", steps=(5, 30), epochs=3)
        training(connection, "longer", steps=(25, 50), epochs=5, parent=parent)
        points = read(connection, ["longer"])
    assert gains(points, "longer") == [(e, e / 10) for e in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert [p["step"] for p in points] == sorted(p["step"] for p in points)


def test_a_training_on_its_way_is_drawn_and_what_cannot_be_is_said(engine: Engine) -> None:
    with engine.begin() as connection:
        training(connection, "at-work", steps=(5, 10), epochs=4, final=False)
        add_checkpoint(connection, "base", 4)
        assert gains(read(connection, ["at-work"]), "at-work") == [(1.0, 0.1)]
        with pytest.raises(InputError, match="curves of checkpoint 'base', found none: nothing was trained"):
            read(connection, ["at-work", "base"])
        with pytest.raises(InputError, match="got that of 'at-work' twice"):
            read(connection, ["at-work", "at-work"])
        with pytest.raises(UnknownName, match="Did you mean 'base'"):
            read(connection, ["bse"])


def test_losses_of_other_arms_are_drawn_less_their_first_and_each_run_has_a_line_of_its_own(engine: Engine) -> None:
    with engine.begin() as connection:
        for k in range(8):
            training(connection, f"run{k}", steps=(5, 30), epochs=3, arm="tte" if k else "mtl")
        points = read(connection, [f"run{k}" for k in range(8)])
    loss, gain, probe = curves(points).axes
    for line in loss.lines:
        assert line.get_ydata()[0] == 0
    drawn = [(line.get_color(), line.get_linestyle()) for line in gain.lines if line.get_label().startswith("run")]
    assert len(set(drawn)) == len(drawn) == 8
    assert loss.get_title(loc="left").endswith("less the first") and len(probe.lines) == 9
    alone = curves([point for point in points if point["run"] == "run1"]).axes[0]
    assert alone.lines[0].get_ydata()[0] == pytest.approx(8.95)


def test_the_command_writes_a_png_or_numbers(
    engine: Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.begin() as connection:
        training(connection, "a", steps=(5, 30), epochs=3)

    monkeypatch.chdir(tmp_path)
    ran = partial(lachesis, settings, "plot", "curves")
    assert ran("a", "-o", "curves.png").code == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert ran("a").out == f"{tmp_path / 'curves-a.svg'}\n"
    lines = ran("a", "--csv").out.splitlines()
    assert lines[0] == "run,arm,name,step,epoch,value" and lines[1] == "a,tte,train_loss,5,0.5,8.95"
    assert ran("none").code == ran("a", "-o", "curves.gif").code == ran().code == 2
