"""`load vocabulary`: an Athena download is kept beside the store, and completes it at every load."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.errors import InputError
from app.loading import omop, vocabulary
from app.loading.vocabulary_files import line_feeds
from app.store.work import InlineWork
from tests.app.loading import athena
from tests.app.loading.extracts import CONDITION_HEADER, conditions, extract, one, rows, write

Make = Callable[..., InlineWork]

CONTENT = """
SELECT 'concept', c::text FROM omop.concept c UNION ALL SELECT 'ancestor', a::text FROM omop.concept_ancestor a
UNION ALL SELECT 'relationship', r::text FROM omop.concept_relationship r
UNION ALL SELECT 'synonym', s::text FROM omop.concept_synonym s ORDER BY 1, 2
"""


def more(number: int, concept: int, source: int = 0) -> str:
    """A further condition of person 1."""
    return f"{number},1,{concept},2016-01-01,2016-01-01 10:00:00,,,0,,{source}"


def test_what_is_used_comes_with_all_that_stands_above_it(work: Make, engine: Engine, tmp_path: Path) -> None:
    omop.load(work(path=str(extract(tmp_path / "omop", condition_occurrence=conditions(more(21, 0, 500))))))
    result = vocabulary.load(work(path=str(athena.write(tmp_path / "athena"))))
    assert result["version"] == "v5.0 27-FEB-25"
    assert result["ignored"] == ["concept_class", "domain", "drug_strength", "relationship"]
    assert result["warnings"] == []
    kept = {key for (key,) in rows(engine, "SELECT concept_id FROM omop.concept")}
    assert kept == {10, 20, 30, *range(301, 321), 500, 8507, 8527}
    assert rows(
        engine, "SELECT concept_name FROM omop.concept WHERE concept_id IN (20, 30, 8527) ORDER BY concept_id"
    ) == [
        ('Finding with "literal quotes',),
        ("NA",),
        ("null",),
    ]
    pairs = {(int(a), int(d)) for a, d, _, _ in athena.TABLES["CONCEPT_ANCESTOR"] if int(d) not in (90, 91)}
    assert set(rows(engine, "SELECT ancestor_concept_id, descendant_concept_id FROM omop.concept_ancestor")) == pairs
    assert rows(
        engine, "SELECT concept_id_1, concept_id_2, relationship_id FROM omop.concept_relationship ORDER BY 1"
    ) == [
        (301, 500, "Mapped from"),
        (500, 301, "Maps to"),
    ]
    assert rows(engine, "SELECT concept_synonym_name FROM omop.concept_synonym") == [("First gut trouble",)]
    assert one(engine, "SELECT vocabulary_version FROM omop.vocabulary WHERE vocabulary_id = 'SNOMED'") == "2024-09-01"
    assert rows(
        engine, "SELECT table_name, num_read, num_loaded FROM ops.load WHERE kind = 'vocabulary' ORDER BY 1"
    ) == [
        (name.lower(), len(athena.TABLES[name]), len(athena.TABLES[name]))
        for name in ("CONCEPT", "CONCEPT_ANCESTOR", "CONCEPT_RELATIONSHIP", "CONCEPT_SYNONYM")
    ]


def test_it_makes_no_difference_whether_vocabulary_or_events_come_first(
    work: Make, engine: Engine, tmp_path: Path
) -> None:
    folder = extract(tmp_path / "omop", condition_occurrence=conditions(more(21, 0, 500)))
    small = extract(tmp_path / "small", condition_occurrence=[CONDITION_HEADER, more(1, 320)])
    download = athena.write(tmp_path / "athena")
    omop.load(work(path=str(folder)))
    vocabulary.load(work(path=str(download)))
    expected = rows(engine, CONTENT)
    with engine.begin() as connection:
        for table in ("concept", "concept_ancestor", "concept_relationship", "concept_synonym", "concept_completed"):
            connection.exec_driver_sql(f"DELETE FROM omop.{table}")
        connection.exec_driver_sql("DELETE FROM ops.vocabulary_release")
    omop.load(work(path=str(small), allow_shrink=True))
    vocabulary.load(work(path=str(download)))
    assert len(rows(engine, CONTENT)) < len(expected)
    result = omop.load(work(path=str(folder)))
    assert rows(engine, CONTENT) == expected
    flags = next(table["flags_by_rule"] for table in result["tables"] if table["table"] == "condition_occurrence")
    assert "concept_absent" not in flags
    assert "source_concept_absent" not in flags


def test_the_same_again_changes_nothing(work: Make, engine: Engine, tmp_path: Path) -> None:
    download = athena.write(tmp_path / "athena")
    assert not vocabulary.load(work(path=str(download)))["unchanged"]
    assert vocabulary.load(work(path=str(download)))["unchanged"]
    assert not vocabulary.load(work(path=str(download), full=True))["unchanged"]
    assert one(engine, "SELECT count(*) FROM omop.concept") == len(athena.CONCEPTS)
    assert one(engine, "SELECT count(*) FROM omop.concept_ancestor") == len(athena.TABLES["CONCEPT_ANCESTOR"])


def test_a_zip_and_a_folder_in_a_folder_are_read(work: Make, engine: Engine, tmp_path: Path) -> None:
    folder = athena.write(tmp_path / "outer" / "athena")
    result = vocabulary.load(work(path=str(athena.zipped(folder, tmp_path / "a.zip")), full=True))
    assert [table["rejected"] for table in result["tables"]] == [0, 0, 0, 0]
    assert vocabulary.load(work(path=str(tmp_path / "outer"), full=True))["unchanged"]


def test_a_newer_release_replaces_an_older_one(work: Make, engine: Engine, tmp_path: Path) -> None:
    folder = extract(tmp_path / "omop")
    omop.load(work(path=str(folder)))
    vocabulary.load(work(path=str(athena.write(tmp_path / "old"))))
    named = [athena.concept(301, "Renamed", "D-001"), *(row for row in athena.CONCEPTS if row[0] not in ("301", "302"))]
    parents = {**athena.PARENTS, 301: 30}
    changes = {"CONCEPT": named, "CONCEPT_ANCESTOR": athena.ancestors(parents)}
    newer = athena.write(tmp_path / "new", changes, version="v5.0 31-AUG-25")
    result = vocabulary.load(work(path=str(newer)))
    assert result["not_in_this_release"] == 1  # 302: in use, and kept
    assert "1 concepts of the store are not in this release" in result["summary"]
    names = dict(rows(engine, "SELECT concept_id, concept_name FROM omop.concept WHERE concept_id IN (301, 302)"))
    assert names == {301: "Renamed", 302: "Disorder 2 of gut/bowel"}
    above = rows(
        engine,
        "SELECT ancestor_concept_id FROM omop.concept_ancestor WHERE descendant_concept_id = 301 ORDER BY 1",
    )
    assert above == [(10,), (30,), (301,)]
    assert rows(engine, "SELECT version FROM ops.vocabulary_release WHERE is_current") == [("v5.0 31-AUG-25",)]
    assert rows(engine, "SELECT DISTINCT state, count(*) FROM ops.load WHERE kind = 'vocabulary' GROUP BY 1") == [
        ("published", 4),
        ("superseded", 4),
    ]


def test_the_release_has_the_last_word_over_an_extracts_own_vocabulary(
    work: Make, engine: Engine, tmp_path: Path
) -> None:
    vocabulary.load(work(path=str(athena.write(tmp_path / "athena"))))
    header = ",".join(athena.HEADERS["CONCEPT"].split())
    own = [header, "301,Older name,Condition,SNOMED,X,S,D-001,1970-01-01,2099-12-31,"]
    own.append("2000000001,Ours,Condition,Local,X,,1,1970-01-01,2099-12-31,")
    omop.load(work(path=str(extract(tmp_path / "omop", concept=own))))
    names = dict(
        rows(engine, "SELECT concept_id, concept_name FROM omop.concept WHERE concept_id IN (301, 2000000001)")
    )
    assert names == {301: "Disorder 1 of gut/bowel", 2000000001: "Ours"}


def test_rows_that_the_cpt4_tool_appends_are_read(work: Make, engine: Engine, tmp_path: Path) -> None:
    folder = athena.write(tmp_path / "athena")
    line = "\t".join(("2100", "CT of\r chest", "Procedure", "CPT4", "CPT4", "S", "71250", *athena.VALID))
    with (folder / "CONCEPT.csv").open("ab") as file:
        file.write(line.encode() + b"\r\r\n")
    result = vocabulary.load(work(path=str(folder), full=True))
    assert result["tables"][0]["rejected"] == 0
    assert rows(engine, "SELECT concept_name, invalid_reason FROM omop.concept WHERE concept_id = 2100") == [
        ("CT of  chest", None)
    ]


def test_line_feeds_are_made_of_any_line_end_across_blocks() -> None:
    text = b"a\tb\r\nc\rd\te\r\r\nf\n"
    for cut in range(1, len(text)):
        parts = [text[:cut], text[cut:]]
        assert b"".join(line_feeds(iter(parts))) == b"a\tb\nc d\te\nf\n"


def test_missing_cpt4_names_are_said_with_the_way_to_get_them(work: Make, tmp_path: Path) -> None:
    folder = athena.write(tmp_path / "athena")
    shutil.copy(folder / "CONCEPT.csv", folder / "CONCEPT_CPT4.csv")
    result = vocabulary.load(work(path=str(folder)))
    assert len(result["warnings"]) == 1
    assert "CPT4 concepts are missing" in result["warnings"][0]
    assert "UMLS licence" in result["warnings"][0]


def test_a_download_without_ancestors_is_loaded_with_a_warning(work: Make, tmp_path: Path) -> None:
    result = vocabulary.load(work(path=str(athena.write(tmp_path / "athena", {"CONCEPT_ANCESTOR": None}))))
    assert result["warnings"][0].startswith("CONCEPT_ANCESTOR is missing or empty")


def test_exports_of_a_database_are_read(work: Make, engine: Engine, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "export"
    folder.mkdir()
    header = ",".join(athena.HEADERS["CONCEPT"].split())
    quoted = [header, '20,"Finding, with ""quotes""",Condition,SNOMED,X,S,F-20,1970-01-01,2099-12-31,""']
    (folder / "concept.csv").write_text("\n".join(quoted) + "\n")
    names = athena.HEADERS["CONCEPT_ANCESTOR"].split()
    table = pa.table({name: pa.array([20 if "concept" in name else 0], pa.int64()) for name in names})
    pq.write_table(table, folder / "CONCEPT_ANCESTOR.parquet")
    vocabulary.load(work(path=str(folder), full=True))
    assert rows(engine, "SELECT concept_name, invalid_reason FROM omop.concept") == [('Finding, with "quotes"', None)]
    assert rows(engine, "SELECT * FROM omop.concept_ancestor") == [(20, 20, 0, 0)]


