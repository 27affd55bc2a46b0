"""Files that rows name stay, and those that none does go, whatever two jobs do at the same moment."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, text

from app.settings import Settings
from app.store import artifacts, named_files
from app.store.places import place
from tests.migrations.rows import add_checkpoint


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "weights.safetensors"
    made.write_bytes(b"weights")
    return made


def name_it(connection: Connection, settings: Settings, file: Path, key: str, sha256: str) -> None:
    """As stages do: a row that names a published file."""
    named_files.hold(connection, settings, file, key, sha256)
    added = add_checkpoint(connection, "a", 1)
    statement = text("UPDATE model.checkpoint SET path = :key WHERE checkpoint_id = :c")
    connection.execute(statement, {"key": key, "c": added})


def remove(engine: Engine, settings: Settings, *keys: str) -> list[str]:
    with engine.connect() as connection:
        return named_files.remove(connection, settings, keys)


def test_a_file_goes_once_no_row_names_it(engine: Engine, settings: Settings, file: Path) -> None:
    key, sha256 = artifacts.publish(settings, file, "checkpoints")
    with engine.begin() as connection:
        name_it(connection, settings, file, key, sha256)
        assert named_files.named(connection) == {key}
    assert remove(engine, settings, key, "checkpoints/00/none") == [] and artifacts.is_kept(settings, key)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM model.checkpoint"))
    assert remove(engine, settings, key) == [key] and not artifacts.is_kept(settings, key)
    assert remove(engine, settings, key) == []


def test_a_file_taken_away_before_its_row_came_is_written_again(engine: Engine, settings: Settings, file: Path) -> None:
    key, sha256 = artifacts.publish(settings, file, "checkpoints")
    assert remove(engine, settings, key) == [key]
    with engine.begin() as connection:
        name_it(connection, settings, file, key, sha256)
    assert artifacts.fetch(settings, key, sha256).read_bytes() == b"weights"


def test_who_takes_a_file_away_waits_for_the_row_that_is_being_written(
    engine: Engine, settings: Settings, file: Path
) -> None:
    key, sha256 = artifacts.publish(settings, file, "checkpoints")
    removed: list[list[str]] = []
    other = threading.Thread(target=lambda: removed.append(remove(engine, settings, key)))
    with engine.begin() as connection:
        name_it(connection, settings, file, key, sha256)
        other.start()
        other.join(0.5)
        assert other.is_alive() and artifacts.is_kept(settings, key)
    other.join(30)
    assert removed == [[]] and artifacts.is_kept(settings, key)


def test_a_row_waits_for_who_takes_its_file_away_and_writes_it_again(
    engine: Engine, settings: Settings, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.store.places import FolderPlace

    key, sha256 = artifacts.publish(settings, file, "checkpoints")
    inside, go_on = threading.Event(), threading.Event()
    delete = FolderPlace.remove

    def slow(here: FolderPlace, which: str) -> bool:
        inside.set()
        go_on.wait(30)
        return delete(here, which)

    monkeypatch.setattr(FolderPlace, "remove", slow)
    taker = threading.Thread(target=remove, args=(engine, settings, key))
    taker.start()
    assert inside.wait(30)

    def name() -> None:
        with engine.begin() as connection:
            name_it(connection, settings, file, key, sha256)

    namer = threading.Thread(target=name)
    namer.start()
    namer.join(0.5)
    assert namer.is_alive()
    go_on.set()
    for thread in (taker, namer):
        thread.join(30)
    assert place(settings).get(key, sha256).read_bytes() == b"weights"


def test_releases_of_the_vocabulary_that_are_not_used_any_more_name_no_files(engine: Engine) -> None:
    insert = text(
        "INSERT INTO ops.vocabulary_release (version, is_current, is_full, digest, files) VALUES "
        "('1', false, true, 'a', '{\"concept\": {\"path\": \"vocabulary/1\"}}'), "
        "('2', true, true, 'b', '{\"concept\": {\"path\": \"vocabulary/2\"}}')"
    )
    with engine.begin() as connection:
        connection.execute(insert)
        assert named_files.named(connection) == {"vocabulary/2"}
