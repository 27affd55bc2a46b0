"""Stage `label`: time-to-event labels of a cohort for a task set, from packed timelines into `label.tte`."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.errors import InputError
from app.store import names, stale
from app.store.copy import HEADER, TRAILER, Later, copy_in
from app.store.session import raw
from app.store.vocabulary import MAX_UNKNOWN, unknown_of_cohort
from app.store.work import Work
from ml.labelling import EVENT, ConceptTasks, Labeller, MemberRows, TaskRules, merge_events
from workers.bridge import Timelines, kept
from workers.bridge import labelling as bridge
from workers.stages import label_kept, label_shards
from workers.stages.label_timelines import Early, ReadAhead

if TYPE_CHECKING:
    from sqlalchemy import Connection

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
    tasks: bridge.LabelTasks

    def without(self, members: NDArray[np.int64]) -> Inputs:
        """The same for all but some members; what labelling them needs is cut down, and nothing else."""
        keep = ~np.isin(self.members.member, members)
        chosen = {
            field.name: getattr(self.members, field.name)[keep]
            for field in fields(bridge.LabelMembers)
            if field.name not in ("rows", "image_key")
        }
        rows = MemberRows(**{f.name: getattr(self.members.rows, f.name)[keep] for f in fields(MemberRows)})
        keys = [self.members.image_key[n] for n in np.flatnonzero(keep)]
        left = bridge.LabelMembers(**chosen, image_key=keys, rows=rows)
        persons = np.unique(left.person)
        theirs = np.isin(self.events.person, persons)
        events = {f.name: getattr(self.events, f.name)[theirs] for f in fields(bridge.StatementEvents)}
        return replace(
            self,
            members=left,
            persons=persons,
            num_events=self.num_events[np.searchsorted(self.persons, persons)],
            events=bridge.StatementEvents(**events),
        )


def label(work: Work) -> dict[str, Any]:
    """Label `args["cohort"]` for `args["tasks"]` under `args["name"]`; the same inputs again change nothing.

    Raises:
        Waiting: the work is shared out among several jobs (workers/stages/label_shards.py).
    """
    name = names.check_name("label set", work.args.get("name"))
    found = label_shards.shared(work)
    with work.connect() as reading, ExitStack() as stack:
        reading = reading.execution_options(isolation_level="REPEATABLE READ")
        early = None if found else stack.enter_context(Early(work, reading))
        cohort, tasks = (found.cohort, found.tasks) if found else definition(reading, name, work.args)
        inputs = read_inputs(reading, cohort, tasks, early=early)
        check_vocabulary(work, reading, inputs.cohort.id)
        made = Making.of(reading, inputs)
        if found is not None:
            label_shards.check_shards(work, reading, inputs, found)
            made.is_shared = True
        elif unchanged(reading, name, inputs) is None:
            made.taken = None if work.args.get("full") else earlier(reading, name, inputs, made)
            shards = label_shards.wanted(work, inputs) if made.taken is None else 1
            if shards > 1:
                label_shards.share_out(work, inputs, shards)
        with work.transaction() as writing:
            names.lock(writing, "label set", name)
            same = unchanged(writing, name, inputs)
            if same is not None:
                stale.renew_digests(writing, same["label_set_id"], stale.read_digests(reading, inputs.cohort.id))
            early_timelines = early.reader if early is not None and made.taken is None else None
            result = same or write(work, reading, writing, name, inputs, made, early_timelines)
        reading.rollback()
    if not result["events"]:
        work.log("No member has an outcome of these tasks; `lachesis show label` counts members by status.")
    return result


@dataclass(kw_only=True, slots=True)
class Making:
    """How a version is made."""

    rules_digest: bytes
    of_members: list[bytes]
    """Digest of each member's inputs, in their order."""
    taken: label_kept.TakenOver | None = None
    """Members whose labels an earlier version has."""
    is_shared: bool = False
    """Whether the job's shards have made the labels."""

    @classmethod
    def of(cls, connection: Connection, inputs: Inputs) -> Making:
        definitions = kept.read_definitions(connection, inputs.task_set.id)
        return cls(
            rules_digest=kept.rules_digest(RULES_VERSION, inputs.rules, inputs.concept_tasks, definitions),
            of_members=kept.input_digests(inputs.members, inputs.events, inputs.timelines),
        )


def earlier(connection: Connection, name: str, inputs: Inputs, made: Making) -> label_kept.TakenOver | None:
    """What an earlier version of the name has of these members."""
    return label_kept.find(
        connection,
        name,
        rules_digest=made.rules_digest,
        member=inputs.members.member,
        person=inputs.members.person,
        inputs=made.of_members,
        num_tasks=len(inputs.rules.start_seconds),
    )


