"""Heads: what they are given, how their penalty is chosen, and that they are what scikit-learn would fit."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from ml.metrics import Outcomes, follow_up
from ml.probe import PENALTIES, cox_head, design, fit_logistic, impute, logistic_head


def drawn(n: int, seed: int, width: int = 12) -> tuple[np.ndarray, Outcomes, np.ndarray]:
    """Features of which the first matters, outcomes, split."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width))
    onset, end = rng.exponential(np.exp(-x[:, 0]) * 800), rng.uniform(200, 2500, n)
    outcomes = Outcomes(
        time=np.minimum(onset, end), event=onset <= end, competing=np.zeros(n, bool), person=np.arange(n)
    )
    return x, outcomes, rng.choice(3, n, p=(0.6, 0.2, 0.2))


@pytest.mark.parametrize("penalty", [0.1, 1.0, 100.0])
def test_logistic_coefficients_are_those_of_scikit_learn(penalty: float) -> None:
    x, outcomes, _ = drawn(500, 0)
    event = outcomes.event & (outcomes.time < 700)
    weights = np.random.default_rng(1).uniform(0, 2, 500)
    weights[:50] = 0
    theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(x, event, sample_weight=weights)
    ours = fit_logistic(x, event, penalty=penalty, weights=weights)
    np.testing.assert_allclose(ours, [*theirs.intercept_, *theirs.coef_[0]], atol=1e-5)


def test_wide_logistic_problems_settle_on_the_maximum_although_their_information_is_rounded() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 100)) * np.geomspace(0.1, 20, 100)
    event = rng.random(1000) < 1 / (1 + np.exp(-x[:, 50]))
    theirs = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x, event)
    np.testing.assert_allclose(fit_logistic(x, event, penalty=1.0)[1:], theirs.coef_[0], atol=1e-8)


def test_one_class_and_separation_are_refused_in_one_sentence() -> None:
    x = np.linspace(-1, 1, 40)[:, None]
    with pytest.raises(ValueError, match="one kind only"):
        fit_logistic(x, np.zeros(40, bool), penalty=1.0)
    with pytest.raises(ValueError, match=r"settle|collinear"):
        fit_logistic(x, x[:, 0] > 0, penalty=0.0, max_iterations=25)


def test_unknown_age_and_sex_become_the_train_mean_and_say_so() -> None:
    x = np.array([[50.0, 1.0], [70.0, np.nan], [np.nan, 0.0], [1000.0, 1.0]])
    train = np.array([True, True, True, False])
    filled = impute(x, train)
    assert filled.shape == (4, 4)
    assert filled[2, 0] == 60 and filled[1, 1] == 0.5 and filled[:, 2].tolist() == [0, 0, 1, 0]
    assert impute(x[:1], train[:1]).shape == (1, 2)


def test_features_are_standardised_by_train_alone_and_constant_ones_left_out() -> None:
    x, _, split = drawn(300, 2)
    train = split == 0
    x[:, 3] = 7.0
    made = design("image", train, covariates=np.zeros((300, 2)), image=x, voxels=None)
    assert made.x.shape == (300, 11)
    np.testing.assert_allclose(made.x[train].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(made.x[train].std(0), 1, atol=1e-12)
    with pytest.raises(ValueError, match="got none"):
        design("voxels", train, covariates=np.zeros((300, 2)), image=x, voxels=None)
    with pytest.raises(ValueError, match="'lab values'"):
        design("lab values", train, covariates=np.zeros((300, 2)), image=x, voxels=None)


def test_age_and_sex_keep_a_small_penalty_beside_a_penalised_image() -> None:
    x, outcomes, split = drawn(600, 3)
    train, tuning = split == 0, split == 1
    age = np.column_stack([x[:, 0] * 10 + 60, np.ones(600)])
    noise = np.random.default_rng(4).normal(size=(600, 200))
    made = design("age+sex+image", train, covariates=age, image=noise, voxels=None)
    assert made.penalised.sum() == 200 and made.x.shape[1] == 201
    alone = cox_head(design("age+sex", train, covariates=age, image=None, voxels=None), outcomes, train, tuning)
    both = cox_head(made, outcomes, train, tuning)
    assert np.corrcoef(alone.log_hazard, both.log_hazard)[0, 1] > 0.9


def test_tuning_chooses_a_large_penalty_for_noise_and_a_smaller_one_for_signal() -> None:
    x, outcomes, split = drawn(1500, 5, width=6)
    train, tuning = split == 0, split == 1
    covariates = np.full((1500, 2), np.nan)
    noise = np.random.default_rng(6).normal(size=(1500, 150))
    informed = cox_head(design("image", train, covariates=covariates, image=x, voxels=None), outcomes, train, tuning)
    lost = cox_head(design("image", train, covariates=covariates, image=noise, voxels=None), outcomes, train, tuning)
    assert informed.penalty is not None and lost.penalty is not None
    assert informed.penalty <= 30 < 3000 <= lost.penalty <= max(PENALTIES)


def test_held_out_scans_change_no_head() -> None:
    x, outcomes, split = drawn(500, 7)
    train, tuning, held_out = (split == k for k in range(3))
    covariates = np.zeros((500, 2))
    known = follow_up(outcomes.take(train))

    def heads(image: np.ndarray, judged: Outcomes) -> list[np.ndarray]:
        made = design("image", train, covariates=covariates, image=image, voxels=None)
        cox, logistic = cox_head(made, judged, train, tuning), logistic_head(made, judged, known, 365, train, tuning)
        return [cox.log_hazard[~held_out], logistic.probability[~held_out]]

    moved = x + held_out[:, None] * 100
    event = np.where(held_out, ~outcomes.event, outcomes.event)
    other = Outcomes(time=outcomes.time, event=event, competing=outcomes.competing, person=outcomes.person)
    for one, two in zip(heads(x, outcomes), heads(moved, other), strict=True):
        np.testing.assert_array_equal(one, two)


def test_without_tuning_events_the_default_penalty_is_taken_and_said() -> None:
    x, outcomes, split = drawn(400, 8)
    nobody = np.zeros(400, bool)
    made = design("image", split == 0, covariates=np.zeros((400, 2)), image=x, voxels=None)
    head = cox_head(made, outcomes, split == 0, nobody)
    assert not head.tuned and head.penalty == 300.0


def test_weighting_by_the_censoring_gives_unbiased_risks_where_dropping_does_not() -> None:
    _, outcomes, _ = drawn(6000, 9)
    everyone = np.ones(6000, bool)
    nothing = design("image", everyone, covariates=np.zeros((6000, 2)), image=np.ones((6000, 1)), voxels=None)
    known = follow_up(outcomes)
    head = logistic_head(nothing, outcomes, known, 1500, everyone, everyone)
    truth = 1 - float(known.survival.at(1500.0))
    certain = outcomes.event & (outcomes.time <= 1500) | (outcomes.time >= 1500)
    dropped = (outcomes.event & (outcomes.time <= 1500))[certain].mean()
    assert head.probability[0] == pytest.approx(truth, abs=0.01)
    assert abs(dropped - truth) > 0.03
