"""A store of the paper's shape: 19,402 persons, 225 M events, a five-level ontology, 18,945 scans. Made, not loaded.

`python -m tests.bench.scale FOLDER [EVENTS] [SEED]` writes it into the store at FOLDER/home (made where absent):
timelines alone (omop.timeline, not omop.event), which is all that task choice and labels read. A seed fixes it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from app.store.copy import Field, ahead, copy_in, encode, index_statements
from app.store.session import make_engine, raw
from app.store.timelines import COLUMNS, Batch, pack

PERSONS, EVENTS, SCANS = 19_402, 225_000_000, 18_945
LEVELS = (14, 160, 1_800, 9_000, 40_000)
"""Concepts a level of the ontology: each but the first has one parent a level above; rows mostly carry the lowest."""
REPERTOIRE = 800
"""Concepts that one person's record repeats: most rows of a long record are the same few laboratory tests and drugs."""
SPREAD, LONGEST = 1.3, 1_000_000
"""Of the log-normal number of events a person, and its greatest value."""
FIRST_DAY, DAYS = 10_957, 7_300
"""20 years from 2000-01-01."""
DAY_SECONDS = 86_400
EVENTS_A_VISIT = 40
CHUNK = 4_000_000


@dataclass(frozen=True, slots=True)
class Shape:
    """What is to be made."""

    events: int = EVENTS
    persons: int = PERSONS
    scans: int = SCANS
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Made:
    """What was made of each person."""

    num_events: NDArray[np.int64]
    first: NDArray[np.int64]
    """(persons,) first day of the record, days since 1970."""
    last: NDArray[np.int64]
    """(persons,) last second of the record."""


