"""Real workers on the test's own database and Redis, with clocks a test can wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from sqlalchemy import Engine, text

from app.embedded import Store, environment
from app.embedded.processes import start_time
from app.queue import nudge
from app.settings import Settings
from app.store import jobs

if TYPE_CHECKING:
    from tests.workers.trainings import Trainings

FAST = ("--lease", "1.5", "--heartbeat", "0.3", "--poll", "0.15", "--grace", "2")
ENDED = ("succeeded", "failed", "cancelled", "dead")


class Lab:
    """Queues jobs of test stages, starts and kills workers, asks the tables."""

    def __init__(self, engine: Engine, settings: Settings, log: Path) -> None:
        assert settings.database_url and settings.redis_url
        self.engine, self.settings, self.log = engine, settings, log
        self.store = Store(
            settings=settings,
            database_url=settings.database_url,
            redis_url=settings.redis_url,
            reader_url=None,
            embedded=False,
        )
        self.workers: list[subprocess.Popen[bytes]] = []

    def worker(self, *options: str, queues: str = "load,label,eval,gpu") -> subprocess.Popen[bytes]:
        """A worker that has registered."""
        command = [sys.executable, "-m", "tests.workers.worker", "worker", "--queues", queues, *(options or FAST)]
        worker = self.start(command)
        self.workers.append(worker)
        registered = "SELECT count(*) FROM ops.worker WHERE pid = :p"
        self.until(lambda: self.scalar(registered, p=worker.pid) == 1, 20)
        return worker

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=Path(__file__).parents[2],
                env={**os.environ, **environment(self.settings), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def insert(self, kind: str, **args: Any) -> int:
        """Queue a job and ring no bell."""
        with self.engine.begin() as connection:
            return jobs.insert(connection, kind=kind, queue="load", args=args)

    def submit(self, kind: str, **args: Any) -> int:
        """Queue a job as app.queue.submit does."""
        job_id = self.insert(kind, **args)
        assert nudge(self.store.redis_url, job_id, "load")
        return job_id

    def job(self, job_id: int) -> dict[str, Any]:
        with self.engine.connect() as connection:
            return jobs.find(connection, job_id)

    def scalar(self, statement: str, **parameters: Any) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(text(statement), parameters).scalar()

    def rows(self, statement: str, **parameters: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(statement), parameters))

    def attempts(self, job_id: int) -> list[Any]:
        return self.rows("SELECT * FROM ops.job_attempt WHERE job_id = :j ORDER BY fence", j=job_id)

    def until(self, condition: Callable[[], Any], seconds: float = 15.0) -> None:
        """Wait for something that must come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:] if self.log.exists() else "no log"
            time.sleep(0.03)

    def ended(self, job_id: int, seconds: float = 15.0) -> dict[str, Any]:
        """The job once it has ended."""
        self.until(lambda: self.job(job_id)["state"] in ENDED, seconds)
        return self.job(job_id)

    def running(self, job_id: int, done: int = 1) -> int:
        """Wait until a job is at work; the pid that does it."""
        self.until(lambda: self.job(job_id)["state"] == "running" and (self.job(job_id)["done"] or 0) >= done)
        return int(self.attempts(job_id)[-1].pid)

    def close(self) -> None:
        family = []
        for worker in self.workers:
            if worker.poll() is None:
                family += [child.pid for child in psutil.Process(worker.pid).children(recursive=True)]
                worker.send_signal(signal.SIGKILL)
        for worker in self.workers:
            worker.wait()
        self.until(lambda: all(start_time(pid) is None for pid in family), 5)


@pytest.fixture
def lab(engine: Engine, settings: Settings, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(engine, settings, tmp_path / "workers.log")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported what a training needs, and forks attempts."""
    command = [sys.executable, "-m", "tests.workers.dying"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made:
        yield made
        assert made.stdin is not None
        made.stdin.close()
        made.wait(20)


@pytest.fixture
def trainings(nursery: subprocess.Popen[str], engine: Engine, settings: Settings, tmp_path: Path) -> Trainings:
    from tests.workers.trainings import Trainings

    return Trainings(nursery, engine, settings, tmp_path / "scans")
