"""Cox, Kaplan–Meier and the censoring distribution against scikit-survival, lifelines, R and their own definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from sksurv.datasets import load_gbsg2, load_whas500
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv

from ml.survival import (
    Ties,
    baseline_hazard,
    censoring_distribution,
    fit_cox,
    kaplan_meier,
    partial_log_likelihood,
)
from tests.reference import survival as slow

OUTCOMES = st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=25)


def whas500() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (standardised), time, event; 500 scans with many tied times."""
    x, y = load_whas500()
    features = x.astype(float).to_numpy()
    return (features - features.mean(0)) / features.std(0), y["lenfol"], y["fstat"]


def gbsg2() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_gbsg2()
    features = pd.get_dummies(x, drop_first=True).astype(float).to_numpy()
    return (features - features.mean(0)) / features.std(0), y["time"], y["cens"]


@pytest.mark.parametrize("ties", ["breslow", "efron"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("data", [whas500, gbsg2])
def test_coefficients_are_those_of_scikit_survival(data, penalty: float, ties: Ties) -> None:
    x, time, event = data()
    theirs = CoxPHSurvivalAnalysis(alpha=penalty, ties=ties, tol=1e-12, n_iter=200).fit(
        x, Surv.from_arrays(event, time)
    )
    ours = fit_cox(x, time, event, penalty=penalty, ties=ties)
    np.testing.assert_allclose(ours.coefficients, theirs.coef_, atol=1e-6)


def test_more_features_than_scans_gives_what_scikit_survival_gives() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 90))
    time, event = np.ceil(rng.exponential(np.exp(-x[:, 0])) * 10), rng.random(60) < 0.7
    theirs = CoxPHSurvivalAnalysis(alpha=5.0, tol=1e-12, n_iter=200).fit(x, Surv.from_arrays(event, time))
    np.testing.assert_allclose(fit_cox(x, time, event, penalty=5.0).coefficients, theirs.coef_, atol=1e-6)


def test_wide_problems_settle_on_the_maximum_although_their_information_is_rounded() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(800, 100)) * np.geomspace(0.1, 30, 100)
    time, event = rng.exponential(np.exp(-x[:, 50] / 4)), rng.random(800) < 0.6
    fit = fit_cox(x, time, event, penalty=0.5)
    step = 1e-5
    for k in (0, 50, 99):
        around = []
        for sign in (-1, 1):
            beta = fit.coefficients.copy()
            beta[k] += sign * step
            around.append(slow.partial_log_likelihood(x, time, event, beta, "breslow") - 0.25 * (beta @ beta))
        assert abs(around[1] - around[0]) / (2 * step) < 1e-3


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_the_partial_likelihood_is_its_definition(ties: Ties) -> None:
    x, time, event = whas500()
    beta = np.linspace(-0.5, 0.5, x.shape[1])
    ours = partial_log_likelihood(x @ beta, time, event, ties=ties)
    assert ours == pytest.approx(slow.partial_log_likelihood(x, time, event, beta, ties), abs=1e-8)


def test_weighted_breslow_is_the_fit_of_repeated_scans() -> None:
    x, time, event = whas500()
    repeat = np.random.default_rng(5).integers(0, 4, len(x))
    weighted = fit_cox(x, time, event, penalty=2.0, weights=repeat)
    rows = np.repeat(np.arange(len(x)), repeat)
    repeated = fit_cox(x[rows], time[rows], event[rows], penalty=2.0)
    np.testing.assert_allclose(weighted.coefficients, repeated.coefficients, atol=1e-8)


def test_weighted_efron_is_that_of_lifelines() -> None:
    x, time, event = whas500()
    weight = np.random.default_rng(6).uniform(0.5, 2, len(x))
    frame = pd.DataFrame(x[:, :6], columns=list("abcdef")).assign(time=time, event=event, weight=weight)
    theirs = CoxPHFitter().fit(frame, "time", "event", weights_col="weight", robust=True)
    ours = fit_cox(x[:, :6], time, event, penalty=0.0, weights=weight, ties="efron")
    np.testing.assert_allclose(ours.coefficients, theirs.params_.to_numpy(), atol=1e-5)


def test_a_penalty_for_each_coefficient_shrinks_it_alone() -> None:
    x, time, event = whas500()
    penalty = np.zeros(x.shape[1])
    penalty[0] = 1e9
    fit = fit_cox(x, time, event, penalty=penalty)
    others = fit_cox(x[:, 1:], time, event, penalty=0.0)
    assert abs(fit.coefficients[0]) < 1e-5
    np.testing.assert_allclose(fit.coefficients[1:], others.coefficients, atol=1e-4)


