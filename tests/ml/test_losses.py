from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.config import Recipe
from ml.labelling import LabelArrays
from ml.losses import binary, constant_over_pieces, cox, over_pieces
from ml.objectives import OverPieces
from ml.targets import outcomes
from ml.tte_targets import TteTargets
from tests.ml.arrays import exponential_labels
from tests.ml.test_targets import messy_labels
from tests.reference import dense_losses
from tests.reference import losses as reference

CPU = torch.device("cpu")
ROWS = np.array([7, 0, 3, 11, 5])


def objective(labels: LabelArrays, **settings: Any) -> OverPieces | None:
    """The objective of all 12 scans, None where a draw has no outcome."""
    try:
        targets = TteTargets(labels, np.arange(12), 3, objective=settings.get("objective", "piecewise"))
    except ValueError:
        return None
    return OverPieces(Recipe(encoder="tiny", **settings), targets, CPU)


def doubles(made: OverPieces) -> tuple[Any, dict[str, torch.Tensor]]:
    """Weights of ROWS in float64, as days are in float32 for speed alone."""
    made.edges = torch.from_numpy(made.targets.edges)
    batch = {name: torch.from_numpy(np.asarray(a)) for name, a in made.targets.batch(ROWS).items()}
    batch = {n: a.double() if a.is_floating_point() else a for n, a in batch.items()}
    return made.weights(batch), batch


def cells(labels: LabelArrays, k: int) -> list[tuple[float, float, bool, bool]]:
    """(opens, until, event, at risk) of task k at ROWS, by the dense form."""
    dense = outcomes(labels, ROWS)
    columns = (dense.start_BK, dense.time_BK, dense.event_BK, dense.at_risk_BK)
    return [tuple(c[b, k].item() for c in columns) for b in range(len(ROWS))]


@settings(deadline=None)  # the first call of torch is slow
@given(st.integers(0, 10_000))
def test_the_loss_and_its_gradient_are_the_textbook_s_likelihood(seed: int) -> None:
    labels = messy_labels(seed)
    made = objective(labels)
    if made is None:
        return
    weights, _ = doubles(made)
    edges, rng = made.targets.edges.tolist(), np.random.default_rng(seed)
    values = rng.uniform(-14, 2, (len(ROWS), len(edges) - 1, 5))
    l_BPK = torch.tensor(values, requires_grad=True)
    found = over_pieces(l_BPK, weights)
    wanted = np.zeros(len(ROWS))
    for k in range(5):
        for b, (opens, until, event, at_risk) in enumerate(cells(labels, k)):
            if at_risk:
                wanted[b] += reference.negative_log_likelihood(values[b, :, k].tolist(), edges, opens, until, event)
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-9, atol=1e-9)

    upstream = torch.from_numpy(rng.normal(size=len(ROWS)))
    (found * upstream).sum().backward()
    dense = outcomes(labels, ROWS)
    days = [torch.from_numpy(a).double() for a in (dense.time_BK, dense.start_BK)]
    flags = [torch.from_numpy(a) for a in (dense.event_BK, dense.at_risk_BK)]
    again = l_BPK.detach().clone().requires_grad_()
    pieces = dense_losses.cut(days[0], days[1], *flags, made.edges)
    (dense_losses.piecewise_exponential(again, pieces) * upstream).sum().backward()
    assert l_BPK.grad is not None and again.grad is not None
    torch.testing.assert_close(l_BPK.grad, again.grad, rtol=1e-9, atol=1e-9)


@settings(deadline=None)  # the first call of torch is slow
@given(st.integers(0, 10_000))
def test_the_discrete_loss_and_its_gradient_are_the_textbook_s_likelihood(seed: int) -> None:
    labels = messy_labels(seed)
    made = objective(labels, objective="discrete")
    if made is None:
        return
    weights, _ = doubles(made)
    edges, rng = made.targets.edges.tolist(), np.random.default_rng(seed)
    values = rng.uniform(-6, 3, (len(ROWS), len(edges) - 1, 5))
    wanted = np.zeros(len(ROWS))
    for k in range(5):
        for b, (opens, until, event, at_risk) in enumerate(cells(labels, k)):
            if at_risk:
                wanted[b] += reference.discrete_likelihood(values[b, :, k].tolist(), edges, opens, until, event)
    l_BPK = torch.tensor(values, requires_grad=True)
    np.testing.assert_allclose(
        over_pieces(l_BPK, weights, discrete=True).detach().numpy(), wanted, rtol=1e-9, atol=1e-9
    )
    assert torch.autograd.gradcheck(lambda logit: over_pieces(logit, weights, discrete=True), l_BPK)


