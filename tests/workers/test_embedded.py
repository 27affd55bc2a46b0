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
