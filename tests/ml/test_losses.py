from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.hazards import cut
from ml.losses import binary, piecewise_exponential
from tests.reference import losses as reference

cell = st.tuples(st.floats(0, 300), st.floats(0.01, 3000), st.booleans(), st.booleans())
logs = st.floats(-14, 2)


@settings(deadline=None)  # the first call of torch is slow
@given(
    st.lists(st.lists(cell, min_size=2, max_size=2), min_size=1, max_size=4),
    st.lists(st.floats(1, 400), min_size=0, max_size=5),
    st.data(),
)
def test_the_loss_is_the_textbook_s_likelihood(
    scans: list[list[tuple[float, float, bool, bool]]], gaps: list[float], data: st.DataObject
) -> None:
    edges = [*np.concatenate([[0.0], np.cumsum(gaps)]).tolist(), float("inf")]
    values = data.draw(
        st.lists(logs, min_size=len(scans) * 2 * (len(edges) - 1), max_size=len(scans) * 2 * (len(edges) - 1))
    )
    l_BPK = torch.tensor(values, dtype=torch.float64).view(len(scans), len(edges) - 1, 2)
    start, stay = (torch.tensor([[c[j] for c in scan] for scan in scans], dtype=torch.float64) for j in (0, 1))
    event, at_risk = (torch.tensor([[c[j] for c in scan] for scan in scans]) for j in (2, 3))
    pieces = cut(start + stay, start, event, at_risk, torch.tensor(edges, dtype=torch.float64))
    made = piecewise_exponential(l_BPK, pieces)
    for b, scan in enumerate(scans):
        wanted = sum(
            reference.negative_log_likelihood(l_BPK[b, :, k].tolist(), edges, s, float((start + stay)[b, k]), e)
            for k, (s, _, e, r) in enumerate(scan)
            if r
        )
        assert float(made[b]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@settings(deadline=None)  # the first call of torch is slow
@given(st.lists(st.tuples(st.floats(-20, 20), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_the_binary_loss_counts_known_labels_alone(cells: list[tuple[float, bool, bool]]) -> None:
    logit = torch.tensor([[c[0] for c in cells]], dtype=torch.float64)
    label, known = (torch.tensor([[c[j] for c in cells]]) for j in (1, 2))
    wanted = sum(reference.binary_cross_entropy(x, y) for x, y, seen in cells if seen)
    assert float(binary(logit, label, known)[0]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_half_precision_logits_are_summed_in_float32() -> None:
    pieces = cut(*(torch.full((1, 900), x) for x in (1000.0, 0.0)), *[torch.ones(1, 900, dtype=torch.bool)] * 2,
                 torch.tensor([0.0, float("inf")]))  # fmt: skip
    made = piecewise_exponential(torch.full((1, 1, 900), -7.0, dtype=torch.bfloat16), pieces)
    assert made.dtype == torch.float32
    assert float(made[0]) == pytest.approx(900 * (1000 * np.exp(-7) + 7), rel=1e-5)


def test_a_shape_that_does_not_fit_names_both_shapes() -> None:
    pieces = cut(*[torch.ones(2, 3)] * 2, *[torch.ones(2, 3, dtype=torch.bool)] * 2, torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match=r"\(2, 1, 3\), got \(2, 3, 1\)"):
        piecewise_exponential(torch.zeros(2, 3, 1), pieces)
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 1\)"):
        binary(torch.zeros(2, 1), torch.zeros(2, 3), torch.ones(2, 3))
