"""Servers of one's own: `ensure_up` gives every command a store that answers, and starts what is needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.embedded import home as homes
from app.embedded import postgres, processes, redis
from app.errors import StoreError
from app.settings import Settings
from app.store import schema_version

__all__ = [
    "Store",
    "connection_url",
    "ensure_up",
    "ensure_workers",
    "listen_on",
    "psql_command",
    "require_own",
    "status",
    "stop",
    "was_stopped",
]

READER_URL_FILE = "reader_url"
"""In the home, for its owner alone: the URL with which readers connect by TCP."""

STOPPED_FILE = "stopped"
"""In the home: `lachesis down` ended its servers, and no command has started them since."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """Servers that answer."""

    settings: Settings
    """Its home is the embedded store's, also where `ensure_up` has just made it."""
    database_url: str
    redis_url: str
    reader_url: str | None
    """Login that may only read, for `lachesis sql`."""
    embedded: bool


def ensure_up(settings: Settings, *, create: bool = False) -> Store:
    """The store that is meant here, started and of this code's version.

    Args:
        settings: external URLs mean servers of somebody else: nothing is started and nothing changed there.
        create: make a store where there is none (`up`, `demo`); a home named by LACHESIS_HOME is made anyway.

    Raises:
        StoreError: there is no store, a server does not answer, or its schema is of another version.
        InputError: settings name a version of Postgres that is not there.
    """
    if settings.database_url is not None:
        return _external(settings, settings.database_url)
    place = homes.existing(settings)
    if place is not None:
        store = _quick(settings, place)
        if store is not None:
            return store
    if place is None and not (create or settings.home_is_named):
        raise homes.no_store(settings)
    return _start(settings)


def connection_url(settings: Settings) -> str:
    """URL of the database that is meant here, whatever its version; embedded servers are started.

    Raises:
        StoreError: there is no store here.
    """
    if settings.database_url is not None:
        return settings.database_url
    place = homes.existing(settings)
    if place is None:
        raise homes.no_store(settings)
    with homes.lock(place.home):
        _start_servers(place)
    return postgres.database_url(place)


def stop(settings: Settings) -> dict[str, Any]:
    """End the workers and servers of the embedded store; {"home", "workers", "redis", "postgres"} that ran.

    Raises:
        StoreError: there is no embedded store here.
    """
    place = _embedded_place(settings)
    with homes.lock(place.home):
        if not was_stopped(settings):
            (place.home / STOPPED_FILE).touch()
        workers = processes.stop_workers(place.home)
        return {
            "home": str(place.home),
            "workers": workers,
            "redis": redis.stop(place),
            "postgres": postgres.stop(place),
        }


def was_stopped(settings: Settings) -> bool:
    """True from `stop` to the next start: whoever only watches must not start servers that somebody ended."""
    return settings.home is not None and (settings.home / STOPPED_FILE).exists()


def status(settings: Settings) -> dict[str, Any]:
    """What runs, without starting anything.

    Raises:
        StoreError: there is no store here.
    """
    if settings.database_url is not None:
        version = schema_version.revision_of(settings.database_url)
        return {"home": None, "embedded": False, "schema": version, "schema_needed": schema_version.NEEDED}
    place = _embedded_place(settings)
    pid = postgres.running(place)
    port = postgres.listening_port(place)
    return {
        "home": str(place.home),
        "embedded": True,
        "servers": str(place.servers),
        "postgres": pid,
        "postgres_version": postgres.major_version(place),
        "listens": f"127.0.0.1:{port}" if port else None,
        "reader_url_file": str(place.home / READER_URL_FILE) if port else None,
        "redis": redis.running(place) if redis.answers(place) else None,
        "workers": processes.live_workers(place.home),
        "schema": schema_version.revision_of(postgres.database_url(place)) if pid else None,
        "schema_needed": schema_version.NEEDED,
    }


def listen_on(store: Store, port: int) -> None:
    """Let readers connect to 127.0.0.1:`port` with the password in HOME/reader_url; 0 ends that. Restarts Postgres.

    Raises:
        StoreError: workers run, whose sessions a restart would cut; or the port is taken.
    """
    place = _embedded_place(store.settings)
    with homes.lock(place.home):
        before = postgres.listening_port(place)
        if before == port:
            return
        if processes.live_workers(place.home):
            raise StoreError("Workers run, and Postgres must start again to listen; run `lachesis down` first.")
        postgres.stop(place)
        postgres.listen_on(place, port)
        try:
            _start_servers(place)
        except StoreError:
            postgres.listen_on(place, before)
            raise
        _set_reader_password(store.settings, place, port)


