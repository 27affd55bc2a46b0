"""A load that kills its own process at a named point, as kill -9, a crash or a power cut would.

`python -m tests.app.loading.crashing_child URL FOLDER POINT ARGS`: the job's arguments are JSON; a point of `none` lets
the load end; `file_size` limits how much its process may write into one file, as a full disk would.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from app.errors import LachesisError
from app.loading import omop, publish
from app.settings import Settings
from app.store.session import make_engine
from app.store.work import InlineWork


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(module: Any, name: str) -> Callable[[], None]:
    return lambda: setattr(module, name, die)


def die_after(module: Any, name: str) -> Callable[[], None]:
    whole = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        whole(*args, **kwargs)
        die()

    return lambda: setattr(module, name, wrapped)


def in_copy(table: str) -> Callable[[], None]:
    """Die with half of a table's rows on their way."""
    whole = publish.copy_in

    def wrapped(connection: Any, name: str, columns: Any, chunks: Iterator[bytes], **kwargs: Any) -> Any:
        def cut() -> Iterator[bytes]:
            for chunk in chunks:
                yield chunk[: len(chunk) // 2]
                die()

        return whole(connection, name, columns, cut() if name.startswith(table) else chunks, **kwargs)

    return lambda: setattr(publish, "copy_in", wrapped)


class CrashingWork(InlineWork):
    """Dies right after its transaction is committed."""

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        with super().transaction() as connection:
            yield connection
        die()


POINTS: dict[str, Callable[[], None]] = {
    "before files are decoded": die_before(omop, "open_decoder"),
    "before rows are judged": die_before(omop, "judge"),
    "before publishing": die_before(omop, "publish"),
    "in the copy of events": in_copy("omop.event_"),
    "in the copy of timelines": in_copy("omop.timeline"),
    "before the books are closed": die_before(publish, "supersede"),
    "before the vocabulary is completed": die_before(publish, "complete"),
    "while partitions are attached": die_before(publish, "_swap"),
    "after publishing, before commit": die_after(omop, "publish"),
}
"""Where a load dies with nothing committed."""
AFTER_COMMIT = "after commit"


def main(url: str, folder: str, point: str, args: str) -> int:
    settings = Settings(home=Path(folder) / "home")
    work = CrashingWork if point == AFTER_COMMIT else InlineWork
    if point in POINTS:
        POINTS[point]()
    given = json.loads(args)
    if limit := given.pop("file_size", None):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        print(
            json.dumps(omop.load(work(make_engine(url), args=given, folder=Path(folder) / "work", settings=settings)))
        )
    except LachesisError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
