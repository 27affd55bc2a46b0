"""How many train persons have each concept or a descendant of it, from packed timelines, some persons at a time.

Memory does not grow with the events: a stretch is read, reduced to (person, concept) and added up. Of the ancestors
only rows of concepts that somebody has are asked for, so that a whole vocabulary costs no more than the part in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from app.store import timelines
from app.store.session import raw

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from sqlalchemy import Connection

CHUNK_EVENTS, CHUNK_PERSONS = 2_000_000, 4_096
"""Persons are read together until they hold so many events."""

SCANS = """
SELECT person_id, floor(extract(epoch FROM index_time))::int8, floor(extract(epoch FROM follow_up_end))::int8
FROM label.cohort_member WHERE cohort_id = %s AND split = 'train' AND eligible ORDER BY 1, 2
"""

# Eight bytes a row, in one value: a row each takes ten times longer to read. Concept for concept through the index:
# OFFSET 0 keeps the planner from reading a whole vocabulary's 79 M rows instead.
ANCESTORS = """
SELECT string_agg(int4send(c.id) || int4send(a.ancestor_concept_id), '')
FROM unnest(%s::int[]) c(id) CROSS JOIN LATERAL (
    SELECT a.ancestor_concept_id FROM omop.concept_ancestor a
    WHERE a.descendant_concept_id = c.id AND a.ancestor_concept_id <> 0 {more} OFFSET 0) a
"""
# Persons who have a source concept that stands for none of its own, and those who have it within follow-up of a scan.
SOURCE_CONCEPTS = """
WITH scan AS (
    SELECT person_id, date_trunc('second', index_time) AS index_time, date_trunc('second', follow_up_end) AS ends
    FROM label.cohort_member WHERE cohort_id = %(cohort_id)s AND split = 'train' AND eligible
), had AS (
    SELECT e.source_concept_id AS concept_id, e.person_id,
           bool_or(date_trunc('second', e.time) > s.index_time AND date_trunc('second', e.time) <= s.ends) AS after
    FROM omop.event e JOIN scan s USING (person_id)
    WHERE e.source_concept_id <> ALL (%(standard)s::int[]) AND e.source_concept_id <> 0 GROUP BY 1, 2
)
SELECT concept_id, count(*), count(*) FILTER (WHERE after)
FROM had JOIN omop.concept USING (concept_id) GROUP BY 1 ORDER BY 1
"""
MAPS_TO = """
SELECT string_agg(int4send(r.concept_id_1) || int4send(r.concept_id_2), '') FROM omop.concept_relationship r
WHERE r.concept_id_1 = ANY (%s::int[]) AND r.relationship_id = 'Maps to' AND r.invalid_reason IS NULL
  AND r.concept_id_2 <> 0 AND r.concept_id_2 <> r.concept_id_1