def test_duplicates_and_invalid_dates_are_rejected_by_record(work: Make, engine: Engine, tmp_path: Path) -> None:
    bad = ("700", "x", "Condition", "SNOMED", "X", "S", "x", "20201345", "20991231", "")
    wrong = ("7O1", "x", "Condition", "SNOMED", "X", "S", "x", *athena.VALID)
    lines = [*athena.CONCEPTS, athena.CONCEPTS[3], bad, wrong, ("702", "too few")]
    twice = [*athena.TABLES["CONCEPT_ANCESTOR"], athena.TABLES["CONCEPT_ANCESTOR"][0]]
    folder = athena.write(tmp_path / "athena", {"CONCEPT": lines, "CONCEPT_ANCESTOR": twice})
    vocabulary.load(work(path=str(folder), max_rejects=0.5))
    found = rows(engine, "SELECT table_name, record, rule, column_name FROM ops.reject ORDER BY 1, 2")
    base = len(athena.CONCEPTS)
    assert found == [
        ("concept", base + 1, "duplicate_row", "concept_id"),
        ("concept", base + 2, "unparsable_time", "valid_start_date"),
        ("concept", base + 3, "unparsable_id", "concept_id"),
        ("concept", base + 4, "wrong_number_of_fields", None),
        ("concept_ancestor", len(twice), "duplicate_row", "ancestor_concept_id"),
    ]


