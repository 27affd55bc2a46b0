"""What a new version of labels takes over from an earlier one: persons whose inputs are the same, rows and counts.

A member's labels are a function of the rules and of its own inputs, both of which a label set keeps digests of. Persons
whose members all have the inputs they had are copied by one statement; what is left is computed. Counts are those of
the earlier version, less the persons that are not taken over, plus those that are computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.errors import StoreError
from workers.bridge import find_label_set, read_labels
from workers.bridge.kept import Kept, read_counts, read_kept

if TYPE_CHECKING:
    from sqlalchemy import Connection

MOST_COMPUTED = 0.5
"""Where more of the members than this are to be computed, all are: copying would save little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenOver:
    """Members of the version in the making whose labels are there already."""

    label_set_id: int
    name: str
    """Where they are, as NAME@1."""
    old: NDArray[np.int64]
    """Members there …"""
    new: NDArray[np.int64]
    """… and here, in the same order."""
    digests: dict[int, bytes]
    """Member here → digest of its labels."""
    counts: NDArray[np.int64]
    """(split, status, 3, K) of these members."""


def find(
    connection: Connection,
    name: str,
    *,
    rules_digest: bytes,
    member: NDArray[np.int64],
    person: NDArray[np.int64],
    inputs: Sequence[bytes],
    num_tasks: int,
) -> TakenOver | None:
    """What an earlier version of `name` has of these members (`person` ascending); None where it would not pay."""
    kept = read_kept(connection, name, rules_digest)
    if kept is None:
        return None
    old, new = match(kept, member, person, inputs)
    if len(member) - len(new) > MOST_COMPUTED * len(member):
        return None
    counts = read_counts(connection, kept.label_set_id, num_tasks)
    gone = np.flatnonzero(~np.isin(kept.member, kept.member[old]))
    counts -= count_gone(connection, kept, gone, num_tasks)
    return TakenOver(
        label_set_id=kept.label_set_id,
        name=kept.name,
        old=kept.member[old],
        new=member[new],
        digests={int(member[n]): kept.labels[o] for o, n in zip(old, new, strict=True)},
        counts=counts,
    )


def match(
    kept: Kept, member: NDArray[np.int64], person: NDArray[np.int64], inputs: Sequence[bytes]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows there and here of the persons whose members all have the inputs they had, and no others."""
    before: dict[int, list[int]] = {}
    for row, who in enumerate(kept.person.tolist()):  # ordered by person and input
        before.setdefault(who, []).append(row)
    old: list[int] = []
    new: list[int] = []
    for who, group in itertools.groupby(range(len(member)), key=person.tolist().__getitem__):
        here = sorted(group, key=inputs.__getitem__)
        there = before.get(who, [])
        if [inputs[n] for n in here] == [kept.inputs[o] for o in there]:
            old += there
            new += here
    return np.array(old, np.int64), np.array(new, np.int64)


def count_gone(connection: Connection, kept: Kept, gone: NDArray[np.int64], num_tasks: int) -> NDArray[np.int64]:
    """Counts of the members (rows of `kept`) that are not taken over, from their stored labels."""
    from ml.label_counts import count_members

    if not len(gone):
        return np.zeros((1, 1, 1, num_tasks), np.int64)
    order = gone[np.argsort(kept.member[gone])]
    labels = read_labels(connection, find_label_set(connection, kept.name), kept.member[order])
    return count_members(labels, kept.person[order], kept.split[order])


COPY = """
INSERT INTO label.tte ({columns})
SELECT %(to)s, k.new, {lists}
FROM unnest(%(old)s::int8[], %(new)s::int8[]) k(old, new)
JOIN label.tte y ON y.label_set_id = %(from)s AND y.cohort_member_id = k.old
ORDER BY k.new
"""
LISTS = (
    *("event_tasks", "event_seconds", "prior_tasks", "ineligible_tasks", "window_tasks", "window_seconds"),
    *("visit_tasks", "follow_up_seconds", "data_cut_seconds", "death_seconds"),
)


def copy_rows(connection: Connection, taken: TakenOver, label_set_id: int) -> None:
    """Write the rows of the members that are taken over. Raises StoreError where some have gone meanwhile."""
    from app.store.session import raw

    columns = ", ".join(("label_set_id", "cohort_member_id", *LISTS))
    statement = COPY.format(columns=columns, lists=", ".join(f"y.{name}" for name in LISTS))
    values = {"from": taken.label_set_id, "to": label_set_id, "old": taken.old.tolist(), "new": taken.new.tolist()}
    copied = raw(connection).execute(statement.encode(), values).rowcount
    if copied != len(taken.new):
        raise StoreError(
            f"Expected {len(taken.new):,} rows to take over from {taken.name}, found {copied:,}: some were removed "
            "meanwhile; run the command again."
        )