def num_events(shape: Shape, random: np.random.Generator) -> NDArray[np.int64]:
    """(persons,) log-normal, at least 10, at most a million, of the sum asked for."""
    share = random.lognormal(0, SPREAD, shape.persons)
    counts = np.clip(np.rint(share / share.sum() * shape.events), 10, LONGEST).astype(np.int64)
    free = np.flatnonzero((counts > 10) & (counts < LONGEST // 2))
    missing = shape.events - int(counts.sum())
    counts[free] += np.rint(missing * counts[free] / counts[free].sum()).astype(np.int64)
    return np.clip(counts, 10, LONGEST)


def ontology() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Parents (concepts,) by concept id - 1, 0 for roots; and the level of each."""
    parent, level, before, start = [np.zeros(LEVELS[0], np.int64)], [np.zeros(LEVELS[0], np.int64)], LEVELS[0], 1
    for depth, size in enumerate(LEVELS[1:], 1):
        parent.append(start + np.arange(size) * before // size)
        level.append(np.full(size, depth))
        start, before = start + before, size
    return np.concatenate(parent), np.concatenate(level)


def ancestor_rows() -> NDArray[np.int64]:
    """(rows, 3): ancestor, descendant and levels between, itself at 0."""
    parent, _ = ontology()
    concept = node = np.arange(1, len(parent) + 1)
    found, depth = [], 0
    while len(concept):
        found.append(np.column_stack([node, concept, np.full(len(concept), depth)]))
        node = parent[node - 1]
        concept, node, depth = concept[node > 0], node[node > 0], depth + 1
    return np.concatenate(found)


def batches(shape: Shape, counts: NDArray[np.int64], made: Made, random: np.random.Generator) -> Iterator[Batch]:
    """Events of person after person, sorted by (person, time, concept)."""
    _, level = ontology()
    leaf = np.flatnonzero(level >= 2) + 1
    popularity = np.cumsum(1 / np.arange(1, len(leaf) + 1) ** 0.9)
    leaf = random.permutation(leaf).astype(np.int32)
    habit = np.cumsum(1 / np.arange(1, REPERTOIRE + 1))
    begin = 0
    while begin < shape.persons:
        upto = np.cumsum(counts[begin:])
        stop = begin + max(1, int(np.searchsorted(upto, CHUNK)))
        yield stretch(begin, counts[begin:stop], made, random, leaf, popularity, habit)
        begin = stop


def stretch(
    begin: int,
    counts: NDArray[np.int64],
    made: Made,
    random: np.random.Generator,
    leaf: NDArray[np.int32],
    popularity: NDArray[np.float64],
    habit: NDArray[np.float64],
) -> Batch:
    """Events of some persons: visits on days of their record, a few concepts again and again."""
    person = np.repeat(np.arange(len(counts)), counts)
    own = leaf[np.searchsorted(popularity, random.random((len(counts), REPERTOIRE)) * popularity[-1])]
    concept = own[person, np.searchsorted(habit, random.random(len(person)) * habit[-1])]
    visits = np.maximum(counts // EVENTS_A_VISIT, 3)
    starts = np.cumsum(visits) - visits
    first = made.first[begin : begin + len(counts)]
    length = np.minimum(random.integers(400, DAYS, len(counts)), FIRST_DAY + DAYS - first)
    visit_day = np.repeat(first, visits) + (random.random(int(visits.sum())) * np.repeat(length, visits)).astype(int)
    day = visit_day[starts[person] + (random.random(len(person)) * visits[person]).astype(np.int64)]
    second = random.integers(0, DAY_SECONDS, len(person))
    date_only = random.random(len(person)) < 0.3
    second[date_only] = DAY_SECONDS - 1
    coded = (day * DAY_SECONDS + second) * 2 + date_only
    order = np.lexsort((concept, coded, person))
    ends = np.cumsum(counts) - 1
    made.last[begin : begin + len(counts)] = coded[order][ends] >> 1
    return person[order] + begin + 1, coded[order], concept[order]


def fill(url: str, shape: Shape) -> Made:
    """Write persons, periods, scans, concepts, ancestors and timelines into an empty store; a scan in mid-record."""
    random = np.random.default_rng(shape.seed)
    counts = num_events(shape, random)
    first = FIRST_DAY + random.integers(0, DAYS // 2, shape.persons)
    made = Made(counts, first, np.zeros(shape.persons, np.int64))
    engine = make_engine(url)
    with engine.begin() as connection:
        copy_in(connection, "omop.timeline", COLUMNS, ahead(pack(batches(shape, counts, made, random))))
        write_persons(connection, shape, made, random)
        write_vocabulary(connection)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")
    return made


def write_persons(connection: Connection, shape: Shape, made: Made, random: np.random.Generator) -> None:
    """Persons, a period that spans each one's record, and scans inside it; a person may have several."""
    connection.exec_driver_sql("INSERT INTO ops.source (name, simulated) VALUES ('bench', true)")
    connection.exec_driver_sql(
        "INSERT INTO ops.load (source_id, kind, mode, table_name, state, files, content_sha256, num_read, num_loaded, "
        "num_rejected) SELECT source_id, 'omop', 'snapshot', 'person', 'published', '[]', '', 0, 0, 0 FROM ops.source"
    )
    load_id = connection.exec_driver_sql("SELECT load_id FROM ops.load").scalar_one()
    connection.exec_driver_sql(
        "INSERT INTO omop.person (person_id, birth_time, load_id) "
        f"SELECT n, '1950-01-01', {load_id} FROM generate_series(1, {shape.persons}) n"
    )
    with (
        raw(connection)
        .cursor()
        .copy(
            "COPY omop.observation_period (observation_period_id, person_id, start_date, end_date, load_id) FROM STDIN"
        ) as copy
    ):
        for n in range(shape.persons):
            days = np.array([made.first[n], made.last[n] // DAY_SECONDS], "datetime64[D]").astype(str)
            copy.write_row([n + 1, n + 1, days[0], days[1], load_id])
    person = np.sort(random.choice(shape.persons, shape.scans, replace=shape.scans > shape.persons))
    place = random.uniform(0.2, 0.7, shape.scans)
    begin = made.first[person] * DAY_SECONDS
    when = (begin + (made.last[person] - begin) * place).astype(np.int64) // DAY_SECONDS * DAY_SECONDS + 43_200
    number = np.arange(shape.scans)
    with (
        raw(connection)
        .cursor()
        .copy(
            "COPY omop.image_occurrence (person_id, acquired_at, date_only, acquired_at_source, image_key, root, path, "
            "format, verdict, load_id) FROM STDIN"
        ) as copy
    ):
        for n, who, moment in zip(number.tolist(), person.tolist(), when.astype("datetime64[s]"), strict=True):
            copy.write_row([who + 1, str(moment), False, "manifest", f"{n}", "r", f"{n}", "nifti", "ok", load_id])


def write_vocabulary(connection: Connection) -> None:
    """Concepts and their ancestors."""
    rows = ancestor_rows().astype(np.int32)
    levels = Field(rows[:, 2])
    columns = ("ancestor_concept_id", "descendant_concept_id", "min_levels_of_separation", "max_levels_of_separation")
    fields = [Field(rows[:, 0]), Field(rows[:, 1]), levels, levels]
    copy_in(connection, "omop.concept_ancestor", columns, [encode(fields)])
    connection.exec_driver_sql(
        "INSERT INTO omop.concept (concept_id, concept_name, domain_id, vocabulary_id, concept_class_id, "
        f"standard_concept, concept_code) SELECT n, n, 'd', 'v', 'c', 'S', n FROM generate_series(1, {sum(LEVELS)}) n"
    )


def write_foreign_ancestors(connection: Connection, rows: int) -> None:
    """Ancestor rows of three million concepts that nobody has: a whole vocabulary brings 79 M."""
    drop, make = index_statements(connection, "omop.concept_ancestor")
    for statement in drop:
        connection.exec_driver_sql(statement)
    connection.exec_driver_sql(
        "INSERT INTO omop.concept_ancestor "
        "SELECT 1000000 + n / 3000000 * 997 + mod(n, 97), 10000000 + mod(n, 3000000), 1, 1 "
        f"FROM generate_series(1, {rows}) n"
    )
    for statement in (*make, "ANALYZE omop.concept_ancestor"):
        connection.exec_driver_sql(statement)


def main(argv: list[str]) -> int:
    """Make the store that the command line names."""
    from app.embedded import ensure_up
    from app.settings import Settings

    folder = Path(argv[0])
    shape = Shape(events=int(argv[1]) if len(argv) > 1 else EVENTS, seed=int(argv[2]) if len(argv) > 2 else 0)
    began = time.monotonic()
    made = fill(ensure_up(Settings(home=folder / "home", home_is_named=True)).database_url, shape)
    total = int(made.num_events.sum())
    print(f"{total:,} events of {shape.persons:,} persons in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
