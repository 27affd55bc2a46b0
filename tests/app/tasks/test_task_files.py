"""Task files: what may stand in them, and what is said of what may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.errors import InputError, UnknownName
from app.tasks import CLINICAL, FOLDER, TaskSpec, builtin, clinical_task_names, read_task_file


def read(tmp_path: Path, text: str) -> TaskSpec:
    file = tmp_path / "task.toml"
    file.write_text(text)
    return read_task_file(file)


def test_two_lines_are_a_task_with_clinical_defaults(tmp_path: Path) -> None:
    spec = read(tmp_path, 'name = "gi_bleed"\nconcepts = [192671]\n')
    assert (spec.occurrence, spec.prior, spec.same_day, spec.death, spec.follow_up) == (
        "first", "exclude", "exclude", "censor", "cohort",
    )  # fmt: skip
    assert spec.descendants and spec.start_seconds == 0 and spec.horizons_days == (365,) and not spec.by_statement


def test_the_next_occurrence_keeps_history_unless_told_otherwise(tmp_path: Path) -> None:
    assert read(tmp_path, 'name = "a"\nconcepts = [1]\noccurrence = "next"\n').prior == "keep"
    assert read(tmp_path, 'name = "a"\nconcepts = [1]\noccurrence = "next"\nprior = "exclude"\n').prior == "exclude"


@pytest.mark.parametrize(
    ("text", "line", "field", "says"),
    [
        ('name = "a"\nconcept = [1]', 2, "concept", "did you mean 'concepts'"),
        ('name = "a"\nconcepts = [1]\n\ndeath = "censors"', 4, "death", "did you mean 'censor'"),
        ('name = "a"\nconcepts = ["192671"]', 2, "concepts", "whole number"),
        ('name = "a"\nconcepts = 192671', 2, "concepts", "a list"),
        ('name = "a"\nvocabulary_codes = ["46621007"]', 2, "vocabulary_codes", "VOCABULARY/CODE"),
        ('name = "a"\nconcepts = [1]\nhorizons_days = []', 3, "horizons_days", "at least one"),
        ('name = "a"\nconcepts = [1]\nstart_days = -1', 3, "start_days", "0 to 73000"),
        ('name = "a"\nconcepts = [1]\nvalues = [{ below = 7 }]', 3, "values", "a unit"),
        ('name = "a"\nconcepts = [1]\nvalues = [{ belo = 7, unit = 0 }]', 3, "values", "did you mean 'below'"),
        ('name = "a"\nconcepts = [4306655]\ndeath = "competing"', 3, "death", "censor"),
        ('name = "a"\nconcepts = [1]\ndomains = ["drugs"]', 3, "domains", "did you mean 'drug'"),
        ('name = "a"\nconcepts = [1]\nprior = "keep"\nprior_days = 3', 4, "prior_days", "exclude"),
        ('concepts = [1]', 1, "name", "expected a field 'name'"),
        ('name = "a"', 1, "concepts", "found none"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_file_line_and_field(
    tmp_path: Path, text: str, line: int, field: str, says: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'task.toml'}, line {line}, field {field!r}: ") and says in message
    assert "\n" not in message


def test_broken_toml_and_absent_files_are_answered_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task\.toml: expected TOML, .*line 1"):
        read(tmp_path, "name = \n")
    with pytest.raises(InputError, match="No such file"):
        read_task_file(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(InputError, match="not UTF-8"):
        read_task_file(tmp_path / "latin.toml")


def test_every_task_that_comes_with_lachesis_reads_and_survives_json() -> None:
    names = {file.stem for file in FOLDER.glob("*.toml")}
    assert names == {*CLINICAL, *(f"paper_{name}" for name in CLINICAL)}
    for name in names:
        spec = builtin(name)
        assert spec.name == name and spec.title
        assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_ours_exclude_history_and_the_papers_keep_it() -> None:
    ours = {name: builtin(name) for name in clinical_task_names()}
    assert len(ours) == 8
    assert {name for name, spec in ours.items() if spec.prior == "keep"} == {"readmission"}
    papers = [builtin(f"paper_{name}") for name in ours]
    assert all(spec.prior == "keep" and spec.same_day == "after" and spec.start_seconds > 0 for spec in papers)
    assert ours["mortality"].follow_up == "data_cut"
    assert [spec.name for spec in ours.values() if spec.horizons_days == (30, 180, 365)] == ["mortality", "readmission"]


def test_a_mistyped_task_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'pleural_effusion'"):
        builtin("pleural_efusion")
