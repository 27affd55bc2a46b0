"""Two workers, one with an encoder of its own: jobs that need it wait for that one, told why."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.workers.conftest import FAST, Lab
from tests.workers.small_cohort import SMALL, insert_cohort
from tests.workers.test_commands import lachesis, outcome

MINE = """
from torch import nn


def mine():
    body = nn.Sequential(nn.Conv3d(1, 6, 3, 2), nn.ReLU())
    body.width = 6
    return body
"""
SETTINGS = [option for key, value in SMALL.items() for option in ("--set", f"{key}={value}")]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    file.chmod(0o600)
    return file


def test_a_job_waits_told_why_until_a_worker_comes_that_has_its_encoder(lab: Lab, mine: Path, tmp_path: Path) -> None:
    with lab.engine.begin() as connection:
        insert_cohort(connection, tmp_path / "scans")
    plain, own = lab.settings, replace(lab.settings, encoders=str(mine))
    lab.settings = own
    first = lab.worker(*FAST)
    time.sleep(2)  # until it listens to signals
    first.terminate()  # its encoders are known from now on
    lab.until(lambda: lab.scalar("SELECT count(*) FROM ops.worker WHERE stopped_at IS NOT NULL") == 1, 20)
    lab.settings = plain
    without = lab.worker(*FAST)

    command = ("pretrain", "tte", "--encoder", "mine", "--labels", "outcomes", "--name", "m", *SETTINGS)
    training = lachesis(lab, *command, "--json")
    lab.until(lambda: lab.scalar("SELECT count(*) FROM ops.job WHERE kind = 'pretrain'") == 1, 20)
    time.sleep(4)  # the worker looks at the table many times, the command once
    assert lab.scalar("SELECT state FROM ops.job WHERE kind = 'pretrain'") == "queued"

    lab.settings = own
    rich = lab.worker(*FAST)
    code, said, told = outcome(training)
    assert code == 0, told
    assert f"waits: no worker has the encoder 'mine'; workers seen: {lab.scalar(HOST)}:{without.pid}" in told
    assert "(densenet121, resnet152" in told
    job_id = json.loads(said)["job_id"]
    assert [a.worker_id.split(":")[1] for a in lab.attempts(job_id)] == [str(rich.pid)]
    assert lab.scalar("SELECT width FROM model.checkpoint WHERE name = 'm' AND is_final") == 6

    code, _, told = outcome(lachesis(lab, "embed", "m", "--cohort", "chest"))
    assert code == 0, told
    assert lab.scalar("SELECT args ->> 'encoder' FROM ops.job WHERE kind = 'embed'") == "mine"
    embedded = lab.scalar("SELECT a.worker_id FROM ops.job_attempt a JOIN ops.job USING (job_id) WHERE kind = 'embed'")
    assert embedded.split(":")[1] == str(rich.pid)

    rows = {row["name"]: row for row in json.loads(outcome(lachesis(lab, "ls", "encoders", "--json"))[1])["rows"]}
    assert (rows["mine"]["width"], rows["mine"]["workers"], rows["mine"]["source"]) == (6, 1, "mine.py")
    lab.settings = plain
    rows = {row["name"]: row for row in json.loads(outcome(lachesis(lab, "ls", "encoders", "--json"))[1])["rows"]}
    assert (rows["mine"]["width"], rows["mine"]["source"]) == (6, "another host")
    assert (rows["tiny"]["width"], rows["tiny"]["weights"], rows["tiny"]["workers"]) == (64, 160_656, 2)


HOST = "SELECT max(host) FROM ops.worker"


def test_an_encoder_that_nobody_ever_had_fails_with_the_nearest_name(lab: Lab, tmp_path: Path) -> None:
    with lab.engine.begin() as connection:
        insert_cohort(connection, tmp_path / "scans")
    lab.worker(*FAST)
    code, _, told = outcome(lachesis(lab, "pretrain", "tte", "--encoder", "densnet121", "--labels", "outcomes"))
    assert (code, "Did you mean 'densenet121'?" in told) == (2, True), told


def test_a_file_that_is_not_there_stops_a_worker_at_once(lab: Lab, tmp_path: Path) -> None:
    lab.settings = replace(lab.settings, encoders=str(tmp_path / "gone.py"))
    code, _, told = outcome(lachesis(lab, "ls", "encoders"))
    assert code == 2
    assert "Expected Python files in LACHESIS_ENCODERS" in told
