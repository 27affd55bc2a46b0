"""Row `job`: from submit to claimed, less what a bare Celery worker takes to begin a task; and a child's life."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from sqlalchemy import Engine, text

from app.embedded import Store, ensure_up, environment, stop
from app.queue import broker_url, submit
from app.settings import Settings
from app.store.session import make_engine
from tests.bench import Row

PAIRS = 15
BROKER = "LACHESIS_BENCH_BROKER"
REPLY = "bench-reply"

bare = Celery("bare", broker=os.environ.get(BROKER))
bare.conf.update(task_ignore_result=True, worker_enable_remote_control=False)


@bare.task(name="answer")
def answer(url: str) -> None:
    """Say when this began."""
    with redis.from_url(url) as client:
        client.rpush(REPLY, str(time.time()))


def run() -> list[Row]:
    """Both figures, interleaved."""
    with servers() as store:
        engine = make_engine(store.database_url)
        with processes(store):
            claimed(store, engine, "load")
            began(store)
            pairs = [(claimed(store, engine, "load"), began(store)) for _ in range(PAIRS)]
            child = statistics.median(lived(store, engine) for _ in range(3))
    extra = statistics.median(ours - theirs for ours, theirs in pairs)
    return [
        Row(row="job", figure=1000 * extra, unit="ms over Celery", target=50, at_least=False),
        Row(row="job-child", figure=child, unit="s of a child that ends at once", target=3, at_least=False),
    ]


@contextmanager
def servers() -> Iterator[Store]:
    """An embedded store that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="lachesis-bench-") as folder:
        Path(folder).chmod(0o711)
        settings = Settings(home=Path(folder) / "home", home_is_named=True)
        try:
            yield ensure_up(settings)
        finally:
            stop(settings)


@contextmanager
def processes(store: Store) -> Iterator[None]:
    """One of our workers and one of Celery's own, both with one child."""
    env = {**os.environ, **environment(store.settings), BROKER: broker_url(store.redis_url)}
    celery = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "tests.bench.job:bare",
        "worker",
        "-c",
        "1",
        "-Q",
        "bare",
        "-l",
        "ERROR",
    ]
    ours = [sys.executable, "-m", "workers", "worker", "--name", "bench"]
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen(command, env=env, **quiet) for command in (celery, ours)]
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


def began(store: Store) -> float:
    """Seconds from sending a message to the start of its task."""
    start = time.time()
    with bare.connection_for_write(broker_url(store.redis_url)) as connection:
        bare.send_task("answer", args=[store.redis_url], queue="bare", connection=connection)
    with redis.from_url(store.redis_url) as client:
        reply = client.blpop([REPLY], timeout=60)
    return float(reply[1]) - start


def claimed(store: Store, engine: Engine, kind: str) -> float:
    """Seconds from submitting a job to its claim; its arguments name nothing, so that it ends at once."""
    start = time.time()
    row = ended(engine, submit(store, kind, {}))
    return float(row.started) - start


def lived(store: Store, engine: Engine) -> float:
    """Seconds from the claim of a job in a child process to its end, for want of arguments."""
    row = ended(engine, submit(store, "embed", {}))
    return float(row.finished - row.started)


def ended(engine: Engine, job_id: int) -> Any:
    """The only attempt at a job, once it has ended."""
    statement = """
    SELECT extract(epoch FROM started_at)::float8 AS started, extract(epoch FROM finished_at)::float8 AS finished
    FROM ops.job_attempt WHERE job_id = :j AND finished_at IS NOT NULL
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            row = connection.execute(text(statement), {"j": job_id}).first()
        if row is not None:
            return row
        time.sleep(0.01)
    raise RuntimeError(f"Job {job_id} has not ended within a minute.")
