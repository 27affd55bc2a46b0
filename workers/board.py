"""The board: what a worker's main process tells the process that does the work, in one page of shared memory.

Forked children inherit it, children by exec get its descriptor. Reading it costs no system call, so that a stage may
ask in its innermost loop; and no lock, so that a stage that holds the interpreter for minutes delays no heartbeat.
"""

from __future__ import annotations

import mmap
import os
import struct

from app.errors import Cancelled, FenceLost, LachesisError, Preempted

_NUMBER = struct.Struct("=q")
_STOP, _CANCEL, _LOST = 0, 8, 24
_SIZE = 40


class Board:
    """One flag for all (stop) and two messages to one attempt each (cancel, lost)."""

    def __init__(self, descriptor: int | None = None) -> None:
        """A new board, or the one behind an inherited descriptor."""
        self.descriptor = os.memfd_create("lachesis-board") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, _SIZE)
        self._page = mmap.mmap(self.descriptor, _SIZE)

    def _read(self, offset: int) -> int:
        return int(_NUMBER.unpack_from(self._page, offset)[0])

    def _write(self, offset: int, value: int) -> None:
        _NUMBER.pack_into(self._page, offset, value)

    def _address(self, offset: int, job_id: int, fence: int) -> None:
        self._write(offset, 0)  # nobody is job 0: readers never see one job's number beside another's fence
        self._write(offset + 8, fence)
        self._write(offset, job_id)

    def _is_for(self, offset: int, job_id: int, fence: int) -> bool:
        return self._read(offset) == job_id and self._read(offset + 8) == fence

    def stop(self) -> None:
        """Every attempt of this worker shall hand its job back."""
        self._write(_STOP, 1)

    @property
    def stopping(self) -> bool:
        """True once the worker stops."""
        return self._read(_STOP) != 0

    def cancel(self, job_id: int, fence: int) -> None:
        """That attempt shall end: the job is to be cancelled."""
        self._address(_CANCEL, job_id, fence)

    def lose(self, job_id: int, fence: int) -> None:
        """That attempt shall end: the job is another's, or the lease may be over."""
        self._address(_LOST, job_id, fence)

    def verdict(self, job_id: int, fence: int) -> type[LachesisError] | None:
        """What that attempt is to raise at its next check."""
        if self._is_for(_LOST, job_id, fence):
            return FenceLost
        if self._is_for(_CANCEL, job_id, fence):
            return Cancelled
        return Preempted if self.stopping else None
