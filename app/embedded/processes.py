"""Processes of a home: is a noted process still the one that was noted, and how it is ended."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

WAIT_SECONDS = 20.0
"""How long a server may take to end before it is killed."""
WORKER_SECONDS = 45.0
"""The same for workers, whose jobs may write a checkpoint first (they give them 30 s)."""


def start_time(pid: int) -> float | None:
    """When process `pid` started (seconds since 1970), or None where it is gone or a zombie.

    A zombie counts as gone: in a container whose first process reaps nothing, a killed server stays one for ever.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def is_server(pid: int, names: tuple[str, ...], folder: Path) -> bool:
    """True if `pid` lives, bears one of `names` and works in `folder`: a reused pid does not."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE or not process.name().startswith(names):
            return False
        return os.path.realpath(process.cwd()) == os.path.realpath(folder)
    except (psutil.Error, OSError):
        return False


def in_folder(folder: Path, names: tuple[str, ...], uid: int) -> list[int]:
    """Pids of this user's live servers that work in `folder`, oldest first; asked of the kernel, not of a pid file."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if (
                process.name().startswith(names)
                and process.uids().real == uid
                and is_server(process.pid, names, folder)
            ):
                found.append((process.create_time(), process.pid))
    return [pid for _, pid in sorted(found)]


def with_argument(argument: str, names: tuple[str, ...], uid: int) -> list[int]:
    """Pids of this user's servers whose command line names `argument`: left over from a removed home."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name().startswith(names) and process.uids().real == uid and argument in process.cmdline():
                found.append(process.pid)
    return found


def end(pid: int, first: signal.Signals = signal.SIGTERM, *, seconds: float = WAIT_SECONDS) -> bool:
    """Ask process `pid` to end, kill it after `seconds`; False where it was gone already.

    Raises:
        PermissionError: it belongs to another user.
    """
    started = start_time(pid)
    if started is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, first)
        if not _gone(pid, started, seconds):
            os.kill(pid, signal.SIGKILL)
            _gone(pid, started, 5.0)
    return True


def _gone(pid: int, started: float, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if start_time(pid) != started:
            return True
        time.sleep(0.05)
    return False


def note(path: Path, pid: int | None = None) -> None:
    """Write a pid file: {"pid", "started"}; whoever reads it later can tell a reused pid by its start time."""
    pid = pid or os.getpid()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"pid": pid, "started": start_time(pid)}))
    new.replace(path)


def noted(path: Path) -> int | None:
    """The pid in a pid file, if that process still lives; else None.

    Reads what `note` writes, and a bare number, whose process must not be younger than the file.
    """
    try:
        content = json.loads(path.read_text())
        pid, started = (content["pid"], content["started"]) if isinstance(content, dict) else (int(content), None)
        now = start_time(pid)
        written = path.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if now is None:
        return None
    same = abs(now - started) < 1.0 if started is not None else now <= written + 2.0
    return pid if same else None


def live_workers(home: Path) -> dict[str, int]:
    """Pids of the live workers noted in HOME/workers, by name."""
    pids = {path.stem: noted(path) for path in sorted((home / "workers").glob("*.pid"))}
    return {name: pid for name, pid in pids.items() if pid is not None}


def stop_workers(home: Path) -> int:
    """End the workers noted in HOME/workers and remove their notes; how many there were."""
    workers = live_workers(home)
    started = {pid: start_time(pid) for pid in workers.values()}
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + WORKER_SECONDS
    for pid, began in started.items():
        if began is not None and not _gone(pid, began, deadline - time.monotonic()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _gone(pid, began, 5.0)
    for path in (home / "workers").glob("*.pid"):
        path.unlink(missing_ok=True)
    return len(workers)
