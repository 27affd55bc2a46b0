"""Members by split and status, counted from labels that are there already: what the kernel counts while it labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ml.labelling import CENSORED, COMPETING, EVENT, INELIGIBLE, PRIOR, STATUSES, LabelArrays, Sparse

NUM_SPLITS = 3


def count_members(labels: LabelArrays, person: NDArray[np.int64], split: NDArray[np.int8]) -> NDArray[np.int64]:
    """(split, status, 3, K): members, persons and seconds at risk inside the window.

    Args:
        labels: the labels of N members; dense work, N times K.
        person: (N,) whose they are; all members of a person must be among them.
        split: (N,) 0 train, 1 tuning, 2 held out; one a person.
    """
    num_tasks = len(labels.start_seconds)
    counts = np.zeros((NUM_SPLITS, len(STATUSES), 3, num_tasks), np.int64)
    every = np.arange(num_tasks)
    seen, seen_person = np.zeros((len(STATUSES), num_tasks), np.bool_), -1
    for n in np.argsort(person, kind="stable").tolist():
        if person[n] != seen_person:
            seen[:], seen_person = False, person[n]
        status, at_risk = _of_member(labels, n)
        count = counts[split[n]]
        count[status, 0, every] += 1
        count[status, 1, every] += ~seen[status, every]
        seen[status, every] = True
        count[status, 2, every] += np.where(status <= CENSORED, at_risk, 0)
    return counts


def _of_member(labels: LabelArrays, n: int) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Status (K,) of each task at one member, and seconds (K,) from the opening of its window to its end."""
    tasks, seconds = _entries(labels.windows, n)
    opens = labels.start_seconds.copy()
    opens[tasks] = seconds
    end = np.where(labels.to_data_cut, labels.data_cut_seconds[n], labels.follow_up_seconds[n])
    death = labels.death_seconds[n]
    died = labels.competing & (death >= 0) & (death <= end)
    status = np.where(died, COMPETING, CENSORED).astype(np.int8)
    until = np.where(died, death, end)
    tasks, seconds = _entries(labels.events, n)
    status[tasks], until[tasks] = EVENT, seconds
    prior = _entries(labels.priors, n)[0]
    status[prior[labels.excludes_prior[prior]]] = PRIOR
    status[_entries(labels.ineligibles, n)[0]] = INELIGIBLE
    status[(end <= opens) | ~labels.eligible[n]] = INELIGIBLE
    return status, until - opens


def _entries(sparse: Sparse, n: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Tasks of one member in a list, and their seconds (none where the list has no times)."""
    part = slice(sparse.ptr[n], sparse.ptr[n + 1])
    return sparse.task[part], np.empty(0, np.int64) if sparse.seconds is None else sparse.seconds[part]
