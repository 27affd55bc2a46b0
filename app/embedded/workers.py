"""Workers of an embedded store: one for loading, labels and evaluation, one for the device."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from app.embedded import processes
from app.embedded.home import Place
from app.errors import StoreError

GROUPS = {"jobs": ("load", "label", "eval"), "gpu": ("gpu",)}
"""Queues by the name of the worker that serves them."""
BOOT_SECONDS = 60.0
"""A worker younger than this, or younger servers, may be without a heartbeat yet."""

_SERVED = """
SELECT coalesce(array_agg(DISTINCT q), '{}'), extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())::float8
FROM ops.worker w CROSS JOIN LATERAL unnest(w.queues) q
WHERE w.stopped_at IS NULL AND w.heartbeat_at > clock_timestamp() - interval '30 seconds'
"""


def start_missing(place: Place, database_url: str, environment: Mapping[str, str]) -> list[str]:
    """Start a worker for each group of queues that nobody serves; their names. The caller holds the home's lock."""
    import psycopg

    try:
        with psycopg.connect(database_url, connect_timeout=10) as connection:
            row = connection.execute(_SERVED).fetchone()
    except psycopg.OperationalError:
        raise StoreError("The database does not answer, so no worker was started.") from None
    served, servers_age = row if row is not None else ([], 0.0)
    missing = [
        name
        for name, queues in GROUPS.items()
        if not set(queues) <= set(served) and not _is_coming(place.home, name, servers_age)
    ]
    return [_start(place.home, name, environment) for name in missing]


def _is_coming(home: Path, name: str, servers_age: float) -> bool:
    """True while a living worker of that name may still find its way to the servers."""
    for noted_name, pid in processes.live_workers(home).items():
        if noted_name.split(".")[0] == name:
            age = time.time() - (processes.start_time(pid) or 0.0)
            if min(age, servers_age) < BOOT_SECONDS:
                return True
    return False


def _start(home: Path, name: str, environment: Mapping[str, str]) -> str:
    """Start one worker, untied from this process and its terminal; a silent one of the same name is left alone."""
    taken = processes.live_workers(home)
    free = next(n for n in (name, *(f"{name}.{i}" for i in range(2, 1000))) if n not in taken)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LACHESIS_")}
    command = [sys.executable, "-P", "-m", "workers", "worker", "--queues", ",".join(GROUPS[name]), "--name", free]
    try:
        (home / "log").mkdir(mode=0o700, exist_ok=True)
        with (home / "log" / f"{free}.log").open("ab") as log:
            worker = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**kept, **environment},
                start_new_session=True,
            )
    except OSError as error:
        raise StoreError(f"No worker can be started: {error.strerror} ({error.filename}).") from error
    processes.note(home / "workers" / f"{free}.pid", worker.pid)
    return free