def test_too_many_rejects_stop_it_and_name_file_record_and_rule(work: Make, engine: Engine, tmp_path: Path) -> None:
    wrong = [(*row[:7], "1/1/1970", "12/31/2099", "") for row in athena.CONCEPTS]
    folder = athena.write(tmp_path / "athena", {"CONCEPT": wrong})
    with pytest.raises(InputError, match=r"CONCEPT\.csv, record 1, unparsable_time in valid_start_date"):
        vocabulary.load(work(path=str(folder)))
    assert one(engine, "SELECT count(*) FROM omop.concept") == 0
    assert one(engine, "SELECT count(*) FROM ops.vocabulary_release") == 0
    assert one(engine, "SELECT count(*) FROM ops.reject") == len(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"CONCEPT": None}, "Expected CONCEPT.csv among the vocabulary's files, found CONCEPT_ANCESTOR, "),
        ({"CONCEPT": []}, "Expected rows in CONCEPT, found none"),
    ],
)
def test_a_download_without_concepts_is_refused(
    work: Make, tmp_path: Path, changes: dict[str, list[tuple[str, ...]] | None], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        vocabulary.load(work(path=str(athena.write(tmp_path / "athena", changes))))


def test_a_header_of_another_tool_is_refused(work: Make, tmp_path: Path) -> None:
    folder = athena.write(tmp_path / "athena")
    text = (folder / "CONCEPT.csv").read_text().replace("concept_code", "code", 1)
    (folder / "CONCEPT.csv").write_text(text)
    with pytest.raises(InputError, match=r"Expected the column concept_code in CONCEPT\.csv, found none"):
        vocabulary.load(work(path=str(folder)))


def test_a_truncated_zip_and_a_stray_file_are_refused(work: Make, tmp_path: Path) -> None:
    whole = athena.zipped(athena.write(tmp_path / "athena"), tmp_path / "whole.zip")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"Expected a whole zip of vocabulary files in cut\.zip"):
        vocabulary.load(work(path=str(cut)))
    with pytest.raises(InputError, match=r"Expected a folder or a \.zip"):
        vocabulary.load(work(path=str(tmp_path / "athena" / "CONCEPT.csv")))


