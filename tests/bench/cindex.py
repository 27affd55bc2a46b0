"""`cindex`: 1,000 bootstraps by person of Harrell's C on 20,000 scans against scikit-survival called in a loop."""

from __future__ import annotations

import statistics

import numpy as np
from sksurv.metrics import concordance_index_censored

from ml.metrics import draw_persons
from ml.pairs import concordance
from tests.bench import Row, seconds

SCANS, REPLICATES = 20_000, 1_000
SHARE = 8
"""Bootstraps that scikit-survival does in each of the five pairs; it would need minutes for all, so this is scaled."""


def run() -> list[Row]:
    """How many times faster, and how far the replicates are apart; one scan a person, as the peer knows no persons."""
    rng = np.random.default_rng(0)
    risk = rng.normal(size=SCANS)
    onset, end = rng.exponential(np.exp(-0.5 * risk)), rng.exponential(1.5, SCANS)
    time, event = np.minimum(onset, end).round(4), onset <= end
    everyone, ones = np.arange(SCANS), np.ones(SCANS)
    concordance(time[:99], event[:99], risk[:99], everyone[:99], ones[:99], draw_persons(99, 2, 0))  # compile
    found: dict[str, list[float]] = {"theirs": []}

    def ours() -> None:
        concordant, comparable = concordance(time, event, risk, everyone, ones, draw_persons(SCANS, REPLICATES, 0))
        found["ours"] = (concordant / comparable).tolist()

    def theirs() -> None:
        for _ in range(SHARE):
            drawn = draws[:, len(found["theirs"])]
            rows = np.repeat(everyone, drawn)
            found["theirs"].append(concordance_index_censored(event[rows], time[rows], risk[rows])[0])

    draws = draw_persons(SCANS, REPLICATES, 0)
    pairs = [(seconds(ours), seconds(theirs) * REPLICATES / SHARE) for _ in range(5)]
    ratio = statistics.median(b / a for a, b in pairs)
    mine, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
    apart = max(abs(a - b) for a, b in zip(found["ours"], found["theirs"], strict=False))
    unit = f"times scikit-survival ({mine:.3g} s, {peer:.3g} s scaled from {SHARE} of {REPLICATES})"
    return [
        Row(row="cindex", figure=ratio, unit=unit, target=100),
        Row(row="cindex", figure=apart, unit="largest difference of replicates", target=1e-9, at_least=False),
    ]
