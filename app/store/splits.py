"""Which split a person belongs to: by a hash of the person, so that a new load never moves anyone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection

TRAIN_BELOW, TUNING_BELOW = 0.70, 0.80
LARGEST_UNIT = 0.05
"""Persons who share scans are kept together unless one such unit holds a larger share of all persons."""

OWN_WORDS = {
    "train": "train",
    "training": "train",
    "tuning": "tuning",
    "valid": "tuning",
    "validation": "tuning",
    "val": "tuning",
    "dev": "tuning",
    "test": "held_out",
    "held_out": "held_out",
}


def fraction(person_id: int, salt: str = "") -> float:
    """The person's place in [0, 1): first 8 bytes of sha256('lachesis' ‖ salt ‖ decimal person_id), big-endian."""
    digest = hashlib.sha256(f"lachesis{salt}{person_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_at(place: float) -> str:
    """train, tuning or held_out."""
    return "train" if place < TRAIN_BELOW else "tuning" if place < TUNING_BELOW else "held_out"


def units(groups: Iterable[Sequence[int]]) -> dict[int, int]:
    """Person → the smallest person of its unit, for all persons in `groups` that overlap directly or through others."""
    parent: dict[int, int] = {}

    def root(person: int) -> int:
        parent.setdefault(person, person)
        while parent[person] != person:
            parent[person] = parent[parent[person]]
            person = parent[person]
        return person

    for group in groups:
        first = root(group[0])
        for person in group[1:]:
            low, high = sorted((first, root(person)))
            parent[high] = first = low
    return {person: root(person) for person in parent}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """Which persons share a file or a series UID."""

    unit: Mapping[int, int] = field(default_factory=dict)
    """Person → smallest person of its unit; persons who share nothing are absent, all where units are too large."""
    persons: int = 0
    """Persons who share."""
    largest: int = 0
    """Persons in the largest unit."""
    by_person: bool = False
    """True where the largest unit is too large, so that the split is by person alone and scans cross it."""

    def definition(self) -> dict[str, Any]:
        """As kept with a cohort."""
        return {
            "by": "person" if self.by_person else "unit",
            "persons_sharing": self.persons,
            "largest_unit": self.largest,
            "shared_volumes": self.by_person,
        }


_SHARED = """
SELECT array_agg(DISTINCT person_id) FROM omop.image_occurrence GROUP BY root, path HAVING count(DISTINCT person_id) > 1
UNION ALL
SELECT array_agg(DISTINCT person_id) FROM omop.image_occurrence WHERE series_uid IS NOT NULL
GROUP BY series_uid HAVING count(DISTINCT person_id) > 1
"""


def find_sharing(connection: Connection) -> Sharing:
    """Who shares scans with whom, over all scans loaded, so that two cohorts of one store split alike."""
    from sqlalchemy import text

    unit = units(connection.execute(text(_SHARED)).scalars())
    if not unit:
        return Sharing()
    largest = max(Counter(unit.values()).values())
    persons = connection.execute(text("SELECT count(DISTINCT person_id) FROM omop.image_occurrence")).scalar_one()
    too_large = largest > LARGEST_UNIT * persons
    return Sharing(unit={} if too_large else unit, persons=len(unit), largest=largest, by_person=too_large)


def split_persons(own: Mapping[int, str | None], sharing: Sharing, salt: str = "") -> dict[int, str]:
    """Each person's split: the extract's own where it has one (then that of the person's unit), else by hash."""
    given = {p: OWN_WORDS[word.lower()] for p, word in own.items() if word and word.lower() in OWN_WORDS}
    of_unit: dict[int, str] = {}
    for person in sorted(given):
        if person in sharing.unit:
            of_unit.setdefault(sharing.unit[person], given[person])
    result = {}
    for person in own:
        unit = sharing.unit.get(person, person)
        result[person] = given.get(person) or of_unit.get(unit) or split_at(fraction(unit, salt))
    return result


def split_by_time(latest: Mapping[int, bool], places: Mapping[int, float]) -> dict[int, str]:
    """Held out = persons with a scan from the day on (`latest`); the others by hash, 7 to 1 train and tuning."""
    edge = TRAIN_BELOW / TUNING_BELOW
    return {p: "held_out" if late else "train" if places[p] < edge else "tuning" for p, late in latest.items()}
