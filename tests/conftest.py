"""Real servers for tests: one embedded store a session, one fresh database a test."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from sqlalchemy import Engine

from app.embedded import Store, ensure_up, stop
from app.errors import StoreError
from app.settings import Settings
from app.store.session import make_engine
from app.store.work import InlineWork

TEMPLATE = "lachesis_template"
PASSING = ("fsync = off", "synchronous_commit = off", "full_page_writes = off", "max_wal_size = '512MB'")
"""Of the session's Postgres: nothing here outlives the session, and the log should not fill a folder in memory."""
ROOM_BYTES = 6 << 30
_counter = itertools.count(1)


def new_folder(prefix: str) -> Path:
    """A new temporary folder for servers, in memory where there is room: a database a test is mostly new files."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and min(shutil.disk_usage(memory).free, psutil.virtual_memory().available) > ROOM_BYTES
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=memory if roomy and os.access(memory, os.W_OK) else None))
    folder.chmod(0o711)
    return folder


@pytest.fixture(scope="session")
def store() -> Iterator[Store]:
    """An embedded store with real Postgres and Redis in a temporary home; gone at the end."""
    folder = new_folder("lachesis-tests-")
    settings = Settings(
        home=folder / "home", home_is_named=True, postgres_version=int(os.environ.get("LACHESIS_POSTGRES") or 18)
    )
    try:
        made = ensure_up(settings)
        with psycopg.connect(made.database_url, autocommit=True) as connection:
            for setting in PASSING:
                connection.execute(f"ALTER SYSTEM SET {setting}")
            connection.execute("SELECT pg_reload_conf()")
        yield made
        stop(settings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def template(store: Store) -> str:
    """Name of a migrated, empty database that is copied for each test."""
    url = store.database_url.replace("/lachesis?", "/postgres?", 1)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {TEMPLATE} TEMPLATE lachesis")
    return TEMPLATE


@pytest.fixture
def database_url(store: Store, template: str) -> Iterator[str]:
    """URL of a fresh database with the schema and no rows."""
    name = f"test_{os.getpid()}_{next(_counter)}"
    admin = store.database_url.replace("/lachesis?", "/postgres?", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY = file_copy")
    yield store.database_url.replace("/lachesis?", f"/{name}?", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on the fresh database."""
    made = make_engine(database_url)
    yield made
    made.dispose()


@pytest.fixture
def redis_url(store: Store) -> Iterator[str]:
    """URL of the session's Redis, a numbered database that is empty before the test."""
    import redis

    url = store.redis_url.replace("db=0", "db=1")
    with redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Settings as they are with servers of somebody else: both URLs, and a home for files."""
    home = tmp_path / "home"
    home.mkdir()
    return Settings(home=home, home_is_named=True, database_url=database_url, redis_url=redis_url)


@pytest.fixture
def work(engine: Engine, settings: Settings, tmp_path: Path) -> Callable[..., InlineWork]:
    """A factory of work for a stage: `work(name="a", path="b")`, without a job row."""

    def make(**args: Any) -> InlineWork:
        return InlineWork(engine, args=args, folder=tmp_path / "work", settings=replace(settings))

    return make


@pytest.fixture
def new_home() -> Iterator[Callable[..., Settings]]:
    """A factory of settings that name a home which is not there yet; its servers are ended afterwards."""
    folder = new_folder("lachesis-home-")
    made: list[Settings] = []

    def make(name: str = "home", *, version: int = 18) -> Settings:
        made.append(Settings(home=folder / name, home_is_named=True, postgres_version=version))
        return made[-1]

    yield make
    for settings in made:
        try:
            stop(settings)
        except StoreError:
            continue
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real extracts that LACHESIS_TEST_DATA names."""
    named = os.environ.get("LACHESIS_TEST_DATA")
    if not named:
        pytest.skip("set LACHESIS_TEST_DATA to the folder of real extracts to run this test")
    return Path(named)
