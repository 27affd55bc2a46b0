"""Everything that Lachesis refuses on purpose; a class's exit code is what the command line returns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LachesisError(Exception):
    """Something went wrong that Lachesis foresaw."""

    exit_code = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class InputError(LachesisError):
    """What was given cannot be used; the message says what was expected, what came and what to do."""

    exit_code = 2


class UnknownName(InputError):
    """No such thing of that kind; the nearest known name is suggested."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(set(known))
        near = difflib.get_close_matches(name, names, n=1)
        if near:
            hint = f" Did you mean {near[0]!r}?"
        elif names:
            hint = f" Known: {', '.join(names[:20])}."
        else:
            hint = f" There is no {kind} yet."
        super().__init__(f"No {kind} named {name!r}.{hint}")


class StoreError(LachesisError):
    """No store, server or worker answers, or its schema is of another version."""

    exit_code = 4


class ArtifactsAway(StoreError, OSError):
    """The object store that holds artifacts does not answer; it may later."""


class Cancelled(LachesisError):
    """The job was cancelled."""

    exit_code = 3


class SourceLost(LachesisError):
    """The database that is loaded from stopped answering."""


class FenceLost(LachesisError):
    """Another attempt holds this job now, so this one may write nothing more."""


class Preempted(LachesisError):
    """The worker is asked to stop, so the job goes back to its queue."""


class RankEnded(LachesisError):
    """A process that shared a training ended before its time; another attempt goes on from the last stop."""


class Waiting(LachesisError):
    """The job has shared its work out among jobs of its own and gives its worker back until they have ended."""


class JobFailed(LachesisError):
    """A job ended without success; carries the exit code that the job left."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