@settings(deadline=None)  # the first call of torch is slow
@given(st.integers(0, 10_000), st.booleans())
def test_a_constant_loses_the_same_by_the_short_way(seed: int, discrete: bool) -> None:
    made = objective(messy_labels(seed), objective="discrete" if discrete else "piecewise")
    if made is None:
        return
    weights, _ = doubles(made)
    logit_K = torch.from_numpy(np.random.default_rng(seed).uniform(-9, -1, 5))
    l_BPK = logit_K.expand(len(ROWS), len(made.targets.edges) - 1, 5)
    torch.testing.assert_close(
        constant_over_pieces(logit_K, weights, discrete=discrete), over_pieces(l_BPK, weights, discrete=discrete)
    )


@pytest.mark.parametrize("kind", ["piecewise", "discrete"])
def test_the_null_model_is_the_best_constant_of_the_train_scans(kind: str) -> None:
    labels, rows = exponential_labels(300, 4), np.arange(300)
    targets = TteTargets(labels, rows, objective=kind)
    made = OverPieces(Recipe(encoder="tiny"), targets, CPU)
    weights = made.weights({name: torch.from_numpy(np.asarray(a)) for name, a in targets.batch(rows).items()})
    null_K = torch.from_numpy(targets.null).float()
    lost = float(constant_over_pieces(null_K, weights, discrete=kind == "discrete").sum())
    assert lost / targets.num_events.sum() == pytest.approx(targets.null_loss, rel=1e-4)
    for shift in (-0.05, 0.05):
        moved = constant_over_pieces(null_K + shift, weights, discrete=kind == "discrete").sum()
        assert float(moved) > lost


@settings(deadline=None)  # the first call of torch is slow
@given(st.integers(0, 10_000))
def test_the_partial_likelihood_of_a_batch_is_that_of_each_task_by_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    opens = rng.integers(0, 3, (9, 4)) * (rng.random((9, 4)) < 0.3)
    until = opens + rng.integers(0, 6, (9, 4))  # ties, and cells that carry nothing
    event = (rng.random((9, 4)) < 0.6) & (until > opens)
    risk = torch.tensor(rng.normal(size=(9, 4)), requires_grad=True)
    scan, task = np.nonzero(event)
    made = cox(risk, *(torch.from_numpy(a.astype(float)) for a in (opens, until)), *map(torch.from_numpy, (scan, task)))
    columns = [risk.detach().numpy()[:, k].tolist() for k in range(4)]
    wanted = sum(
        reference.partial_likelihood(columns[k], opens[:, k].tolist(), until[:, k].tolist(), event[:, k].tolist())
        for k in range(4)
    )
    assert made.sum().item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_the_partial_likelihood_is_that_of_lifelines_at_the_same_coefficient() -> None:
    import pandas as pd
    from lifelines import CoxPHFitter

    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    time, event = rng.exponential(np.exp(-x)), rng.random(60) < 0.7  # no ties: all conventions agree
    fitted = CoxPHFitter().fit(pd.DataFrame({"x": x, "t": time, "e": event}), "t", "e")
    beta = float(fitted.params_["x"])
    scan = torch.from_numpy(np.flatnonzero(event))
    until = torch.from_numpy(time)[:, None]
    made = cox(torch.from_numpy(beta * x)[:, None], torch.zeros_like(until), until, scan, torch.zeros_like(scan))
    assert -float(made.sum()) == pytest.approx(fitted.log_likelihood_, rel=1e-6)


@settings(deadline=None)  # the first call of torch is slow
@given(st.lists(st.tuples(st.floats(-20, 20), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_the_binary_loss_counts_known_labels_alone(cells: list[tuple[float, bool, bool]]) -> None:
    logit = torch.tensor([[c[0] for c in cells]], dtype=torch.float64)
    label, known = (torch.tensor([[c[j] for c in cells]]) for j in (1, 2))
    wanted = sum(reference.binary_cross_entropy(x, y) for x, y, seen in cells if seen)
    assert float(binary(logit, label, known)[0]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_half_precision_logits_are_summed_in_float32() -> None:
    made = objective(exponential_labels(12, 900))
    assert made is not None
    batch = {name: torch.from_numpy(np.asarray(a)) for name, a in made.targets.batch(ROWS).items()}
    weights = made.weights(batch)
    logits = torch.full((len(ROWS), len(made.targets.edges) - 1, 900), -7.0)
    found = over_pieces(logits.bfloat16(), weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, over_pieces(logits.double(), weights).float(), rtol=1e-5, atol=1e-5)


def test_a_shape_that_does_not_fit_names_both_shapes() -> None:
    made = objective(exponential_labels(12, 3))
    assert made is not None
    weights, _ = doubles(made)
    pieces = len(made.targets.edges) - 1
    with pytest.raises(ValueError, match=rf"\(5, {pieces}, 3\), got \(5, 3, 1\)"):
        over_pieces(torch.zeros(5, 3, 1), weights)
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 1\)"):
        binary(torch.zeros(2, 1), torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 1\)"):
        cox(torch.zeros(2, 1), *[torch.zeros(2, 3)] * 2, *[torch.zeros(0, dtype=torch.int64)] * 2)
