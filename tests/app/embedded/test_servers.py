"""The embedded servers start, survive what kills them, and end."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import redis

from app import embedded
from app.embedded import ensure_up, home, processes
from app.errors import InputError, StoreError
from app.settings import Settings

NewHome = Callable[..., Settings]
REPOSITORY = Path(__file__).resolve().parents[3]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run servers as another user")


def ask(url: str, statement: str) -> object:
    """One value from a database."""
    with psycopg.connect(url) as connection:
        row = connection.execute(statement).fetchone()  # type: ignore[call-overload]
        return row[0] if row else None


def add_source(url: str, name: str) -> None:
    """A committed row."""
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO ops.source (name) VALUES (%s)", (name,))


def test_a_killed_postmaster_is_replaced_and_no_committed_row_is_lost(new_home: NewHome) -> None:
    settings = new_home()
    store = ensure_up(settings)
    add_source(store.database_url, "kept")
    killed = embedded.status(settings)["postgres"]
    with closing(psycopg.connect(store.database_url, autocommit=True)) as busy:
        busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1000000000) a, generate_series(1, 1000) b")
        time.sleep(0.3)
        os.kill(killed, signal.SIGKILL)
        start = time.monotonic()
        again = ensure_up(settings)
        assert time.monotonic() - start < 30
    assert ask(again.database_url, "SELECT name FROM ops.source") == "kept"
    assert embedded.status(settings)["postgres"] not in (None, killed)


def test_a_killed_redis_is_replaced(new_home: NewHome) -> None:
    settings = new_home()
    url = ensure_up(settings).redis_url
    os.kill(embedded.status(settings)["redis"], signal.SIGKILL)
    with redis.from_url(ensure_up(settings).redis_url) as client:
        assert client.ping()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert ensure_up(settings).redis_url == url


def test_a_stale_pid_file_whose_pid_another_process_has_is_no_hindrance(new_home: NewHome) -> None:
    settings = new_home()
    ensure_up(settings)
    embedded.stop(settings)
    place = home.existing(settings)
    assert place is not None
    with subprocess.Popen(["sleep", "60"], **place.as_server) as other:
        (place.postgres / "data" / "postmaster.pid").write_text(f"{other.pid}\n{place.postgres / 'data'}\n0\n5432\n")
        try:
            assert ask(ensure_up(settings).database_url, "SELECT 1") == 1
            assert other.poll() is None
        finally:
            other.kill()


def test_a_cleaned_socket_folder_is_no_hindrance(new_home: NewHome) -> None:
    settings = new_home()
    store = ensure_up(settings)
    add_source(store.database_url, "kept")
    place = home.existing(settings)
    assert place is not None
    shutil.rmtree(place.sock)
    assert ask(ensure_up(settings).database_url, "SELECT name FROM ops.source") == "kept"


def test_two_homes_live_side_by_side(new_home: NewHome) -> None:
    first, second = ensure_up(new_home("a")), ensure_up(new_home("b"))
    add_source(first.database_url, "first")
    assert ask(second.database_url, "SELECT count(*) FROM ops.source") == 0
    embedded.stop(first.settings)
    assert ask(second.database_url, "SELECT 1") == 1


def test_processes_that_start_a_store_at_once_get_the_same_servers(new_home: NewHome) -> None:
    assert len(start_at_once(new_home())) == 1


def start_at_once(settings: Settings) -> set[str]:
    """Pids of the postmasters that four processes find when each makes sure of the same home's servers."""
    code = "from app.embedded import ensure_up, status; from app.settings import read_settings; s = read_settings(); "
    code += "ensure_up(s); print(status(s)['postgres'])"
    environment = {**os.environ, "LACHESIS_HOME": str(settings.home)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    pids = {process.communicate(timeout=120)[0].strip() for process in started}
    assert all(process.returncode == 0 for process in started)
    return pids


def test_down_ends_everything_and_up_brings_the_rows_back(new_home: NewHome) -> None:
    settings = new_home()
    add_source(ensure_up(settings).database_url, "kept")
    assert embedded.stop(settings) == {"home": str(settings.home), "workers": 0, "redis": True, "postgres": True}
    assert embedded.status(settings)["postgres"] is None
    assert embedded.status(settings)["redis"] is None
    assert embedded.stop(settings)["postgres"] is False
    assert ask(ensure_up(settings).database_url, "SELECT name FROM ops.source") == "kept"


def test_without_a_store_nothing_is_made(tmp_path: Path) -> None:
    settings = Settings(home=None)
    with pytest.raises(StoreError, match="There is no store here"):
        ensure_up(settings)
    found = Settings(home=tmp_path / ".lachesis")
    with pytest.raises(StoreError):
        ensure_up(found)
    assert not (tmp_path / ".lachesis").exists()


def test_a_home_whose_sockets_the_kernel_cannot_name_is_refused(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / ("long" * 30), home_is_named=True)
    with pytest.raises(StoreError, match="bytes"):
        ensure_up(settings)
    assert not (tmp_path / ("long" * 30)).exists()


def test_foreign_files_in_a_home_are_left_alone(new_home: NewHome) -> None:
    settings = new_home()
    assert settings.home is not None
    (settings.home / "postgres").mkdir(parents=True)
    (settings.home / "postgres" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="not ours"):
        ensure_up(settings)
    assert (settings.home / "postgres" / "thesis.txt").read_text() == "mine"


def test_a_version_of_postgres_that_is_not_there_is_refused(new_home: NewHome) -> None:
    with pytest.raises(InputError, match="Expected Postgres 18 or 16"):
        ensure_up(new_home(version=9))


@pytest.mark.long
def test_readers_may_connect_by_tcp_with_the_password_in_the_home(new_home: NewHome) -> None:
    import socket

    settings = new_home()
    store = ensure_up(settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    embedded.listen_on(store, port)
    assert settings.home is not None
    file = settings.home / "reader_url"
    assert file.stat().st_mode & 0o077 == 0
    assert ask(file.read_text().strip(), "SELECT current_user::text") == "lachesis_reader"
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(f"postgresql://lachesis@127.0.0.1:{port}/lachesis", connect_timeout=5)
    assert ask(ensure_up(settings).database_url, "SHOW port") == str(port)
    embedded.listen_on(store, 0)
    assert ask(ensure_up(settings).database_url, "SHOW listen_addresses") == ""
    assert not file.exists()


@as_root
def test_as_root_the_servers_run_as_a_system_user(new_home: NewHome) -> None:
    import psutil

    settings = new_home()
    ensure_up(settings)
    pid = embedded.status(settings)["postgres"]
    assert psutil.Process(pid).username() == home.SYSTEM_USER


@pytest.mark.long
@as_root
def test_where_that_user_cannot_reach_the_home_its_data_are_kept_elsewhere() -> None:
    folder = Path(tempfile.mkdtemp(prefix="lachesis-closed-"))
    settings = Settings(home=folder / "home", home_is_named=True)
    try:
        assert len(start_at_once(settings)) == 1
        assert ask(ensure_up(settings).database_url, "SELECT 1") == 1
        place = home.existing(settings)
        assert place is not None
        assert place.servers.parent == home.SYSTEM_FOLDER
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        embedded.stop(settings)
        shutil.rmtree(place.servers)
        shutil.rmtree(folder)


@as_root
def test_an_ordinary_user_has_a_store_of_their_own() -> None:
    nobody = pwd.getpwnam("nobody")
    if not home.reaches(nobody.pw_uid, nobody.pw_gid, Path(sys.executable).resolve().parent):
        pytest.skip("an ordinary user cannot reach this environment")
    folder = Path(tempfile.mkdtemp(prefix="lachesis-nobody-"))
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    code = "from app.embedded import *; from app.settings import read_settings; s = read_settings(); "
    code += "print(ensure_up(s).embedded, stop(s)['postgres'])"
    environment = {"LACHESIS_HOME": str(folder / "home"), "PATH": os.environ["PATH"]}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=environment,
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stdout.split() == ["True", "True"], done.stderr
    finally:
        shutil.rmtree(folder)


def test_servers_of_somebody_else_are_neither_started_nor_changed(settings: Settings, database_url: str) -> None:
    assert ensure_up(settings).embedded is False
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE ops.alembic_version SET version_num = '0001'")
    with pytest.raises(StoreError, match="lachesis db upgrade") as refused:
        ensure_up(settings)
    assert refused.value.exit_code == 4
    assert ask(database_url, "SELECT version_num FROM ops.alembic_version") == "0001"
    with pytest.raises(StoreError, match="LACHESIS_REDIS_URL"):
        ensure_up(replace(settings, redis_url=None))
    with pytest.raises(StoreError, match="somebody else"):
        embedded.stop(settings)


def test_a_database_that_does_not_answer_is_said_so(settings: Settings) -> None:
    away = replace(settings, database_url="postgresql://lachesis@127.0.0.1:1/lachesis")
    with pytest.raises(StoreError, match="does not answer"):
        ensure_up(away)


def test_settings_reach_workers_through_the_environment(tmp_path: Path) -> None:
    from app.settings import read_settings

    settings = Settings(
        home=tmp_path, home_is_named=True, artifacts=str(tmp_path / "a"), roots={"pacs": tmp_path}, role_prefix="x"
    )
    assert read_settings(embedded.environment(settings), tmp_path) == settings


def test_a_reused_pid_is_told_from_the_process_that_was_noted(tmp_path: Path) -> None:
    file = tmp_path / "jobs.pid"
    processes.note(file)
    assert processes.noted(file) == os.getpid()
    file.write_text(f'{{"pid": {os.getpid()}, "started": {time.time() - 1e6}}}')
    assert processes.noted(file) is None
