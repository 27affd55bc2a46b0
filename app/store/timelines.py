"""Timelines: each person's events packed and sorted by (time, concept), as the label engine reads them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from app.store.copy import HEADER, TRAILER

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy import Connection

COLUMNS = ("person_id", "num_events", "times", "concepts", "digest")
CHUNK = 4 << 20

Batch = tuple["NDArray[np.int64]", "NDArray[np.int64]", "NDArray[np.int32]"]
"""Persons, times (seconds since 1970-01-01 00:00, times 2, plus 1 where date_only) and concepts, each (N,)."""


def digest(times: bytes, concepts: bytes) -> bytes:
    """What tells two timelines apart: the first 16 bytes of sha256 over both."""
    hashed = hashlib.sha256(times)
    hashed.update(concepts)
    return hashed.digest()[:16]


def whole_persons(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches cut between persons: the last person of each waits for the next one."""
    held: list[Batch] = []
    for batch in batches:
        persons = batch[0]
        if not len(persons):
            continue
        cut = int(np.searchsorted(persons, persons[-1]))  # sorted: where the last person begins
        if cut:
            yield _joined([*held, _part(batch, slice(None, cut))])
            held = []
        elif held and held[-1][0][-1] != persons[0]:
            yield _joined(held)
            held = []
        held.append(_part(batch, slice(cut, None)))
    if held:
        yield _joined(held)


def _part(batch: Batch, rows: slice) -> Batch:
    return batch[0][rows], batch[1][rows], batch[2][rows]


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    persons, times, concepts = zip(*batches, strict=True)
    return np.concatenate(persons), np.concatenate(times), np.concatenate(concepts)


def pack(batches: Iterable[Batch]) -> Iterator[bytes]:
    """Rows of omop.timeline for a binary COPY, from batches sorted by (person, time, concept)."""
    rows: list[bytes] = []
    size = 0
    for persons, times, concepts in whole_persons(batches):
        edges = np.concatenate([[0], np.flatnonzero(persons[1:] != persons[:-1]) + 1, [len(persons)]])
        time_bytes = np.ascontiguousarray(times, "<i8").view(np.uint8)
        concept_bytes = np.ascontiguousarray(concepts, "<i4").view(np.uint8)
        who = persons[edges[:-1]].tolist()
        edges_list = edges.tolist()
        for i, person in enumerate(who):
            start, end = edges_list[i], edges_list[i + 1]
            row = _row(person, time_bytes[start * 8 : end * 8].tobytes(), concept_bytes[start * 4 : end * 4].tobytes())
            rows.append(row)
            size += len(row)
            if size >= CHUNK:
                yield b"".join(rows)
                rows, size = [], 0
    if rows:
        yield b"".join(rows)


def _row(person: int, times: bytes, concepts: bytes) -> bytes:
    head = struct.pack(">hiqiii", len(COLUMNS), 8, person, 4, len(concepts) // 4, len(times))
    return b"".join(
        (
            head,
            times,
            struct.pack(">i", len(concepts)),
            concepts,
            struct.pack(">i", 16),
            digest(times, concepts),
        )
    )


_ROW_HEAD = struct.Struct(">2x4xqi")
"""Of a binary COPY row: number of fields, the person's length and id, the length of the times."""

READ = "SELECT person_id, times, concepts FROM omop.timeline WHERE person_id = ANY(%s) ORDER BY person_id"


def read(
    connection: Connection, persons: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Packed events of `persons` (ascending, each once), one after the other.

    Returns:
        where each person's events begin (persons + 1,), coded times and concepts (events,).
    """
    from app.store.session import raw

    person, times, concepts = list[int](), list[memoryview](), list[memoryview]()
    statement = f"COPY ({READ}) TO STDOUT (FORMAT binary)"
    with raw(connection).cursor().copy(statement, (persons.tolist(),)) as copy:
        for message in copy:  # a row each, the header before the first, a trailer at the end
            row = memoryview(message)[0 if person else len(HEADER) :]
            if len(row) <= len(TRAILER):
                continue
            who, size = _ROW_HEAD.unpack_from(row)
            person.append(who)
            times.append(row[_ROW_HEAD.size : _ROW_HEAD.size + size])
            concepts.append(row[_ROW_HEAD.size + size + 4 :])
    counts = np.zeros(len(persons), np.int64)
    counts[np.searchsorted(persons, person)] = [len(part) // 4 for part in concepts]
    return (
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.frombuffer(b"".join(times), "<i8").astype(np.int64, copy=False),
        np.frombuffer(b"".join(concepts), "<i4").astype(np.int32, copy=False),
    )


NUM_EVENTS = "SELECT person_id, num_events FROM omop.timeline WHERE person_id = ANY(%s) ORDER BY person_id"


def num_events(connection: Connection, persons: NDArray[np.int64]) -> NDArray[np.int64]:
    """(persons,) how many events each of `persons` (ascending, each once) has."""
    from app.store.session import raw

    counts = np.zeros(len(persons), np.int64)
    rows = raw(connection).cursor(binary=True).execute(NUM_EVENTS, (persons.tolist(),)).fetchall()
    if rows:
        counts[np.searchsorted(persons, np.array([row[0] for row in rows], np.int64))] = [row[1] for row in rows]
    return counts


def delete_timelines(connection: Connection, load_ids: list[int]) -> None:
    """Drop the timelines of the persons that some loads brought."""
    from sqlalchemy import text

    connection.execute(
        text(
            "DELETE FROM omop.timeline t USING omop.person p "
            "WHERE p.person_id = t.person_id AND p.load_id = ANY (:load_ids)"
        ),
        {"load_ids": load_ids},
    )