def definition(connection: Connection, name: str, args: Mapping[str, Any]) -> tuple[str, str]:
    """The cohort and task set to label by; those that are not given are the newest of the current version's names.

    Raises:
        InputError: not both are given, and the name has no labels yet.
    """
    from sqlalchemy import text

    cohort, tasks = args.get("cohort"), args.get("tasks")
    if cohort and tasks:
        return str(cohort), str(tasks)
    row = connection.execute(
        text(
            "SELECT c.name, t.name FROM label.label_set s JOIN label.cohort c USING (cohort_id) "
            "JOIN label.task_set t USING (task_set_id) WHERE s.name = :name AND s.is_current"
        ),
        {"name": name},
    ).first()
    if row is None:
        raise InputError(
            f"Expected --cohort and --tasks for labels that are new, and there are none named {name!r}; give both."
        )
    return str(cohort or row[0]), str(tasks or row[1])


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


def read_inputs(
    connection: Connection,
    cohort_name: str,
    task_set_name: str,
    ranks: slice = slice(None),
    early: Early | None = None,
) -> Inputs:
    """Everything but timelines, in one snapshot; of the persons of some ranks alone. Raises UnknownName.

    Timelines take the longest: where `early` is given they begin to be read as soon as it is known whose.
    """
    cohort = names.find(connection, "cohort", cohort_name)
    task_set = names.find(connection, "task set", task_set_name)
    persons, num_members = (column[ranks] for column in bridge.read_persons(connection, cohort.id))
    num_events, digests = bridge.read_timeline_digests(connection, persons)
    if early is not None:
        early.begin(persons, num_events, num_members)
    bounds = (int(persons[0]), int(persons[-1])) if len(persons) else (0, -1)
    tasks = bridge.read_label_tasks(connection, task_set.id)
    members = bridge.read_label_members(connection, cohort.id, tasks, bounds)
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
        tasks=tasks,
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
    return None if row is None else dict(row) | {"unchanged": True, "recomputed": 0, "taken_over_from": None}


INSERT = """
INSERT INTO label.label_set (name, version, is_current, cohort_id, task_set_id, digest, data_digest, num_members,
                             num_events, job_id, rules_digest, vocabulary_version)
VALUES (:name, :version, true, :cohort, :tasks, '', :data_digest, :members, 0, :job_id, :rules_digest,
        (SELECT version FROM ops.vocabulary_release WHERE is_current)) RETURNING label_set_id
"""

TTE_COLUMNS = (
    "label_set_id, cohort_member_id, event_tasks, event_seconds, prior_tasks, ineligible_tasks, window_tasks, "
    "window_seconds, visit_tasks, follow_up_seconds, data_cut_seconds, death_seconds"
)


COUNT_COLUMNS = ("label_set_id", "split", "status", "n", "persons", "person_days")


def write(
    work: Work,
    reading: Connection,
    writing: Connection,
    name: str,
    inputs: Inputs,
    made: Making,
    timelines: ReadAhead | None,
) -> dict[str, Any]:
    """Store labels of all members, made here, by the job's shards or earlier, as the next version of the name."""
    from sqlalchemy import text

    row = {
        "name": name,
        "version": names.move(writing, "label set", name),
        "cohort": inputs.cohort.id,
        "tasks": inputs.task_set.id,
        "data_digest": inputs.data_digest,
        "rules_digest": made.rules_digest,
        "members": len(inputs.members.member),
        "job_id": work.job_id,
    }
    label_set_id = int(writing.execute(text(INSERT), row).scalar_one())
    keep_meaning(reading, writing, label_set_id, inputs)  # while the first timelines are labelled
    left = inputs if made.taken is None else inputs.without(made.taken.new)
    read_digests = partial(stale.read_digests, reading, inputs.cohort.id)
    reads = timelines is None and not made.is_shared
    if reads:
        timelines = ReadAhead.of(reading, left.members, left.persons, left.num_events)
    make = label_shards.move if timelines is None else partial(write_all, timelines=timelines)
    with nullcontext() if reads else Later(read_digests) as beside:
        counts, digests = make(work, writing=writing, label_set_id=label_set_id, inputs=left)
    if made.taken is not None:
        label_kept.copy_rows(writing, made.taken, label_set_id)
        counts, digests = counts + made.taken.counts, digests | made.taken.digests
    copy_in(writing, "label.status_count", COUNT_COLUMNS, [bridge.status_count_rows(label_set_id, counts)])
    found = read_digests() if beside is None else beside.get()
    keep_digests(writing, label_set_id, found, inputs, made, digests)
    num_events = int(counts[:, EVENT, 0].sum())
    digest = hashlib.sha256(inputs.task_set.digest + b"".join(sorted(digests.values()))).digest()
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
        "recomputed": len(left.members.member),
        "taken_over_from": None if made.taken is None else made.taken.name,
    }


