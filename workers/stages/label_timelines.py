"""Timelines of a cohort's persons, read ahead of their use, a stretch of persons at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.store import moment
from app.store.copy import Ahead
from app.store.work import Work
from workers.bridge import Timelines, read_timelines
from workers.bridge.labelling import LabelMembers

if TYPE_CHECKING:
    from sqlalchemy import Connection

STRETCH_EVENTS, STRETCH_MEMBERS = 1_000_000, 4_096
"""Persons are read together until they hold so many events or members."""
DEPTH = 4
"""Stretches that are read while one is in use."""


def stretches(num_events: NDArray[np.int64], num_members: NDArray[np.int64]) -> Iterator[slice]:
    """Stretches of persons of whom these many events and members are known."""
    begin, events, members = 0, 0, 0
    for person, (more_events, more_members) in enumerate(zip(num_events.tolist(), num_members.tolist(), strict=True)):
        events, members = events + more_events, members + more_members
        if events >= STRETCH_EVENTS or members >= STRETCH_MEMBERS:
            yield slice(begin, person + 1)
            begin, events, members = person + 1, 0, 0
    if begin < len(num_events):
        yield slice(begin, len(num_events))


class ReadAhead:
    """Stretches of persons with their timelines, which a thread reads; to be closed."""

    def __init__(
        self,
        opened: AbstractContextManager[Connection],
        person: NDArray[np.int64],
        num_events: NDArray[np.int64],
        num_members: NDArray[np.int64],
    ) -> None:
        def read() -> Iterator[tuple[slice, Timelines]]:
            with opened as connection:
                for part in stretches(num_events, num_members):
                    yield part, read_timelines(connection, person[part])

        self.person = person
        self._coming = Ahead(read(), DEPTH)

    @classmethod
    def of(
        cls, connection: Connection, members: LabelMembers, person: NDArray[np.int64], num_events: NDArray[np.int64]
    ) -> ReadAhead:
        """Of the persons (ascending) of some members, by a connection that nobody else uses meanwhile."""
        first = np.searchsorted(members.person, person)
        return cls(nullcontext(connection), person, num_events, np.diff(first, append=len(members.person)))

    def of_members(self, members: LabelMembers) -> Iterator[tuple[slice, Timelines]]:
        """Stretches of members (by person), no person cut in two, with their persons' timelines."""
        first = np.append(np.searchsorted(members.person, self.person), len(members.person))
        for part, timelines in self._coming:
            yield slice(int(first[part.start]), int(first[part.stop])), timelines

    def close(self) -> None:
        """Read no more."""
        self._coming.close()


class Early:
    """Reads timelines in the snapshot of another transaction while that still asks for all the rest."""

    def __init__(self, work: Work, reading: Connection) -> None:
        self.work = work
        self.moment = moment.export(reading)
        self.reader: ReadAhead | None = None

    def begin(self, person: NDArray[np.int64], num_events: NDArray[np.int64], num_members: NDArray[np.int64]) -> None:
        """Begin to read the timelines of persons (ascending)."""
        opened = moment.see(self.work.connect(), self.moment)
        self.reader = ReadAhead(opened, person, num_events, num_members)

    def __enter__(self) -> Early:
        return self

    def __exit__(self, *_: object) -> None:
        if self.reader is not None:
            self.reader.close()
