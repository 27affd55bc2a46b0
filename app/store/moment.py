"""Several connections that see one moment of the store, so that what is large is read by all of them at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from sqlalchemy import Connection

MOST_CONNECTIONS = 4
"""That read at once: each is a process of the server."""

Part = TypeVar("Part")
Found = TypeVar("Found")


def export(connection: Connection) -> str:
    """Name the moment that a transaction sees; others may see it, too, until the transaction ends."""
    return str(connection.exec_driver_sql("SELECT pg_export_snapshot()").scalar_one())


@contextmanager
def see(opened: AbstractContextManager[Connection], moment: str) -> Iterator[Connection]:
    """A connection that sees a moment which another transaction named, for reading alone."""
    with opened as connection:
        apart = connection.execution_options(isolation_level="REPEATABLE READ")
        apart.exec_driver_sql(f"SET TRANSACTION SNAPSHOT '{moment}'")
        yield apart
        apart.rollback()


def wrote(connection: Connection) -> bool:
    """True where a transaction has written: nobody else sees that."""
    return bool(connection.exec_driver_sql("SELECT pg_current_xact_id_if_assigned() IS NOT NULL").scalar_one())


def read_parts(connection: Connection, read: Callable[[Connection, Part], Found], parts: Sequence[Part]) -> list[Found]:
    """What `read` finds of each part, in their order, at the moment that a connection's transaction sees.

    Several connections read at once, a thread each; the transaction's own where it has written or there is one part.
    """
    if len(parts) < 2 or wrote(connection):
        return [read(connection, part) for part in parts]
    moment, free = export(connection), SimpleQueue["Connection"]()

    def read_one(part: Part) -> Found:
        mine = free.get()
        try:
            return read(mine, part)
        finally:
            free.put(mine)

    number = min(MOST_CONNECTIONS, len(os.sched_getaffinity(0)), len(parts))
    with ExitStack() as stack:
        for _ in range(number):
            free.put(stack.enter_context(see(connection.engine.connect(), moment)))
        with ThreadPoolExecutor(number) as pool:
            return list(pool.map(read_one, parts))
