"""Outcomes permuted among persons tell nothing, unless a person is in train and held out at once."""

from __future__ import annotations

import numpy as np
import pytest

from ml.controls import null_scores, permute_persons
from ml.evaluate import HELD_OUT, TRAIN, TUNING, People, Question
from ml.labelling import CENSORED, EVENT


def test_a_persons_scans_get_the_outcomes_of_one_other_person() -> None:
    person = np.array([5, 5, 5, 1, 2, 2, 9, 9, 9])
    donor = permute_persons(person, seed=4)
    given = {p: set(person[donor[person == p]].tolist()) for p in (1, 2, 5, 9)}
    assert all(len(of) == 1 for of in given.values())
    assert sorted(next(iter(of)) for of in given.values()) == [1, 2, 5, 9]
    assert len(set(donor[person == 1].tolist())) == 1
    assert (permute_persons(person, seed=4) == donor).all()
    assert any((permute_persons(person, seed=s) != donor).any() for s in range(5))


def make(*, in_both_splits: bool) -> tuple[People, Question]:
    """Two scans a person whose embedding is noise, but the same in both; the outcome depends on it."""
    rng = np.random.default_rng(2)
    persons = 300
    noise = rng.normal(size=(persons, 40))
    onset, end = rng.exponential(300 / np.exp(noise[:, 0])), rng.uniform(100, 900, persons)
    status = np.where(onset <= end, EVENT, CENSORED).astype(np.int8)
    split = rng.choice([TRAIN, TRAIN, TUNING, HELD_OUT], persons).astype(np.int8)
    person = np.tile(np.arange(persons), 2)
    both = np.tile(split, 2)
    if in_both_splits:
        both = np.repeat([TRAIN, HELD_OUT], persons).astype(np.int8)
    people = People(
        person=person,
        split=both,
        index_seconds=np.zeros(2 * persons, np.int64),
        covariates=np.zeros((2 * persons, 2)),
        images={"arm": np.tile(noise, (2, 1))},
    )
    return people, Question(
        name="a", horizons_days=[365], status=np.tile(status, 2), time_days=np.tile(np.minimum(onset, end), 2)
    )


@pytest.mark.parametrize("leaks", [False, True])
def test_a_person_in_two_splits_is_what_makes_permuted_outcomes_tell(leaks: bool) -> None:
    people, question = make(in_both_splits=leaks)
    scores = null_scores(people, [question], arm="arm", permutations=4, replicates=200, seed=0)
    off = [not low <= 0.5 <= high for low, high in (score.interval() or (1, 1) for score in scores)]
    assert len(off) == 4
    assert sum(off) == 4 if leaks else sum(off) <= 1
