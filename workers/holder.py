"""Who holds jobs: a registered worker, its clocks and its board."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version

from sqlalchemy import Engine

from app.embedded import Store
from app.embedded.processes import start_time
from app.store import jobs
from app.store.session import make_engine
from workers.board import Board
from workers.devices import driver_facts
from workers.stages import STAGES


@dataclass(frozen=True, kw_only=True, slots=True)
class Clocks:
    """How often and how long, in seconds."""

    lease: float = 60.0
    """A job is free for others so long after the last heartbeat."""
    heartbeat: float = 10.0
    poll: float = 2.0
    """Between two looks at the table, which also bounds how late a cancel is seen."""
    grace: float = 30.0
    """For an attempt to end by itself once it is told to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """One worker, shared by its processes."""

    store: Store
    queues: tuple[str, ...]
    clocks: Clocks = Clocks()
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    worker_id: str = field(
        default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{start_time(os.getpid()):.2f}"
    )
    board: Board = field(default_factory=Board)
    devices: tuple[str, ...] = ()
    """Those of its host that its jobs may use (workers/devices.py)."""

    @property
    def code_version(self) -> str:
        return version("lachesis")

    def claim(self, job_id: int | None = None, queues: Sequence[str] | None = None) -> jobs.Claim | None:
        """Claim one job for this worker in a transaction of its own: that one, or the best of the queues."""
        with claim_engine(self.store.database_url).begin() as connection:
            return jobs.claim(
                connection,
                worker_id=self.worker_id,
                host=self.host,
                pid=os.getpid(),
                version=self.code_version,
                lease=self.clocks.lease,
                queues=self.queues if queues is None else queues,
                job_id=job_id,
                kinds=STAGES,
            )


@lru_cache(maxsize=2)
def claim_engine(url: str) -> Engine:
    """Made once, for the first connection asks the server much; it keeps no connection, so that forks may share it."""
    return make_engine(url, application_name="lachesis:claim")


def device() -> str | None:
    """Name of the first GPU, or cpu; asked of the driver's files, for this process must not load CUDA."""
    return next((facts["Model"] for facts in driver_facts() if "Model" in facts), "cpu")