def test_a_table_that_excel_cut_is_refused(work: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.loading import vocabulary_files

    folder = tmp_path / "excel"
    folder.mkdir()
    with (folder / "CONCEPT.csv").open("w", newline="") as file:
        csv.writer(file).writerows([athena.HEADERS["CONCEPT"].split(), *athena.CONCEPTS])
    assert vocabulary.load(work(path=str(folder)))["tables"][0]["rejected"] == 0
    folder = folder.rename(tmp_path / "again")
    with (folder / "CONCEPT.csv").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(vocabulary_files, "EXCEL_ROWS", len(athena.CONCEPTS))
    with pytest.raises(InputError, match="where Excel cuts a table"):
        vocabulary.load(work(path=str(folder)))


def test_a_release_that_is_not_on_this_host_stops_a_load_that_needs_it(
    work: Make, engine: Engine, tmp_path: Path
) -> None:
    from app.errors import StoreError

    vocabulary.load(work(path=str(athena.write(tmp_path / "athena"))))
    shutil.rmtree(tmp_path / "home" / "artifacts" / "vocabulary")
    with pytest.raises(StoreError, match="run `lachesis load vocabulary` again"):
        omop.load(work(path=str(extract(tmp_path / "omop"))))
    assert one(engine, "SELECT count(*) FROM omop.event") == 0


def test_concepts_are_counted_by_source(work: Make, engine: Engine, tmp_path: Path) -> None:
    counts = "SELECT concept_id, num_events, num_persons, num_source_events FROM omop.concept_count ORDER BY 1"
    both = conditions(more(21, 301, 500), more(22, 301))
    omop.load(work(path=str(extract(tmp_path / "a", condition_occurrence=both))))
    found = {key: rest for key, *rest in rows(engine, counts)}
    assert found[301] == [3, 2, 0]
    assert found[500] == [0, 0, 1]
    assert found[302] == [1, 1, 0]
    whole = rows(engine, counts)
    from app.store.vocabulary import recount

    with engine.begin() as connection:
        recount(connection, one(engine, "SELECT source_id FROM ops.source WHERE name = 'omop'"))
    assert rows(engine, counts) == whole
    omop.load(work(path=str(extract(tmp_path / "b", condition_occurrence=conditions())), allow_shrink=True))
    assert 500 not in {key for key, *_ in rows(engine, counts)}


def test_indexes_that_are_built_anew_are_the_same_afterwards(
    work: Make, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.loading import publish

    indexes = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'omop' AND tablename LIKE 'concept%' ORDER BY 1"
    before = rows(engine, indexes)
    monkeypatch.setattr(publish, "ANEW_ROWS", 1)
    omop.load(work(path=str(extract(tmp_path / "omop"))))
    vocabulary.load(work(path=str(athena.write(tmp_path / "athena"))))
    vocabulary.load(work(path=str(tmp_path / "athena"), full=True))
    assert rows(engine, indexes) == before
    assert one(engine, "SELECT count(*) FROM omop.concept") == len(athena.CONCEPTS)


def test_a_delta_brings_what_its_new_concepts_need_and_is_counted(work: Make, engine: Engine, tmp_path: Path) -> None:
    omop.load(work(path=str(extract(tmp_path / "omop", condition_occurrence=[CONDITION_HEADER, more(1, 301)]))))
    vocabulary.load(work(path=str(athena.write(tmp_path / "athena"))))
    assert one(engine, "SELECT count(*) FROM omop.concept WHERE concept_id IN (91, 90, 302)") == 0
    delta = write(tmp_path / "delta", {"condition_occurrence": [CONDITION_HEADER, more(2, 91), more(3, 301, 600)]})
    omop.load(work(path=str(delta), mode="append"))
    assert one(engine, "SELECT count(*) FROM omop.concept WHERE concept_id IN (91, 90, 302, 600)") == 4
    above = "SELECT ancestor_concept_id FROM omop.concept_ancestor WHERE descendant_concept_id = 91 ORDER BY 1"
    assert rows(engine, above) == [(10,), (90,), (91,)]
    counts = "SELECT concept_id, num_events, num_persons, num_source_events FROM omop.concept_count ORDER BY 1"
    assert rows(engine, counts) == [(0, 0, 0, 2), (91, 1, 1, 0), (301, 2, 1, 0), (600, 0, 0, 1)]
