"""Files among the artifacts and the rows that name them: neither may be without the other.

A file is written first and named by a row afterwards; a row goes first and its file afterwards. Files are named by
their content, so that what one job takes away may be what another has just found written already. Both therefore hold
a lock on the file's key: who names a file looks whether it is still there, in the transaction of its row, and who takes
one away looks whether a row names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from app.store import locks
from app.store.places import place

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from app.settings import Settings

NAMED = """
SELECT path FROM model.checkpoint
UNION SELECT path FROM model.embedding_set
UNION SELECT path FROM model.report
UNION SELECT f.value ->> 'path' FROM ops.vocabulary_release v, jsonb_each(v.files) f WHERE v.is_current
"""
"""Keys of all files that are in use; earlier releases of the vocabulary stay in the books alone."""
KINDS = ("checkpoints", "embeddings", "reports", "vocabulary")
"""First parts of keys; what else lies at the place is not ours to take away."""


def hold(connection: Connection, settings: Settings, file: Path, key: str, sha256: str) -> None:
    """Have a published file stay for a row of this transaction; it is written again where it was taken away since.

    Args:
        connection: the transaction that writes the row.
        settings: say where files lie.
        file: the one that was published.
        key: what it was published as.
        sha256: its digest.

    Raises:
        OSError: it could not be written again.
        StoreError: there is no place for it.
    """
    _lock(connection, key)
    here = place(settings)
    if here.size(key) is None:
        here.put(file, key, sha256)


def named(connection: Connection) -> set[str]:
    """Keys of all files that rows name."""
    from sqlalchemy import text

    return set(connection.execute(text(NAMED)).scalars())


def remove(connection: Connection, settings: Settings, keys: Iterable[str]) -> list[str]:
    """Delete published files that no row names; those that were there.

    Args:
        connection: without a transaction; each file gets one of its own, so that no lock is held for long.
        settings: say where files lie.
        keys: of files whose rows are gone.
    """
    from sqlalchemy import text

    here, gone = place(settings), []
    for key in keys:
        with connection.begin():
            _lock(connection, key)
            statement = text(f"SELECT EXISTS (SELECT FROM ({NAMED}) n (path) WHERE n.path = :key)")
            if not connection.execute(statement, {"key": key}).scalar_one() and here.remove(key):
                gone.append(key)
    return gone


def _lock(connection: Connection, key: str) -> None:
    locks.hold(connection, f"artifact {key}")
