"""News of a training as rows: progress, loss curves, stops on the way and the checkpoint at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ArtifactsAway, Preempted, StoreError
from app.store import artifacts, named_files
from app.store.places import place
from app.store.work import Work
from workers.stages.pretrain_left import KIND, superseded
from workers.stages.pretrain_plan import Plan

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ml.keeping import Kept, Result

END_SECONDS, PAUSE_SECONDS = 600.0, 5.0
"""How long it is tried to write finished weights, and how long after each failure."""
FLUSH_POINTS = 12
"""Numbers of the loss curves written at once."""


def find_stops(work: Work, end: Path | None) -> tuple[int, Kept]:
    """The step of the newest intact stop on the way of this job, and what there is to go on from.

    Args:
        work: the job.
        end: the stop at the end of the training that the job carries on.
    """
    from sqlalchemy import text

    from ml import checkpoint
    from ml.keeping import Kept

    begins = Kept(last=end, retreat=end, extends=end is not None)
    if work.job_id is None:
        return 0, begins
    statement = (
        "SELECT step, path, sha256, is_best FROM model.checkpoint WHERE job_id = :job AND NOT is_final "
        "ORDER BY checkpoint_id DESC"
    )
    with work.connect() as connection:
        rows = connection.execute(text(statement), {"job": work.job_id}).all()
    files = [(row, file) for row in rows if (file := _fetch(work, row)) is not None]
    if not files:
        return 0, begins
    newest, last = files[0]
    goes_back = checkpoint.facts(last).get("retreat", 0)
    best = next((file for row, file in files if row.is_best), None)
    retreat = next((file for row, file in files if row.step == goes_back), end)
    return newest.step, Kept(last=last, best=best, retreat=retreat, extends=end is not None and retreat == end)


def _fetch(work: Work, row: Any) -> Path | None:
    try:
        return artifacts.fetch(work.settings, row.path, row.sha256)
    except StoreError as error:
        work.log(f"the checkpoint of step {row.step} cannot be used: {error}")
        return None


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

    def went_back(self, step: int) -> None:
        from sqlalchemy import text

        self.points = []
        if self.work.job_id is not None:
            job_id = self.work.job_id
            self._forget(lambda connection: artifacts.undo_stops(connection, job_id, step))
            curves = "DELETE FROM ops.training_step WHERE job_id = :job AND step > :step"
            with self.work.transaction() as connection:
                connection.execute(text(curves), {"job": job_id, "step": step})

    def keep(self, file: Path, step: int, total: int, *, is_best: bool, is_retreat: bool) -> Path:
        self.flush()
        flags = {"is_best": is_best, "is_retreat": is_retreat}
        kept = publish(self.work, self.plan, self.described, file, steps=(step, total), flags=flags)
        if self.work.job_id is not None:
            job_id = self.work.job_id
            self._forget(lambda connection: artifacts.forget_stops(connection, job_id, artifacts.KEPT_STOPS))
        return kept.file

    def _forget(self, delete: Callable[[Connection], list[str]]) -> None:
        with ExitStack() as noted:
            with self.work.transaction() as connection:
                keys = delete(connection)
                noted.enter_context(superseded(self.work, keys))
            with self.work.connect() as connection:
                named_files.remove(connection, self.work.settings, keys)


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint among the artifacts."""

    checkpoint_id: int
    file: Path


def publish_end(work: Work, plan: Plan, described: dict[str, Any], file: Path, result: Result) -> Published:
    """Publish the finished weights; where they cannot be written it is tried again for a while, as they are all there.

    Raises:
        StoreError: they could not be written for so long; ArtifactsAway at once.
        Cancelled, Preempted: the job shall end meanwhile.
    """
    steps, until, said = (result.step, result.num_steps), time.monotonic() + END_SECONDS, False
    while True:
        try:
            return publish(work, plan, described, file, steps=steps, validation=result.validation)
        except ArtifactsAway:  # the next attempt comes after a longer while
            raise
        except OSError as error:
            why = error.strerror or str(error).rstrip(".")
            if time.monotonic() > until:
                raise StoreError(
                    f"Expected to write the finished weights among the artifacts, got {why!r} for {END_SECONDS:g} s; "
                    f"free some of the disk and run `lachesis retry {work.job_id}`, which goes on from the last stop."
                ) from None
        if not said:
            work.log(f"The finished weights cannot be written ({why}); it is tried again for {END_SECONDS:g} s.")
        said = True
        pause = time.monotonic() + PAUSE_SECONDS
        while time.monotonic() < pause:
            work.check()
            time.sleep(0.1)


def publish(
    work: Work,
    plan: Plan,
    described: dict[str, Any],
    file: Path,
    *,
    steps: tuple[int, int],
    validation: dict[str, Any] | None = None,
    flags: Mapping[str, bool] | None = None,
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
        **(flags or {}),
    }
    with work.transaction() as connection:
        named_files.hold(connection, work.settings, file, path, sha256)
        checkpoint_id = artifacts.add_checkpoint(connection, values)
    file.unlink()
    return Published(checkpoint_id, place(work.settings).path(path))
