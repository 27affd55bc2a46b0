"""kill -9 at each moment of writing a stop: the next attempt goes on from a whole one and ends as if nothing was."""

from __future__ import annotations

import pytest

from tests.workers.trainings import STEP, Made, Trainings

POINTS = [
    ("shutil.copyfile runs/safetensors", True),
    ("commit after os.rename", False),
    ("os.remove artifacts/safetensors", False),
]
"""What is about to happen when the process is killed, and whether it may happen half."""


def place_of(moments: list[str], point: str) -> int:
    """The first moment of that kind; of commits the first one after a rename among the artifacts."""
    if point.startswith("commit"):
        return moments.index("commit", moments.index("os.rename artifacts/part"))
    return moments.index(point)


def goes_on_as_if_nothing_was(trainings: Trainings, whole: Made, at: int, *, halfway: bool) -> None:
    """A training that is killed at a moment, and the next attempt."""
    job = trainings.job(f"killed-{at}-{halfway}")
    trainings.attempt(job, at=at, halfway=halfway)
    trainings.stands(job)
    trainings.attempt(job)
    ended = trainings.rows(
        "SELECT outcome, signal, start_step FROM ops.job_attempt WHERE job_id = :j ORDER BY 1", j=job
    )
    assert [row.outcome for row in ended] == ["crashed", "succeeded"]
    assert ended[1].start_step is None or ended[1].start_step >= STEP - 1, "it went on from the last stop"
    trainings.stands(job)
    assert trainings.made(job) == whole
    assert trainings.left_over() == []


def test_a_training_killed_while_it_keeps_a_stop_ends_as_one_that_was_not(trainings: Trainings) -> None:
    trainings.epochs = 1
    job = trainings.job("whole")
    moments = trainings.attempt(job)
    whole = trainings.made(job)
    for point, halfway in POINTS:
        goes_on_as_if_nothing_was(trainings, whole, place_of(moments, point), halfway=halfway)


@pytest.mark.long
def test_whatever_the_moment_of_the_kill_a_training_ends_as_one_that_was_not(trainings: Trainings) -> None:
    seldom = trainings.job("seldom")
    trainings.attempt(seldom, every_step=False)
    job = trainings.job("whole")
    moments = trainings.attempt(job)
    whole = trainings.made(job)
    assert whole == trainings.made(seldom), "when stops are kept decides nothing"
    ends = next(i for i, moment in enumerate(moments) if moment.startswith("os.remove artifacts")) + 1
    final = len(moments) - moments[::-1].index("os.rename runs/part") - 1
    for at in [*range(ends), *range(final, len(moments))]:
        goes_on_as_if_nothing_was(trainings, whole, at, halfway=False)
    writes = [i for i in range(ends) if moments[i].startswith(("os.mkdir runs", "shutil.copyfile"))]
    for at in writes:
        goes_on_as_if_nothing_was(trainings, whole, at, halfway=True)
