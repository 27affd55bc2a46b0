"""A check of leakage that labels anew: outcomes found in what happened after the index alone."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.store import leakage as store
from app.store.leakage import Answer, Check
from app.store.work import Work
from ml.labelling import Labeller, Sparse
from workers.bridge import LabelSetInfo, Timelines, read_labels
from workers.stages.label import Inputs, part_inputs, read_inputs
from workers.stages.label_timelines import ReadAhead

if TYPE_CHECKING:
    from sqlalchemy import Connection

NEED_NO_PAST = Check(
    name="labels_need_no_past",
    asks="outcomes do not change when all events up to the index are taken away",
    mend="label again: `lachesis label NAME --full`; rows of label.tte were changed by hand",
)

Cells = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Keys of (member, task), ascending, and seconds from the index."""


def labels_need_no_past(work: Work, connection: Connection, info: LabelSetInfo) -> Answer:
    """Outcomes of all members and tasks, found anew after the index alone, are those that are stored.

    History may take an outcome away (its task excludes prior), and opens windows (discharge): both are left as stored.
    """
    from sqlalchemy import text

    made = connection.execute(text(store.LABEL_SET), {"label_set": info.label_set_id}).one()
    inputs = read_inputs(connection, made.cohort, made.task_set)
    if inputs.data_digest != bytes(made.data_digest):
        return NEED_NO_PAST.not_made("the records have changed since these labels were made; label again")
    labels = read_labels(connection, info)
    found = _found_anew(work, connection, inputs, labels.member)
    stored = _cells(labels.events, np.arange(len(labels.member)))
    priors = _cells(labels.priors, np.arange(len(labels.member)))[0]
    excluded = priors[labels.excludes_prior[priors & _TASK]]
    wrong = _differences(_without(found, excluded), stored)
    rows = len(labels.member) * len(info.task_names)
    return NEED_NO_PAST.counted(rows, wrong, f"{wrong:,} of {rows:,} scans and tasks differ")


_TASK = (1 << 15) - 1


def _found_anew(work: Work, connection: Connection, inputs: Inputs, member: NDArray[np.int64]) -> Cells:
    """Outcomes after the index alone."""
    labeller = Labeller(inputs.rules, inputs.concept_tasks)
    keys, seconds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    with closing(ReadAhead.of(connection, inputs.members, inputs.persons, inputs.num_events)) as read:
        for part, timelines in read.of_members(inputs.members):
            work.progress(part.stop, len(member), "scans", "labelling anew")
            key, second = _cells(
                _label_later(labeller, inputs, part, timelines), np.searchsorted(member, inputs.members.member[part])
            )
            keys.append(key)
            seconds.append(second)
    key, second = np.concatenate(keys), np.concatenate(seconds)
    order = np.argsort(key)
    return key[order], second[order]


def _label_later(labeller: Labeller, inputs: Inputs, part: slice, timelines: Timelines) -> Sparse:
    """Outcomes of some members, each with a stretch of its own that begins after its index."""
    times, concepts, ptr, rows = part_inputs(timelines, inputs, part)
    person = rows.person_row
    lengths = ptr[person + 1] - ptr[person]
    ends = np.cumsum(lengths)
    take = np.arange(int(ends[-1])) + np.repeat(ptr[person] - (ends - lengths), lengths)
    kept = times[take] >> 1 > np.repeat(rows.index, lengths)
    after = np.concatenate([[0], np.cumsum(kept)])
    take = take[kept]
    own = np.concatenate([[0], after[ends]]).astype(np.int64)
    alone = replace(rows, person_row=np.arange(len(person)))
    return labeller.label(times[take], concepts[take], own, alone).events


def _cells(sparse: Sparse, place: NDArray[np.int64]) -> Cells:
    """Entries of a list whose n-th member is the `place[n]`-th."""
    key = np.repeat(place, np.diff(sparse.ptr)) * (_TASK + 1) + sparse.task
    seconds = np.zeros(len(key), np.int64) if sparse.seconds is None else sparse.seconds
    return key, seconds


def _without(cells: Cells, keys: NDArray[np.int64]) -> Cells:
    kept = ~np.isin(cells[0], keys)
    return cells[0][kept], cells[1][kept]


def _differences(one: Cells, other: Cells) -> int:
    """Cells that only one has, or whose seconds differ."""
    shared, a, b = np.intersect1d(one[0], other[0], return_indices=True)
    return len(one[0]) + len(other[0]) - 2 * len(shared) + int((one[1][a] != other[1][b]).sum())
