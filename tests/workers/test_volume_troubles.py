"""What befalls volumes, and the threads that read them ahead, in the middle of a training."""

from __future__ import annotations

from tests.workers.trainings import Trainings


def test_volumes_that_are_cut_or_gone_in_the_middle_of_a_run_are_decoded_again(trainings: Trainings) -> None:
    trainings.epochs = 1
    whole, job = trainings.job("whole"), trainings.job("cut")
    trainings.attempt(whole)
    assert trainings.settings.home is not None
    assert trainings.troubled(job, "cut volumes")["state"] == "succeeded"
    assert trainings.made(job) == trainings.made(whole)
    files = list(trainings.settings.home.rglob("cache/*/*.npy"))
    assert len(files) == 47 and len({file.stat().st_size for file in files}) == 1, "all are whole again"


def test_a_thread_that_dies_while_it_reads_ahead_ends_the_attempt_and_nobody_waits_for_it(
    trainings: Trainings,
) -> None:
    trainings.epochs = 1
    told = trainings.troubled(trainings.job("lost"), "lost prefetch")
    assert told["state"] == "queued" and told["attempt"] == 1
