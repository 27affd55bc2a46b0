"""Which concepts become pretraining tasks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.errors import InputError, UnknownName
from app.store import cohorts, tasks
from app.store.entropy import score, weigh
from app.store.work import InlineWork
from tests.app.store.records import Records, rows

Make = Callable[..., InlineWork]

# A six-concept ontology:  1 ─ 2 ─ 4      and 6 alone; 40 train persons.
#                           └─ 3 ─ 5
# Everyone has 1 (through something); 20 have 2, 10 of them 4; 20 have 3, all of them 5; 4 have 6.
HAND = [(1, 40, 40, 40), (2, 20, 20, 40), (3, 20, 20, 40), (4, 10, 10, 20), (5, 20, 20, 20), (6, 4, 4, 40)]


def test_the_six_concept_ontology_by_hand() -> None:
    weighed = weigh(HAND, persons=40, size=3)
    half = math.log(0.5)  # q = 1/2 everywhere but at 6, where q = 1/10
    assert [(c.concept_id, c.entropy) for c in weighed] == [
        (2, pytest.approx(half)),  # base 1, ties by concept id
        (3, pytest.approx(half)),
        (4, pytest.approx(half / 2)),  # base 1/2: half of the persons have its parent
        (6, pytest.approx(0.1 * math.log(0.1) + 0.9 * math.log(0.9))),
    ]  # 1 is everybody's, 5 is its parent's equal: q = 1 tells nothing
    assert [c.verdict for c in weighed] == ["chosen", "chosen", "chosen", "too_few_events"]


def test_the_next_in_order_fill_up_what_is_banned_or_too_rare() -> None:
    counts = [(n, 100 - n, 9 if n == 2 else 50, 200) for n in range(1, 7)]
    verdicts = {c.concept_id: c.verdict for c in weigh(counts, persons=200, size=2, banned={1})}
    assert verdicts == {
        1: "banned", 2: "too_few_events", 3: "chosen", 4: "chosen", 5: "beyond_size", 6: "beyond_size",
    }  # fmt: skip


def test_a_task_needs_a_thousandth_of_the_persons_where_that_is_more_than_ten() -> None:
    counts = [(1, 9_000, 19, 20_000), (2, 8_000, 20, 20_000)]
    assert [c.verdict for c in weigh(counts, persons=20_000, size=9)] == ["too_few_events", "chosen"]


def test_the_score_is_minus_the_weighted_entropy() -> None:
    assert score(5, 20, 40) == pytest.approx(0.5 * (0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


HAND_EDGES = [(1, 2), (1, 3), (2, 4), (3, 5)]


def fill(engine: Engine, persons: int = 60) -> dict[int, set[int]]:
    """Persons with the hand-worked ontology, scanned between two sets of events; (person → concepts after)."""
    random_ = random.Random(1)
    after: dict[int, set[int]] = {}
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([1, 2, 3, 4, 5, 6])
        records.ancestors([(c, c, 0) for c in range(1, 7)])
        records.ancestors([(a, d, 1) for a, d in HAND_EDGES] + [(1, 4, 2), (1, 5, 2)])
        for person in range(1, persons + 1):
            records.person(person, split="train" if person % 4 else "test")
            records.period(person, "2010-01-01", "2012-12-31")
            records.scan(person, "2011-01-01 12:00:00")
            after[person] = set()
            for concept in (2, 4, 5, 6, 0):
                for year, lived in ((2010, 0), (2012, 1), (2013, 0)):  # before the scan, after it, after the end
                    if random_.random() < 0.4:
                        records.event(person, f"{year}-06-01 10:00:00", concept)
                        after[person] |= {concept} if lived else set()
        records.pack()
    return after


def test_counts_in_the_store_agree_with_counting_by_hand(engine: Engine, work: Make) -> None:
    after = fill(engine)
    cohorts.build(work(name="c"))
    result = tasks.build(work(name="t", cohort="c", size=3))
    up = {1: {1}, 2: {1, 2}, 3: {1, 3}, 4: {1, 2, 4}, 5: {1, 3, 5}, 6: {6}, 0: set[int]()}
    had: dict[int, set[int]] = {}
    for row in rows(engine, "SELECT DISTINCT person_id, concept_id FROM omop.event"):
        if row.person_id % 4:
            had.setdefault(row.person_id, set()).update(up[row.concept_id])
    train = [person for person in after if person % 4]
    persons = {c: sum(c in s for s in had.values()) for c in range(1, 7)}
    events = {c: sum(any(c in up[x] for x in after[p]) for p in train) for c in range(1, 7)}
    parent = {2: 1, 3: 1, 4: 2, 5: 3}
    base = {c: persons[parent[c]] if c in parent else len(train) for c in range(1, 7)}
    expected = weigh([(c, persons[c], events[c], base[c]) for c in range(1, 7)], len(train), 3)
    found = rows(engine, "SELECT * FROM label.task_candidate ORDER BY rank")
    assert [
        (r.concept_id, r.rank, r.persons, r.base_persons, pytest.approx(r.entropy), r.num_train_events, r.verdict)
        for r in found
    ] == [(c.concept_id, c.rank, c.persons, c.base_persons, c.entropy, c.num_train_events, c.verdict) for c in expected]
    chosen = rows(engine, "SELECT * FROM label.task ORDER BY position")
    assert [t.concept_id for t in chosen] == [c.concept_id for c in expected if c.verdict == "chosen"]
    assert chosen[0].name == f"SNOMED/c{chosen[0].concept_id}" and chosen[0].occurrence == "next"
    assert result["tasks"] == len(chosen) and result["kind"] == "pretraining"


def test_a_parent_that_nobody_has_makes_a_concept_certain(engine: Engine, work: Make) -> None:
    """The class 7 of ingredient 3 is no ancestor of 5, which contains it: persons have 3 and nobody has 7."""
    fill(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO omop.concept_ancestor VALUES (7, 3, 1, 1)"))
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", size=5))
    weighed = {r.concept_id: r.base_persons for r in rows(engine, "SELECT * FROM label.task_candidate")}
    assert 3 not in weighed and 7 not in weighed and 2 in weighed


def test_an_ancestor_without_a_row_of_its_own_is_a_concept(engine: Engine, work: Make) -> None:
    """Extracts bring the concepts in use with all their ancestors' ids, but not the ancestors' names."""
    fill(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO omop.concept_ancestor VALUES (8, 4, 2, 2)"))
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", specs=[{"name": "a", "concepts": [8]}]))
    (row,) = rows(engine, "SELECT concept_id FROM label.task")
    assert row.concept_id == 8


def test_banned_concepts_go_with_their_descendants(engine: Engine, work: Make) -> None:
    fill(engine)
    cohorts.build(work(name="c"))
    tasks.build(work(name="clinical", cohort="c", specs=[{"name": "two", "concepts": [2]}]))
    tasks.build(work(name="t", cohort="c", size=5, ban="clinical"))
    verdicts = {r.concept_id: r.verdict for r in rows(engine, "SELECT * FROM label.task_candidate")}
    assert verdicts[2] == verdicts[4] == "banned" and "banned" not in {
        v for c, v in verdicts.items() if c not in (2, 4)
    }


def test_fewer_than_asked_for_is_said_and_the_same_again_is_unchanged(
    engine: Engine, work: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(engine)
    cohorts.build(work(name="c"))
    first = tasks.build(work(name="t", cohort="c", size=500))
    assert first["tasks"] < 500 and f"found {first['tasks']}" in capsys.readouterr().err
    again = tasks.build(work(name="t", cohort="c", size=500))
    assert again["unchanged"] and (again["task_set_id"], again["version"]) == (first["task_set_id"], 1)
    other = tasks.build(work(name="t", cohort="c", size=1))
    assert (other["version"], other["unchanged"]) == (2, False)
    current = rows(engine, "SELECT version FROM label.task_set WHERE is_current")
    assert [r.version for r in current] == [2]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"specs": [{"name": "a", "concepts": [77]}]}, r"not found: 77 \(task a\)"),
        ({"specs": [{"name": "a", "vocabulary_codes": ["SNOMED/none"]}]}, "SNOMED/none"),
        ({"specs": [{"name": "a", "source_codes": ["ICD10CM/I27.0"]}]}, "ICD10CM/I27.0"),
        ({"specs": [{"name": "a", "concepts": [1]}] * 2}, "'a' twice"),
        ({"specs": [{"name": "a", "concepts": [1]}], "size": 3}, "either a size or specs"),
        ({"specs": [{"name": "a", "concepts": [1]}], "ban": "x"}, "--size only"),
        ({"size": 3, "cohort": "chest"}, "No cohort named 'chest'"),
        ({"size": 3, "ban": "clinicl"}, "No task set named 'clinicl'"),
        ({"size": 40_000}, "32,767"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_and_nothing_is_stored(
    engine: Engine, work: Make, args: dict[str, Any], says: str
) -> None:
    with engine.begin() as connection:
        Records(connection).concepts([1])
    cohorts.build(work(name="c"))
    with pytest.raises((InputError, UnknownName), match=says):
        tasks.build(work(**{"name": "t", "cohort": "c"} | args))
    assert not rows(engine, "SELECT 1 FROM label.task_set")


def test_absent_codes_may_be_allowed_and_then_a_task_has_no_outcome(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        Records(connection).concepts([1])
    cohorts.build(work(name="c"))
    specs = [{"name": "a", "concepts": [1]}, {"name": "b", "vocabulary_codes": ["SNOMED/none"]}]
    result = tasks.build(work(name="t", cohort="c", specs=specs, allow_absent=True))
    assert result["absent"] == ["b"] and result["tasks"] == 2


def test_a_code_that_is_not_standard_means_what_it_maps_to(engine: Engine, work: Make) -> None:
    with engine.begin() as connection:
        records = Records(connection)
        records.concepts([1])
        records.concepts([2], "ICD10CM", None)
        records.do("INSERT INTO omop.concept_relationship VALUES (2, 1, 'Maps to')")
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", specs=[{"name": "a", "vocabulary_codes": ["ICD10CM/c2"]}]))
    (row,) = rows(engine, "SELECT definition -> 'resolved' -> 'concepts' AS concepts FROM label.task")
    assert row.concepts == [1, 2]


def test_what_was_weighed_reads_by_name_with_the_verdict(engine: Engine, work: Make) -> None:
    from app.store import listing

    fill(engine)
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", size=2))
    with engine.connect() as connection:
        (_, _), (title, statement) = listing.TASK.parts
        weighed = listing.details(connection, statement, "t@1", None)
    stored = rows(engine, "SELECT * FROM label.task_candidate ORDER BY rank")
    assert title == "weighed" and [w["concept_id"] for w in weighed] == [c.concept_id for c in stored]
    assert [w["verdict"] for w in weighed][:2] == ["chosen", "chosen"] and weighed[0]["code"].startswith("SNOMED/c")
    train = rows(engine, "SELECT definition ->> 'train_persons' AS n FROM label.task_set")[0].n
    for shown, candidate in zip(weighed, stored, strict=True):
        assert shown["prevalence"] == pytest.approx(candidate.persons / int(train))
        assert shown["event_rate"] == pytest.approx(candidate.num_train_events / int(train))


def test_flat_codes_without_a_vocabulary_have_everybody_as_their_base(engine: Engine, work: Make) -> None:
    fill(engine)
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE omop.concept_ancestor; DELETE FROM omop.concept"))
    cohorts.build(work(name="c"))
    tasks.build(work(name="t", cohort="c", size=4))
    weighed = rows(engine, "SELECT concept_id, base_persons FROM label.task_candidate")
    assert {r.concept_id for r in weighed} == {2, 4, 5, 6} and len({r.base_persons for r in weighed}) == 1
    assert {r.name for r in rows(engine, "SELECT name FROM label.task")} == {f"concept/{c}" for c in (2, 4, 5, 6)}