def write_all(
    work: Work, *, timelines: ReadAhead, writing: Connection, label_set_id: int, inputs: Inputs
) -> tuple[NDArray[np.int64], dict[int, bytes]]:
    """Label all members into label.tte; counts of all, and the digest of each."""
    from psycopg.copy import QueuedLibpqWriter

    digests: dict[int, bytes] = {}
    cursor = raw(writing).cursor()
    writer = QueuedLibpqWriter(cursor)  # Postgres takes rows in while the next ones are made
    with cursor.copy(f"COPY label.tte ({TTE_COLUMNS}) FROM STDIN (FORMAT BINARY)", writer=writer) as copy:
        copy.write(HEADER)
        labeller = later_labeller(inputs)
        for part, rows, found in labelled(timelines, inputs, labeller, partial(bridge.tte_heads, label_set_id)):
            copy.write(rows.data.data)
            digests.update(zip(inputs.members.member[part].tolist(), found, strict=True))
            work.progress(part.stop, len(inputs.members.member), "scans", "label")
        copy.write(TRAILER)
    return labeller.get().counts, digests


def later_labeller(inputs: Inputs) -> Later[Labeller]:
    """A labeller that is made while the first timelines are read."""
    return Later(partial(Labeller, inputs.rules, inputs.concept_tasks))


def keep_digests(
    connection: Connection,
    label_set_id: int,
    found: stale.Digests,
    inputs: Inputs,
    made: Making,
    digests: Mapping[int, bytes],
) -> None:
    """Keep digests of what each member's labels were made of, and of the labels."""
    timelines = dict(inputs.timelines)
    members, persons = inputs.members.member.tolist(), inputs.members.person.tolist()
    of_members = {
        member: stale.Made(timelines.get(person), of, digests[member])
        for member, person, of in zip(members, persons, made.of_members, strict=True)
    }
    stale.keep_digests(connection, label_set_id, found, of_members)


def keep_meaning(reading: Connection, writing: Connection, label_set_id: int, inputs: Inputs) -> None:
    """Keep the concepts that each task of a label set meant."""
    meaning = kept.read_meaning(reading, inputs.concept_tasks, inputs.tasks)
    columns = ("label_set_id", "positions", "concepts")
    copy_in(writing, "label.label_meaning", columns, [kept.meaning_row(label_set_id, *meaning)])


Heads = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""What comes before the arrays in the rows of members, by their ids: `bridge.tte_heads` of a set."""


def labelled(
    read: ReadAhead, inputs: Inputs, labeller: Later[Labeller], heads: Heads
) -> Iterator[tuple[slice, bridge.TteRows, list[bytes]]]:
    """Stretches of members in order, with their rows and digests.

    One thread reads ahead, as many as there are processors label and encode (kernels hold no lock of Python's), and
    whoever takes the rows writes: the three overlap.
    """
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[slice, Future[tuple[bridge.TteRows, list[bytes]]]]] = deque()
        try:
            for part, timelines in read.of_members(inputs.members):
                waiting.append((part, pool.submit(label_part, timelines, labeller, inputs, part, heads)))
                while waiting and (len(waiting) > threads or waiting[0][1].done()):
                    done, future = waiting.popleft()
                    yield done, *future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, *future.result()
        finally:
            read.close()
            for _, future in waiting:
                future.cancel()


def part_inputs(
    timelines: Timelines, inputs: Inputs, part: slice
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], MemberRows]:
    """What the engine reads of some members: their persons' events, those of statements merged in, and their rows.

    Returns:
        times, concepts and where each person's events begin, as `merge_events` gives them; the rows of the members.
    """
    lo, hi = np.searchsorted(inputs.events.person, [timelines.person[0], timelines.person[-1] + 1])
    times, concepts, ptr = merge_events(
        timelines.time,
        timelines.concept,
        timelines.ptr,
        np.searchsorted(timelines.person, inputs.events.person[lo:hi]),
        inputs.events.time[lo:hi],
        inputs.events.concept[lo:hi],
    )
    every = inputs.members.rows
    rows = replace(
        MemberRows(**{field.name: getattr(every, field.name)[part] for field in fields(MemberRows)}),
        person_row=np.searchsorted(timelines.person, inputs.members.person[part]),
    )
    return times, concepts, ptr, rows


def label_part(
    timelines: Timelines, labeller: Later[Labeller], inputs: Inputs, part: slice, heads: Heads
) -> tuple[bridge.TteRows, list[bytes]]:
    """Rows of some members, with their digests."""
    times, concepts, ptr, rows = part_inputs(timelines, inputs, part)
    labels = labeller.get().label(times, concepts, ptr, rows)
    encoded = bridge.tte_rows(heads(inputs.members.member[part]), inputs.members, part, labels)
    return encoded, encoded.digests(bridge.who(inputs.members, part))
