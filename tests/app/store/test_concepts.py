"""Searching concepts: codes first, then names by use; and what the vocabulary lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from app.loading import omop, vocabulary
from app.store.concepts import Filter, search, unknown
from app.store.work import InlineWork
from tests.app.loading import athena
from tests.app.loading.extracts import conditions, extract


@pytest.fixture
def filled(work: Callable[..., InlineWork], engine: Engine, tmp_path: Path) -> Engine:
    """Twenty conditions of five persons, one coded by ICD, two unknown; a whole vocabulary."""
    lines = (
        "21,1,301,2016-01-01,,,,0,,500",
        "22,2,777,2016-01-01,,,,0,,778",
        "23,2,0,2016-01-01,,,,0,,0",
    )
    omop.load(work(path=str(extract(tmp_path / "omop", condition_occurrence=conditions(*lines)))))
    vocabulary.load(work(path=str(athena.write(tmp_path / "athena")), full=True))
    return engine


@pytest.mark.parametrize(
    ("words", "wanted", "found"),
    [
        ("301", Filter(), [301]),
        ("k92.2", Filter(), [500]),
        ("K92", Filter(), [500]),
        ("FINDING clinical", Filter(), [10]),
        ("gut bowel disorder 3", Filter(), [303]),
        ("bowel 4", Filter(domain="condition", vocabulary="snomed", standard=True), [304]),
        ("first trouble", Filter(), [301]),
        ("gut", Filter(vocabulary="ICD10CM"), [500]),
        ("old", Filter(standard=True), []),
        ("odwe", Filter(), []),
        ("obod", Filter(), [90]),
        ("' & | ! :*", Filter(), []),
        ("99999999999999999999", Filter(), []),
    ],
)
def test_concepts_are_found(filled: Engine, words: str, wanted: Filter, found: list[int]) -> None:
    with filled.connect() as connection:
        assert [row["concept_id"] for row in search(connection, words, 5, wanted)] == found


def test_the_most_used_come_first_with_persons_and_events(filled: Engine) -> None:
    with filled.connect() as connection:
        rows = {row["concept_id"]: row for row in search(connection, "finding", 10)}
        (mapped,) = search(connection, "500", 1)
    assert list(rows)[:2] == [10, 20]
    assert {key: rows[10][key] for key in ("persons", "events")} == {"persons": 0, "events": 0}
    assert rows[10]["events_with_descendants"] == 21
    assert rows[10]["persons_with_descendants"] == 5
    assert (rows[20]["events_with_descendants"], rows[20]["persons_with_descendants"]) == (3, 3)
    assert (mapped["source_events"], mapped["maps_to"]) == (1, "301 Disorder 1 of gut/bowel")


def test_unknown_concepts_are_listed_without_concept_zero(filled: Engine) -> None:
    with filled.connect() as connection:
        rows = unknown(connection, 5)
    assert [(row["concept_id"], row["persons"], row["events"], row["source_events"]) for row in rows] == [
        (777, 1, 1, 0),
        (778, 0, 0, 1),
    ]


def test_a_reader_may_count_concepts(filled: Engine) -> None:
    with filled.begin() as connection:
        connection.execute(text("SET LOCAL ROLE lachesis_reader"))
        assert connection.scalar(text("SELECT sum(num_events) FROM omop.concept_count")) == 23
        assert connection.scalar(text("SELECT version FROM ops.vocabulary_release")) == "v5.0 27-FEB-25"
