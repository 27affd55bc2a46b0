"""Trainings of one small cohort by attempts that may get into trouble, each a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

from app.settings import Settings
from app.store import jobs
from app.store.places import place
from tests.workers.small_cohort import SMALL, insert_cohort

STEP = 5
SET = {**SMALL, "batch": "3", "accumulate": "2", "ema": "0.9", "schedule": "plateau", "select": "best"}

Made = tuple[dict[str, bytes], dict[str, Any]]


class Trainings:
    """Trainings of one cohort, by attempts that may die."""

    def __init__(self, nursery: subprocess.Popen[str], engine: Engine, settings: Settings, scans: Path) -> None:
        self.nursery, self.engine, self.settings = nursery, engine, settings
        self.epochs = 2
        self.answer = scans.parent / "answer.json"
        with engine.begin() as connection:
            insert_cohort(connection, scans)

    def job(self, name: str, **more: Any) -> int:
        """Queue one; equal but for its name and `more` of the arguments."""
        settings = {**SET, "epochs": str(self.epochs)}
        args = {"arm": "tte", "encoder": "tiny", "labels": "outcomes", "name": name, "seed": 0, "set": settings, **more}
        with self.engine.begin() as connection:
            return jobs.insert(connection, kind="pretrain", queue="gpu", args=args)

    def attempt(self, job: int, *, at: int | None = None, halfway: bool = False, every_step: bool = True) -> list[str]:
        """One attempt; the moments it had. It must die exactly where it is told to."""
        code = self._fork(job, at=at, halfway=halfway, every_step=every_step)
        if at is None:
            assert code == 0 and self.state(job) == "succeeded"
            return list(json.loads(self.answer.read_text()))
        assert code == -(signal.SIGXFSZ if halfway else signal.SIGKILL)
        with self.engine.begin() as connection:  # as its worker does
            fence = jobs.find(connection, job)["fence"]
            assert jobs.crash(connection, job, fence, message="killed", signal=-code) == "queued"
        return []

    def troubled(self, job: int, trouble: str, **how: Any) -> dict[str, Any]:
        """One attempt that something befalls, and that says so; the job afterwards."""
        assert self._fork(job, trouble=trouble, **how) == 0
        with self.engine.connect() as connection:
            return jobs.find(connection, job)

    def _fork(self, job: int, **how: Any) -> int:
        assert self.nursery.stdin is not None and self.nursery.stdout is not None
        told = {"at": None, "halfway": False, "every_step": True, "trouble": None, **how}
        told |= {"url": self.settings.database_url, "home": str(self.settings.home), "answer": str(self.answer)}
        print(json.dumps({**told, "job": job, "step": STEP}), file=self.nursery.stdin, flush=True)
        return int(self.nursery.stdout.readline())

    def state(self, job: int) -> str:
        """The job's state."""
        return str(self.rows("SELECT state FROM ops.job WHERE job_id = :j", j=job)[0].state)

    def rows(self, statement: str, **parameters: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(statement), parameters))

    def made(self, job: int) -> Made:
        """Tensors and facts of the finished weights, as bytes and without the name."""
        from ml import checkpoint

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
