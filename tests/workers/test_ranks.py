"""Several ranks train as one process does; one that dies ends the attempt, and nobody is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text

from app.errors import InputError
from tests.workers.small_cohort import SMALL, insert_cohort
from workers.ranks import check_devices

PLAIN = {"standardise": "none", "probe_scans": "0"}


def train(folder: Path, count: int, settings: dict[str, str], **asked: Any) -> dict[str, Any]:
    """A training of its own process, which forks."""
    told = json.dumps({"ranks": count, "folder": str(folder), "settings": settings, **asked})
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.rank_child", told], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


@pytest.mark.parametrize("passes", ["2", "3"])
def test_two_ranks_lose_what_one_process_loses(tmp_path: Path, passes: str) -> None:
    settings = {**PLAIN, "batch": "3", "accumulate": passes}
    alone, together = (train(tmp_path / str(count), count, settings) for count in (1, 2))
    assert alone["step"] == together["step"]
    np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-3)
    np.testing.assert_allclose(together["gains"], alone["gains"], rtol=1e-2, atol=1e-3)


def test_two_ranks_that_were_stopped_end_as_two_that_were_not(tmp_path: Path) -> None:
    settings = {"batch": "3", "accumulate": "2", "ema": "0.9"}
    whole = train(tmp_path / "whole", 2, settings)
    part = train(tmp_path / "part", 2, settings, stop_at=5)
    assert part["step"] == 5
    again = train(tmp_path / "part", 2, settings, resume=part["file"])
    assert again["step"] == whole["step"] and again["digest"] == whole["digest"]


def test_a_rank_that_is_killed_ends_the_attempt_and_leaves_nobody(tmp_path: Path) -> None:
    made = train(tmp_path, 2, {**PLAIN, "batch": "3", "accumulate": "2"}, kill_at=4)
    assert "Rank 1 was ended by SIGKILL" in made["error"]
    assert made["children"] == []


def test_a_step_with_fewer_passes_than_ranks_says_what_to_set(tmp_path: Path) -> None:
    told = json.dumps({"ranks": 2, "folder": str(tmp_path), "settings": {**PLAIN, "batch": "4"}})
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.rank_child", told], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "--set accumulate=2" in done.stderr


def test_the_stage_trains_on_two_ranks_and_writes_once(engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        insert_cohort(connection, tmp_path / "scans")
    args = {"arm": "tte", "encoder": "tiny", "labels": "outcomes", "name": "t", "seed": 0, "gpus": 2}
    args["set"] = {**SMALL, "batch": "2", "accumulate": "2"}
    told = [engine.url.render_as_string(hide_password=False), str(tmp_path), json.dumps(args)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.rank_stage", *told], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes share the processor" in done.stderr
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT recipe -> 'num_devices' FROM model.checkpoint WHERE is_final")).all()
    assert [row[0] for row in rows] == [2]


def test_fewer_devices_than_asked_for_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="Expected 4 devices for --gpus 4, CUDA shows 2"):
        check_devices(4)
    assert check_devices(2) == 2
