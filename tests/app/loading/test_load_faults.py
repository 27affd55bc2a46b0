"""Loads that are cut off anywhere: nothing is lost, nothing is half there, nothing comes twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from app.loading.omop import load
from app.store.work import InlineWork
from tests.app.loading.crashing_child import AFTER_COMMIT, POINTS
from tests.app.loading.extracts import CONDITION_HEADER, CONTENT, conditions, extract, rows

Make = Callable[..., InlineWork]

EVENTS = "SELECT person_id, time, concept_id, source_row_id FROM omop.event ORDER BY 1, 2, 3, 4"
TIMELINES = "SELECT person_id, digest FROM omop.timeline ORDER BY 1"
BOOKS = """
SELECT table_name, num_read, num_loaded, num_rejected, num_shown FROM ops.load WHERE state = 'published' ORDER BY 1
"""
STRAY = """
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'omop' AND c.relkind = 'r' AND c.relname ~ '^(event|staged)_' AND NOT c.relispartition
"""


def child(engine: Engine, folder: Path, point: str, **args: Any) -> subprocess.CompletedProcess[str]:
    """A load in a process of its own, that dies at `point`."""
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "tests.app.loading.crashing_child", url, str(folder), point, json.dumps(args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def state(engine: Engine) -> list[Any]:
    return [rows(engine, statement) for statement in (EVENTS, TIMELINES, BOOKS)]


@pytest.fixture
def deliveries(tmp_path: Path) -> tuple[Path, Path]:
    """A delivery, and the next one: one condition more, one changed, one gone, one that is rejected."""
    later = [line.replace("2015-03-07", "2015-04-07") for line in conditions("99,1,999,2015-06-01,,,,0,,0")]
    later = [line for line in later if not line.startswith("8,")] + ["x,1,1,2015-01-01,,,,0,,0"]
    return extract(tmp_path / "a"), extract(tmp_path / "b", condition_occurrence=later)


@pytest.mark.parametrize("mode", ["snapshot", "upsert"])
@pytest.mark.parametrize("point", [*POINTS, AFTER_COMMIT])
def test_a_load_that_is_killed_leaves_one_delivery_or_the_other_and_runs_again_to_the_same_end(
    engine: Engine, work: Make, deliveries: tuple[Path, Path], tmp_path: Path, point: str, mode: str
) -> None:
    before, after = deliveries
    args = {"path": str(after), "mode": mode, "max_rejects": 1}
    load(work(path=str(before)))
    shown = state(engine)
    killed = child(engine, tmp_path, point, **args)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (state(engine) != shown) == (point == AFTER_COMMIT)
    again = load(work(**args))
    assert again["unchanged"] == (point == AFTER_COMMIT)
    reached = state(engine)
    assert load(work(**args))["unchanged"] is True and state(engine) == reached
    assert rows(engine, STRAY) == []
    conditions_loaded = {row[3]: row[2] for row in reached[0]}
    assert conditions_loaded[99] == 999 and (8 in conditions_loaded) == (mode == "upsert")
    assert len(reached[0]) == len(conditions_loaded) == (20 if mode == "snapshot" else 21)


def test_a_full_disk_stops_a_load_with_a_sentence_and_nothing_of_it_is_shown(
    engine: Engine, work: Make, tmp_path: Path
) -> None:
    lines = (f"{i},{i % 5 + 1},{300 + i % 50},2015-03-01,2015-03-01 10:00:00,,,0,,0" for i in range(200_000))
    big = "\n".join([CONDITION_HEADER, *lines]).encode("utf-16")  # read by way of a file in UTF-8
    folder = extract(tmp_path / "big", condition_occurrence=big)
    before = rows(engine, CONTENT)
    failed = child(engine, tmp_path, "none", path=str(folder), file_size=100_000)
    assert failed.returncode != 0 and len(failed.stderr.splitlines()) == 1, failed.stderr
    assert rows(engine, CONTENT) == before
    done = child(engine, tmp_path, "none", path=str(folder))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["events"] == 200_000


@pytest.mark.parametrize("statement", ["COPY omop.event_%", "COPY omop.timeline%"])
def test_a_connection_that_is_cut_in_the_middle_of_writing_leaves_nothing(
    engine: Engine, work: Make, tmp_path: Path, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.loading import publish

    whole = publish.copy_in

    def slow(connection: Any, name: str, columns: Any, chunks: Any, **kwargs: Any) -> Any:
        def waits() -> Any:
            for chunk in chunks:
                yield chunk
                time.sleep(0.5 if name.startswith(statement[5:-1]) else 0)

        return whole(connection, name, columns, waits(), **kwargs)

    monkeypatch.setattr(publish, "copy_in", slow)
    cut = threading.Event()

    def terminate() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not cut.is_set():
            found = rows(
                engine,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND state = 'active' AND query LIKE :pattern AND pid <> pg_backend_pid()",
                pattern=statement,
            )
            if found:
                cut.set()
            time.sleep(0.01)

    before = rows(engine, CONTENT)
    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        with pytest.raises((DBAPIError, psycopg.OperationalError)):
            load(work(path=str(extract(tmp_path / "a"))))
    finally:
        thread.join()
    assert cut.is_set()
    assert rows(engine, CONTENT) == before and rows(engine, STRAY) == []
    monkeypatch.undo()
    assert load(work(path=str(tmp_path / "a")))["events"] == 20
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM ops.load WHERE state <> 'published'")).scalar() == 0
