"""Every arm and objective begins at its null model and learns, on balls whose radius sets hazards and visits' codes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ml.config import read_recipe
from ml.pretrain import pretrain
from ml.targets import MtlTargets, VisitTargets
from ml.training import Data, Training
from ml.tte_targets import TteTargets
from tests.ml.arrays import sparse
from tests.ml.test_pretrain import SMALL, Watch, ball_data

ARMS = ("piecewise", "discrete", "cox", "mean", "mtl", "visit")
"""The first four are the arm tte with one objective each, or with the plain mean as its reduction."""


def settings_of(arm: str) -> dict[str, str]:
    chosen = {"piecewise": {}, "mean": {"reduction": "mean"}, "mtl": {}, "visit": {}}.get(arm, {"objective": arm})
    return {**SMALL, "batch": "8", "accumulate": "1", "epochs": "10", **chosen}


def data_of(arm: str) -> Data:
    """The balls with the targets of an arm; in a visit each code is seen at scans with an early outcome of it."""
    data = ball_data(100)
    labels = data.targets.labels
    if arm == "mtl":
        return replace(data, targets=MtlTargets(labels, data.train, [[365, 1095]] * 3))
    if arm == "visit":
        seen = np.zeros((100, 3), np.bool_)
        seconds = labels.events.seconds
        assert seconds is not None
        row = np.repeat(np.arange(100), np.diff(labels.events.ptr))
        seen[row, labels.events.task] = seconds < 900 * 86_400
        labels = replace(labels, visits=sparse(seen))
        return replace(data, targets=VisitTargets(labels, data.train))
    objective = arm if arm in ("discrete", "cox") else "piecewise"
    return replace(data, targets=TteTargets(labels, data.train, objective=objective))


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_and_objective_starts_within_a_hundredth_of_its_null_model(arm: str) -> None:
    run = Training(read_recipe("tiny", settings_of(arm)), data_of(arm), seed=0)
    run.calibrate()
    loss, null, _ = run.validate(run.data.train)
    assert loss == pytest.approx(null, rel=0.01)


@pytest.mark.parametrize("arm", ARMS)
def test_the_loss_of_each_arm_and_objective_falls_by_more_than_three_standard_errors(arm: str, tmp_path: Path) -> None:
    watch = Watch()
    recipe = read_recipe("tiny", settings_of(arm))
    result = pretrain(recipe, data_of(arm), seed=0, folder=tmp_path, observer=watch, facts={})
    tenth = len(watch.losses) // 10
    first, last = np.array(watch.losses[:tenth]), np.array(watch.losses[-tenth:])
    error = math.sqrt(first.var(ddof=1) / tenth + last.var(ddof=1) / tenth)
    assert last.mean() < first.mean() - 3 * error
    assert result.validation["tuning_gain"] > 0
