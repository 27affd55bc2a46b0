"""Stage `label`: time-to-event labels of a cohort for a task set, from packed timelines into `label.tte`."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.errors import InputError
from app.store import names, stale
from app.store.copy import HEADER, TRAILER
from app.store.session import raw
from app.store.vocabulary import MAX_UNKNOWN, unknown_of_cohort
from app.store.work import Work
from ml.labelling import EVENT, ConceptTasks, Labeller, MemberRows, TaskRules, merge_events
from workers.bridge import Timelines, read_timelines
from workers.bridge import labelling as bridge
from workers.stages import label_shards

if TYPE_CHECKING:
    from sqlalchemy import Connection

CHUNK_EVENTS, CHUNK_MEMBERS = 1_000_000, 4_096
"""Persons are read together until they hold so many events or members."""

MOST_THREADS = 8
"""That label at once; beyond it the one connection that writes is what they wait for."""

RULES_VERSION = 2
"""Raised when the engine's rules change, so that labels made by older rules count as made of other inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """All that labels depend on, but the timelines themselves."""

    cohort: names.Version
    task_set: names.Version
    rules: TaskRules
    concept_tasks: ConceptTasks
    events: bridge.StatementEvents
    members: bridge.LabelMembers
    persons: NDArray[np.int64]
    """Ascending, each once."""
    num_events: NDArray[np.int64]
    """Events of each of `persons`."""
    timelines: list[tuple[int, bytes]]
    """(person, digest of its timeline) of those that have any."""
    data_digest: bytes


def label(work: Work) -> dict[str, Any]:
    """Label `args["cohort"]` for `args["tasks"]` under `args["name"]`; the same inputs again change nothing.

    Raises:
        Waiting: the work is shared out among several jobs (workers/stages/label_shards.py).
    """
    name = names.check_name("label set", work.args.get("name"))
    found = label_shards.shared(work)
    cohort, tasks = (found.cohort, found.tasks) if found else (str(work.args.get(key)) for key in ("cohort", "tasks"))
    with work.connect() as reading:
        reading = reading.execution_options(isolation_level="REPEATABLE READ")
        inputs = read_inputs(reading, cohort, tasks)
        check_vocabulary(work, reading, inputs.cohort.id)
        if found is not None:
            label_shards.check_shards(work, reading, inputs, found)
        elif unchanged(reading, name, inputs) is None:
            shards = label_shards.wanted(work, inputs)
            if shards > 1:
                label_shards.share_out(work, inputs, shards)
        with work.transaction() as writing:
            names.lock(writing, "label set", name)
            same = unchanged(writing, name, inputs)
            if same is not None:
                stale.keep_digests(reading, writing, same["label_set_id"], inputs.cohort.id)
            result = same or write(work, reading, writing, name, inputs, is_shared=found is not None)
        reading.rollback()
    if not result["events"]:
        work.log("No member has an outcome of these tasks; `lachesis show label` counts members by status.")
    return result


def check_vocabulary(work: Work, connection: Connection, cohort_id: int) -> None:
    """Refuse labels of a source whose concepts its vocabulary lacks: outcomes by ancestor would be missed in silence.

    Raises:
        InputError: over 0.1 % of a source's events (concept 0 not counted), unless args["allow_unknown_concepts"].
    """
    for found in unknown_of_cohort(connection, cohort_id):
        if found.share <= MAX_UNKNOWN:
            continue
        counted = (
            f"{found.unknown:,} of {found.events:,} events ({found.share:.2%}) of source {found.source!r} have "
            "concepts that the vocabulary of this store lacks"
        )
        if not found.has_vocabulary:
            work.log(f"{counted}: tasks see these concepts alone, without broader and narrower ones.")
        elif work.args.get("allow_unknown_concepts"):
            work.log(f"{counted}: outcomes among them may be missed (--allow-unknown-concepts).")
        else:
            raise InputError(
                f"Expected at most {MAX_UNKNOWN:.1%} unknown concepts, but {counted}; run "
                "`lachesis concepts --unknown` to see which, then `lachesis load vocabulary DIR` with a download that "
                "has them, or label with --allow-unknown-concepts."
            )


