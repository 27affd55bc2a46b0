"""Label arrays from dense ones, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from ml.labelling import DAY_SECONDS, LabelArrays, Sparse


def sparse(cells: np.ndarray, seconds: np.ndarray | None = None) -> Sparse:
    """The True cells of (N, K) as a sparse list, with their seconds."""
    rows, tasks = np.nonzero(cells)
    ptr = np.concatenate([[0], np.cumsum(cells.sum(1))]).astype(np.int64)
    values = None if seconds is None else seconds[rows, tasks].astype(np.int64)
    return Sparse(ptr=ptr, task=tasks.astype(np.int16), seconds=values)


def label_arrays(event: np.ndarray, seconds: np.ndarray, **changes: Any) -> LabelArrays:
    """Labels of N members and K tasks: `event` (N, K) observed at `seconds` from the index; five years of follow-up."""
    n, k = event.shape
    nothing = np.zeros((n, k), np.bool_)
    fields: dict[str, Any] = {
        "member": np.arange(n) + 100,
        "eligible": np.ones(n, np.bool_),
        "events": sparse(event, seconds),
        "priors": sparse(nothing),
        "ineligibles": sparse(nothing),
        "windows": sparse(nothing, seconds),
        "visits": sparse(nothing),
        "follow_up_seconds": np.full(n, 1826 * DAY_SECONDS),
        "data_cut_seconds": np.full(n, 1826 * DAY_SECONDS),
        "death_seconds": np.full(n, -1),
        "start_seconds": np.zeros(k, np.int64),
        "excludes_prior": np.zeros(k, np.bool_),
        "competing": np.zeros(k, np.bool_),
        "to_data_cut": np.zeros(k, np.bool_),
    }
    return LabelArrays(**{**fields, **changes})


def exponential_labels(n: int, k: int, seed: int = 0, **changes: Any) -> LabelArrays:
    """Exponential outcomes of different rates, five years of follow-up."""
    rng = np.random.default_rng(seed)
    seconds = (rng.exponential(rng.uniform(300, 6000, k), (n, k)) * DAY_SECONDS).astype(np.int64) + 1
    return label_arrays(seconds <= 1826 * DAY_SECONDS, seconds, **changes)
