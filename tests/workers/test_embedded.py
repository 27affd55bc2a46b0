"""The embedded store's own workers: started by the command that queues a job, and again when they were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.embedded import ensure_up, ensure_workers, environment, status, stop
from app.embedded.processes import start_time
from app.queue import submit
from app.settings import Settings


@pytest.fixture
def home() -> Iterator[Settings]:
    with tempfile.TemporaryDirectory(prefix="lachesis-tests-") as folder:
        Path(folder).chmod(0o711)
        settings = Settings(home=Path(folder) / "home", home_is_named=True)
        ensure_up(settings)
        try:
            yield settings
        finally:
            stop(settings)


def load_nothing(settings: Settings, folder: Path) -> tuple[int, float]:
    """Load an empty folder, which a worker refuses: exit code and seconds."""
    (folder / "extract").mkdir(exist_ok=True)
    command = [sys.executable, "-c", "from app.cli import main; main()", "load", "omop", str(folder / "extract")]
    start = time.monotonic()
    done = subprocess.run(command, env={**os.environ, **environment(settings)}, capture_output=True, timeout=120)
    return done.returncode, time.monotonic() - start


def kill(settings: Settings, *names: str) -> None:
    workers = status(settings)["workers"]
    for name in names:
        os.kill(workers[name], signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(start_time(workers[name]) is not None for name in names) and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.long
def test_a_killed_worker_is_started_again_by_the_command_that_needs_it(home: Settings, tmp_path: Path) -> None:
    assert load_nothing(home, tmp_path)[0] == 2
    assert set(status(home)["workers"]) == {"jobs", "gpu"}
    kill(home, "jobs")
    code, seconds = load_nothing(home, tmp_path)
    assert code == 2
    assert seconds < 25, "its neighbour tells of its death before its last heartbeat is old"
    kill(home, *status(home)["workers"])
    code, seconds = load_nothing(home, tmp_path)
    assert code == 2
    assert seconds < 60, "with nobody left, its last heartbeat must be 30 s old"


@pytest.mark.long
def test_workers_end_with_the_store(home: Settings) -> None:
    ensure_workers(ensure_up(home))
    workers = status(home)["workers"]
    assert set(workers) == {"jobs", "gpu"}
    time.sleep(2.0)
    stop(home)
    assert all(start_time(pid) is None for pid in workers.values())


@pytest.mark.long
def test_a_follower_ends_when_somebody_ends_the_servers_and_does_not_start_them_again(home: Settings) -> None:
    job_id = submit(ensure_up(home), "load", {"what": "omop", "path": "/nowhere"}, held_for=3600.0)
    command = [sys.executable, "-c", "from app.cli import main; main()", "watch", str(job_id)]
    variables = {**os.environ, **environment(home)}
    follower = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not status(home)["workers"] and time.monotonic() < deadline:
        time.sleep(0.1)
    stop(home)
    _, said = follower.communicate(timeout=20)
    assert follower.returncode == 4
    assert f"`lachesis down` ended the servers; job {job_id} goes on after `lachesis up`." in said
    assert status(home)["postgres"] is None
