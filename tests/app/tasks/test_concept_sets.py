"""Concept sets as ATLAS exports them, exclusions, and files with several tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from app.errors import InputError
from app.store import cohorts, tasks
from app.store.codes import resolve
from app.store.work import InlineWork
from app.tasks import TaskSpec, read_task_file, read_task_files
from app.tasks.concept_set import ConceptSetItem, read_concept_set
from tests.app.store.records import Records, rows
from workers.stages.label import label

Make = Callable[..., InlineWork]

TREE = {1: (2, 3, 4, 5), 2: (4,), 3: (5,), 6: (5,), 9: ()}
"""Ancestor → descendants; 5 is no longer valid."""
MAPS_TO = ((101, 1), (102, 2), (104, 4), (109, 9), (105, 5))
"""(source concept, standard concept); the mapping of 109 was deleted."""


def item(concept: int, **flags: bool) -> dict[str, Any]:
    return {"concept": {"CONCEPT_ID": concept, "CONCEPT_NAME": f"concept {concept}"}, **flags}


def saved(folder: Path, content: Any, name: str = "set.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


ITEMS = [item(1, includeDescendants=True), item(2, isExcluded=True, includeMapped=False)]
SHAPES: list[tuple[Any, int | None]] = [
    ({"items": ITEMS}, None),
    ({"id": 3, "name": "x", "expression": {"items": ITEMS}}, None),
    ([{"id": 0, "expression": {"items": [item(9)]}}, {"id": 7, "expression": {"items": ITEMS}}], 7),
    ({"ConceptSets": [{"id": 7, "expression": {"items": ITEMS}}], "PrimaryCriteria": {}}, None),
    ({"items": [{"conceptId": 1, "includeDescendants": True}, {"conceptId": 2, "isExcluded": True}]}, None),
]


@pytest.mark.parametrize(("content", "set_id"), SHAPES)
def test_every_shape_that_atlas_exports_gives_the_same_items(tmp_path: Path, content: Any, set_id: int | None) -> None:
    expected = (ConceptSetItem(concept_id=1, descendants=True), ConceptSetItem(concept_id=2, excluded=True))
    assert read_concept_set(saved(tmp_path, content), set_id) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{\n not json", "line 2"),
        ({"items": []}, "items"),
        ({"name": "x"}, "items"),
        ({"items": [item(1), {"concept": {"CONCEPT_NAME": "?"}}]}, "item 2"),
        ({"items": [item(-1)]}, "item 1"),
        ({"items": [item(1, includeDescendants="yes")]}, "includeDescendants"),  # type: ignore[arg-type]
        ({"items": [item(1, isExcluded=True)]}, "not excluded"),
        ([{"id": 1, "expression": {"items": [item(1)]}}, {"id": 2, "expression": {"items": [item(2)]}}], "ids 1, 2"),
    ],
)
def test_a_concept_set_that_cannot_be_read_is_refused_by_file_and_item(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_concept_set(saved(tmp_path, content))


def test_a_task_file_names_its_concept_set_beside_it_and_errors_name_the_line(tmp_path: Path) -> None:
    saved(tmp_path, {"items": [item(1, includeDescendants=True)]}, "pe.json")
    path = saved(tmp_path, 'name = "pe"\nconcept_set = "pe.json"\n', "pe.toml")
    spec = read_task_file(path)
    assert spec.concept_set == (ConceptSetItem(concept_id=1, descendants=True),)
    assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    saved(tmp_path, 'name = "pe"\n\nconcept_set = "other.json"\n', "pe.toml")
    with pytest.raises(InputError, match=r"line 3, field 'concept_set'.*other.json"):
        read_task_file(path)
    saved(tmp_path, 'name = "pe"\nconcepts = [1]\nconcept_set_id = 4\n', "pe.toml")
    with pytest.raises(InputError, match="line 3, field 'concept_set_id'"):
        read_task_file(path)


def test_a_file_may_hold_several_tasks_and_errors_name_the_line_of_theirs(tmp_path: Path) -> None:
    good = '[[task]]\nname = "a"\nconcepts = [1]\n\n[[task]]\nname = "b"\nconcepts = [2]\nprior = "keep"\n'
    path = saved(tmp_path, good, "two.toml")
    assert [(s.name, s.prior) for s in read_task_files(path)] == [("a", "exclude"), ("b", "keep")]
    saved(tmp_path, good.replace('prior = "keep"', 'prior = "kept"'), "two.toml")
    with pytest.raises(InputError, match=r"line 8, field 'prior'"):
        read_task_files(path)
    saved(tmp_path, 'name = "x"\n' + good, "two.toml")
    with pytest.raises(InputError, match=r"line 1, field 'name'.*own \[\[task\]\]"):
        read_task_files(path)
    with pytest.raises(InputError, match="one task"):
        read_task_file(saved(tmp_path, good, "two.toml"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"exclude_concepts": [2], "visit_concepts": [9201]}, "exclude_concepts"),
        ({"exclude_vocabulary_codes": ["x"], "concepts": [1]}, "VOCABULARY/CODE"),
        ({"exclude_concepts": ["a"], "concepts": [1]}, "whole number"),
    ],
)
def test_exclusions_are_checked(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TaskSpec.from_dict({"name": "x", **fields})


def circe(items: list[ConceptSetItem]) -> set[int]:
    """A concept set, item by item, in plain words."""

    def of(chosen: list[ConceptSetItem]) -> set[int]:
        found: set[int] = set()
        for one in chosen:
            named = {one.concept_id}
            if one.descendants:
                named |= {d for d in TREE.get(one.concept_id, ()) if d != 5}
            if one.mapped:
                named |= {source for source, standard in MAPS_TO if standard in named and source != 109}
            found |= named
        return found

    return of([i for i in items if not i.excluded]) - of([i for i in items if i.excluded])


@pytest.fixture
def vocabulary(engine: Engine) -> Engine:
    with engine.begin() as connection:
        records = Records(connection)
        for person, concept in ((1, 3), (2, 4), (3, 2), (4, 1)):
            records.person(person)
            records.period(person, "2010-01-01", "2022-01-01")
            records.scan(person, "2020-01-01 10:00:00")
            records.event(person, "2020-03-01 10:00:00", concept)
        records.pack()
        records.concepts([1, 2, 3, 4, 5, 6, 9])
        records.concepts([source for source, _ in MAPS_TO], "ICD10CM", None)
        records.ancestors([(a, d, 1) for a, descendants in TREE.items() for d in descendants])
        connection.execute(text("UPDATE omop.concept SET invalid_reason = 'D' WHERE concept_id = 5"))
        for source, standard in MAPS_TO:
            connection.execute(
                text("INSERT INTO omop.concept_relationship VALUES (:a, :b, 'Maps to', null, null, :invalid)"),
                {"a": source, "b": standard, "invalid": "D" if source == 109 else None},
            )
    return engine


flags = st.booleans()
items = st.lists(
    st.builds(
        ConceptSetItem, concept_id=st.sampled_from([1, 2, 3, 4, 6, 9]), descendants=flags, excluded=flags, mapped=flags
    ),
    min_size=1,
    max_size=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(items)
def test_a_concept_set_means_what_ohdsi_takes_it_to_mean(vocabulary: Engine, items: list[ConceptSetItem]) -> None:
    expected = circe(items)
    if not any(not one.excluded for one in items) or not expected:
        return
    with vocabulary.connect() as connection:
        spec = TaskSpec(name="x", concept_set=tuple(items))
        (resolved,) = resolve(connection, [spec], allow_absent=False)
    assert resolved["concepts"] == sorted(expected)
    assert resolved["descendants"] is False


def test_a_concept_that_the_vocabulary_lacks_is_named_and_an_excluded_one_need_not_be_there(vocabulary: Engine) -> None:
    with vocabulary.connect() as connection:
        with pytest.raises(InputError, match="777"):
            resolve(connection, [TaskSpec(name="x", concept_set=(ConceptSetItem(concept_id=777),))], allow_absent=False)
        spec = TaskSpec(name="x", concepts=(1,), exclude_concepts=(2, 888))
        assert resolve(connection, [spec], allow_absent=False)[0]["concepts"] == [1, 3, 5]
        by_code = TaskSpec(name="x", concepts=(1,), exclude_vocabulary_codes=("SNOMED/c2", "ICD10CM/c105"))
        assert resolve(connection, [by_code], allow_absent=False)[0]["concepts"] == [1, 3]
        with pytest.raises(InputError, match="all of them excluded"):
            resolve(connection, [TaskSpec(name="x", concepts=(2,), exclude_concepts=(1, 2))], allow_absent=False)


@pytest.mark.parametrize("domains", [(), ("condition",)])
def test_an_excluded_branch_gives_no_outcome_and_the_list_is_kept_with_the_task(
    vocabulary: Engine, work: Make, domains: tuple[str, ...]
) -> None:
    """Both ways to an outcome: by the concepts of a timeline, and by a statement."""
    cohorts.build(work(name="c"))
    spec = TaskSpec(name="x", concepts=(1,), exclude_concepts=(2,), domains=domains)
    tasks.build(work(name="t", cohort="c", specs=[spec.to_dict()]))
    label(work(name="l", cohort="c", tasks="t"))
    found = rows(vocabulary, "SELECT person_id FROM label.tte_long WHERE label_set = 'l' AND event = 1 ORDER BY 1")
    assert [row.person_id for row in found] == [1, 4]
    (kept,) = rows(vocabulary, "SELECT definition -> 'resolved' -> 'concepts' AS concepts FROM label.task")
    assert kept.concepts == [1, 3, 5]
