"""Measurements, side by side in one run; never timed tests. `make bench` prints a row a line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure against its target."""

    row: str
    figure: float
    unit: str
    target: float
    at_least: bool = True

    @property
    def ok(self) -> bool:
        return self.figure >= self.target if self.at_least else self.figure <= self.target

    def __str__(self) -> str:
        sign = "" if self.at_least else "<= "
        return f"{self.row}\t{self.figure:.4g}\t{self.unit}\t{sign}{self.target:g}\t{'ok' if self.ok else 'short'}"


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_ratio(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    pairs: int = 5,
    *,
    before: Callable[[], object] = lambda: None,
) -> tuple[float, float, float]:
    """Time ours and theirs in turn; the median of theirs / ours, and the median seconds of each.

    Interleaving shares a noisy machine's weather fairly between the two. `before` is called ahead of each pair and not
    timed.
    """
    mine, other = [], []
    for _ in range(pairs):
        before()
        mine.append(seconds(ours))
        other.append(seconds(theirs))
    ratio = statistics.median(b / a for a, b in zip(mine, other, strict=True))
    return ratio, statistics.median(mine), statistics.median(other)
