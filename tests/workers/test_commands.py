"""Following jobs from a shell: `watch`, `jobs`, `logs`, `cancel`, `retry`, `--detach`, `--inline`, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from app.embedded import environment
from tests.workers.conftest import Lab


def lachesis(lab: Lab, *arguments: str, **options: object) -> subprocess.Popen[str]:
    """A command as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-c", "from app.cli import main; main()", *arguments],
        env={**os.environ, **environment(lab.settings), "COLUMNS": "200"},
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},  # type: ignore
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def test_watch_ends_with_the_job_and_its_exit_code(lab: Lab) -> None:
    lab.worker()
    good, bad, stopped = lab.submit("count", number=3), lab.submit("wrong_input"), lab.submit("count", number=10_000)
    assert outcome(lachesis(lab, "cancel", str(stopped)))[0] == 0
    code, out, err = outcome(lachesis(lab, "watch", str(good)))
    assert (code, out) == (0, "")
    assert err.startswith("count: ") and "counted 3" in err and err.endswith(f"(job {good})\n")
    code, out, err = outcome(lachesis(lab, "watch", str(good), "--json"))
    assert (code, err) == (0, "")
    assert json.loads(out)["result"]["counted"] == 3
    code, out, err = outcome(lachesis(lab, "watch", str(bad)))
    assert (code, out) == (2, "")
    assert err == "lachesis: Expected a folder of OMOP files, got a fish; give a folder.\n"
    code, out, err = outcome(lachesis(lab, "watch", str(stopped), "--json"))
    assert code == 3
    assert json.loads(out)["state"] == "cancelled"
    code, _, err = outcome(lachesis(lab, "watch", "999"))
    assert code == 2
    assert "No job named '999'" in err


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(lab: Lab) -> None:
    lab.worker()
    job_id = lab.submit("count", number=10_000, seconds=0.05)
    lab.running(job_id)
    process = lachesis(lab, "watch", str(job_id))
    following = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lachesis:follow'"
    lab.until(lambda: lab.scalar(following))
    process.send_signal(signal.SIGINT)
    code, out, err = outcome(process)
    assert (code, out) == (130, "")
    assert err.strip() == f"lachesis: job {job_id} goes on; `lachesis cancel {job_id}` stops it."
    assert lab.job(job_id)["state"] == "running"
    assert outcome(lachesis(lab, "cancel", str(job_id)))[0] == 0
    assert lab.ended(job_id, 5)["state"] == "cancelled"


def test_a_job_that_nobody_claims_says_which_queue_has_no_worker(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "extract").mkdir()
    process = lachesis(lab, "load", "omop", str(tmp_path / "extract"))
    lab.until(lambda: lab.scalar("SELECT count(*) FROM ops.job"))
    time.sleep(4.0)
    assert lab.scalar("SELECT state FROM ops.job") == "queued"
    lab.worker()
    code, _, err = outcome(process)
    assert code == 2
    assert "no worker serves the queue 'load'; start one with `lachesis worker --queues load`" in err


def test_a_terminal_shows_a_bar_with_what_is_done_and_the_time_left(lab: Lab) -> None:
    lab.worker()
    job_id = lab.submit("count", number=150, seconds=0.02)
    ours, theirs = pty.openpty()
    process = lachesis(lab, "watch", str(job_id), stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # the other side is closed: the command has ended
        pass
    os.close(ours)
    shown = seen.decode()
    assert process.wait(10) == 0, shown
    assert "/150" in shown
    assert "steps" in shown
    assert "0:00:0" in shown
    assert "counted 150" in shown


def test_detach_prints_the_id_of_the_job_alone(lab: Lab, tmp_path: Path) -> None:
    code, out, err = outcome(lachesis(lab, "load", "omop", str(tmp_path), "--detach"))
    assert (code, err) == (0, "")
    assert lab.job(int(out))["state"] == "queued"
    code, out, _ = outcome(lachesis(lab, "load", "omop", str(tmp_path), "--detach", "--json"))
    assert (code, lab.job(json.loads(out)["job_id"])["kind"]) == (0, "load")


def test_inline_runs_a_job_without_broker_or_worker(lab: Lab, tmp_path: Path) -> None:
    lab.settings = replace(lab.settings, redis_url=f"unix://{tmp_path}/no.sock?db=0")
    (tmp_path / "extract").mkdir()
    code, out, err = outcome(lachesis(lab, "load", "omop", str(tmp_path / "extract"), "--inline"))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    (attempt,) = lab.rows("SELECT * FROM ops.job_attempt")
    assert attempt.outcome == "failed"
    assert lab.scalar("SELECT count(*) FROM ops.worker WHERE queues = '{}' AND stopped_at IS NOT NULL") == 1


def test_ctrl_c_cancels_a_job_in_the_foreground(lab: Lab) -> None:
    job_id = lab.insert("count", number=10_000, seconds=0.05)
    process = lab.start([sys.executable, "-m", "tests.workers.worker", "run", str(job_id)])
    lab.running(job_id)
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 3
    assert lab.job(job_id)["state"] == "cancelled"


def test_jobs_logs_and_retry_say_what_happened(lab: Lab) -> None:
    lab.worker()
    good, bad = lab.submit("count", number=1), lab.submit("wrong_input")
    lab.ended(good)
    lab.ended(bad)
    code, out, _ = outcome(lachesis(lab, "jobs", "--state", "failed"))
    assert code == 0
    assert "got a fish" in out
    assert "succeeded" not in out
    code, out, _ = outcome(lachesis(lab, "jobs", "--json"))
    assert [job["state"] for job in json.loads(out)["jobs"]] == ["failed", "succeeded"]
    code, _, err = outcome(lachesis(lab, "jobs", "--state", "faild"))
    assert code == 2
    assert "Did you mean 'failed'?" in err
    code, out, _ = outcome(lachesis(lab, "logs", str(good), "-f"))
    assert code == 0
    assert out.endswith("1  counted\n")
    code, out, _ = outcome(lachesis(lab, "retry", str(bad)))
    assert (code, out) == (0, f"Job {bad} is queued again.\n")
    lab.until(lambda: lab.job(bad)["attempt"] == 2)
    code, _, err = outcome(lachesis(lab, "retry", str(good)))
    assert code == 2
    assert "it is succeeded" in err


def test_the_log_of_a_failed_job_says_where_it_failed_and_why(lab: Lab) -> None:
    lab.worker()
    job_id = lab.submit("fault")
    assert lab.ended(job_id)["state"] == "failed"
    code, _, err = outcome(lachesis(lab, "watch", str(job_id)))
    assert code == 1
    assert f"`lachesis logs {job_id}`" in err
    code, out, _ = outcome(lachesis(lab, "logs", str(job_id)))
    assert code == 0
    assert "tests/workers/stages.py:" in out
    path = out.split("traceback: ")[1].split(" on ")[0]
    assert "RuntimeError" in Path(path).read_text()
    assert "secret" not in out
    assert out.splitlines()[-1].endswith("failed: RuntimeError: first line")
