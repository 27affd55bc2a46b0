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
    """(N,) the end for tasks followed to the data cut; -1 where unknown."""
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
