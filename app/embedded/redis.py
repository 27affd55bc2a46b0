"""The embedded Redis: a doorbell for jobs, whose rows are in Postgres."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from app.embedded.binaries import redis_program
from app.embedded.home import Place
from app.embedded.processes import end, in_folder
from app.errors import StoreError

NAMES = ("redis-server", "valkey-server")
START_SECONDS = 60.0


def redis_url(place: Place) -> str:
    """URL of the store's Redis, for redis.from_url."""
    return f"unix://{quote(str(_socket(place)))}?db=0"


def answers(place: Place, seconds: float = 2.0) -> bool:
    """True if Redis answers a PING on this store's socket."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(str(_socket(place)))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def running(place: Place) -> int | None:
    """Pid of this store's Redis, or None."""
    return next(iter(in_folder(place.redis, NAMES, place.uid)), None)


def start(place: Place) -> None:
    """Start Redis and wait until it answers.

    Raises:
        StoreError: it does not answer within 60 s.
    """
    if answers(place):
        return
    deadline = time.monotonic() + START_SECONDS
    while not answers(place):
        if time.monotonic() > deadline:
            raise StoreError(f"Redis does not start; its log is {place.redis / 'log'}.")
        if running(place) is None:
            _launch(place)
        elif not _socket(place).exists():  # a clean-up of the socket folder: nobody can reach it any more
            stop(place)
        time.sleep(0.05)


def stop(place: Place) -> bool:
    """End Redis in order; False where it did not run."""
    ended = [end(pid) for pid in in_folder(place.redis, NAMES, place.uid)]
    return any(ended)


def _launch(place: Place) -> None:
    command = [
        *(str(redis_program(place)), "--port", "0", "--daemonize", "yes", "--dir", str(place.redis)),
        *("--unixsocket", str(_socket(place)), "--unixsocketperm", "700"),
        *("--pidfile", str(place.redis / "redis.pid"), "--logfile", str(place.redis / "log")),
        *("--maxmemory-policy", "noeviction", "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
    ]
    quiet = subprocess.DEVNULL
    subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, check=False, **place.as_server)


def _socket(place: Place) -> Path:
    return place.sock / "redis.sock"