def read_inputs(connection: Connection, cohort_name: str, task_set_name: str, ranks: slice = slice(None)) -> Inputs:
    """Everything but timelines, in one snapshot; of the persons of some ranks alone. Raises UnknownName."""
    cohort = names.find(connection, "cohort", cohort_name)
    task_set = names.find(connection, "task set", task_set_name)
    tasks = bridge.read_label_tasks(connection, task_set.id)
    persons = bridge.read_persons(connection, cohort.id)[ranks]
    bounds = (int(persons[0]), int(persons[-1])) if len(persons) else (0, -1)
    members = bridge.read_label_members(connection, cohort.id, tasks, bounds)
    num_events, digests = bridge.read_timeline_digests(connection, persons)
    concept_tasks = bridge.read_concept_tasks(connection, task_set.id, tasks)
    events = bridge.read_statement_events(connection, cohort.id, tasks, bounds)
    return Inputs(
        cohort=cohort,
        task_set=task_set,
        rules=tasks.rules,
        concept_tasks=concept_tasks,
        events=events,
        members=members,
        persons=persons,
        num_events=num_events,
        timelines=digests,
        data_digest=data_digest(task_set.digest, concept_tasks, events, members, digests),
    )


def data_digest(
    task_set: bytes,
    concept_tasks: ConceptTasks,
    events: bridge.StatementEvents,
    members: bridge.LabelMembers,
    timelines: Sequence[tuple[int, bytes]],
) -> bytes:
    """sha256 over tasks, members (scans, periods, deaths, visits) and their timelines, without keys of ours."""
    digest = hashlib.sha256(f"labels {RULES_VERSION}\n".encode() + task_set)
    rows = [getattr(members.rows, field.name) for field in fields(MemberRows)]
    for array in (*_arrays(concept_tasks), *_arrays(events), members.person, members.index_date_only, *rows):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("\n".join(members.image_key).encode())
    for person, of_timeline in timelines:
        digest.update(f"\n{person}".encode() + of_timeline)
    return digest.digest()


def _arrays(record: ConceptTasks | bridge.StatementEvents) -> list[NDArray[Any]]:
    return [getattr(record, field.name) for field in fields(record)]


def unchanged(connection: Connection, name: str, inputs: Inputs) -> dict[str, Any] | None:
    """The current version, where it was made of the same inputs."""
    from sqlalchemy import text

    row = (
        connection.execute(
            text(
                "SELECT label_set_id, name, version, num_members AS members, num_events AS events FROM label.label_set "
                "WHERE name = :name AND is_current AND cohort_id = :cohort AND task_set_id = :tasks "
                "AND data_digest = :digest"
            ),
            {"name": name, "cohort": inputs.cohort.id, "tasks": inputs.task_set.id, "digest": inputs.data_digest},
        )
        .mappings()
        .first()
    )
    return None if row is None else dict(row) | {"unchanged": True}


INSERT = """
INSERT INTO label.label_set (name, version, is_current, cohort_id, task_set_id, digest, data_digest, num_members,
                             num_events, job_id, vocabulary_version)
VALUES (:name, :version, true, :cohort, :tasks, '', :data_digest, :members, 0, :job_id,
        (SELECT version FROM ops.vocabulary_release WHERE is_current)) RETURNING label_set_id
"""

TTE_COLUMNS = (
    "label_set_id, cohort_member_id, event_tasks, event_seconds, prior_tasks, ineligible_tasks, window_tasks, "
    "window_seconds, visit_tasks, follow_up_seconds, data_cut_seconds, death_seconds"
)


COUNT_COLUMNS = "label_set_id, split, status, n, persons, person_days"


def write(
    work: Work, reading: Connection, writing: Connection, name: str, inputs: Inputs, *, is_shared: bool
) -> dict[str, Any]:
    """Store labels of all members, made here or by the job's shards, as the next version of the name."""
    from sqlalchemy import text

    row = {
        "name": name,
        "version": names.move(writing, "label set", name),
        "cohort": inputs.cohort.id,
        "tasks": inputs.task_set.id,
        "data_digest": inputs.data_digest,
        "members": len(inputs.members.member),
        "job_id": work.job_id,
    }
    label_set_id = int(writing.execute(text(INSERT), row).scalar_one())
    stale.keep_digests(reading, writing, label_set_id, inputs.cohort.id)
    make = label_shards.move if is_shared else partial(write_all, reading=reading)
    counts, digests = make(work, writing=writing, label_set_id=label_set_id, inputs=inputs)
    with raw(writing).cursor().copy(f"COPY label.status_count ({COUNT_COLUMNS}) FROM STDIN (FORMAT BINARY)") as copy:
        copy.write(HEADER + bridge.status_count_rows(label_set_id, counts) + TRAILER)
    num_events = int(counts[:, EVENT, 0].sum())
    digest = hashlib.sha256(inputs.task_set.digest + b"".join(sorted(digests))).digest()
    writing.execute(
        text("UPDATE label.label_set SET digest = :digest, num_events = :events WHERE label_set_id = :id"),
        {"digest": digest, "events": num_events, "id": label_set_id},
    )
    return {
        "label_set_id": label_set_id,
        "name": name,
        "version": row["version"],
        "unchanged": False,
        "members": row["members"],
        "events": num_events,
    }