"""
PARENTS = ANCESTORS.format(more="AND a.min_levels_of_separation = 1")
ANCESTORS = ANCESTORS.format(more="")


@dataclass(frozen=True, slots=True)
class Scans:
    """The scans of the train persons."""

    person: NDArray[np.int64]
    """(persons,) ascending, each once."""
    row: NDArray[np.int64]
    """(scans,) whose scan it is, ascending."""
    index: NDArray[np.int64]
    end: NDArray[np.int64]
    """(scans,) end of follow-up, seconds since 1970."""


def count(
    connection: Connection, cohort_id: int, check: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[tuple[int, int, int, int]], int]:
    """Counts for `entropy.weigh` over the train persons of a cohort with an eligible scan, and how many they are.

    A count is (concept, persons who ever have it or a descendant, those who have it after an index, persons of its
    rarest parent). Ancestors of real vocabularies are not always transitive (a combined drug lacks the classes of its
    ingredients): nobody may have a parent of a concept that some have. It then counts 0, and the concept is as certain
    as under any parent that is rarer than itself.

    Args:
        connection: whose transaction it is; one snapshot where it is repeatable read.
        cohort_id: the cohort.
        check: called with (persons done, persons) after each stretch; may raise to stop.
    """
    scans = read_scans(connection, cohort_id)
    ancestors, total = Ancestors(connection), Tally()
    for part in stretches(timelines.num_events(connection, scans.person)):
        total.add(*stretch_counts(connection, scans, part, ancestors))
        check(part.stop, len(scans.person))
    concept, persons, events = total.result()
    base = base_persons(connection, concept, persons, len(scans.person))
    columns = [column.tolist() for column in (concept, persons, events, base)]
    return list(zip(*columns, strict=True)), len(scans.person)


def source_counts(
    connection: Connection, cohort_id: int, standard: Sequence[tuple[int, int, int, int]], everybody: int
) -> list[tuple[int, int, int, int]]:
    """The same of source concepts, whose parents are the concepts that they map to.

    Args:
        connection: whose transaction it is.
        cohort_id: the cohort.
        standard: what `count` gave; a concept in it is no source concept, though rows name it as such.
        everybody: how many train persons there are.
    """
    persons = {concept: n for concept, n, _, _ in standard}
    values = {"cohort_id": cohort_id, "standard": list(persons)}
    rows = raw(connection).cursor(binary=True).execute(SOURCE_CONCEPTS, values).fetchall()
    parents: dict[int, list[int]] = {}
    for source, concept in read_pairs(connection, MAPS_TO, np.array([row[0] for row in rows], np.int32)).tolist():
        parents.setdefault(source, []).append(persons.get(concept, 0))
    return [(concept, n, after, min(parents.get(concept, [everybody]))) for concept, n, after in rows]


def read_scans(connection: Connection, cohort_id: int) -> Scans:
    """Eligible scans of the train persons of a cohort."""
    rows = raw(connection).cursor(binary=True).execute(SCANS, (cohort_id,)).fetchall()
    table = np.array(rows, np.int64).reshape(-1, 3)
    person, row = np.unique(table[:, 0], return_inverse=True)
    return Scans(person=person, row=row, index=table[:, 1], end=table[:, 2])


def stretches(num_events: NDArray[np.int64]) -> Iterator[slice]:
    """Persons to be read together."""
    begin, held = 0, 0
    for person, events in enumerate(num_events.tolist()):
        held += events
        if held >= CHUNK_EVENTS or person + 1 - begin >= CHUNK_PERSONS:
            yield slice(begin, person + 1)
            begin, held = person + 1, 0
    if begin < len(num_events):
        yield slice(begin, len(num_events))


def stretch_counts(
    connection: Connection, scans: Scans, part: slice, ancestors: Ancestors
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(concept, persons with it or a descendant, those after an index) among some persons; each concept once."""
    ptr, times, concepts = timelines.read(connection, scans.person[part])
    person = np.repeat(np.arange(part.stop - part.start), np.diff(ptr))
    after = np.zeros(len(times), np.bool_)
    seconds = times >> 1
    for index, end in windows(scans, part):
        after |= (seconds > index[person]) & (seconds <= end[person])
    key = once(person[concepts != 0], concepts[concepts != 0], after[concepts != 0])
    person, concepts, after = key >> 33, (key >> 1 & 0xFFFFFFFF).astype(np.uint32).astype(np.int32), key & 1 == 1
    rows, up = ancestors.of(concepts)
    key = once(person[rows], up, after[rows])
    concept = (key >> 1 & 0xFFFFFFFF).astype(np.uint32).astype(np.int32).astype(np.int64)
    return group(concept, np.ones(len(key), np.int64), key & 1)


def windows(scans: Scans, part: slice) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Index and end (persons of the part,) of each one's first scan, then second, …; never where there is none."""
    lo, hi = np.searchsorted(scans.row, [part.start, part.stop])
    row = scans.row[lo:hi] - part.start
    begins = np.searchsorted(row, np.arange(part.stop - part.start))
    order = np.arange(hi - lo) - begins[row]
    for n in range(int(order.max(initial=-1)) + 1):
        index = np.full(part.stop - part.start, np.iinfo(np.int64).max)
        end = index.copy()
        nth = order == n
        index[row[nth]], end[row[nth]] = scans.index[lo:hi][nth], scans.end[lo:hi][nth]
        yield index, end