def psql_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The psql that comes with the servers, on the store as its owner; and what its environment must hold beside ours.

    A password goes there, since every user of a machine may read the arguments of its processes.
    """
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    from app.embedded.binaries import postgres_programs

    try:
        given = conninfo_to_dict(connection_url(settings).replace("postgresql+psycopg://", "postgresql://", 1))
    except ProgrammingError:  # its message repeats the URL
        raise StoreError("The URL of the database cannot be read; check LACHESIS_DATABASE_URL.") from None
    password = given.pop("password", None)
    place = homes.existing(settings)
    version = settings.postgres_version if place is None else postgres.major_version(place)
    command = [str(postgres_programs(None, version) / "psql"), make_conninfo("", **given)]
    return command, {} if password is None else {"PGPASSWORD": str(password)}


def ensure_workers(store: Store) -> list[str]:
    """Start the embedded store's workers where none serves a queue; names of those started.

    External stores have workers of their own: nothing is started for them.
    """
    if not store.embedded:
        return []
    from app.embedded.workers import start_missing

    place = _embedded_place(store.settings)
    homes.refuse_root(place)
    with homes.lock(place.home):
        return start_missing(place, store.database_url, environment(store.settings))


def require_own(store: Store) -> None:
    """Refuse to queue jobs in a store whose owner could not read what they make. Raises StoreError."""
    if store.embedded:
        homes.refuse_root(_embedded_place(store.settings))


def environment(settings: Settings) -> Mapping[str, str]:
    """The settings as the environment of a worker; `read_settings` gives them back."""
    named = {
        "LACHESIS_HOME": settings.home and str(settings.home),
        "LACHESIS_DATABASE_URL": settings.database_url,
        "LACHESIS_REDIS_URL": settings.redis_url,
        "LACHESIS_READER_URL": settings.reader_url,
        "LACHESIS_ARTIFACTS": _absolute(settings.artifacts),
        "LACHESIS_CACHE": settings.cache and str(settings.cache),
        "LACHESIS_CACHE_SIZE": settings.cache_bytes and f"{settings.cache_bytes}B",
        "LACHESIS_POSTGRES": str(settings.postgres_version),
        "LACHESIS_ROLE_PREFIX": settings.role_prefix,
        "LACHESIS_ENCODERS": settings.encoders,
        "LACHESIS_DEVICES": settings.devices,
        **{f"LACHESIS_ROOT_{name.upper()}": str(path.absolute()) for name, path in settings.roots.items()},
    }
    return {name: value for name, value in named.items() if value}


def _absolute(url: str | None) -> str | None:
    return url if url is None or "://" in url else str(Path(url).absolute())


def _external(settings: Settings, database_url: str) -> Store:
    if settings.redis_url is None:
        raise StoreError("Expected LACHESIS_REDIS_URL beside LACHESIS_DATABASE_URL, found none; set both or neither.")
    schema_version.require(schema_version.revision_of(database_url))
    return Store(
        settings=settings,
        database_url=database_url,
        redis_url=settings.redis_url,
        reader_url=settings.reader_url,
        embedded=False,
    )


def _store(settings: Settings, place: homes.Place) -> Store:
    return Store(
        settings=replace(settings, home=place.home),
        database_url=postgres.database_url(place),
        redis_url=settings.redis_url or redis.redis_url(place),
        reader_url=settings.reader_url or postgres.database_url(place, role=f"{settings.role_prefix}_reader"),
        embedded=True,
    )


def _quick(settings: Settings, place: homes.Place) -> Store | None:
    """The store where both servers answer and the schema is this code's, found without the lock; else None."""
    if not redis.answers(place):
        return None
    try:
        found = schema_version.revision_of(postgres.database_url(place))
    except StoreError:
        return None
    return _store(settings, place) if found == schema_version.NEEDED else None


def _start(settings: Settings) -> Store:
    """Make, start and upgrade under the home's lock; whoever waited for it finds the work done."""
    found = homes.existing(settings)
    home = homes.prepare(settings) if found is None else found.home
    with homes.lock(home):
        found = homes.existing(replace(settings, home=home))
        place = found or homes.create(home)
        if found is None:
            postgres.initialise(place, settings.postgres_version)
        _start_servers(place)
        _upgrade(settings, place)
    if found is None:
        homes.say(f"made a store in {home}.")
    return _store(settings, place)


def _start_servers(place: homes.Place) -> None:
    homes.secure(place)
    postgres.start(place)
    redis.start(place)
    (place.home / STOPPED_FILE).unlink(missing_ok=True)


def _upgrade(settings: Settings, place: homes.Place) -> None:
    import psycopg

    postgres.create_database(place)
    url = postgres.database_url(place)
    if schema_version.revision_of(url) != schema_version.NEEDED:
        schema_version.upgrade(url, role_prefix=settings.role_prefix)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'ALTER ROLE "{settings.role_prefix}_reader" LOGIN')


def _set_reader_password(settings: Settings, place: homes.Place, port: int) -> None:
    import secrets

    import psycopg

    path = place.home / READER_URL_FILE
    path.unlink(missing_ok=True)
    if not port:
        return
    password = secrets.token_urlsafe(24)
    role = f"{settings.role_prefix}_reader"
    with psycopg.connect(postgres.database_url(place), autocommit=True) as connection:
        hashed = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
        connection.execute(f"ALTER ROLE \"{role}\" PASSWORD '{hashed}'")
    path.touch(mode=0o600)
    path.write_text(f"postgresql://{role}:{password}@127.0.0.1:{port}/{postgres.OWNER}\n")


def _embedded_place(settings: Settings) -> homes.Place:
    if settings.database_url is not None:
        raise StoreError(
            "LACHESIS_DATABASE_URL names servers of somebody else; Lachesis starts and stops only its own."
        )
    place = homes.existing(settings)
    if place is None:
        raise homes.no_store(settings)
    return place
