"""kill -9 at each moment of writing a stop: the next attempt goes on from a whole one and ends as if nothing was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.settings import Settings
from app.store import jobs
from app.store.places import place
from ml import checkpoint
from tests.workers.small_cohort import SMALL, insert_cohort

STEP = 5
SET = {**SMALL, "batch": "3", "accumulate": "2", "ema": "0.9", "schedule": "plateau", "select": "best"}


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported what a training needs, and forks attempts."""
    command = [sys.executable, "-m", "tests.workers.dying"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made:
        yield made
        assert made.stdin is not None
        made.stdin.close()
        made.wait(20)


Made = tuple[dict[str, bytes], dict[str, Any]]


class Trainings:
    """Trainings of one cohort, by attempts that may die."""

    def __init__(self, nursery: subprocess.Popen[str], engine: Engine, settings: Settings, scans: Path) -> None:
        self.nursery, self.engine, self.settings = nursery, engine, settings
        self.answer = scans.parent / "answer.json"
        with engine.begin() as connection:
            insert_cohort(connection, scans)

    epochs = 2

    def job(self, name: str) -> int:
        """Queue one; equal but for its name."""
        settings = {**SET, "epochs": str(self.epochs)}
        args = {"arm": "tte", "encoder": "tiny", "labels": "outcomes", "name": name, "seed": 0, "set": settings}
        with self.engine.begin() as connection:
            return jobs.insert(connection, kind="pretrain", queue="gpu", args=args)

    def attempt(self, job: int, *, at: int | None = None, halfway: bool = False, every_step: bool = True) -> list[str]:
        """One attempt; the moments it had. It must die exactly where it is told to."""
        assert self.nursery.stdin is not None and self.nursery.stdout is not None
        told: dict[str, Any] = {
            "url": self.settings.database_url,
            "home": str(self.settings.home),
            "answer": str(self.answer),
        }
        told |= {"job": job, "step": STEP, "at": at, "halfway": halfway, "every_step": every_step}
        print(json.dumps(told), file=self.nursery.stdin, flush=True)
        code = int(self.nursery.stdout.readline())
        if at is None:
            assert code == 0 and self.rows("SELECT state FROM ops.job WHERE job_id = :j", j=job)[0].state == "succeeded"
            return list(json.loads(self.answer.read_text()))
        assert code == -(signal.SIGXFSZ if halfway else signal.SIGKILL)
        with self.engine.begin() as connection:  # as its worker does
            fence = jobs.find(connection, job)["fence"]
            assert jobs.crash(connection, job, fence, message="killed", signal=-code) == "queued"
        return []

    def rows(self, statement: str, **parameters: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(statement), parameters))

    def made(self, job: int) -> Made:
        """Tensors and facts of the finished weights, as bytes and without the name."""
        (row,) = self.rows("SELECT path FROM model.checkpoint WHERE job_id = :j AND is_final", j=job)
        file = place(self.settings).path(row.path)
        facts = checkpoint.facts(file)
        del facts["name"], facts["described"]["identity"]
        return {name: tensor.numpy().tobytes() for name, tensor in checkpoint.tensors(file).items()}, facts

    def stands(self, job: int) -> None:
        """Each row has its file, whole; the newest is one to go on from."""
        for row in self.rows("SELECT path, sha256 FROM model.checkpoint WHERE job_id = :j", j=job):
            place(self.settings).get(row.path, row.sha256)

    def left_over(self) -> list[str]:
        """Files that belong to no row."""
        assert self.settings.home is not None
        named = {row.path for row in self.rows("SELECT path FROM model.checkpoint")}
        runs = [str(f) for f in (self.settings.home / "runs").rglob("*") if f.is_file() and f.name != "log"]
        return runs + [one.key for one in place(self.settings).listing("checkpoints") if one.key not in named]


@pytest.fixture
def trainings(nursery: subprocess.Popen[str], engine: Engine, settings: Settings, tmp_path: Path) -> Trainings:
    return Trainings(nursery, engine, settings, tmp_path / "scans")


POINTS = [
    ("os.rename runs/part", False),
    ("shutil.copyfile runs/safetensors", True),
    ("commit after os.rename", False),
    ("os.remove artifacts/safetensors", False),
]
"""What is about to happen when the process is killed, and whether it may happen half."""


def place_of(moments: list[str], point: str) -> int:
    """The first moment of that kind; of commits the first one after a rename among the artifacts."""
    if point.startswith("commit"):
        return moments.index("commit", moments.index("os.rename artifacts/part"))
    return moments.index(point)


def goes_on_as_if_nothing_was(trainings: Trainings, whole: Made, at: int, *, halfway: bool) -> None:
    """A training that is killed at a moment, and the next attempt."""
    job = trainings.job(f"killed-{at}-{halfway}")
    trainings.attempt(job, at=at, halfway=halfway)
    trainings.stands(job)
    trainings.attempt(job)
    ended = trainings.rows(
        "SELECT outcome, signal, start_step FROM ops.job_attempt WHERE job_id = :j ORDER BY 1", j=job
    )
    assert [row.outcome for row in ended] == ["crashed", "succeeded"]
    assert ended[1].start_step is None or ended[1].start_step >= STEP - 1, "it went on from the last stop"
    trainings.stands(job)
    assert trainings.made(job) == whole
    assert trainings.left_over() == []


def test_a_training_killed_while_it_keeps_a_stop_ends_as_one_that_was_not(trainings: Trainings) -> None:
    trainings.epochs = 1
    job = trainings.job("whole")
    moments = trainings.attempt(job)
    whole = trainings.made(job)
    for point, halfway in POINTS:
        goes_on_as_if_nothing_was(trainings, whole, place_of(moments, point), halfway=halfway)


@pytest.mark.long
def test_whatever_the_moment_of_the_kill_a_training_ends_as_one_that_was_not(trainings: Trainings) -> None:
    seldom = trainings.job("seldom")
    trainings.attempt(seldom, every_step=False)
    job = trainings.job("whole")
    moments = trainings.attempt(job)
    whole = trainings.made(job)
    assert whole == trainings.made(seldom), "when stops are kept decides nothing"
    ends = next(i for i, moment in enumerate(moments) if moment.startswith("os.remove artifacts")) + 1
    final = len(moments) - moments[::-1].index("os.rename runs/part") - 1
    for at in [*range(ends), *range(final, len(moments))]:
        goes_on_as_if_nothing_was(trainings, whole, at, halfway=False)
    writes = [i for i in range(ends) if moments[i].startswith(("os.mkdir runs", "shutil.copyfile"))]
    for at in writes:
        goes_on_as_if_nothing_was(trainings, whole, at, halfway=True)
