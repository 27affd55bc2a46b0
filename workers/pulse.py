"""The pulse of a worker: a thread of its main process that keeps leases, sees cancels, notes deaths, and polls.

It lives in the main process because a stage may hold its own interpreter for minutes. What it learns it puts on the
board; everything it does is one short statement on a connection of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.embedded.processes import start_time
from app.store import attempts, jobs
from app.store.session import make_engine
from ml.registry import encoders
from workers import holder as holders
from workers.attempt import passes
from workers.holder import Holder
from workers.stages import STAGES
from workers.supervisor import Child

if TYPE_CHECKING:
    from sqlalchemy import Connection

UNHEARD_SECONDS = 2.0
"""A job that is due for so long was not rung for, or nobody heard the bell."""
PRUNE_SECONDS = 3600.0


def boot_seconds() -> float:
    """Seconds since boot, with those the machine slept: Python's monotonic clock leaves them out."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Pulse(threading.Thread):
    """Runs until `end`."""

    def __init__(self, holder: Holder, *, serves: bool) -> None:
        """`serves`: also claim jobs that nobody was rung for."""
        super().__init__(name="pulse", daemon=True)
        self.holder, self.serves = holder, serves
        self._ended = threading.Event()
        self._engine = make_engine(holder.store.database_url, application_name="lachesis:pulse")
        self._connection: Connection | None = None
        self._held: set[tuple[int, int]] = set()
        self._missing: set[tuple[int, int, int]] = set()
        self._child: Child | None = None
        self._heard_at = boot_seconds()
        self._next_heartbeat = self._next_reap = self._next_prune = 0.0

    def register(self) -> None:
        """Enter the worker; raises where the database is away."""
        with self._engine.begin() as connection:
            self._register(connection)

    def end(self) -> None:
        """Stop, after the job of this thread (if any) is handed back; says so in the registry."""
        self._ended.set()
        self.join()
        if self._child is not None:
            self.holder.board.stop()
            while not self._child.attend():
                time.sleep(self.holder.clocks.poll / 10)
        self._drop()
        with contextlib.suppress(DBAPIError), self._engine.begin() as connection:
            attempts.stop_worker(connection, self.holder.worker_id)

    def run(self) -> None:
        """Beat at every poll; trouble with the database passes, anything else is told and survived."""
        while not self._ended.wait(self.holder.clocks.poll if self._child is None else self.holder.clocks.poll / 4):
            try:
                self._beat(self._connect())
            except DBAPIError as error:
                self._drop()
                if not passes(error):
                    traceback.print_exc()
            except Exception:
                traceback.print_exc()
            self._fence_itself()

    def _beat(self, connection: Connection) -> None:
        now = boot_seconds()
        if now >= self._next_heartbeat:
            self._register(connection)
            jobs.heartbeat(connection, self.holder.worker_id, self.holder.clocks.lease)
            self._heard_at, self._next_heartbeat = now, now + self.holder.clocks.heartbeat
        held = jobs.held(connection, self.holder.worker_id)
        self._tell(connection, held)
        self._note_dead(connection, held)
        if now >= self._next_reap:
            self._next_reap = now + self.holder.clocks.lease / 12
            for job_id, fence, _ in jobs.reap(connection):
                self._end_sessions(connection, job_id, fence)
            if self.holder.store.embedded:
                self._bury_neighbours(connection)
        if now >= self._next_prune:
            self._next_prune = now + PRUNE_SECONDS
            attempts.prune_workers(connection)
        if self._child is not None and self._child.attend():
            self._child = None
        elif self.serves and not held and self._child is None and not self.holder.board.stopping:
            self._fill_in(connection)

    def _tell(self, connection: Connection, held: list[jobs.Held]) -> None:
        """Put cancels and lost jobs on the board; end the sessions of a stage that does not look at it."""
        now_held = {(job.job_id, job.fence) for job in held}
        for job_id, fence in self._held - now_held:
            self.holder.board.lose(job_id, fence)
        self._held = now_held
        for job in held:
            if job.cancel_seconds is not None:
                self.holder.board.cancel(job.job_id, job.fence)
                if job.cancel_seconds > self.holder.clocks.grace:
                    self._end_sessions(connection, job.job_id, job.fence)

    def _note_dead(self, connection: Connection, held: list[jobs.Held]) -> None:
        """End attempts whose process is gone; seen twice, so that its supervisor, who knows more, may speak first."""
        missing = {
            (job.job_id, job.fence, job.pid)
            for job in held
            if job.host == self.holder.host and start_time(job.pid) is None
        }
        for job_id, fence, pid in missing & self._missing:
            jobs.crash(connection, job_id, fence, message=f"The job's process {pid} ended without a word.")
            self._end_sessions(connection, job_id, fence)
        self._missing = missing

    def _bury_neighbours(self, connection: Connection) -> None:
        """Of an embedded store all workers are this machine's: one whose process is gone needs no lease to be over."""
        for worker_id, pid in attempts.neighbours(connection, self.holder.worker_id, self.holder.host):
            if start_time(pid) is None:
                for job in jobs.held(connection, worker_id):
                    jobs.crash(connection, job.job_id, job.fence, message=f"Its worker (process {pid}) was killed.")
                    self._end_sessions(connection, job.job_id, job.fence)
                attempts.stop_worker(connection, worker_id)

    def _fill_in(self, connection: Connection) -> None:
        """Run a job that waits although this worker is idle: Redis is away, or lost the nudge, or nobody rang."""
        waited = jobs.due_seconds(connection, self.holder.queues, STAGES)
        if waited is not None and waited > min(UNHEARD_SECONDS, self.holder.clocks.poll):
            claim = self.holder.claim()
            if claim is not None:
                self._held.add((claim.job_id, claim.fence))
                self._child = Child(self.holder, claim)

    def _fence_itself(self) -> None:
        """Without a heartbeat for two thirds of the lease the jobs may soon be another's: stop working on them."""
        if boot_seconds() - self._heard_at > self.holder.clocks.lease * 2 / 3:
            for job_id, fence in self._held:
                self.holder.board.lose(job_id, fence)

    def _register(self, connection: Connection) -> None:
        holder = self.holder
        attempts.register_worker(
            connection,
            holder.worker_id,
            host=holder.host,
            pid=holder.pid,
            queues=holder.queues,
            version=holder.code_version,
            device=holders.device(),
            encoders=sorted(encoders()),
            devices=holder.devices,
        )

    def _end_sessions(self, connection: Connection, job_id: int, fence: int) -> None:
        with contextlib.suppress(DBAPIError):  # a role may lack the right to; the sessions then end by themselves
            jobs.end_sessions(connection, job_id, fence)

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            self._connection.execute(text("SET statement_timeout = '10s'"))
            self._connection.execute(text("SET lock_timeout = '5s'"))
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(DBAPIError):
                self._connection.close()
            self._connection = None