def write_all(
    work: Work, *, reading: Connection, writing: Connection, label_set_id: int, inputs: Inputs
) -> tuple[NDArray[np.int64], list[bytes]]:
    """Label all members into label.tte; counts and digests of all."""
    from psycopg.copy import QueuedLibpqWriter

    digests = list[bytes]()
    cursor = raw(writing).cursor()
    writer = QueuedLibpqWriter(cursor)  # Postgres takes rows in while the next ones are made
    with cursor.copy(f"COPY label.tte ({TTE_COLUMNS}) FROM STDIN (FORMAT BINARY)", writer=writer) as copy:
        copy.write(HEADER)
        labeller = LaterLabeller(inputs)
        for part, rows, found in labelled(reading, inputs, labeller, partial(bridge.tte_heads, label_set_id)):
            copy.write(rows.data.data)
            digests += found
            work.progress(part.stop, len(inputs.members.member), "scans", "label")
        copy.write(TRAILER)
    return labeller.get().counts, digests


class LaterLabeller:
    """A labeller made by a thread of its own while the first timelines are read."""

    def __init__(self, inputs: Inputs) -> None:
        thread = ThreadPoolExecutor(1)
        self._coming = thread.submit(Labeller, inputs.rules, inputs.concept_tasks)
        thread.shutdown(wait=False)

    def get(self) -> Labeller:
        """The labeller, once it is there."""
        return self._coming.result()


def chunks(inputs: Inputs) -> Iterator[slice]:
    """Stretches of members, no person cut in two."""
    row = np.searchsorted(inputs.persons, inputs.members.person)
    first = np.searchsorted(row, np.arange(len(inputs.persons) + 1))
    begin, held = 0, 0
    for person, events in enumerate(inputs.num_events.tolist()):
        held += events
        if held >= CHUNK_EVENTS or first[person + 1] - begin >= CHUNK_MEMBERS:
            yield slice(begin, int(first[person + 1]))
            begin, held = int(first[person + 1]), 0
    if begin < len(row):
        yield slice(begin, len(row))


def read_ahead(reading: Connection, inputs: Inputs) -> Iterator[tuple[slice, Timelines]]:
    """Stretches of members with their persons' timelines, the next two of which are read while one is in use."""

    def read(part: slice) -> tuple[slice, Timelines]:
        return part, read_timelines(reading, np.unique(inputs.members.person[part]))

    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[tuple[slice, Timelines]]] = deque()
        for part in chunks(inputs):
            coming.append(thread.submit(read, part))
            if len(coming) > 2:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


Heads = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""What comes before the arrays in the rows of members, by their ids: `bridge.tte_heads` of a set."""


def labelled(
    reading: Connection, inputs: Inputs, labeller: LaterLabeller, heads: Heads
) -> Iterator[tuple[slice, bridge.TteRows, list[bytes]]]:
    """Stretches of members in order, with their rows and digests.

    One thread reads ahead, as many as there are processors label and encode (kernels hold no lock of Python's), and
    whoever takes the rows writes: the three overlap.
    """
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[slice, Future[tuple[bridge.TteRows, list[bytes]]]]] = deque()
        try:
            for part, timelines in read_ahead(reading, inputs):
                waiting.append((part, pool.submit(label_part, timelines, labeller, inputs, part, heads)))
                while waiting and (len(waiting) > threads or waiting[0][1].done()):
                    done, future = waiting.popleft()
                    yield done, *future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, *future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def label_part(
    timelines: Timelines, labeller: LaterLabeller, inputs: Inputs, part: slice, heads: Heads
) -> tuple[bridge.TteRows, list[bytes]]:
    """Rows of some members, with their digests."""
    lo, hi = np.searchsorted(inputs.events.person, [timelines.person[0], timelines.person[-1] + 1])
    times, concepts, ptr = merge_events(
        timelines.time,
        timelines.concept,
        timelines.ptr,
        np.searchsorted(timelines.person, inputs.events.person[lo:hi]),
        inputs.events.time[lo:hi],
        inputs.events.concept[lo:hi],
    )
    all_rows = inputs.members.rows
    rows = replace(
        MemberRows(**{field.name: getattr(all_rows, field.name)[part] for field in fields(MemberRows)}),
        person_row=np.searchsorted(timelines.person, inputs.members.person[part]),
    )
    labels = labeller.get().label(times, concepts, ptr, rows)
    encoded = bridge.tte_rows(heads(inputs.members.member[part]), inputs.members, part, labels)
    return encoded, encoded.digests(bridge.who(inputs.members, part))
