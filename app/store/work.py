"""What a stage may ask of the job that runs it: arguments, a folder, progress and fenced transactions."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from app.settings import Settings


class Work(Protocol):
    """One attempt at one job, as its stage sees it."""

    job_id: int | None
    fence: int
    args: dict[str, Any]
    settings: Settings

    @property
    def folder(self) -> Path:
        """`runs/<job>/<fence>/`, made when first asked for; the only place a stage writes files."""
        ...

    def progress(self, done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        """Say how far the work is; cheap to call often. Raises Cancelled or FenceLost like `check`."""
        ...

    def check(self) -> None:
        """Raise Cancelled when a cancel was asked for, FenceLost when another attempt holds the job, Preempted when the
        worker is to stop. Costs less than a microsecond: call it in every loop."""
        ...

    def transaction(self) -> AbstractContextManager[Connection]:
        """One transaction that commits only while this attempt still holds the job (write first, lock last)."""
        ...

    def connect(self) -> AbstractContextManager[Connection]:
        """A connection for reading and for staging; committed only by the caller."""
        ...

    def started_at_step(self, step: int) -> None:
        """Say at which step a resumed training goes on (0 where it starts afresh)."""
        ...

    def ring(self, queue: str, job_ids: Sequence[int]) -> None:
        """Ring for workers of a queue; jobs are found without it, some seconds later."""
        ...

    def log(self, message: str) -> None:
        """One line for `lachesis logs`; never a person id, a path of a patient or a source value."""
        ...


class InlineWork:
    """Work without a job row: for tests and for calling a stage from Python. No fence is checked."""

    job_id: int | None = None
    fence: int = 0

    def __init__(self, engine: Engine, *, args: dict[str, Any], folder: Path, settings: Settings) -> None:
        self.engine, self.args, self._folder, self.settings = engine, args, folder, settings

    @property
    def folder(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def progress(self, done: int, total: int | None = None, unit: str = "", note: str = "") -> None:
        """Progress of work without a job is nobody's concern."""

    def check(self) -> None:
        """Nothing can cancel it."""

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            yield connection

    def started_at_step(self, step: int) -> None:
        """Nobody asks."""

    def ring(self, queue: str, job_ids: Sequence[int]) -> None:
        """Nobody waits for it."""

    def log(self, message: str) -> None:
        print(message, file=sys.stderr)
