"""Stages that only tests have: each does one thing that a worker must survive."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

from sqlalchemy import text

from app.errors import InputError, Preempted
from app.store.work import Work


def count(work: Work) -> dict[str, Any]:
    """Count to `number`, one every `seconds`."""
    for done in range(work.args["number"]):
        work.progress(done, work.args["number"], "steps")
        time.sleep(work.args.get("seconds", 0.01))
    work.progress(work.args["number"], work.args["number"], "steps")
    work.log("counted")
    return {"counted": work.args["number"], "pid": os.getpid()}


def train(work: Work) -> dict[str, Any]:
    """Count like a training: what is counted is kept by rows, and another attempt goes on from it."""
    assert work.job_id is not None
    with work.connect() as connection:
        done = connection.execute(
            text("SELECT coalesce(max(step), 0) FROM ops.training_step WHERE job_id = :j"), {"j": work.job_id}
        ).scalar_one()
    work.started_at_step(done)
    insert = text(
        "INSERT INTO ops.training_step (job_id, step, name, epoch, value) VALUES (:j, :s, 'train_loss', 0, 1)"
    )
    for step in range(done + 1, work.args["steps"] + 1):
        with work.transaction() as connection:
            connection.execute(insert, {"j": work.job_id, "s": step})
            time.sleep(work.args["seconds"])  # most deaths come in the middle of a transaction
        work.progress(step, work.args["steps"], "steps")
    return {"steps": work.args["steps"]}


def hold_interpreter(work: Work) -> dict[str, Any]:
    """Sleep in C without giving the interpreter's lock back, as a kernel or a decoder may."""
    ctypes.PyDLL(None).usleep(int(work.args["seconds"] * 1e6))
    return {}


def long_statement(work: Work) -> dict[str, Any]:
    """One statement that takes long, in the transaction that writes."""
    with work.transaction() as connection:
        connection.execute(text("SELECT pg_sleep(:s)"), {"s": work.args["seconds"]})
    return {}


def end_itself(work: Work) -> dict[str, Any]:
    """Die without a word."""
    print("a last line", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def wrong_input(work: Work) -> dict[str, Any]:
    raise InputError("Expected a folder of OMOP files, got a fish; give a folder.")


def fault(work: Work) -> dict[str, Any]:
    raise RuntimeError("first line\nsecond line with a secret")


def bad_value(work: Work) -> dict[str, Any]:
    with work.connect() as connection:
        connection.execute(text("SELECT CAST(CAST(:value AS text) AS integer)"), {"value": "a secret"})
    return {}


def stopped_late(work: Work) -> dict[str, Any]:
    """Write a last row when asked to stop, as a training writes its checkpoint."""
    work.log("in its loop")
    try:
        while True:
            work.check()
            time.sleep(0.02)
    except Preempted:
        with work.transaction() as connection:
            connection.execute(
                text("INSERT INTO ops.training_step (job_id, step, name, epoch, value) VALUES (:j, 7, 'saved', 0, 1)"),
                {"j": work.job_id},
            )
        raise


STAGES = {
    function.__name__: f"tests.workers.stages:{function.__name__}"
    for function in (
        count,
        train,
        hold_interpreter,
        long_statement,
        end_itself,
        wrong_input,
        fault,
        bad_value,
        stopped_late,
    )
}
"""As in workers/stages."""
CHILDREN = {f"child_{name}": place for name, place in STAGES.items()}
"""The same, each attempt a process of its own."""
