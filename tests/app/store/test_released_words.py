"""Codes of tasks that no row uses mean what the vocabulary that is kept beside the store says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.errors import InputError, StoreError
from app.loading import omop, vocabulary
from app.store import task_checks
from app.store.codes import resolve
from app.store.work import InlineWork
from app.tasks import TaskSpec
from app.tasks.concept_set import ConceptSetItem
from tests.app.loading import athena
from tests.app.loading.extracts import conditions, extract, rows
from tests.app.loading.test_vocabulary import more

Make = Callable[..., InlineWork]

UNUSED = TaskSpec(name="unused", vocabulary_codes=("SNOMED/N-90",))
BY_ID = TaskSpec(name="by_id", concepts=(90,))
MAPPED = TaskSpec(name="mapped", vocabulary_codes=("ICD10CM/K92.2",))
IN_SET = TaskSpec(name="in_set", concept_set=(ConceptSetItem(concept_id=90, descendants=True),))
LESS = TaskSpec(name="less", concepts=(10,), exclude_vocabulary_codes=("ICD10CM/K92.2",))
TYPO = TaskSpec(name="typo", vocabulary_codes=("SNOMED/N-99",))


@pytest.fixture
def loaded(work: Make, engine: Engine, tmp_path: Path) -> InlineWork:
    """Rows of the concepts 301 to 320, and a release that knows more; nobody has 90, 91 and ICD10CM/K92.2 (500)."""
    omop.load(work(path=str(extract(tmp_path / "omop", condition_occurrence=conditions()))))
    vocabulary.load(work(path=str(athena.write(tmp_path / "athena"))))
    assert rows(engine, "SELECT concept_id FROM omop.concept WHERE concept_id IN (90, 91, 500)") == []
    return work()


def test_codes_that_no_row_uses_are_known_by_the_kept_vocabulary(loaded: InlineWork, engine: Engine) -> None:
    specs = [UNUSED, BY_ID, MAPPED, IN_SET, LESS]
    with engine.connect() as connection:
        found = resolve(connection, specs, allow_absent=False, settings=loaded.settings)
        with pytest.raises(InputError, match=r"not found: SNOMED/N-99 \(task typo\)"):
            resolve(connection, [TYPO], allow_absent=False, settings=loaded.settings)
    assert [one["concepts"] for one in found[:4]] == [[90], [90], [301, 500], [90]]
    assert 301 not in found[4]["concepts"] and {10, 20, 302} <= set(found[4]["concepts"])
    assert not any(one["absent"] for one in found)


def test_checks_tell_a_code_that_nobody_has_from_one_that_does_not_exist(loaded: InlineWork, engine: Engine) -> None:
    with engine.connect() as connection:
        found = task_checks.check_specs(connection, [UNUSED, MAPPED, TYPO], loaded.settings)
        without = task_checks.check_specs(connection, [UNUSED])
    assert [(one.task, one.check) for one in found] == [("unused", "never_seen"), ("typo", "absent_code")]
    assert "known" in found[0].found
    assert [one.check for one in without] == ["absent_code"]


def test_a_release_that_is_not_on_this_host_is_asked_for_only_where_it_is_needed(
    loaded: InlineWork, engine: Engine
) -> None:
    shutil.rmtree(loaded.settings.home / "artifacts", ignore_errors=True)
    with engine.connect() as connection:
        known = TaskSpec(name="known", concepts=(301,))
        assert resolve(connection, [known], allow_absent=False, settings=loaded.settings)[0]["concepts"] == [301]
        with pytest.raises(StoreError, match="missing or cut short"):
            resolve(connection, [UNUSED], allow_absent=False, settings=loaded.settings)


def test_a_later_load_brings_what_such_a_task_needs(
    loaded: InlineWork, work: Make, engine: Engine, tmp_path: Path
) -> None:
    changed = extract(tmp_path / "later", condition_occurrence=conditions(more(21, 91)))
    omop.load(work(path=str(changed)))
    assert rows(
        engine, "SELECT descendant_concept_id FROM omop.concept_ancestor WHERE ancestor_concept_id = 90 ORDER BY 1"
    ) == [
        (90,),
        (91,),
    ]
