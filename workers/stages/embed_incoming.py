"""Vectors to Postgres while embedding runs: a block a transaction, seen by nobody until all of them are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from app.store import incoming
from app.store.incoming import ROWS, Place
from app.store.work import Work

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

Take = Callable[[Sequence[str]], "NDArray[np.float32]"]
"""Contents → their (B, D) standardised vectors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The scans of an embedding that can be read, by ascending image_occurrence_id."""

    images: NDArray[np.int64]
    embedded: list[str]
    """Digest of the content that is embedded for each."""
    own: list[str]
    """Digest of its own content: another one where volumes were permuted among persons."""

    @property
    def is_permuted(self) -> bool:
        return self.embedded != self.own

    def first(self) -> dict[str, int]:
        """Distinct contents → the first scan of each, in order."""
        found: dict[str, int] = {}
        for image, content in zip(self.images.tolist(), self.embedded, strict=True):
            found.setdefault(content, image)
        return found


class Incoming:
    """Where the vectors of one embedding wait."""

    def __init__(self, work: Work, place: Place, order: Order, *, anew: bool) -> None:
        """
        Args:
            work: each block is written only while its attempt holds the job.
            place: checkpoint and cohort.
            order: the scans.
            anew: also scans whose content this checkpoint has embedded before are written.
        """
        self.work, self.place, self.order = work, place, order
        self.anew = anew
        self._rows_of: dict[str, list[int]] = {}
        for row, content in enumerate(order.embedded):
            self._rows_of.setdefault(content, []).append(row)
        self._blocks: list[tuple[list[int], NDArray[np.float32]]] = []
        self._waiting = 0

    def begin(self, there: Callable[[str], bool]) -> None:
        """Keep of what a stopped attempt wrote only vectors whose exact numbers are `there`."""
        keep = [row for row, content in enumerate(self.order.embedded) if there(content) and not self.order.is_permuted]
        with self.work.transaction() as connection:
            incoming.keep_only(connection, self.place, self.order.images[keep], [self.order.own[row] for row in keep])

    def add(self, contents: Sequence[str], vectors_BD: NDArray[np.float32]) -> None:
        """Standardised vectors of contents, for all scans that have them; written when they make a block."""
        rows = [(row, n) for n, content in enumerate(contents) for row in self._rows_of[content]]
        self._blocks.append(([row for row, _ in rows], vectors_BD[[n for _, n in rows]]))
        self._waiting += len(rows)
        if self._waiting >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what waits for its block to be full."""
        if self._blocks:
            rows = [row for some, _ in self._blocks for row in some]
            vectors = np.concatenate([vectors_BD for _, vectors_BD in self._blocks])
            self._blocks, self._waiting = [], 0
            with self.work.transaction() as connection:
                self._write(connection, rows, vectors)

    def fill(self, take: Take) -> None:
        """Write what is neither here nor seen already, a block at a time."""
        with self.work.connect() as connection:
            left = self._missing(connection)
        for start in range(0, len(left), ROWS):
            self.work.progress(start, len(left), "scan", "writing embeddings")
            rows = left[start : start + ROWS]
            vectors = take([self.order.embedded[row] for row in rows])
            with self.work.transaction() as connection:
                self._write(connection, rows, vectors)

    def publish(self, connection: Connection, take: Take, width: int) -> int:
        """Let all of them be seen in the caller's transaction, those added that were lost meanwhile; how many.

        Another attempt at the same scans may have published what waited here; after a crash of Postgres nothing does.
        """
        incoming.lock(connection, self.place)
        left = self._missing(connection)
        for start in range(0, len(left), ROWS):
            rows = left[start : start + ROWS]
            self._write(connection, rows, take([self.order.embedded[row] for row in rows]))
        return incoming.move(connection, self.place, width)

    def _missing(self, connection: Connection) -> list[int]:
        """Rows of the order."""
        images = incoming.missing(connection, self.place, self.order.images, self.order.own, anew=self.anew)
        rows: list[int] = np.searchsorted(self.order.images, np.array(images, np.int64)).tolist()
        return rows

    def _write(self, connection: Connection, rows: list[int], vectors_BD: NDArray[np.float32]) -> None:
        own = [self.order.own[row] for row in rows]
        incoming.write_block(connection, self.place, self.order.images[rows], own, vectors_BD)
