"""What befalls the second rank of a training reaches its job: the next attempt, or an error that says what to do."""

from __future__ import annotations

import pytest

from tests.workers.dying import AT_STEP
from tests.workers.trainings import Trainings


def two_ranks(trainings: Trainings, name: str) -> int:
    trainings.epochs = 1
    return trainings.job(name, gpus=2)


@pytest.mark.long
def test_a_rank_that_hangs_is_given_up_and_the_next_attempt_ends_as_if_it_had_not(trainings: Trainings) -> None:
    whole = two_ranks(trainings, "whole")
    trainings.attempt(whole)
    job = two_ranks(trainings, "hung")
    told = trainings.troubled(job, "hang")
    assert told["state"] == "retry_wait" and "did not answer for 10 s" in told["error_message"]
    trainings.attempt(job)
    attempts = trainings.rows("SELECT start_step FROM ops.job_attempt WHERE job_id = :j ORDER BY fence", j=job)
    assert [row.start_step for row in attempts] == [0, AT_STEP]
    assert trainings.made(job) == trainings.made(whole)
    assert trainings.left_over() == []


def test_a_rank_without_memory_ends_the_job_with_the_settings_to_change(trainings: Trainings) -> None:
    told = trainings.troubled(two_ranks(trainings, "large"), "no memory")
    assert told["state"] == "failed" and told["error_class"] == "InputError"
    assert "rank 1: RuntimeError" in told["error_message"] and "can't allocate memory" in told["error_message"]
    assert (
        "--set recompute=true" in told["error_message"] and "--set batch=1 --set accumulate=4" in told["error_message"]
    )


def test_a_rank_that_fails_says_why_and_the_training_is_tried_again(trainings: Trainings) -> None:
    told = trainings.troubled(two_ranks(trainings, "lost"), "other error")
    assert told["state"] == "retry_wait"
    assert "Rank 1 failed (FileNotFoundError: " in told["error_message"]


def test_a_rank_without_room_for_messages_between_devices_says_what_to_give_the_container(
    trainings: Trainings,
) -> None:
    told = trainings.troubled(two_ranks(trainings, "narrow"), "no shm")
    assert told["state"] == "failed" and told["error_class"] == "InputError"
    assert "Expected room in /dev/shm" in told["error_message"] and "--shm-size=1g" in told["error_message"]


@pytest.mark.long
def test_two_ranks_go_back_together_and_when_stops_are_kept_decides_nothing(trainings: Trainings) -> None:
    often, seldom = (trainings.job(name, gpus=2) for name in ("often", "seldom"))
    for job, every_step in ((often, True), (seldom, False)):
        assert trainings.troubled(job, "diverges", every_step=every_step)["state"] == "succeeded"
        said = trainings.rows("SELECT message FROM ops.job_log WHERE job_id = :j", j=job)
        assert sum("went back to step 6" in row.message for row in said) == 1
    assert trainings.made(often) == trainings.made(seldom)
    trainings.stands(often)
