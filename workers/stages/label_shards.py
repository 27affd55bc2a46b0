"""A label set made by several jobs: each labels a stretch of persons, and the job that asked stores them all at once.

The first attempt of a large `label` job cuts its persons into shards, queues a job for each and gives its worker back.
Each shard's labels wait in `label.shard_tte`, written by one fenced transaction. When the last has ended, the job is
claimed again: it looks whether each shard was made of what there is now (else that shard is made again), and moves all
of them into `label.tte` in the transaction that makes the set. Nobody ever sees half a set, and labels do not depend on
how many jobs or workers made them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.errors import Cancelled, JobFailed, Waiting
from app.queue import QUEUE_OF
from app.store import jobs
from app.store.copy import HEADER, TRAILER
from app.store.session import raw
from app.store.work import Work
from ml.labelling import STATUSES, MemberRows
from workers.bridge import SPLITS
from workers.bridge import labelling as bridge
from workers.stages.label_timelines import ReadAhead

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from workers.stages.label import Inputs

KIND = "label_shard"
SHARD_EVENTS = 20_000_000
"""Of a shard, about; a set of less than twice as many is made by one job."""
MOST_SHARDS = 64

ARRAYS = (
    "event_tasks, event_seconds, prior_tasks, ineligible_tasks, window_tasks, window_seconds, visit_tasks, "
    "follow_up_seconds, data_cut_seconds, death_seconds"
)


@dataclass(frozen=True, slots=True)
class Shared:
    """The shards of a job, as it left them."""

    cohort: str
    tasks: str
    """NAME@VERSION: what the names meant when the work was shared out."""
    shards: list[dict[str, Any]]
    """By share."""


def shared(work: Work) -> Shared | None:
    """How this job shared its work out; None where it has not."""
    if work.job_id is None:
        return None
    with work.connect() as connection:
        shards = jobs.shards(connection, work.job_id)
    return Shared(shards[0]["args"]["cohort"], shards[0]["args"]["tasks"], shards) if shards else None


def wanted(work: Work, inputs: Inputs) -> int:
    """How many jobs a set is worth."""
    if work.job_id is None or not len(inputs.persons):
        return 1
    asked, events = work.args.get("shards"), int(inputs.num_events.sum())
    count = int(asked) if asked else events // SHARD_EVENTS if events >= 2 * SHARD_EVENTS else 1
    return max(1, min(count, MOST_SHARDS, len(inputs.persons)))


def share_out(work: Work, inputs: Inputs, count: int) -> None:
    """Queue a job for each stretch of persons with as many events as the others. Raises Waiting."""
    done = np.cumsum(inputs.num_events + 1)
    edges = np.searchsorted(done, done[-1] * np.arange(1, count) / count) + 1
    edges = np.unique(np.concatenate([[0], edges, [len(done)]]))
    common = {
        "parent": work.job_id,
        "cohort": f"{inputs.cohort.name}@{inputs.cohort.version}",
        "tasks": f"{inputs.task_set.name}@{inputs.task_set.version}",
    }
    stops = [*edges[1:-1].tolist(), None]  # the last one takes whoever is left
    stretches = zip(edges[:-1].tolist(), stops, strict=True)
    queue_shards(
        work, [common | {"shard": n, "first": first, "stop": stop} for n, (first, stop) in enumerate(stretches)]
    )
    work.progress(0, len(inputs.members.member), "scans", f"label in {len(stops)} shards")
    raise Waiting


def queue_shards(work: Work, args: list[dict[str, Any]]) -> None:
    """Queue shards, all or none, and ring for workers."""
    with work.transaction() as connection:
        made = [
            jobs.insert(
                connection,
                kind=KIND,
                queue=QUEUE_OF[KIND],
                name=work.args.get("name"),
                args=one,
                parent=work.job_id,
                shard=one["shard"],
                dedupe_key=f"{KIND}:{work.job_id}:{one['shard']}",
            )
            for one in args
        ]
    work.ring(QUEUE_OF[KIND], made)


def check_shards(work: Work, reading: Connection, inputs: Inputs, found: Shared) -> None:
    """See that every shard was made of what there is now.

    Raises:
        Waiting: some are open, or are made again because their data changed meanwhile.
        JobFailed: one cannot be made.
    """
    from sqlalchemy import text

    rows = reading.execute(text("SELECT shard, data_digest FROM label.shard WHERE job_id = :job"), {"job": work.job_id})
    made = {row.shard: bytes(row.data_digest) for row in rows}
    again, is_open = list[dict[str, Any]](), False
    for shard in found.shards:
        if shard["state"] in ("failed", "dead", "cancelled"):
            with work.connect() as connection, connection.begin():
                jobs.cancel_shards(connection, work.job_id or 0)
            said = shard["error_message"] or "it ended without a word"
            raise JobFailed(f"Shard {shard['shard']} of the labels (job {shard['job_id']}) failed: {said}", 1)
        ranks = slice(shard["args"]["first"], shard["args"]["stop"])
        if made.get(shard["shard"]) == part_of(inputs, ranks).data_digest:
            continue
        if shard["state"] in jobs.OPEN_STATES:
            is_open = True
        else:
            again.append(shard["args"])
    if again:
        work.log(f"The data of {len(again)} of {len(found.shards)} shards changed meanwhile; they are made again.")
        queue_shards(work, again)
    if again or is_open:
        raise Waiting


def part_of(inputs: Inputs, ranks: slice) -> Inputs:
    """The inputs of some persons, by their ranks, as they are read for them alone."""
    from workers.stages.label import data_digest

    persons = inputs.persons[ranks]
    if not len(persons):
        lo = hi = first = last = 0
    else:
        lo, hi = np.searchsorted(inputs.members.person, [persons[0], persons[-1] + 1]).tolist()
        first, last = np.searchsorted(inputs.events.person, [persons[0], persons[-1] + 1]).tolist()
    part, members = slice(lo, hi), inputs.members
    rows = MemberRows(**{field.name: getattr(members.rows, field.name)[part] for field in fields(MemberRows)})
    some = replace(
        members,
        rows=rows,
        **{
            name: getattr(members, name)[part]
            for name in ("member", "person", "image_key", "index_date_only", "has_end", "has_cut")
        },
    )
    events = bridge.StatementEvents(
        person=inputs.events.person[first:last],
        time=inputs.events.time[first:last],
        concept=inputs.events.concept[first:last],
    )
    known = {
        person: digest for person, digest in inputs.timelines if len(persons) and persons[0] <= person <= persons[-1]
    }
    timelines = list(known.items())
    return replace(
        inputs,
        members=some,
        events=events,
        persons=persons,
        num_events=inputs.num_events[ranks],
        timelines=timelines,
        data_digest=data_digest(inputs.task_set.digest, inputs.concept_tasks, events, some, timelines),
    )


def label_shard(work: Work) -> dict[str, Any]:
    """Label the persons `args["first"]` to `args["stop"]` of a cohort for the job `args["parent"]`.

    Raises:
        Cancelled: that job has ended.
    """
    from sqlalchemy import text

    from workers.stages.label import read_inputs

    args, key = work.args, {"job": work.args["parent"], "shard": work.args["shard"]}
    with work.connect() as reading:
        reading = reading.execution_options(isolation_level="REPEATABLE READ")
        inputs = read_inputs(reading, args["cohort"], args["tasks"], slice(args["first"], args["stop"]))
        with work.transaction() as writing:
            writing.execute(text("DELETE FROM label.shard WHERE job_id = :job AND shard = :shard"), key)
            writing.execute(
                text("INSERT INTO label.shard (job_id, shard, data_digest, counts) VALUES (:job, :shard, :digest, '')"),
                key | {"digest": inputs.data_digest},
            )
            counts = write_shard(work, reading, writing, inputs)
            writing.execute(
                text("UPDATE label.shard SET counts = :counts WHERE job_id = :job AND shard = :shard"),
                key | {"counts": counts.astype("<i8").tobytes()},
            )
            state = writing.execute(text("SELECT state FROM ops.job WHERE job_id = :job"), key).scalar()
            if state not in jobs.OPEN_STATES:
                raise Cancelled
        reading.rollback()
    return {"shard": args["shard"], "members": len(inputs.members.member)}


def write_shard(work: Work, reading: Connection, writing: Connection, inputs: Inputs) -> NDArray[np.int64]:
    """Label all members of a shard into label.shard_tte; how many they are, as the engine counts."""
    from workers.stages.label import labelled, later_labeller

    labeller, job_id, shard = later_labeller(inputs), work.args["parent"], work.args["shard"]
    timelines = ReadAhead.of(reading, inputs.members, inputs.persons, inputs.num_events)

    def heads(member: NDArray[np.int64]) -> NDArray[np.uint8]:
        return bridge.shard_heads(job_id, shard, member)

    columns = f"job_id, shard, cohort_member_id, digest, {ARRAYS}"
    with raw(writing).cursor().copy(f"COPY label.shard_tte ({columns}) FROM STDIN (FORMAT BINARY)") as copy:
        copy.write(HEADER)
        for part, rows, digests in labelled(timelines, inputs, labeller, heads):
            bridge.put_digests(rows, digests)
            copy.write(rows.data.data)
            work.progress(part.stop, len(inputs.members.member), "scans", "label")
        copy.write(TRAILER)
    return labeller.get().counts


def move(
    work: Work, writing: Connection, label_set_id: int, inputs: Inputs
) -> tuple[NDArray[np.int64], dict[int, bytes]]:
    """Move the shards' labels into a label set; counts of all members, and the digest of each.

    Raises:
        RuntimeError: they are not those of all members.
    """
    from sqlalchemy import text

    key = {"job": work.job_id, "label_set": label_set_id}
    moved = writing.execute(
        text(
            f"INSERT INTO label.tte (label_set_id, cohort_member_id, {ARRAYS}) "
            f"SELECT :label_set, cohort_member_id, {ARRAYS} FROM label.shard_tte WHERE job_id = :job "
            "ORDER BY shard, cohort_member_id"
        ),
        key,
    ).rowcount
    if moved != len(inputs.members.member):
        raise RuntimeError(f"Expected the labels of {len(inputs.members.member)} members, the shards have {moved}.")
    shape = (len(SPLITS), len(STATUSES), 3, len(inputs.rules.start_seconds))
    counts = np.zeros(shape, np.int64)
    for row in writing.execute(text("SELECT counts FROM label.shard WHERE job_id = :job"), key):
        counts += np.frombuffer(row.counts, "<i8").reshape(shape)
    rows = writing.execute(text("SELECT cohort_member_id, digest FROM label.shard_tte WHERE job_id = :job"), key)
    digests = {row.cohort_member_id: bytes(row.digest) for row in rows}
    writing.execute(text("DELETE FROM label.shard WHERE job_id = :job"), key)
    work.progress(moved, moved, "scans", "store")
    return counts, digests
