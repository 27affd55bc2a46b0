"""Splits: by person, by hash, whole units together."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from app.store.splits import Sharing, fraction, split_at, split_by_time, split_persons, units

PERSONS = st.integers(-(2**62), 2**62)


@given(PERSONS, st.text(max_size=5))
def test_the_fraction_is_the_first_eight_bytes_of_the_digest(person: int, salt: str) -> None:
    text = "lachesis" + salt + str(person)
    assert fraction(person, salt) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16


def test_seventy_ten_and_twenty_of_a_hundred_persons_fall_into_the_splits() -> None:
    split = split_persons(dict.fromkeys(range(20_000)), Sharing())
    share = {s: list(split.values()).count(s) / 20_000 for s in ("train", "tuning", "held_out")}
    assert abs(share["train"] - 0.7) < 0.01 and abs(share["tuning"] - 0.1) < 0.01
    assert split_at(0.7) == "tuning" and split_at(0.8) == "held_out" and split_at(0.0) == "train"


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), max_size=12))
def test_units_are_the_connected_groups_named_by_their_smallest_person(groups: list[list[int]]) -> None:
    sets: list[set[int]] = []
    for group in groups:
        merged = set(group).union(*(s for s in sets if s & set(group)))
        sets = [s for s in sets if not s & merged] + [merged]
    assert units(groups) == {person: min(s) for s in sets for person in s}


@given(st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=4), max_size=6))
def test_persons_of_a_unit_share_a_split(groups: list[list[int]]) -> None:
    unit = units(groups)
    split = split_persons(dict.fromkeys(range(31)), Sharing(unit=unit))
    assert all(split[person] == split_at(fraction(first)) for person, first in unit.items())


def test_the_extracts_own_split_wins_and_takes_the_unit_with_it() -> None:
    own = {1: "valid", 2: None, 3: "TEST", 4: None, 5: "unheard of"}
    split = split_persons(own, Sharing(unit={1: 1, 2: 1}))
    assert (split[1], split[2], split[3]) == ("tuning", "tuning", "held_out")
    assert split[4] == split_at(fraction(4)) and split[5] == split_at(fraction(5))


def test_by_time_the_late_are_held_out_and_the_others_keep_seven_to_one() -> None:
    places = {person: fraction(person) for person in range(20_000)}
    split = split_by_time({person: person % 5 == 0 for person in places}, places)
    assert all((split[p] == "held_out") == (p % 5 == 0) for p in places)
    train = sum(s == "train" for s in split.values())
    assert abs(train / 16_000 - 0.875) < 0.01