def once(person: NDArray[np.int64], concept: NDArray[np.int32], after: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Each (person, concept) once, as person << 33 | concept << 1 | whether any of its rows is after an index."""
    key = np.sort(person << 33 | concept.astype(np.uint32).astype(np.int64) << 1 | after)
    last = np.ones(len(key), np.bool_)
    last[:-1] = key[1:] >> 1 != key[:-1] >> 1
    return key[last]


def group(
    concept: NDArray[np.int64], persons: NDArray[np.int64], events: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Sums by concept."""
    unique, place = np.unique(concept, return_inverse=True)
    sums = [np.bincount(place, column, len(unique)).astype(np.int64) for column in (persons, events)]
    return unique, sums[0], sums[1]


class Tally:
    """Sums by concept over stretches."""

    def __init__(self) -> None:
        self.parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
        self.held = 0

    def add(self, concept: NDArray[np.int64], persons: NDArray[np.int64], events: NDArray[np.int64]) -> None:
        """Add the counts of some persons."""
        self.parts.append((concept, persons, events))
        self.held += len(concept)
        if self.held > 5_000_000:
            self.parts = [self.result()]
            self.held = len(self.parts[0][0])

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(concept, persons, events), concepts ascending."""
        empty = np.zeros(0, np.int64)
        columns = zip(*(self.parts or [(empty, empty, empty)]), strict=True)
        return group(*(np.concatenate(column) for column in columns))


class Ancestors:
    """Ancestors of the concepts met so far, each one its own; asked of the store when a concept is first met."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.known = np.zeros(0, np.int32)
        self.ptr = np.zeros(1, np.int64)
        self.up = np.zeros(0, np.int32)

    def of(self, concepts: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """(row in `concepts`, ancestor or the concept itself), each pair once."""
        if len(self.known):
            place = np.minimum(np.searchsorted(self.known, concepts), len(self.known) - 1)
            missing = concepts[self.known[place] != concepts]
        else:
            missing = concepts
        if len(missing):
            self._learn(np.unique(missing))
        found = np.searchsorted(self.known, concepts)
        begin, count = self.ptr[found], self.ptr[found + 1] - self.ptr[found]
        rows = np.repeat(np.arange(len(concepts)), count)
        entry = np.repeat(begin - np.cumsum(count) + count, count) + np.arange(int(count.sum()))
        return rows, self.up[entry]

    def _learn(self, new: NDArray[np.int32]) -> None:
        pairs = read_pairs(self.connection, ANCESTORS, new)
        old = np.repeat(self.known, np.diff(self.ptr))
        down = np.concatenate([old, pairs[:, 0], new]).astype(np.int64)
        up = np.concatenate([self.up, pairs[:, 1], new]).astype(np.uint32).astype(np.int64)
        key = np.unique(down << 32 | up)
        self.known, counts = np.unique((key >> 32).astype(np.int32), return_counts=True)
        self.ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.up = (key & 0xFFFFFFFF).astype(np.uint32).astype(np.int32)


def read_pairs(connection: Connection, statement: str, concepts: NDArray[np.int32]) -> NDArray[np.int32]:
    """(descendant, ancestor) rows of some descendants."""
    row = raw(connection).cursor(binary=True).execute(statement, (concepts.tolist(),)).fetchone()
    packed = row[0] if row is not None and row[0] is not None else b""
    return np.frombuffer(packed, ">i4").astype(np.int32).reshape(-1, 2)


def base_persons(
    connection: Connection, concept: NDArray[np.int64], persons: NDArray[np.int64], everybody: int
) -> NDArray[np.int64]:
    """(concepts,) persons of each one's rarest parent, everybody where it has none; `concept` ascends."""
    base = np.full(len(concept), everybody)
    pairs = read_pairs(connection, PARENTS, concept.astype(np.int32)).astype(np.int64)
    if len(pairs):
        place = np.searchsorted(concept, pairs[:, 1])
        held = concept[np.minimum(place, len(concept) - 1)] == pairs[:, 1]
        of_parent = np.where(held, persons[np.minimum(place, len(concept) - 1)], 0)
        np.minimum.at(base, np.searchsorted(concept, pairs[:, 0]), of_parent)
    return base
