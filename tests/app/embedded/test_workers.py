"""Workers of the embedded store are started where none serves, and end with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import psycopg
import pytest

from app import embedded
from app.embedded import ensure_up, ensure_workers
from app.settings import Settings


def wait_for_heartbeats(url: str, count: int) -> None:
    """Until so many workers live."""
    deadline = time.monotonic() + 60
    with psycopg.connect(url, autocommit=True) as connection:
        while time.monotonic() < deadline:
            row = connection.execute(
                "SELECT count(*) FROM ops.worker WHERE stopped_at IS NULL AND heartbeat_at > now() - interval '30 s'"
            ).fetchone()
            if row and row[0] >= count:
                return
            time.sleep(0.2)
    pytest.fail("no heartbeat within a minute")


def test_workers_are_started_once_replaced_when_killed_and_ended_by_down(new_home: Callable[..., Settings]) -> None:
    store = ensure_up(new_home())
    assert ensure_workers(store) == ["jobs", "gpu"]
    assert ensure_workers(store) == []  # the first ones are still on their way
    wait_for_heartbeats(store.database_url, 2)
    assert ensure_workers(store) == []
    os.kill(embedded.status(store.settings)["workers"]["jobs"], signal.SIGKILL)
    with psycopg.connect(store.database_url) as connection:  # as it is half a minute later
        connection.execute(
            "UPDATE ops.worker SET heartbeat_at = heartbeat_at - interval '1 min' WHERE 'load' = ANY (queues)"
        )
    assert ensure_workers(store) == ["jobs"]
    wait_for_heartbeats(store.database_url, 2)
    assert set(embedded.status(store.settings)["workers"]) == {"jobs", "gpu"}
    assert embedded.stop(store.settings)["workers"] == 2
    assert embedded.status(store.settings)["workers"] == {}


def test_a_worker_that_serves_from_elsewhere_is_enough(new_home: Callable[..., Settings]) -> None:
    store = ensure_up(new_home())
    with psycopg.connect(store.database_url) as connection:
        connection.execute(
            "INSERT INTO ops.worker (worker_id, host, pid, queues, code_version) "
            "VALUES ('a', 'a', 1, '{load,label}', ''), ('b', 'b', 1, '{eval,gpu}', '')"
        )
    assert ensure_workers(store) == []


def test_external_stores_get_no_workers(settings: Settings) -> None:
    store = ensure_up(settings)
    assert ensure_workers(replace(store)) == []
