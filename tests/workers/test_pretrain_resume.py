"""A pretraining that is stopped goes on from its checkpoint; its curves and stops are rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.errors import Cancelled, InputError, LachesisError, Preempted
from app.settings import Settings
from app.store import artifacts
from app.store.places import place
from app.store.work import InlineWork
from tests.workers.small_cohort import SMALL, SmallCohort, insert_cohort
from workers.stages.pretrain import pretrain

ARGS = {"arm": "tte", "encoder": "tiny", "labels": "outcomes", "name": "t", "seed": 0, "set": SMALL}


class JobWork(InlineWork):
    """Work of a job that has a row; ends with `error` once training has taken `steps` steps."""

    def __init__(
        self, *args: Any, job_id: int, fence: int, steps: int = 10**9, error: LachesisError | None = None, **kw: Any
    ) -> None:
        super().__init__(*args, **kw)
        self.job_id, self.fence = job_id, fence
        self.steps, self.error = steps, error
        self.started: list[int] = []
        self.seen = 0

    def progress(self, done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        self.seen = done if unit == "step" else 0

    def check(self) -> None:
        if self.error is not None and self.seen >= self.steps:
            raise self.error

    def started_at_step(self, step: int) -> None:
        self.started.append(step)


@pytest.fixture
def cohort(engine: Engine, tmp_path: Path) -> SmallCohort:
    with engine.begin() as connection:
        return insert_cohort(connection, tmp_path / "scans")


@pytest.fixture
def attempt(engine: Engine, settings: Settings, tmp_path: Path, cohort: SmallCohort) -> Callable[..., JobWork]:
    """A factory of attempts at one job."""
    with engine.begin() as connection:
        job_id = connection.execute(
            text("INSERT INTO ops.job (kind, queue, name) VALUES ('pretrain', 'gpu', 't') RETURNING job_id")
        ).scalar_one()

    def make(fence: int, **how: Any) -> JobWork:
        folder = tmp_path / f"runs-{fence}"
        return JobWork(engine, args=dict(ARGS), folder=folder, settings=settings, job_id=job_id, fence=fence, **how)

    return make


def rows(engine: Engine, statement: str) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(text(statement)).all())


def test_a_preempted_training_goes_on_where_it_stopped_and_ends_the_same(
    engine: Engine, attempt: Callable[..., JobWork], work: Callable[..., InlineWork]
) -> None:
    with pytest.raises(Preempted):
        pretrain(attempt(1, steps=11, error=Preempted()))
    stop = rows(engine, "SELECT step, num_steps, is_final, fence FROM model.checkpoint ORDER BY step DESC")[0]
    assert (stop.step, stop.is_final, stop.fence) == (11, False, 1)
    second = attempt(2)
    result = pretrain(second)
    assert second.started == [11]
    assert result["steps"] == stop.num_steps > 11
    uninterrupted = pretrain(work(**{**ARGS, "name": "again"}))
    finals = rows(engine, "SELECT checkpoint_id, validation FROM model.checkpoint WHERE is_final ORDER BY 1")
    assert [row.checkpoint_id for row in finals] == [result["checkpoint_id"], uninterrupted["checkpoint_id"]]
    assert finals[0].validation == finals[1].validation


def test_stops_are_written_on_the_way_and_only_the_newest_three_stay(
    engine: Engine, attempt: Callable[..., JobWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml.keeping.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("ml.keeping.KEEP_TIMES", 0.0)
    made = attempt(1, steps=8, error=Cancelled())
    with pytest.raises(Cancelled):
        pretrain(made)
    stops = rows(engine, "SELECT step, path FROM model.checkpoint WHERE NOT is_final ORDER BY step")
    assert [row.step for row in stops] == [5, 6, 7]
    files = {one.key for one in place(made.settings).listing("checkpoints")}
    assert files == {row.path for row in stops}, "superseded files are gone"
    assert not list(made.folder.iterdir())


def test_what_a_training_that_went_back_had_kept_since_is_gone_and_the_next_attempt_goes_on_behind_it(
    engine: Engine, attempt: Callable[..., JobWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.training import Training

    honest = Training.embedding

    def embedding(run: Training, batch: Any) -> Any:
        made = honest(run, batch)
        return made * float("nan") if made.requires_grad and run.turn == 0 and run.step in range(9, 13) else made

    monkeypatch.setattr(Training, "embedding", embedding)
    monkeypatch.setattr("ml.training.RETREAT_STEPS", 6)
    monkeypatch.setattr("ml.keeping.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("ml.keeping.KEEP_TIMES", 0.0)
    first = attempt(1, steps=8)
    said: list[str] = []

    def log(message: str) -> None:
        said.append(message)
        if "went back" in message:
            first.error, first.seen = Preempted(), 0

    monkeypatch.setattr(first, "log", log)
    with pytest.raises(Preempted):
        pretrain(first)
    stops = rows(engine, "SELECT step, is_retreat FROM model.checkpoint ORDER BY step")
    assert [row.step for row in stops] == [6, 7, 8] and "went back to step 6" in said[-1]
    assert [row.step for row in stops if row.is_retreat] == [6]
    assert rows(engine, "SELECT max(step) FROM ops.training_step")[0][0] <= 8
    second = attempt(2, steps=20, error=Cancelled())
    said.clear()
    monkeypatch.setattr(second, "log", said.append)
    with pytest.raises(Cancelled):
        pretrain(second)
    assert second.started == [8]
    assert "went back" not in " ".join(said), "it knows that it is on its second turn"
    newest = rows(engine, "SELECT step FROM model.checkpoint ORDER BY checkpoint_id DESC LIMIT 3")
    assert [row.step for row in newest] == sorted((row.step for row in newest), reverse=True) and newest[0].step > 12


def test_a_damaged_stop_falls_back_to_the_one_before(
    engine: Engine, attempt: Callable[..., JobWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml.keeping.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("ml.keeping.KEEP_TIMES", 0.0)
    first = attempt(1, steps=8, error=Cancelled())
    with pytest.raises(Cancelled):
        pretrain(first)
    newest = rows(engine, "SELECT path FROM model.checkpoint ORDER BY step DESC LIMIT 1")[0].path
    place(first.settings).path(newest).write_bytes(b"damaged")
    second = attempt(2, steps=9, error=Cancelled())
    with pytest.raises(Cancelled):
        pretrain(second)
    assert second.started == [6]


def test_loss_curves_are_rows_and_steps_taken_again_replace_the_older_ones(
    engine: Engine, attempt: Callable[..., JobWork]
) -> None:
    with pytest.raises(Preempted):
        pretrain(attempt(1, steps=11, error=Preempted()))
    pretrain(attempt(2))
    curve = rows(engine, "SELECT name, step, epoch, value FROM ops.training_step ORDER BY name, step")
    names = {row.name for row in curve}
    assert names == {"train_loss", "learning_rate", "volumes_per_second", "tuning_loss", "tuning_gain"}
    assert [row.epoch for row in curve if row.name == "tuning_loss"] == [1, 2, 3]
    steps = [row.step for row in curve if row.name == "train_loss"]
    assert steps == list(range(1, max(steps) + 1))


def test_a_batch_that_does_not_fit_into_memory_fails_with_the_settings_to_change(
    attempt: Callable[..., JobWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from ml.training import Training

    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nand more")

    monkeypatch.setattr(Training, "embedding", too_large)
    monkeypatch.setattr("ml.pretrain.embed", too_large)
    for arm in ("tte", "base"):
        work = attempt(1)
        work.args["arm"] = arm
        with pytest.raises(InputError, match=r"fit into memory.*20 GiB.*--set batch="):
            pretrain(work)


def test_the_best_stop_stays_beside_the_last_three_and_is_one(
    engine: Engine, attempt: Callable[..., JobWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.selection import Selection

    monkeypatch.setattr(Selection, "note", lambda self, epoch, values: epoch in (1, 2))
    work = attempt(1)
    work.args["set"] = {**work.args["set"], "epochs": "7"}
    pretrain(work)
    stops = rows(engine, "SELECT epoch, is_best, path FROM model.checkpoint WHERE NOT is_final ORDER BY step")
    assert [(row.epoch, row.is_best) for row in stops if row.is_best] == [(2, True)]
    assert all(place(work.settings).path(row.path).is_file() for row in stops)


def test_a_finished_training_goes_on_as_a_child_and_only_on_its_own_labels(
    engine: Engine, attempt: Callable[..., JobWork], settings: Settings, tmp_path: Path
) -> None:
    first = pretrain(attempt(1))
    with engine.begin() as connection:
        job_id = connection.execute(
            text("INSERT INTO ops.job (kind, queue, name) VALUES ('pretrain', 'gpu', 't') RETURNING job_id")
        ).scalar_one()
    args = {"continue": "t", "epochs": 2, "name": None}
    more = JobWork(engine, args=args, folder=tmp_path / "more", settings=settings, job_id=job_id, fence=1)
    second = pretrain(more)
    row = rows(engine, "SELECT parent_id, epoch, name FROM model.checkpoint WHERE is_final ORDER BY 1 NULLS FIRST")[-1]
    assert (row.parent_id, row.name) == (first["checkpoint_id"], "t")
    assert second["steps"] > first["steps"]
    epochs = int(SMALL["epochs"])
    assert row.epoch == epochs + 2
    with engine.connect() as connection:
        assert artifacts.find_checkpoint(connection, "t").checkpoint_id == second["checkpoint_id"]
        assert artifacts.find_checkpoint(connection, f"t@{epochs + 2}").checkpoint_id == second["checkpoint_id"]
        with pytest.raises(InputError, match=r"Expected a kept epoch of checkpoint 't' \(.*found '99'"):
            artifacts.find_checkpoint(connection, "t@99")
    with engine.begin() as connection:
        connection.execute(text("UPDATE label.label_set SET digest = 'other'"))
    with pytest.raises(InputError, match="Expected the labels that 't' learnt from"):
        pretrain(more)


def test_an_alias_means_what_was_judged_by_the_same_labels_and_remembers_what_it_meant(
    engine: Engine, attempt: Callable[..., JobWork]
) -> None:
    from app.store import promotion

    pretrain(attempt(1))
    with engine.begin() as connection:
        old = artifacts.find_checkpoint(connection, "t")
        connection.execute(
            text(
                "INSERT INTO model.checkpoint (name, sha256, arm, encoder, width, recipe, seed, step, num_steps, "
                "is_final, path, num_bytes, code_version, label_set_id) SELECT 'new', repeat('e', 64), arm, encoder, "
                "width, recipe, seed, step, num_steps, true, 'p', 1, code_version, label_set_id FROM model.checkpoint "
                "WHERE checkpoint_id = :c"
            ),
            {"c": old.checkpoint_id},
        )
        new = artifacts.find_checkpoint(connection, "eeeeee")
        with pytest.raises(InputError, match="found none; run `lachesis evaluate"):
            promotion.promote(connection, "champion", new, None)
        judge = text(
            "INSERT INTO model.metric (checkpoint_id, label_set_id, head, inputs, task, metric, split, arm, value, n, "
            "num_events, unit) VALUES (:c, :l, 'cox', 'image', 'a', 'harrell_c', 'held_out', 'tte', .6, 9, 9, 'person')"
        )
        connection.execute(judge, {"c": old.checkpoint_id, "l": old.label_set_id})
        assert promotion.promote(connection, "champion", old, "first")
        assert not promotion.promote(connection, "champion", old, None)
        assert artifacts.find_checkpoint(connection, "@champion").name == "t"
        connection.execute(
            text(
                "INSERT INTO label.label_set (name, version, is_current, cohort_id, task_set_id, digest, data_digest, "
                "num_members, num_events) SELECT 'others', 1, true, cohort_id, task_set_id, '', '', 0, 0 "
                "FROM label.label_set"
            )
        )
        other = connection.execute(text("SELECT label_set_id FROM label.label_set WHERE name = 'others'")).scalar()
        connection.execute(judge, {"c": new.checkpoint_id, "l": other})
        with pytest.raises(InputError, match="found no figures by outcomes@1"):
            promotion.promote(connection, "champion", new, None)
        connection.execute(judge, {"c": new.checkpoint_id, "l": old.label_set_id})
        assert promotion.promote(connection, "champion", new, "better")
        assert artifacts.find_checkpoint(connection, "champion").name == "new"
        assert promotion.undo(connection, "champion") == "t"
        assert [row["name"] for row in promotion.history(connection, "champion")] == ["t", "new", "t"]
        with pytest.raises(InputError, match="meant before, found none"):
            promotion.undo(connection, "champion")
