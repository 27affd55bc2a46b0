"""What a label set keeps of the inputs it was made of, so that the next version finds what it may take over."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.store import coded_outcomes, outcomes
from ml.labelling import DAY_SECONDS, STATUSES, ConceptTasks, MemberRows, TaskRules
from workers.bridge import SPLITS, binary_cursor, coded
from workers.bridge.labelling import LabelMembers, LabelTasks, StatementEvents, packed_array

if TYPE_CHECKING:
    from sqlalchemy import Connection


def rules_digest(version: int, rules: TaskRules, concept_tasks: ConceptTasks, definitions: bytes) -> bytes:
    """sha256 over all that labels depend on beside a member's own inputs."""
    digest = hashlib.sha256(f"rules {version}\n".encode() + definitions + rules.table().tobytes())
    for field in fields(concept_tasks):
        digest.update(np.ascontiguousarray(getattr(concept_tasks, field.name)).tobytes() + b"\n")
    return digest.digest()


def read_definitions(connection: Connection, task_set_id: int) -> bytes:
    """sha256 over the tasks of a set as they are defined, codes resolved."""
    statement = "SELECT definitions_digest FROM label.task_set WHERE task_set_id = %s"
    return bytes(binary_cursor(connection).execute(statement, (task_set_id,)).fetchone()[0])


def input_digests(
    members: LabelMembers, events: StatementEvents, timelines: Sequence[tuple[int, bytes]]
) -> list[bytes]:
    """sha256 a member over its person, scan, times, visit, clocks, timeline and rows that statements chose.

    Of two members with the same digest (and the same rules) the labels are the same, whichever keys they have.
    """
    columns = [members.person, members.index_date_only, members.has_end, members.has_cut]
    columns += [getattr(members.rows, f.name) for f in fields(MemberRows) if f.name not in ("person_row", "clocks")]
    clocks = members.rows.clocks
    columns += [clocks[:, r, what] for r in range(clocks.shape[1]) for what in range(2)]
    numbers = np.column_stack([column.astype(np.int64) for column in columns])
    chosen = np.column_stack([events.time, events.concept.astype(np.int64)])
    lows = np.searchsorted(events.person, members.person).tolist()
    highs = np.searchsorted(events.person, members.person, side="right").tolist()
    of_timeline = dict(timelines)
    found = []
    for n, person in enumerate(members.person.tolist()):
        digest = hashlib.sha256(numbers[n].tobytes())
        digest.update(of_timeline.get(person, b"-") + b"\n" + members.image_key[n].encode() + b"\n")
        if highs[n] > lows[n]:
            digest.update(chosen[lows[n] : highs[n]].tobytes())
        found.append(digest.digest())
    return found


_OF_STATEMENT = f"SELECT DISTINCT concept_id FROM ({outcomes.WITH_DESCENDANTS}) c ORDER BY 1"


def read_meaning(
    connection: Connection, concept_tasks: ConceptTasks, tasks: LabelTasks
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(position, concept) of all concepts whose events are outcomes, those of statements, too; ascending."""
    concept = np.repeat(concept_tasks.concept, np.diff(concept_tasks.ptr)).astype(np.int64)
    plain = concept >= 0
    positions, concepts = [concept_tasks.task[plain].astype(np.int64)], [concept[plain]]
    together, apart = coded_outcomes.split(tasks.by_statement)
    if together:
        of_codes = np.unique(coded.read_codes(connection, together)[:, :2], axis=0)
        positions.append(of_codes[:, 0])
        concepts.append(of_codes[:, 1])
    for position, definition in apart.items():
        _, values = outcomes.statement(definition)
        rows = binary_cursor(connection).execute(_OF_STATEMENT, values).fetchall()
        found = np.array(sorted({row[0] for row in rows} | set(values["source_concepts"])), np.int64)
        positions.append(np.full(len(found), position))
        concepts.append(found)
    all_positions, all_concepts = np.concatenate(positions), np.concatenate(concepts)
    order = np.lexsort((all_concepts, all_positions))
    return all_positions[order], all_concepts[order]


def meaning_row(label_set_id: int, position: NDArray[np.int64], concept: NDArray[np.int64]) -> bytes:
    """The row of label.label_meaning in binary COPY form."""
    fields = [struct.pack(">i", label_set_id), packed_array(position, "i2", 21), packed_array(concept, "i4", 23)]
    return struct.pack(">h", len(fields)) + b"".join(struct.pack(">i", len(field)) + field for field in fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Members of an earlier version, with the digests that were kept; ordered by person and input."""

    label_set_id: int
    name: str
    member: NDArray[np.int64]
    person: NDArray[np.int64]
    split: NDArray[np.int8]
    inputs: list[bytes]
    labels: list[bytes]


_EARLIER = """
SELECT label_set_id, name || '@' || version FROM label.label_set
WHERE name = %s AND rules_digest = %s ORDER BY is_current DESC, version DESC LIMIT 1
"""

_KEPT = """
SELECT y.cohort_member_id, m.person_id, array_position(%s::text[], m.split) - 1, d.input_digest, d.label_digest
FROM label.tte y JOIN label.cohort_member m USING (cohort_member_id)
LEFT JOIN label.member_digest d USING (label_set_id, cohort_member_id)
WHERE y.label_set_id = %s ORDER BY m.person_id, d.input_digest, y.cohort_member_id
"""


def read_kept(connection: Connection, name: str, rules: bytes) -> Kept | None:
    """The newest version of a name that was made by the same rules and kept its digests; None where there is none."""
    found = binary_cursor(connection).execute(_EARLIER, (name, rules)).fetchone()
    if found is None:
        return None
    rows = binary_cursor(connection).execute(_KEPT, (list(SPLITS), found[0])).fetchall()
    if not rows or any(row[3] is None or row[4] is None for row in rows):
        return None
    member, person, split, inputs, labels = zip(*rows, strict=True)
    return Kept(
        label_set_id=found[0],
        name=found[1],
        member=np.array(member, np.int64),
        person=np.array(person, np.int64),
        split=np.array(split, np.int8),
        inputs=[bytes(digest) for digest in inputs],
        labels=[bytes(digest) for digest in labels],
    )


_COUNTS = """
SELECT array_position(%s::text[], split) - 1, array_position(%s::text[], status) - 1, n, persons, person_days
FROM label.status_count WHERE label_set_id = %s
"""


def read_counts(connection: Connection, label_set_id: int, num_tasks: int) -> NDArray[np.int64]:
    """(split, status, 3, K) as `Labeller.counts`: members, persons, seconds at risk, as a label set stored them."""
    counts = np.zeros((len(SPLITS), len(STATUSES), 3, num_tasks), np.int64)
    rows: list[Any] = (
        binary_cursor(connection).execute(_COUNTS, (list(SPLITS), list(STATUSES), label_set_id)).fetchall()
    )
    for split, status, n, persons, days in rows:
        counts[split, status] = [n, persons, np.rint(np.array(days) * DAY_SECONDS).astype(np.int64)]
    return counts
