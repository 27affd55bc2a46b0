"""News of a training as rows: progress, loss curves, stops on the way and the checkpoint at its end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.errors import Preempted, StoreError
from app.store import artifacts, named_files
from app.store.places import place
from app.store.work import Work
from workers.stages.pretrain_left import KIND, superseded
from workers.stages.pretrain_plan import Plan

FLUSH_POINTS = 12
"""Numbers of the loss curves written at once."""


@dataclass(frozen=True, slots=True)
class Stops:
    """Where a job's training stood."""

    step: int = 0
    last: Path | None = None
    best: Path | None = None


def find_stops(work: Work) -> Stops:
    """The newest intact stop on the way of this job, and the best one; neither where there is none."""
    from sqlalchemy import text

    if work.job_id is None:
        return Stops()
    with work.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT step, path, sha256, is_best FROM model.checkpoint WHERE job_id = :job AND NOT is_final "
                "ORDER BY step DESC, checkpoint_id DESC"
            ),
            {"job": work.job_id},
        ).all()
    found = Stops()
    for step, path, sha256, is_best in rows:
        try:
            file = artifacts.fetch(work.settings, path, sha256)
        except StoreError as error:
            work.log(f"the checkpoint of step {step} cannot be used: {error}")
            continue
        if found.last is None:
            found = replace(found, step=step, last=file)
        if is_best:
            found = replace(found, best=file)
    return found


class Watcher:
    """Turns news of a training into rows: progress, loss curves, stops on the way."""

    def __init__(self, work: Work, plan: Plan, described: dict[str, Any]) -> None:
        self.work, self.plan, self.described = work, plan, described
        self.points: list[dict[str, Any]] = []
        self.preempted = False

    def stop(self) -> bool:
        """True once the worker is asked to stop; Cancelled and FenceLost pass through."""
        try:
            self.work.check()
        except Preempted:
            self.preempted = True
        return self.preempted

    def progress(self, step: int, total: int, epoch: int) -> None:
        try:
            self.work.progress(step, total, "step", f"epoch {min(epoch + 1, self.plan.recipe.epochs)}")
        except Preempted:
            self.preempted = True

    def curve(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.points += [{"step": step, "epoch": epoch, "name": name, "value": v} for name, v in values.items()]
        if len(self.points) >= FLUSH_POINTS:
            self.flush()

    def flush(self) -> None:
        """Write the points of the loss curves that wait; those of steps taken again replace the older ones."""
        from sqlalchemy.dialects.postgresql import insert

        from app.schema.ops import TrainingStep

        if self.points and self.work.job_id is not None:
            rows = [{**point, "job_id": self.work.job_id} for point in self.points]
            statement = insert(TrainingStep)
            replace = {"value": statement.excluded.value, "epoch": statement.excluded.epoch}
            statement = statement.on_conflict_do_update(index_elements=["job_id", "step", "name"], set_=replace)
            with self.work.transaction() as connection:
                connection.execute(statement, rows)
        self.points = []

    def alarm(self, message: str) -> None:
        self.work.log(message)

    def keep(self, file: Path, step: int, total: int, *, is_best: bool) -> Path:
        self.flush()
        kept = publish(self.work, self.plan, self.described, file, steps=(step, total), is_best=is_best)
        if self.work.job_id is not None:
            self._forget(self.work.job_id)
        return kept.file

    def _forget(self, job_id: int) -> None:
        with ExitStack() as noted:
            with self.work.transaction() as connection:
                keys = artifacts.forget_stops(connection, job_id, artifacts.KEPT_STOPS)
                noted.enter_context(superseded(self.work, keys))
            with self.work.connect() as connection:
                named_files.remove(connection, self.work.settings, keys)


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint among the artifacts."""

    checkpoint_id: int
    file: Path


def publish(
    work: Work,
    plan: Plan,
    described: dict[str, Any],
    file: Path,
    *,
    steps: tuple[int, int],
    validation: dict[str, Any] | None = None,
    is_best: bool = False,
) -> Published:
    """Put a checkpoint among the artifacts, then write its row; final where there is a validation."""
    from app import __version__
    from ml import checkpoint

    path, sha256 = artifacts.publish(work.settings, file, KIND)
    values = {
        "name": plan.name,
        "sha256": sha256,
        "arm": plan.arm,
        "encoder": plan.recipe.encoder,
        "width": checkpoint.facts(file)["width"],
        "recipe": described,
        "seed": plan.seed,
        "step": steps[0],
        "num_steps": steps[1],
        "epoch": steps[0] * plan.recipe.epochs // steps[1] if steps[1] else 0,
        "is_best": is_best,
        "is_final": validation is not None,
        "parent_id": plan.parent_id,
        "label_set_id": plan.info.label_set_id,
        "cohort_id": plan.info.cohort_id,
        "shuffled": plan.shuffled,
        "path": path,
        "num_bytes": file.stat().st_size,
        "validation": validation or {},
        "code_version": __version__,
        "job_id": work.job_id,
        "fence": work.fence,
    }
    with work.transaction() as connection:
        named_files.hold(connection, work.settings, file, path, sha256)
        checkpoint_id = artifacts.add_checkpoint(connection, values)
    file.unlink()
    return Published(checkpoint_id, place(work.settings).path(path))