def test_baseline_survival_is_that_of_scikit_survival() -> None:
    x, time, event = whas500()
    theirs = CoxPHSurvivalAnalysis(alpha=1.0).fit(x, Surv.from_arrays(event, time))
    fit = fit_cox(x, time, event, penalty=1.0)
    log_hazard = fit.log_hazard(x)
    grid = np.array([10.0, 400.0, 1000.0, 2000.0])
    ours = baseline_hazard(log_hazard, time, event).survival(log_hazard[:20], grid)
    expected = [[curve(t) for t in grid] for curve in theirs.predict_survival_function(x[:20])]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@given(OUTCOMES, st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_curves_are_their_definitions_on_both_sides_of_every_tie(outcomes: list[tuple[int, bool]], at: int) -> None:
    time, event = [float(t) for t, _ in outcomes], [e for _, e in outcomes]
    survival, censoring = kaplan_meier(time, event), censoring_distribution(time, event)
    assert survival.at(at) == pytest.approx(slow.survival_at(time, event, at))
    assert survival.before(at) == pytest.approx(slow.survival_at(time, event, at, left=True))
    assert censoring.at(at) == pytest.approx(slow.censoring_at(time, event, at))
    assert censoring.before(at) == pytest.approx(slow.censoring_at(time, event, at, left=True))


def test_kaplan_meier_is_that_of_scikit_survival_and_weights_repeat_scans() -> None:
    _, time, event = whas500()
    at, expected = kaplan_meier_estimator(event, time)
    np.testing.assert_allclose(kaplan_meier(time, event).at(at), expected, atol=1e-12)
    repeat = np.random.default_rng(7).integers(0, 3, len(time))
    rows = np.repeat(np.arange(len(time)), repeat)
    weighted, repeated = kaplan_meier(time, event, repeat), kaplan_meier(time[rows], event[rows])
    np.testing.assert_allclose(weighted.at(at), repeated.at(at), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event": np.zeros(500, bool)}, "at least one event"),
        ({"penalty": -1.0}, "at least 0"),
        ({"time": np.full(500, np.nan)}, "500 that are not"),
        ({"x": np.full((500, 2), np.inf)}, "finite features"),
        ({"x": np.ones((400, 2))}, r"shape \(500, D\)"),
        ({"weights": np.full(500, -1.0)}, "at least 0"),
    ],
)
def test_what_cannot_be_fitted_is_said_in_one_sentence(change: dict, message: str) -> None:
    x, time, event = whas500()
    given = {"x": x, "time": time, "event": event, "penalty": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        fit_cox(given.pop("x"), given.pop("time"), given.pop("event"), **given)


def test_separated_features_without_a_ridge_are_refused_and_with_one_fitted() -> None:
    time, event = np.arange(1.0, 31.0), np.ones(30, bool)
    x = -time[:, None]
    with pytest.raises(ValueError, match=r"settle|collinear"):
        fit_cox(x * 1e3, time, event, penalty=0.0, max_iterations=15)
    assert np.isfinite(fit_cox(x, time, event, penalty=1.0).coefficients).all()


def reference(real_data: Path, name: str) -> list[dict]:
    """What R computed."""
    path = real_data / "survival_reference_R_torchsurv" / "benchmark_data" / f"benchmark_{name}.json"
    found = json.loads(path.read_text())
    return found if isinstance(found, list) else [found]


def test_kaplan_meier_is_that_of_r(real_data: Path) -> None:
    for case in reference(real_data, "kaplan_meier"):
        ours = kaplan_meier(case["time"], case["status"]).at(case["times"])
        np.testing.assert_allclose(ours, case["surv_prob_survival"], atol=1e-4)


def test_the_censoring_distribution_gives_the_weights_of_r(real_data: Path) -> None:
    for case in reference(real_data, "ipcw"):
        censoring = censoring_distribution(case["time"], case["status"])
        np.testing.assert_allclose(1 / censoring.at(case["times"]), case["ipcw_times"], atol=1e-4)
        known = np.array([np.nan if w in (None, "Inf") else w for w in case["ipcw_subjectimes"]], float)
        ours = censoring.at(case["time"])  # R was asked for G(t) here, without the lag
        kept = (ours > 0) & np.isfinite(known)
        assert kept.sum() > 200
        np.testing.assert_allclose(1 / ours[kept], known[kept], rtol=1e-4)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_partial_likelihoods_with_ties_are_those_of_r(real_data: Path, ties: Ties) -> None:
    for case in reference(real_data, "cox_with_ties"):
        ours = partial_log_likelihood(case[f"log_hazard_{ties}"][0], case["time"], case["status"], ties=ties)
        assert ours == pytest.approx(case[f"log_likelihood_{ties}"][0], abs=2e-3)
    for case in reference(real_data, "cox_without_ties"):
        ours = partial_log_likelihood(case["log_hazard"][0], case["time"], case["status"], ties=ties)
        assert ours == pytest.approx(case["log_likelihood"][0], abs=2e-3)


def test_rossi_gives_the_coefficients_of_the_textbook(real_data: Path) -> None:
    rossi = pd.read_csv(real_data / "survival_lifelines" / "rossi.csv")
    x = rossi.drop(columns=["week", "arrest"]).to_numpy(float)
    fit = fit_cox(x, rossi["week"], rossi["arrest"], penalty=0.0, ties="efron")
    names = list(rossi.columns.drop(["week", "arrest"]))
    found = dict(zip(names, fit.coefficients, strict=True))
    assert found["fin"] == pytest.approx(-0.3794, abs=1e-4) and found["age"] == pytest.approx(-0.0574, abs=1e-4)
    assert fit.log_likelihood == pytest.approx(-658.748, abs=1e-3)
