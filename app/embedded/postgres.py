"""The embedded Postgres: its data folder, its start and its end."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from app.embedded.binaries import postgres_programs
from app.embedded.home import Place
from app.embedded.processes import end, in_folder, is_server
from app.errors import StoreError

OWNER = "lachesis"
"""Database and role that own everything in an embedded store."""
START_SECONDS = 60.0

SETTINGS = """\
# Written by Lachesis when this store was made; yours to change (restart with `lachesis down` and `lachesis up`).
shared_buffers = 512MB
maintenance_work_mem = 512MB
work_mem = 32MB
max_wal_size = 8GB
checkpoint_timeout = 15min
effective_io_concurrency = 64
random_page_cost = 1.1
max_connections = 200
jit = off
timezone = 'UTC'
log_timezone = 'UTC'
# Messages of failed statements may quote rows of patients: the log keeps none of them.
log_min_messages = log
log_error_verbosity = terse
log_min_error_statement = panic
log_parameter_max_length_on_error = 0
"""


def database_url(place: Place, *, role: str = OWNER, database: str = OWNER) -> str:
    """URL of a database through the socket, for libpq and SQLAlchemy alike."""
    port = listening_port(place)
    return f"postgresql://{quote(role)}@/{quote(database)}?host={quote(str(place.sock))}" + (
        f"&port={port}" if port else ""
    )


def listening_port(place: Place) -> int:
    """TCP port on this machine that Postgres listens on besides its socket; 0 for none."""
    try:
        return int((place.postgres / "port").read_text())
    except (FileNotFoundError, ValueError):
        return 0


def listen_on(place: Place, port: int) -> None:
    """Listen on 127.0.0.1:`port` from the next start on; 0 for the socket alone."""
    path = place.postgres / "port"
    path.unlink(missing_ok=True)
    if port:
        _append(place, path, f"{port}\n")


def major_version(place: Place) -> int:
    """The major version that wrote the data folder."""
    return int((place.postgres / "data" / "PG_VERSION").read_text().split(".")[0])


def running(place: Place) -> int | None:
    """Pid of this store's postmaster, or None."""
    pid = _noted_pid(place.postgres / "data")
    return pid if pid is not None and is_server(pid, ("postgres",), place.postgres / "data") else None


def initialise(place: Place, major: int) -> None:
    """Make the data folder; a stop halfway leaves none, so that the next call starts afresh."""
    data, new = place.postgres / "data", place.postgres / "new"
    if data.exists():
        return
    programs = postgres_programs(place, major)
    _run(place, ["rm", "-rf", str(new)], "The unfinished data folder could not be removed")
    locale = ["--locale-provider=builtin", "--locale=C.UTF-8"] if major >= 17 else ["--no-locale"]
    command = [str(programs / "initdb"), "-D", str(new), "-U", OWNER, "-E", "UTF8", *locale]
    _run(place, [*command, "--auth-local=trust", "--auth-host=scram-sha-256"], "Postgres could not make its folder")
    _append(place, new / "lachesis.conf", SETTINGS + _shared_memory())
    _append(place, new / "postgresql.conf", "\ninclude_if_exists = 'lachesis.conf'\n")
    new.rename(data)


def start(place: Place) -> None:
    """Start Postgres and wait until it answers; an old postmaster that is still dying is waited for.

    Raises:
        StoreError: it does not start within 60 s; the message ends with the log's last line.
    """
    data = place.postgres / "data"
    programs = postgres_programs(place, major_version(place))
    deadline = time.monotonic() + START_SECONDS
    while True:
        _forget_stale(data, place.uid)
        if running(place) is not None and _answers(place, programs):
            return
        if running(place) is not None and not _socket(place).exists():  # cleaned up: nobody can reach it any more
            stop(place)
        options = shlex.join(_options(place))
        command = [str(programs / "pg_ctl"), "-D", str(data), "-s", "-w", "-t", "60"]
        log = place.postgres / "log"
        begun = subprocess.run(
            [*command, "-l", str(log), "-o", options, "start"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            **place.as_server,
        )
        if begun.returncode == 0:
            return
        if time.monotonic() > deadline:
            raise StoreError(f"Postgres does not start in {data}: {_last_line(log)} The log is {log}.")
        time.sleep(0.3)


def stop(place: Place) -> bool:
    """End Postgres in order (open sessions are ended, nothing is lost); False where it did not run."""
    if running(place) is None:
        return False
    programs = postgres_programs(place, major_version(place))
    command = [str(programs / "pg_ctl"), "-D", str(place.postgres / "data"), "-s", "-w", "-t", "60", "-m", "fast"]
    _run(place, [*command, "stop"], "Postgres does not stop")
    return True


def create_database(place: Place) -> None:
    """Make the store's database where it is absent."""
    import psycopg

    with psycopg.connect(database_url(place, database="postgres"), autocommit=True, connect_timeout=10) as connection:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (OWNER,)).fetchone():
            connection.execute(f"CREATE DATABASE {OWNER}")


def _shared_memory() -> str:
    """Where parallel workers share memory: a container's /dev/shm of 64 MB is too small to build an index in."""
    try:
        shm = os.statvfs("/dev/shm")  # noqa: S108
        roomy = shm.f_blocks * shm.f_frsize >= 1 << 30
    except OSError:
        roomy = False
    return "" if roomy else "dynamic_shared_memory_type = mmap\n"


def _options(place: Place) -> list[str]:
    port = listening_port(place)
    host = "127.0.0.1" if port else ""
    return [
        *("-c", f"unix_socket_directories={place.sock}", "-c", "unix_socket_permissions=0700"),
        *("-c", f"listen_addresses={host}", "-c", f"port={port or 5432}"),
    ]


def _socket(place: Place) -> Path:
    return place.sock / f".s.PGSQL.{listening_port(place) or 5432}"


def _noted_pid(data: Path) -> int | None:
    try:
        return int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None


def _forget_stale(data: Path, uid: int) -> None:
    """Clear what a killed postmaster left: sessions that still compute, and a pid file that names nobody.

    Postgres would wait for those sessions for as long as they run, and take a reused pid, or a killed postmaster that
    nobody reaps, for a living one. SIGQUIT is what a postmaster sends its sessions when one of them crashes.
    """
    pid = _noted_pid(data)
    if pid is not None and is_server(pid, ("postgres",), data):
        return
    for orphan in in_folder(data, ("postgres",), uid):
        end(orphan, signal.SIGQUIT, seconds=5.0)
    (data / "postmaster.pid").unlink(missing_ok=True)


def _answers(place: Place, programs: Path) -> bool:
    command = [str(programs / "pg_isready"), "-q", "-h", str(place.sock), "-t", "5"]
    return subprocess.run(command, check=False, **place.as_server).returncode == 0


def _run(place: Place, command: list[str], failure: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **place.as_server
    )
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise StoreError(f"{failure}: {lines[-1] if lines else f'exit status {done.returncode}'}.")


def _append(place: Place, path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
    if place.uid != os.geteuid():
        os.chown(path, place.uid, place.gid)


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it left no log."
    return lines[-1] if lines else "it left no log."
