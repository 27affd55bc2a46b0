"""Labels of a cohort as arrays, and the kernel that makes them from packed timelines.

Shape suffixes: N = cohort member (one scan), K = task, E = observed outcome (sparse).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAY_SECONDS = 86_400

EVENT, COMPETING, CENSORED, PRIOR, INELIGIBLE = range(5)
STATUSES = ("event", "competing", "censored", "prior", "ineligible")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparse:
    """Positions of tasks a member has something in, as compressed rows; positions ascend within a member."""

    ptr: NDArray[np.int64]
    """(N + 1,) where each member's entries begin."""
    task: NDArray[np.int16]
    """(E,) task positions."""
    seconds: NDArray[np.int64] | None = None
    """(E,) seconds from the index, where the list carries times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelArrays:
    """`label.tte` of N members and the K tasks of their task set (docs/science.md sections 1 and 2)."""

    member: NDArray[np.int64]
    """(N,) cohort_member_id, ascending."""
    eligible: NDArray[np.bool_]
    """(N,) False for members that no task may use."""
    events: Sparse
    """Observed outcomes only (status event), seconds from the index."""
    priors: Sparse
    """Tasks with history before the window opens, whatever the task makes of it."""
    ineligibles: Sparse
    """Tasks ineligible for this member alone."""
    windows: Sparse
    """Where the window opens other than at the task's start_seconds (readmission); seconds from the index."""
    visits: Sparse
    """Tasks seen in the visit that holds the index (arm `visit`)."""
    follow_up_seconds: NDArray[np.int64]
    """(N,) end of follow-up from the index; -1 where there is none."""
    data_cut_seconds: NDArray[np.int64]
    """(N,) the end for tasks followed to the data cut, that of follow-up where no cut is known; -1 where neither is."""
    death_seconds: NDArray[np.int64]
    """(N,) death from the index; -1 where none is recorded."""
    start_seconds: NDArray[np.int64]
    """(K,) opening of the risk window from the index."""
    excludes_prior: NDArray[np.bool_]
    """(K,) True where prior history disqualifies."""
    competing: NDArray[np.bool_]
    """(K,) True where death competes, False where it censors."""
    to_data_cut: NDArray[np.bool_]
    """(K,) True where follow-up ends at the data cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOutcomes:
    """One task at all N members, dense."""

    status: NDArray[np.int8]
    """(N,) EVENT, COMPETING, CENSORED, PRIOR or INELIGIBLE."""
    time_days: NDArray[np.float64]
    """(N,) days from the index to event, competing death or end of follow-up; nan where prior or ineligible."""
    start_days: NDArray[np.float64]
    """(N,) days from the index to the opening of the risk window; exposure starts there."""


def task_outcomes(labels: LabelArrays, position: int) -> TaskOutcomes:
    """What became of every member under one task: the first of ineligible, prior, event, competing, censored.

    Args:
        labels: the label set.
        position: the task's position, 0 to K - 1.

    Raises:
        ValueError: no such position.
    """
    if not 0 <= position < len(labels.start_seconds):
        raise ValueError(f"Expected a task position from 0 to {len(labels.start_seconds) - 1}, got {position}.")
    rows, seconds = _entries(labels.windows, position)
    opens = np.full(len(labels.member), labels.start_seconds[position])
    opens[rows] = seconds
    end = labels.data_cut_seconds if labels.to_data_cut[position] else labels.follow_up_seconds

    ineligible = ~labels.eligible | (end <= opens)
    ineligible[_entries(labels.ineligibles, position)[0]] = True
    prior = np.zeros(len(end), np.bool_)
    if labels.excludes_prior[position]:
        prior[_entries(labels.priors, position)[0]] = True
    died = labels.competing[position] & (labels.death_seconds >= 0) & (labels.death_seconds <= end)

    status = np.where(died, COMPETING, CENSORED).astype(np.int8)
    time = np.where(died, labels.death_seconds, end).astype(np.float64)
    rows, seconds = _entries(labels.events, position)
    status[rows], time[rows] = EVENT, seconds
    status[prior] = PRIOR
    status[ineligible] = INELIGIBLE
    time[prior | ineligible] = np.nan
    return TaskOutcomes(status=status, time_days=time / DAY_SECONDS, start_days=opens / DAY_SECONDS)


def _entries(sparse: Sparse, position: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Members (as row numbers) that have the task in a list, and its seconds (zeros where the list has none)."""
    entry = np.flatnonzero(sparse.task == position)
    rows = np.searchsorted(sparse.ptr, entry, side="right") - 1
    return rows, np.zeros(len(entry), np.int64) if sparse.seconds is None else sparse.seconds[entry]
