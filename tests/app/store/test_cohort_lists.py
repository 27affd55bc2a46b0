"""Cohorts from lists: each row of a file or of an OMOP cohort names scans, and what names none is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from app.errors import InputError
from app.store import cohorts
from app.store.work import InlineWork
from tests.app.store.records import Records, rows

Make = Callable[..., InlineWork]

MEMBERS = "SELECT m.* FROM label.cohort c JOIN label.cohort_member m USING (cohort_id) WHERE c.is_current"


@pytest.fixture
def scans(engine: Engine) -> dict[str, int]:
    """Three persons: two scans of 1 on two days, one of 2, one date-only scan of -3."""
    with engine.begin() as connection:
        records = Records(connection)
        for person in (1, 2, -3):
            records.person(person)
            records.period(person, "2010-01-01", "2022-01-01")
        return {
            "a": records.scan(1, "2020-01-01 10:00:00", study_uid="1.1", series_uid="1.1.1"),
            "b": records.scan(1, "2020-06-01 10:00:00", study_uid="1.2", series_uid="1.2.1"),
            "c": records.scan(2, "2020-03-01 12:00:00", study_uid="2.1", series_uid="2.1.1"),
            "d": records.scan(-3, "2020-04-01 00:00:00", date_only=True, study_uid="3.1", series_uid="3.1.1"),
        }


def members(engine: Engine, scans: dict[str, int]) -> dict[str, str]:
    names = {key: name for name, key in scans.items()}
    return {names[row.image_occurrence_id]: row.split for row in rows(engine, MEMBERS)}


def listed(tmp_path: Path, content: str, encoding: str = "utf-8") -> str:
    path = tmp_path / "list.csv"
    path.write_bytes(content.encode(encoding))
    return str(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("person_id\n1\n", "ab"),
        ("person_id,acquired_at\n1,2020-06-01\n-3,2020-04-01\n", "bd"),
        ("person_id,acquired_at\n1,2020-06-01 10:00:00\n-3,2020-04-01T09:00\n2,\n", "bcd"),
        ("PERSON_ID;note\r\n2;mine\r\n\r\n2;again\r\n", "c"),
        ("study_uid\n1.1\n2.1\n", "ac"),
        ('series_uid\tcomment\n"3.1.1"\t\n', "d"),
    ],
)
def test_a_row_names_scans_by_its_one_key_and_its_day(
    engine: Engine, work: Make, scans: dict[str, int], tmp_path: Path, content: str, expected: str
) -> None:
    result = cohorts.build(work(name="c", **{"from": listed(tmp_path, content, "utf-8-sig")}))
    assert "".join(sorted(members(engine, scans))) == expected
    assert result["rows_unmatched"] == 0


def test_rows_that_name_no_scan_are_counted_by_line_and_the_list_is_a_step_of_attrition(
    engine: Engine, work: Make, scans: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = listed(tmp_path, "person_id,acquired_at\n1,2020-01-01\n77,\n1,2020-01-02\n")
    result = cohorts.build(work(name="c", **{"from": path}))
    assert (result["rows_listed"], result["rows_unmatched"]) == (3, 2)
    assert "2 of 3 rows" in (said := capsys.readouterr().err)
    assert "3, 4" in said and "77" not in said
    assert {"step": "in the list", "scans": 1, "persons": 1} in result["attrition"]


def test_the_same_list_under_another_path_changes_nothing_and_another_list_is_a_new_version(
    engine: Engine, work: Make, scans: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    one = cohorts.build(work(name="c", **{"from": listed(tmp_path, "person_id\n1\n")}))
    same = cohorts.build(work(name="c", **{"from": listed(tmp_path / "elsewhere", "person_id\n1\n")}))
    other = cohorts.build(work(name="c", **{"from": listed(tmp_path, "person_id\n2\n")}))
    assert (one["version"], same["unchanged"], other["version"]) == (1, True, 2)
    (definition,) = rows(engine, "SELECT definition::text AS said FROM label.cohort WHERE is_current")
    assert "list.csv" not in definition.said and "sha256" in definition.said


def test_a_split_in_the_list_wins_over_the_hash(
    engine: Engine, work: Make, scans: dict[str, int], tmp_path: Path
) -> None:
    path = listed(tmp_path, "person_id,split\n1,test\n2,valid\n-3,train\n")
    cohorts.build(work(name="c", **{"from": path}))
    assert members(engine, scans) == {"a": "held_out", "b": "held_out", "c": "tuning", "d": "train"}
    with pytest.raises(InputError, match="--split-time"):
        cohorts.build(work(name="d", split_time="2020-02-01", **{"from": path}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "one of the columns"),
        ("mrn\n1\n", "one of the columns"),
        ("person_id,study_uid\n1,1.1\n", "person_id"),
        ("person_id,person_id\n1,1\n", "twice"),
        ("study_uid,acquired_at\n1.1,2020-01-01\n", "beside person_id only"),
        ("person_id\n1\nx\n", "line 3"),
        ("person_id\n1.0\n", "line 2"),
        ("person_id\n99999999999999999999\n", "line 2"),
        ("person_id,acquired_at\n1,01/02/2020\n", "line 2"),
        ("person_id,acquired_at\n1,2020-01-01T10:00:00Z\n", "zone"),
        ("person_id,note\n1,a\n2\n", "line 3"),
        ("person_id,split\n1,train\n1,test\n", "line 3"),
        ("person_id,split\n1,fold7\n", "line 2"),
        ("person_id\n77\n", "found none"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_line_and_without_its_values(
    engine: Engine, work: Make, scans: dict[str, int], tmp_path: Path, content: str, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        cohorts.build(work(name="c", **{"from": listed(tmp_path, content)}))
    assert not rows(engine, "SELECT FROM label.cohort")


def test_a_list_in_another_encoding_is_refused(work: Make, scans: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="UTF-8"):
        cohorts.build(work(name="c", **{"from": listed(tmp_path, "person_id,note\n1,ü\n", "latin-1")}))


def test_an_omop_cohort_gives_the_scans_made_while_their_person_was_in_it(
    engine: Engine, work: Make, scans: dict[str, int]
) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA results"))
        connection.execute(
            text(
                "CREATE TABLE results.cohort (cohort_definition_id int, subject_id bigint, cohort_start_date date, "
                "cohort_end_date date)"
            )
        )
        connection.execute(
            text(
                "INSERT INTO results.cohort VALUES (17, 1, '2020-01-01', '2020-01-01'), (17, 1, '2019-01-01', "
                "'2019-02-01'), (17, -3, '2020-01-01', null), (18, 2, '2020-01-01', null)"
            )
        )
    cohorts.build(work(name="c", from_omop_cohort="results.cohort:17"))
    assert "".join(sorted(members(engine, scans))) == "ad"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("cohort:1", "SCHEMA.TABLE:ID"),
        ("results.cohort:x", "SCHEMA.TABLE:ID"),
        ('a"; DROP.b:1', "SCHEMA.TABLE:ID"),
        ("results.cohort:1", "found none"),
        ("omop.person:1", "cohort_definition_id"),
        ("label.cohort_omop:999", "name another id"),
    ],
)
def test_an_omop_cohort_that_is_not_there_is_refused(work: Make, scans: dict[str, int], named: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        cohorts.build(work(name="c", from_omop_cohort=named))


def test_a_cohort_reads_back_as_an_omop_cohort_with_the_same_scans(
    engine: Engine, work: Make, scans: dict[str, int], tmp_path: Path
) -> None:
    made = cohorts.build(work(name="c", **{"from": listed(tmp_path, "study_uid\n1.2\n3.1\n")}))
    four = rows(engine, "SELECT * FROM label.cohort_omop ORDER BY subject_id")
    assert [(r.subject_id, str(r.cohort_start_date), str(r.cohort_end_date)) for r in four] == [
        (-3, "2020-04-01", "2022-01-01"),
        (1, "2020-06-01", "2022-01-01"),
    ]
    cohorts.build(work(name="again", from_omop_cohort=f"label.cohort_omop:{made['cohort_id']}"))
    (again,) = rows(
        engine,
        "SELECT array_agg(image_occurrence_id ORDER BY 1) AS ids FROM label.cohort_member m "
        "JOIN label.cohort c USING (cohort_id) WHERE c.name = 'again'",
    )
    assert again.ids == sorted([scans["b"], scans["d"]])
