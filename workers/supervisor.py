"""A child process a job: started in a session of its own, told to end through the board, its death noted.

The child asks the kernel to be killed when its parent dies and then looks whether the parent still is the one that
started it, so that no training outlives its worker.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sqlalchemy.exc import DBAPIError

from app.embedded import environment
from app.store import attempts, jobs
from app.store.runs import runs_folder
from app.store.session import make_engine
from workers.devices import environment_of
from workers.holder import Holder

LOOK_SECONDS = 0.1
TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1


def entry() -> list[str]:
    """The command that starts this program again: a child comes from the same entry as its worker."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = "workers" if spec is None else spec.name.removesuffix(".__main__")
    return [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", name]


class Child:
    """The process of one attempt."""

    def __init__(self, holder: Holder, claim: jobs.Claim) -> None:
        """Start it; its stdout and stderr go to runs/<job>/<fence>/log."""
        self.holder, self.claim = holder, claim
        folder = runs_folder(holder.store.settings) / str(claim.job_id) / str(claim.fence)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log = folder / "log"
        which = [str(claim.job_id), str(claim.fence), "--board", str(holder.board.descriptor)]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("LACHESIS_")}
        with _private(self.log) as log:
            self.process = subprocess.Popen(
                [*entry(), "attempt", *which, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**kept, **environment(holder.store.settings), **environment_of(claim.devices)},
                pass_fds=(holder.board.descriptor,),
                start_new_session=True,
            )
        self._told_at: float | None = None

    def attend(self, *, stopped: bool = False) -> bool:
        """Look after it: True once it has ended and its end is noted. `stopped`: hand its job back, too."""
        if self.process.poll() is not None:
            self._note_end()
            return True
        if stopped and self._told_at is None:
            self.process.terminate()
        if stopped or self.holder.board.verdict(self.claim.job_id, self.claim.fence) is not None:
            self._told_at = self._told_at or time.monotonic()
            if time.monotonic() - self._told_at > self.holder.clocks.grace:
                self.kill()
        return False

    def kill(self) -> None:
        """End it and whatever it started, now."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _note_end(self) -> None:
        """An attempt that still holds its job after its process ended did so without a word."""
        code = self.process.returncode
        self.kill()  # its helpers, where it died before them
        job_id, fence = self.claim.job_id, self.claim.fence
        engine = make_engine(self.holder.store.database_url, application_name="lachesis:supervisor")
        with suppress(DBAPIError), engine.begin() as connection:  # the database is away: the lease will end
            if jobs.is_held(connection, job_id, fence):
                attempts.write_log(connection, job_id, fence, tail(self.log), "error")
                values = {"exit_code": code} if code >= 0 else {"signal": -code}
                jobs.crash(connection, job_id, fence, message=how_it_ended(code), **values)


def how_it_ended(code: int) -> str:
    """A return code as one sentence."""
    if code < 0:
        return f"The job's process was ended by {signal.Signals(-code).name}; `lachesis logs` may tell more."
    return f"The job's process ended with code {code} and without a word; `lachesis logs` may tell more."


QUOTING = ("DETAIL:", "CONTEXT:", "LINE ", "[parameters:")
"""How lines of a database's message begin that may quote a row."""


def tail(path: Path) -> list[str]:
    """The last lines of a log file, but those that may quote a row."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
        return [line[:300] for line in lines[-TAIL_LINES:] if line.strip() and not line.startswith(QUOTING)]
    return []


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies; end at once where it is dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _private(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
