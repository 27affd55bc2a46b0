"""Metrics against scikit-survival, R and their definitions; intervals that resample persons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sksurv.datasets import load_gbsg2, load_whas500
from sksurv.metrics import (
    concordance_index_censored,
    concordance_index_ipcw,
    cumulative_dynamic_auc,
    integrated_brier_score,
)
from sksurv.util import Surv

from ml.metrics import (
    METRICS,
    Estimate,
    FollowUp,
    Judged,
    Outcomes,
    at_horizon,
    difference,
    draw_persons,
    estimate,
    follow_up,
    mean_of,
)
from ml.pairs import case_control, concordance
from ml.survival import baseline_hazard, fit_cox
from tests.reference import survival as slow

SCANS = st.lists(
    st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 4), st.integers(0, 4), st.floats(0.25, 4)),
    min_size=2,
    max_size=18,
)
DRAWN = st.lists(st.integers(0, 3), min_size=5, max_size=5)


@given(SCANS, st.lists(DRAWN, min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_concordance_counts_every_pair_of_different_persons_with_its_weight(scans: list, draws: list) -> None:
    time, event, risk, person, opened = (np.array(column) for column in zip(*scans, strict=True))
    weights = np.array(draws, np.uint16).T
    ours = concordance(time.astype(float), event, risk.astype(float), person, opened, weights)
    for k, drawn in enumerate(draws):
        expected = slow.pair_counts(time, event, risk, person, opened, drawn)
        assert (ours[0][k], ours[1][k]) == pytest.approx(expected)


@given(SCANS, st.lists(DRAWN, min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_case_control_counts_every_pair_of_different_persons_with_its_weight(scans: list, draws: list) -> None:
    _, case, risk, person, size = (np.array(column) for column in zip(*scans, strict=True))
    weights = np.array(draws, np.uint16).T
    cases, controls = case * size, ~case * (size + 1)
    ours = case_control(cases, controls, risk.astype(float), person, weights)
    for k, drawn in enumerate(draws):
        expected = slow.case_control_counts(cases, controls, risk, person, drawn)
        assert (ours[0][k], ours[1][k]) == pytest.approx(expected)


def test_a_resample_counts_as_scikit_survival_does_on_the_repeated_scans() -> None:
    rng = np.random.default_rng(0)
    risk = rng.normal(size=400).round(1)
    time, event = rng.exponential(np.exp(-risk)), rng.random(400) < 0.5
    drawn = draw_persons(400, 20, seed=1)
    concordant, comparable = concordance(time, event, risk, np.arange(400), np.ones(400), drawn)
    for k in range(20):
        rows = np.repeat(np.arange(400), drawn[:, k])
        theirs = concordance_index_censored(event[rows], time[rows], risk[rows])[0]
        assert concordant[k] / comparable[k] == pytest.approx(theirs, abs=1e-12)


def outcomes(time: np.ndarray, event: np.ndarray, **change: np.ndarray) -> Outcomes:
    """Outcomes of one scan a person, none competing."""
    n = len(time)
    given = {"competing": np.zeros(n, bool), "person": np.arange(n), **change}
    return Outcomes(time=np.asarray(time, float), event=np.asarray(event, bool), **given)


def halves(name: str) -> tuple[Outcomes, Outcomes, np.ndarray, np.ndarray]:
    """Real data without ties of event and censoring: train, test, log hazards of test, survival on the grid."""
    x, y = (load_whas500 if name == "whas500" else load_gbsg2)()
    x = x.select_dtypes("number").to_numpy(float) if name == "gbsg2" else x.astype(float).to_numpy()
    x = (x - x.mean(0)) / x.std(0)
    event, time = y[y.dtype.names[0]], y[y.dtype.names[1]]
    time = time + np.where(event, 0.0, 0.25) + np.random.default_rng(0).uniform(0, 0.2, len(time))
    test = np.arange(len(x)) % 3 == 0
    train, judged = outcomes(time[~test], event[~test]), outcomes(time[test], event[test])
    fit = fit_cox(x[~test], train.time, train.event, penalty=1.0)
    baseline = baseline_hazard(fit.log_hazard(x[~test]), train.time, train.event)
    risk = fit.log_hazard(x[test])
    return train, judged, risk, baseline.survival(risk, follow_up(train).grid)


def once(judged: Judged) -> np.ndarray:
    """Weights that take every person once."""
    return np.ones((int(judged.outcomes.person.max()) + 1, 1), np.uint16)


@pytest.mark.parametrize("name", ["whas500", "gbsg2"])
def test_metrics_are_those_of_scikit_survival(name: str) -> None:
    train, test, risk, survival = halves(name)
    known = follow_up(train)
    judged = Judged(outcomes=test, follow_up=known, risk=risk, survival=survival, horizon_days=700)
    ours = {metric: float(METRICS[metric].function(judged, once(judged))[0]) for metric in METRICS}
    theirs_train = Surv.from_arrays(train.event, train.time)
    theirs_test = Surv.from_arrays(test.event, test.time)
    assert ours["harrell_c"] == pytest.approx(concordance_index_censored(test.event, test.time, risk)[0], abs=1e-12)
    uno = concordance_index_ipcw(theirs_train, theirs_test, risk, tau=known.tau)[0]
    assert ours["uno_c"] == pytest.approx(uno, abs=1e-10)
    auc = cumulative_dynamic_auc(theirs_train, theirs_test, risk, [700.0])[0][0]
    assert ours["auroc"] == pytest.approx(auc, abs=1e-10)
    within = integrated_brier_score(theirs_train, theirs_test, survival, known.grid)
    assert ours["ibs"] == pytest.approx(within, abs=1e-10)
    null = np.tile(known.survival.at(known.grid), (len(test), 1))
    without = integrated_brier_score(theirs_train, theirs_test, null, known.grid)
    assert ours["ibs_skill"] == pytest.approx(1 - within / without, abs=1e-9) and 0 < ours["ibs_skill"] < 0.5


def test_concordance_is_that_of_r(real_data: Path) -> None:
    folder = real_data / "survival_reference_R_torchsurv" / "benchmark_data"
    for case in json.loads((folder / "benchmark_cindex.json").read_text()):
        time, event, risk = (np.array(case[k]) for k in ("test_time", "test_status", "estimate"))
        ones = np.ones((len(time), 1), np.uint16)
        concordant, comparable = concordance(
            time.astype(float), event, risk, np.arange(len(time)), np.ones(len(time)), ones
        )
        assert concordant[0] / comparable[0] == pytest.approx(case["c_Harrell_survival"][0], abs=1e-4)


def test_uno_c_is_that_of_r(real_data: Path) -> None:
    folder = real_data / "survival_reference_R_torchsurv" / "benchmark_data"
    for case in json.loads((folder / "benchmark_cindex.json").read_text()):
        test = outcomes(np.array(case["test_time"]), np.array(case["test_status"]))
        known = replace(follow_up(test), tau=float(max(case["times"])))  # survC1 takes G from the scans it judges
        judged = Judged(outcomes=test, follow_up=known, risk=np.array(case["estimate"]))
        # R's G jumps before the events of the same day, ours after them
        assert METRICS["uno_c"].function(judged, once(judged))[0] == pytest.approx(case["c_Uno_survC1"][0], abs=5e-4)


def test_auroc_at_a_horizon_is_that_of_r(real_data: Path) -> None:
    folder = real_data / "survival_reference_R_torchsurv" / "benchmark_data"
    compared = 0
    for case in json.loads((folder / "benchmark_auc.json").read_text()):
        train = outcomes(np.array(case["train_time"]), np.array(case["train_status"]))
        test = outcomes(np.array(case["test_time"]), np.array(case["test_status"]))
        known = follow_up(train)
        for at, expected in zip(case["times"], case["auc_cd_survAUC"], strict=True):
            if at > known.tau or expected is None:
                continue
            judged = Judged(outcomes=test, follow_up=known, risk=np.array(case["estimate"]), horizon_days=at)
            # survAUC weights with G(t), we with its left limit: apart by a censoring at the very time of an event
            assert METRICS["auroc"].function(judged, once(judged))[0] == pytest.approx(float(expected), abs=0.02)
            compared += 1
    assert compared > 100


def simulated(n: int, seed: int, effect: float = 0.8) -> tuple[Outcomes, np.ndarray]:
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    onset, end = rng.exponential(np.exp(-effect * risk) * 1000), rng.uniform(200, 2500, n)
    return outcomes(np.minimum(onset, end), onset <= end), risk


def test_copying_every_scan_ten_times_keeps_the_value_and_the_width_of_its_interval() -> None:
    test, risk = simulated(250, 3)
    known = follow_up(simulated(2000, 4)[0])
    drawn = draw_persons(250, 1000, seed=0)
    rows = np.repeat(np.arange(250), 10)
    for name in ("harrell_c", "uno_c", "auroc"):
        plain = Judged(outcomes=test, follow_up=known, risk=risk, horizon_days=730)
        copied = Judged(outcomes=test.take(rows), follow_up=known, risk=risk[rows], horizon_days=730)
        one, ten = estimate(name, plain, drawn), estimate(name, copied, drawn)
        assert ten.value == pytest.approx(one.value, abs=1e-12)
        assert ten.interval() == pytest.approx(one.interval(), abs=1e-12)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    known = follow_up(simulated(4000, 5)[0])
    truth, risk = simulated(40_000, 6)
    drawn = np.ones((40_000, 1), np.uint16)
    value = METRICS["harrell_c"].function(Judged(outcomes=truth, follow_up=known, risk=risk), drawn)[0]
    covered = 0
    for seed in range(100):
        test, risk = simulated(200, 1000 + seed)
        low, high = estimate(
            "harrell_c", Judged(outcomes=test, follow_up=known, risk=risk), draw_persons(200, 300, seed)
        ).interval() or (1.0, 0.0)
        covered += low <= value <= high
    assert 87 <= covered <= 99


def test_a_competing_event_before_the_horizon_is_a_control_and_a_censoring_is_none() -> None:
    known = follow_up(simulated(500, 7)[0])
    test = outcomes(
        np.array([100.0, 100.0, 100.0, 800.0]),
        np.array([True, False, False, False]),
        competing=np.array([False, True, False, False]),
    )
    assert at_horizon(test, 365) == (1, 2)
    judged = Judged(outcomes=test, follow_up=known, risk=np.array([0.5, 1.0, 2.0, 0.0]), horizon_days=365)
    found = METRICS["auroc"].function(judged, once(judged))[0]
    early, late = 1 / known.censoring.before(100.0), 1 / known.censoring.before(365.0)
    assert found == pytest.approx(late / (early + late))


@pytest.mark.parametrize(
    ("events", "free", "name", "horizon", "reason"),
    [
        (19, 100, "harrell_c", None, "too_few_events: 19 held out"),
        (100, 19, "uno_c", None, "too_few_event_free: 19 held out"),
        (60, 60, "auroc", 5000, "horizon_beyond_follow_up: 5000 days"),
        (60, 60, "auroc", 2, "too_few_events: 0 held out"),
    ],
)
def test_what_cannot_be_estimated_has_a_reason_and_no_value(
    events: int, free: int, name: str, horizon: int | None, reason: str
) -> None:
    time = np.linspace(10, 1000, events + free)
    event = np.arange(events + free) % (events + free) < events
    known: FollowUp = follow_up(simulated(500, 8)[0])
    judged = Judged(outcomes=outcomes(time, event), follow_up=known, risk=time, horizon_days=horizon)
    found = estimate(name, judged, draw_persons(events + free, 50, 0))
    assert found.value is None and found.interval() is None and str(found.reason).startswith(reason)


def test_an_interval_of_too_many_undefined_replicates_is_none() -> None:
    replicates = np.where(np.arange(100) < 3, np.nan, 0.5)
    assert Estimate(value=0.5, replicates=replicates).interval() is None
    assert Estimate(value=0.5, replicates=np.linspace(0, 1, 201)).interval() == pytest.approx((0.025, 0.975))


def test_differences_and_means_are_taken_replicate_by_replicate() -> None:
    one, two = (
        Estimate(value=0.7, replicates=np.array([0.6, 0.8])),
        Estimate(value=0.5, replicates=np.array([0.5, 0.6])),
    )
    missing = Estimate(value=None, reason="too_few_events: 1 held out, 20 needed")
    paired = difference(one, two)
    assert paired.value == pytest.approx(0.2) and paired.replicates == pytest.approx([0.1, 0.2])
    assert difference(one, missing).reason == missing.reason
    both = mean_of([one, missing, two])
    assert both.value == pytest.approx(0.6) and both.replicates == pytest.approx([0.55, 0.7])
    assert mean_of([missing]).value is None and "no_estimable_task" in str(mean_of([missing]).reason)


def test_follow_up_ends_where_a_tenth_is_left() -> None:
    train, _ = simulated(1000, 9)
    known = follow_up(train)
    assert (train.time >= known.tau).mean() >= 0.1 > (train.time > known.tau).mean() - 0.001
    assert known.net.at(known.tau) >= 0.1 and known.grid[-1] == known.tau and len(known.grid) == 100
    assert known.grid[0] == pytest.approx(np.percentile(train.time[train.event], 5))
