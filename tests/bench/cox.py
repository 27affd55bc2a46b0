"""`cox`: ridge Cox on 4,000 scans × 512 features against scikit-survival, the same coefficients to 1e-6."""

from __future__ import annotations

import numpy as np
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv
from threadpoolctl import threadpool_limits

from ml.survival import fit_cox
from tests.bench import Row, median_ratio

SCANS, WIDTH, PENALTY = 4_000, 512, 1.0


def run() -> list[Row]:
    """How many times faster, and how far the coefficients are apart; one core each, as the peer uses no more."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SCANS, WIDTH))
    time, event = rng.exponential(np.exp(-x[:, 0])), rng.random(SCANS) < 0.5
    outcomes = Surv.from_arrays(event, time)
    fit_cox(x[:100], time[:100], event[:100], penalty=PENALTY)  # compile
    with threadpool_limits(1):
        ratio, ours, theirs = median_ratio(
            lambda: fit_cox(x, time, event, penalty=PENALTY),
            lambda: CoxPHSurvivalAnalysis(alpha=PENALTY).fit(x, outcomes),
        )
    exact = CoxPHSurvivalAnalysis(alpha=PENALTY, tol=1e-13, n_iter=200).fit(x, outcomes).coef_
    apart = float(np.abs(fit_cox(x, time, event, penalty=PENALTY).coefficients - exact).max())
    return [
        Row(row="cox", figure=ratio, unit=f"times scikit-survival ({ours:.3g} s, {theirs:.3g} s)", target=50),
        Row(row="cox", figure=apart, unit="largest difference of coefficients", target=1e-6, at_least=False),
    ]
