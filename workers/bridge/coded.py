"""Rows of tasks that concepts and source codes alone tell, as arrays.

Shape suffix: R = row of omop.event.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.store import coded_outcomes as store
from ml.labelling import ConceptTasks
from workers.bridge import binary_cursor

if TYPE_CHECKING:
    from sqlalchemy import Connection

BLOCK_BYTES = 16 << 20
"""Rows are handed out once they take so much."""

_ROW = np.dtype([("time", ">i8"), ("concept", ">i4"), ("source", ">i4")])


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTasks:
    """Which tasks a row's concept and its source concept mean."""

    concepts: ConceptTasks
    sources: ConceptTasks

    def of_rows(self, rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(row, task) of some rows (R,), ascending, each once though both of a row's concepts may be the task's."""
        found = [_tasks(self.concepts, rows["concept"]), _tasks(self.sources, rows["source"])]
        row, task = (np.concatenate([part[n] for part in found]) for n in range(2))
        key = np.sort((row << 15) + task)
        key = key[np.diff(key, prepend=-1) != 0]
        return key >> 15, key & 32_767


def _tasks(tasks: ConceptTasks, concept: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, task) of the rows whose concept means any."""
    if not len(tasks.concept):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    concept = concept.astype(np.int32)
    place = np.minimum(np.searchsorted(tasks.concept, concept), len(tasks.concept) - 1)
    row = np.flatnonzero(tasks.concept[place] == concept)
    begin = tasks.ptr[place[row]]
    count = tasks.ptr[place[row] + 1] - begin
    entry = np.repeat(begin - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
    return np.repeat(row, count), tasks.task[entry].astype(np.int64)


def read_codes(connection: Connection, definitions: store.Definitions) -> NDArray[np.int64]:
    """(pairs, 3): position, concept and 1 where it is a source concept; each pair once."""
    rows = binary_cursor(connection).execute(store.CODES, store.parameters(definitions)).fetchall()
    return np.array(rows, np.int64).reshape(-1, 3)


def read_rows(
    connection: Connection, statement: str, definitions: store.Definitions, values: dict[str, Any]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """(owner, coded time, position) of rows, some owners together, in the order of the statement.

    Args:
        connection: whose transaction it is.
        statement: gives (owner, rows as `store.PACKED`) of rows that meet `store.IS_ASKED`.
        definitions: the tasks.
        values: further parameters of the statement.
    """
    position, concept, is_source = read_codes(connection, definitions).T
    tasks = CodeTasks(
        concepts=ConceptTasks.of_pairs(concept[is_source == 0], position[is_source == 0]),
        sources=ConceptTasks.of_pairs(concept[is_source == 1], position[is_source == 1]),
    )
    values = values | {"concepts": tasks.concepts.concept.tolist(), "written": tasks.sources.concept.tolist()}
    held, size = list[tuple[int, bytes]](), 0
    for owner, packed in binary_cursor(connection).stream(statement, values):
        held.append((owner, packed))
        size += len(packed)
        if size >= BLOCK_BYTES:
            yield _block(tasks, held)
            held, size = [], 0
    yield _block(tasks, held)


def _block(
    tasks: CodeTasks, held: list[tuple[int, bytes]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    rows = np.frombuffer(b"".join(packed for _, packed in held), _ROW)
    counts = [len(packed) // _ROW.itemsize for _, packed in held]
    owner = np.repeat(np.array([owner for owner, _ in held], np.int64), counts)
    row, task = tasks.of_rows(rows)
    return owner[row], rows["time"].astype(np.int64)[row], task
