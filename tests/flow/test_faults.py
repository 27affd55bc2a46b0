"""Violence from outside: what is killed comes back and ends once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flow.conftest import Shell
from tests.flow.extract import write_extract


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until `condition` holds; fail saying what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.5)


@pytest.mark.long
def test_pretraining_whose_worker_is_killed_resumes_from_its_checkpoint_and_ends_once(
    shell: Shell, tmp_path: Path
) -> None:
    shell.do("demo", "--persons", 600, "--size", 24, "--set", "epochs=1")
    words = [
        "pretrain",
        "tte",
        "--encoder",
        "tiny",
        "--labels",
        "pretraining",
        "--name",
        "killed",
        "--set",
        "epochs=40",
    ]
    with shell.popen(*words) as follower:
        job = "SELECT job_id FROM ops.job WHERE name = 'killed'"
        saved = f"SELECT count(*) FROM model.checkpoint WHERE job_id = ({job}) AND NOT is_final"
        wait_for(lambda: shell.value(saved) > 0, 240, "a checkpoint on the way")
        (attempt,) = shell.rows(f"SELECT pid, worker_id FROM ops.job_attempt WHERE job_id = ({job})")
        (worker,) = shell.rows("SELECT pid FROM ops.worker WHERE worker_id = :id", id=attempt["worker_id"])
        os.kill(worker["pid"], signal.SIGKILL)
        follower.communicate(timeout=600)
        assert follower.returncode == 0
    attempts = shell.rows(f"SELECT outcome, start_step FROM ops.job_attempt WHERE job_id = ({job}) ORDER BY fence")
    assert len(attempts) == 2
    assert attempts[0]["outcome"] in ("crashed", "lost") and attempts[1]["outcome"] == "succeeded"
    assert attempts[1]["start_step"] > 0
    finals = f"SELECT count(*) FROM model.checkpoint WHERE job_id = ({job}) AND is_final"
    assert shell.value(finals) == 1
    ends = f"SELECT count(*) FROM ops.job_event WHERE job_id = ({job}) AND to_state = 'succeeded'"
    assert shell.value(ends) == 1


def test_ctrl_c_detaches_and_the_job_goes_on(shell: Shell, tmp_path: Path) -> None:
    shell.do("up")
    extract = write_extract(tmp_path / "omop", persons=2000)
    with shell.popen("load", "omop", extract, "--source", "detached", start_new_session=True) as follower:
        wait_for(
            lambda: shell.value("SELECT count(*) FROM ops.job WHERE name = 'detached'") == 1, 60, "the job to be queued"
        )
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=60)
    if follower.returncode == 0:
        pytest.skip("the load ended before the interrupt reached its follower")
    assert follower.returncode == 130
    assert "lachesis cancel" in err
    wait_for(
        lambda: shell.value("SELECT state FROM ops.job WHERE name = 'detached'") == "succeeded", 120, "the job to end"
    )
    assert shell.value("SELECT count(*) FROM omop.person") == 2000


def test_killed_servers_come_back_with_what_was_loaded(shell: Shell, tmp_path: Path) -> None:
    shell.do("load", "omop", write_extract(tmp_path / "omop", persons=20), "--source", "detached", "--allow-shrink")
    postmaster = next(shell.home.parent.rglob("postmaster.pid"))
    os.kill(int(postmaster.read_text().split()[0]), signal.SIGKILL)
    assert shell.do("sql", "SELECT count(*) AS n FROM omop.person", "--csv").splitlines() == ["n", "20"]
