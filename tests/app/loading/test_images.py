"""Loading scans: which rows, which rejects, what a second load does."""

from __future__ import annotations

import csv
import datetime as dt
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from sqlalchemy import Engine, text

from app.errors import Cancelled, InputError
from app.loading.images import load
from app.loading.images_pool import HeaderPool, Job
from app.loading.simulate import simulate
from app.store.loads import LoadRow, open_source, record_load
from app.store.work import InlineWork
from tests.app.loading.scans import write_dicom, write_nifti

Make = Callable[..., InlineWork]


def add_persons(engine: Engine, persons: list[int]) -> None:
    with engine.begin() as connection:
        row = LoadRow(
            kind="omop",
            mode="snapshot",
            table_name="person",
            files=[],
            content_sha256=b"",
            num_read=len(persons),
            num_loaded=len(persons),
        )
        load_id = record_load(connection, open_source(connection, "extract"), None, row)
        connection.execute(
            text("INSERT INTO omop.person (person_id, load_id) VALUES (:person_id, :load_id)"),
            [{"person_id": p, "load_id": load_id} for p in persons],
        )


def query(engine: Engine, statement: str) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(statement)).mappings()]


IMAGES = "SELECT * FROM omop.image_occurrence ORDER BY person_id, acquired_at"
REJECTS = "SELECT record, rule, column_name FROM ops.reject ORDER BY record"


def write_manifest(path: Path, *rows: str, header: str = "person_id,acquired_at,path") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scans of persons 1 and 2."""
    folder = tmp_path / "delivery"
    write_nifti(folder / "a" / "one.nii.gz")
    write_dicom(folder / "b")
    return folder


def test_a_manifest_loads_nifti_files_and_dicom_series(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1, 2])
    manifest = write_manifest(folder / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz", "2,2016-02-03,b")
    result = load(work(path=str(manifest), source="pacs"))
    assert (result["read"], result["loaded"], result["rejected"], result["added"]) == (2, 2, 0, 2)
    one, two = query(engine, IMAGES)
    assert one["acquired_at"] == dt.datetime(2015, 2, 3, 10, 11, 12)
    assert (one["date_only"], one["acquired_at_source"], one["format"]) == (False, "manifest", "nifti")
    assert (one["rows"], one["columns"], one["slices"], one["spacing_mm"]) == (14, 16, 12, [3.0, 3.0, 3.0])
    assert (one["root"], one["path"], one["image_key"]) == ("images", "a/one.nii.gz", "images:a/one.nii.gz")
    assert (one["verdict"], one["orientation"], one["sha256"]) == ("ok", "RAS", None)
    assert two["acquired_at"] == dt.datetime(2016, 2, 3, 23, 59, 59)
    assert two["date_only"]
    assert two["format"] == "dicom"
    assert two["image_key"] == two["series_uid"]
    assert (two["rows"], two["columns"], two["slices"]) == (16, 14, 12)
    assert two["spacing_mm"] == [3.0, 3.0, 3.0]  # from positions
    assert (two["slice_thickness_mm"], two["kernel"], two["orientation"]) == (5.0, "B30f", "axial")
    assert (two["hu_state"], two["verdict"]) == ("hu", "ok")
    (source,) = query(engine, "SELECT * FROM ops.source WHERE name = 'pacs'")
    assert source["details"]["roots"] == {"images": str(folder)}
    assert not source["arbitrary_pairing"]
    (book,) = query(engine, "SELECT * FROM ops.load WHERE kind = 'images'")
    assert (book["num_read"], book["num_loaded"], book["num_rejected"], book["mode"]) == (2, 2, 0, "upsert")
    assert book["files"][0]["name"] == "m.csv"


def test_bad_records_are_rejected_by_rule_and_the_others_load(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1, 2])
    (folder / "broken.nii.gz").write_bytes(b"nothing")
    (folder / "empty").mkdir()
    manifest = write_manifest(
        folder / "m.csv",
        "1,2015-02-03T10:11:12,a/one.nii.gz",
        "9,2015-02-03T10:11:12,a/one.nii.gz",
        "x,2015-02-03T10:11:12,a/one.nii.gz",
        "1,yesterday,a/one.nii.gz",
        "1,1492-01-01,a/one.nii.gz",
        "1,2015-02-04,a/none.nii.gz",
        "1,2015-02-04,broken.nii.gz",
        "1,2015-02-04,empty",
        "1,2015-02-04,../m.csv",
        "1,2015-02-04,/etc/passwd",
        "1,2015-02-04,",
        "1,2015-02-04",
        "1,,a/one.nii.gz",
        "1,2015-02-03 10:11:12,a/../a/one.nii.gz",
        "18446744073709551616,2015-02-04,a/one.nii.gz",
        "1,2015-02-04,a/\0.nii",
    )
    result = load(work(path=str(manifest)))
    assert (result["read"], result["loaded"], result["rejected"]) == (16, 1, 15)
    found = {(r["record"], r["rule"], r["column_name"]) for r in query(engine, REJECTS)}
    assert found == {
        (2, "unknown_person", "person_id"),
        (3, "unparsable_id", "person_id"),
        (4, "unparsable_time", "acquired_at"),
        (5, "unparsable_time", "acquired_at"),
        (6, "missing_file", "path"),
        (7, "unreadable_file", "path"),
        (8, "unreadable_file", "path"),
        (9, "missing_file", "path"),
        (10, "unreadable_file", "path"),
        (11, "missing_path", "path"),
        (12, "wrong_number_of_fields", None),
        (13, "no_acquisition_time", "acquired_at"),
        (14, "duplicate_record", None),
        (15, "unparsable_id", "person_id"),
        (16, "nul_character", None),
    }
    assert "one.nii" not in json.dumps(query(engine, "SELECT to_jsonb(r) FROM ops.reject r"))


def test_loading_again_changes_nothing(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1])
    manifest = write_manifest(folder / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz", "7,2015-02-03,b")
    first = load(work(path=str(manifest)))
    before = query(engine, IMAGES), query(engine, "SELECT * FROM ops.load"), query(engine, "SELECT * FROM ops.reject")
    again = load(work(path=str(manifest)))
    assert not first["unchanged"]
    assert again["unchanged"]
    assert again["load_id"] == first["load_id"]
    after = query(engine, IMAGES), query(engine, "SELECT * FROM ops.load"), query(engine, "SELECT * FROM ops.reject")
    assert after == before


def test_a_person_loaded_later_makes_the_same_manifest_load_more(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1])
    manifest = write_manifest(folder / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz", "2,2015-02-03,b")
    assert load(work(path=str(manifest)))["loaded"] == 1
    (kept,) = query(engine, IMAGES)
    add_persons(engine, [2])
    result = load(work(path=str(manifest)))
    assert (result["loaded"], result["added"], result["unchanged"]) == (2, 1, False)
    assert query(engine, IMAGES)[0]["image_occurrence_id"] == kept["image_occurrence_id"]
    states = query(engine, "SELECT state FROM ops.load WHERE kind = 'images' ORDER BY load_id")
    assert [s["state"] for s in states] == ["superseded", "published"]


def test_a_changed_scan_keeps_its_key_and_loses_the_digest_of_its_voxels(
    engine: Engine, work: Make, folder: Path
) -> None:
    add_persons(engine, [1])
    manifest = write_manifest(folder / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz")
    load(work(path=str(manifest)))
    with engine.begin() as connection:
        connection.execute(text("UPDATE omop.image_occurrence SET sha256 = '\\x01'"))
    (before,) = query(engine, IMAGES)
    assert load(work(path=str(manifest)))["unchanged"]
    write_nifti(folder / "a" / "one.nii.gz", np.zeros((9, 9, 9), np.int16))
    load(work(path=str(manifest)))
    (after,) = query(engine, IMAGES)
    assert after["image_occurrence_id"] == before["image_occurrence_id"]
    assert after["rows"] == 9
    assert (bytes(before["sha256"]), after["sha256"]) == (b"\x01", None)


def test_other_voxels_of_the_same_geometry_lose_the_digest_and_no_others_do(
    engine: Engine, work: Make, folder: Path
) -> None:
    add_persons(engine, [1, 2])
    manifest = write_manifest(folder / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz", "2,2016-02-03,b")
    load(work(path=str(manifest)))
    know = "UPDATE omop.image_occurrence SET sha256 = '\\x01'"
    for changed, lost in (
        (folder / "a" / "one.nii.gz", [True, False]),
        (next((folder / "b").iterdir()), [False, True]),
    ):
        with engine.begin() as connection:
            connection.exec_driver_sql(know)
        changed.write_bytes(changed.read_bytes())
        assert not load(work(path=str(manifest)))["unchanged"]
        assert [row["sha256"] is None for row in query(engine, IMAGES)] == lost
    with engine.begin() as connection:  # as rows from before stamps were kept
        connection.exec_driver_sql(f"{know}, details = details - 'stamp'")
        connection.exec_driver_sql("UPDATE ops.load SET content_sha256 = '' WHERE kind = 'images'")
    load(work(path=str(manifest)))
    assert [row["sha256"] is None for row in query(engine, IMAGES)] == [False, False]


def test_a_load_that_would_take_scans_away_stops_unless_told_to(
    engine: Engine, work: Make, folder: Path, tmp_path: Path
) -> None:
    add_persons(engine, [1, 2])
    both = write_manifest(folder / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz", "2,2016-02-03,b")
    load(work(path=str(both)))
    before = query(engine, IMAGES)
    one = write_manifest(folder / "less.csv", "1,2015-02-03T10:11:12,a/one.nii.gz")
    with pytest.raises(InputError, match="1 of 2 would vanish"):
        load(work(path=str(one), mode="snapshot"))
    elsewhere = write_manifest(tmp_path / "m.csv", "9,2015-02-03T10:11:12,a/one.nii.gz")
    with pytest.raises(InputError, match="2 of 2 would vanish"):
        load(work(path=str(elsewhere), mode="snapshot", arbitrary_pairing=True))
    assert query(engine, IMAGES) == before
    (source,) = query(engine, "SELECT * FROM ops.source WHERE name = 'images'")
    assert source["details"]["roots"] == {"images": str(folder)}
    assert not source["arbitrary_pairing"]
    (reject,) = query(engine, "SELECT load_id, rule FROM ops.reject")
    assert (reject["load_id"], reject["rule"]) == (None, "missing_file")
    result = load(work(path=str(one), mode="snapshot", allow_shrink=True))
    assert (result["removed"], result["gone"]) == (1, 0)
    assert [i["person_id"] for i in query(engine, IMAGES)] == [1]


def add_member(engine: Engine, image: int) -> None:
    with engine.begin() as connection:
        cohort = connection.execute(
            text(
                "INSERT INTO label.cohort (name, version, is_current, definition, attrition, follow_up, digest) "
                "VALUES ('c', 1, true, '{}', '[]', 'last_event', '') RETURNING cohort_id"
            )
        ).scalar_one()
        connection.execute(
            text(
                "INSERT INTO label.cohort_member (cohort_id, person_id, image_occurrence_id, index_time, "
                "index_date_only, split, eligible) VALUES (:c, 2, :i, '2016-02-03', false, 'train', true)"
            ),
            {"c": cohort, "i": image},
        )


def test_a_scan_that_a_cohort_holds_stays_as_unusable_and_comes_back(
    engine: Engine, work: Make, folder: Path, tmp_path: Path
) -> None:
    add_persons(engine, [1, 2])
    rows = ("1,2015-02-03T10:11:12,a/one.nii.gz", "2,2016-02-03,b")
    both = write_manifest(folder / "m.csv", *rows)
    load(work(path=str(both)))
    held = query(engine, IMAGES)[1]
    add_member(engine, held["image_occurrence_id"])
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    less = write_manifest(moved / "m.csv", rows[0])
    result = load(work(path=str(less), mode="snapshot", allow_shrink=True))
    assert (result["removed"], result["gone"]) == (0, 1)
    gone = query(engine, IMAGES)[1]
    assert (gone["verdict"], gone["reasons"]) == ("unusable", ["gone_from_source"])
    (source,) = query(engine, "SELECT details -> 'roots' AS roots FROM ops.source WHERE name = 'images'")
    assert source["roots"][gone["root"]] == str(folder)  # not the new folder, where other scans may lie
    assert source["roots"]["images"] == str(moved)
    load(work(path=str(both)))
    back = query(engine, IMAGES)[1]
    assert (back["verdict"], back["reasons"], back["root"]) == ("ok", [], "images")
    assert back["image_occurrence_id"] == held["image_occurrence_id"]


def test_two_sources_do_not_take_each_others_scans(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1, 2])
    first = write_manifest(folder / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz")
    load(work(path=str(first), source="first"))
    load(work(path=str(write_manifest(folder / "n.csv", "2,2016-02-03,b")), source="second"))
    before = query(engine, IMAGES)
    assert len(before) == 2
    with pytest.raises(InputError, match="1 that source 'first' shows"):
        load(work(path=str(first), source="second"))
    assert query(engine, IMAGES) == before


def test_an_upsert_adds_and_keeps_what_it_does_not_name(
    engine: Engine, work: Make, folder: Path, tmp_path: Path
) -> None:
    add_persons(engine, [1, 2])
    first = write_manifest(folder / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz")
    load(work(path=str(first), arbitrary_pairing=True))
    shutil.copytree(folder, tmp_path / "next")
    second = write_manifest(tmp_path / "next" / "m.csv", "2,2016-02-03,b")
    assert load(work(path=str(second)))["added"] == 1
    one, two = query(engine, IMAGES)
    (source,) = query(
        engine, "SELECT arbitrary_pairing, details -> 'roots' AS roots FROM ops.source WHERE name = 'images'"
    )
    assert source["arbitrary_pairing"], "the first manifest's scans are still paired arbitrarily"
    assert (source["roots"][one["root"]], source["roots"][two["root"]]) == (str(folder), str(tmp_path / "next"))
    assert query(engine, "SELECT DISTINCT state FROM ops.load WHERE kind = 'images'") == [{"state": "published"}]
    assert load(work(path=str(second)))["unchanged"]
    again = load(work(path=str(first)))
    assert (again["added"], again["removed"]) == (0, 0)
    one, two = query(engine, IMAGES)
    (source,) = query(engine, "SELECT details -> 'roots' AS roots FROM ops.source WHERE name = 'images'")
    assert (source["roots"][one["root"]], source["roots"][two["root"]]) == (str(folder), str(tmp_path / "next"))


def test_every_distinct_path_is_read_once(
    engine: Engine, work: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = HeaderPool.read

    def counted(pool: HeaderPool, jobs: Iterable[Job]) -> Any:
        kept = list(jobs)
        read.extend(path for _, _, path in kept)
        return original(pool, kept)

    monkeypatch.setattr(HeaderPool, "read", counted)
    add_persons(engine, list(range(50)))
    manifest = write_manifest(folder / "m.csv", *(f"{p},2015-02-03T10:11:12,b" for p in range(50)))
    result = load(work(path=str(manifest), arbitrary_pairing=True))
    assert result["loaded"] == 50
    assert len(read) == len(set(read)) == 12
    (source,) = query(engine, "SELECT arbitrary_pairing FROM ops.source WHERE name = 'images'")
    assert source["arbitrary_pairing"]


def test_a_root_names_the_folder_and_absolute_paths_in_it_become_relative(
    engine: Engine, work: Make, folder: Path, tmp_path: Path
) -> None:
    add_persons(engine, [1, 2])
    manifest = write_manifest(tmp_path / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz", f"2,2016-02-03,{folder / 'b'}")
    load(work(path=str(manifest), root={"PACS": str(folder)}))
    assert [(i["root"], i["path"]) for i in query(engine, IMAGES)] == [("pacs", "a/one.nii.gz"), ("pacs", "b")]


def test_a_named_root_is_not_left(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1])
    manifest = write_manifest(
        folder / "m.csv",
        f"1,2015-02-03,{folder / 'b'}",
        "1,2015-02-03,../b",
        "1,2015-02-03,one.nii.gz/../..",
        "1,2015-02-03,one.nii.gz",
    )
    result = load(work(path=str(manifest), root={"pacs": str(folder / "a")}))
    assert (result["loaded"], result["rejects_by_rule"]) == (1, {"path_outside_root": 3})


def test_without_a_named_root_paths_may_lie_anywhere_and_are_found_again(
    engine: Engine, work: Make, folder: Path, tmp_path: Path
) -> None:
    add_persons(engine, [1, 2, 3])
    (tmp_path / "lists" / "c").mkdir(parents=True)
    write_nifti(tmp_path / "lists" / "c" / "here.nii")
    manifest = write_manifest(
        tmp_path / "lists" / "m.csv",
        f"1,2015-02-03T10:11:12,{folder / 'a' / 'one.nii.gz'}",
        "2,2016-02-03,../delivery/b",
        f"3,2016-02-03,{tmp_path / 'lists' / 'c' / 'here.nii'}",
    )
    assert load(work(path=str(manifest)))["loaded"] == 3
    scans = query(engine, IMAGES)
    assert [i["root"] for i in scans] == ["/", "/", "images"]
    assert scans[2]["path"] == "c/here.nii"
    (source,) = query(engine, "SELECT details -> 'roots' AS roots FROM ops.source WHERE name = 'images'")
    found = [Path(source["roots"][i["root"]]) / i["path"] for i in scans]
    assert found == [folder / "a" / "one.nii.gz", folder / "b", tmp_path / "lists" / "c" / "here.nii"]
    assert load(work(path=str(manifest)))["unchanged"]


def test_without_a_time_in_the_manifest_the_header_tells(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1, 2])
    sidecar = {"AcquisitionDateTime": "2014-05-06T07:08:09.5"}
    (folder / "a" / "one.json").write_text(json.dumps(sidecar))
    manifest = write_manifest(folder / "m.csv", "1,a/one.nii.gz", "2,b", header="Person_ID,PATH")
    load(work(path=str(manifest)))
    one, two = query(engine, IMAGES)
    assert (one["acquired_at"], one["acquired_at_source"]) == (
        dt.datetime(2014, 5, 6, 7, 8, 9),
        "AcquisitionDateTime",
    )
    assert (two["acquired_at"], two["acquired_at_source"]) == (dt.datetime(2015, 2, 3, 10, 11, 12), "SeriesDate")


def test_a_folder_is_matched_by_file_names_folders_and_patient_ids(engine: Engine, work: Make, tmp_path: Path) -> None:
    folder = tmp_path / "pacs"
    add_persons(engine, [1, 2, 3, 4])
    write_dicom(folder / "study" / "3.0-chest")  # PatientID 1
    write_nifti(folder / "2_20140506T0708.nii.gz")
    write_nifti(folder / "3" / "scan.nii")
    (folder / "3" / "scan.json").write_text('{"AcquisitionDate": "20140506"}')
    write_nifti(folder / "4.nii")
    write_nifti(folder / "thorax.nii")
    (folder / "README.txt").write_text("about")
    result = load(work(path=str(folder), match="person_id"))
    found = {(i["person_id"], i["path"], i["acquired_at_source"]) for i in query(engine, IMAGES)}
    assert found == {
        (1, "study/3.0-chest", "SeriesDate"),
        (2, "2_20140506T0708.nii.gz", "file_name"),
        (3, "3/scan.nii", "AcquisitionDate"),
    }
    assert result["rejects_by_rule"] == {"no_acquisition_time": 1, "no_person_in_name": 1}
    assert result["read"] == 5


def test_the_outermost_folder_named_by_a_number_is_the_person_and_links_are_followed(
    engine: Engine, work: Make, tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "pacs", write_dicom(tmp_path / "elsewhere", PatientID="A 7")
    add_persons(engine, [1, 2, 3])
    write_dicom(folder / "1", PatientID="A 7")
    (folder / "2" / "20140506").mkdir(parents=True)
    (folder / "2" / "20140506" / "4").symlink_to(elsewhere)
    (folder / "2" / "round").symlink_to(folder)
    (folder / "3").symlink_to(elsewhere)
    result = load(work(path=str(folder), match="person_id"))
    assert [(i["person_id"], i["path"]) for i in query(engine, IMAGES)] == [(1, "1"), (2, "2/20140506/4"), (3, "3")]
    assert result["rejected"] == 0


def test_a_folder_without_scans_is_refused(engine: Engine, work: Make, tmp_path: Path) -> None:
    (tmp_path / "pacs" / "1").mkdir(parents=True)
    (tmp_path / "pacs" / "1" / "notes.txt").write_text("none yet")
    with pytest.raises(InputError, match="found none"):
        load(work(path=str(tmp_path / "pacs"), match="person_id"))
    assert query(engine, "SELECT * FROM ops.load") == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"person,path\n1,a\n", "person_id"),
        (b"person_id,acquired_at\n1,2015-01-01\n", "path"),
        (b"person_id,acquired_at,path\n", "only its header"),
        (b"", "columns"),
        (b"person_id,path\n1,\xff\xfe\n", "UTF-8"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_and_changes_nothing(
    engine: Engine, work: Make, tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(InputError, match=says):
        load(work(path=str(tmp_path / "m.csv")))
    assert query(engine, IMAGES) == []
    assert query(engine, "SELECT * FROM ops.load") == []


def test_tabs_semicolons_and_a_byte_order_mark_are_read(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1])
    for number, delimiter in enumerate("\t;,"):
        (folder / "m.csv").write_bytes(
            b"\xef\xbb\xbf"
            + f"person_id,acquired_at,path\r\n1,2015-02-0{number + 1}T10:11:12,a/one.nii.gz\r\n".replace(
                ",", delimiter
            ).encode()
        )
        assert load(work(path=str(folder / "m.csv"), mode="snapshot", allow_shrink=True))["loaded"] == 1


def test_a_cancel_while_headers_are_read_changes_nothing(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1])
    job = work(path=str(write_manifest(folder / "m.csv", "1,2015-02-03T10:11:12,a/one.nii.gz")))

    def cancelled(*args: Any) -> None:
        raise Cancelled

    job.progress = cancelled  # type: ignore[method-assign]
    with pytest.raises(Cancelled):
        load(job)
    assert query(engine, "SELECT * FROM ops.load WHERE kind = 'images'") == []


def test_a_simulated_cohort_loads_and_its_source_says_so(engine: Engine, work: Make, tmp_path: Path) -> None:
    simulate(tmp_path / "sim", persons=12, seed=0, report=lambda n: None)
    add_persons(engine, list(range(1, 13)))
    result = load(work(path=str(tmp_path / "sim" / "manifest.csv"), source="demo-images"))
    assert (result["loaded"], result["verdicts"]) == (12, {"ok": 12})
    (source,) = query(engine, "SELECT simulated FROM ops.source WHERE name = 'demo-images'")
    assert source["simulated"]
    assert {(i["hu_state"], i["slices"]) for i in query(engine, IMAGES)} == {("hu", 32)}


def test_the_real_manifest_loads(engine: Engine, work: Make, real_data: Path) -> None:
    manifest = real_data / "manifest_gibleed_celecoxib.csv"
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    add_persons(engine, [int(r["person_id"]) for r in rows])
    result = load(work(path=str(manifest), arbitrary_pairing=True))
    assert (result["read"], result["loaded"], result["rejected"]) == (1844, 1844, 0)
    assert result["verdicts"] == {"ok": 1844}
    assert len({i["path"] for i in query(engine, IMAGES)}) == 5
    assert load(work(path=str(manifest), arbitrary_pairing=True))["unchanged"]


def test_an_image_with_every_reason_still_has_a_row(engine: Engine, work: Make, tmp_path: Path) -> None:
    nibabel.Nifti1Image(np.zeros((5, 6, 3, 2), np.uint8), None).to_filename(tmp_path / "a.nii")
    add_persons(engine, [1])
    result = load(work(path=str(write_manifest(tmp_path / "m.csv", "1,2015-02-03,a.nii"))))
    (image,) = query(engine, IMAGES)
    assert (image["verdict"], image["hu_state"]) == ("unusable", "not_hu")
    assert set(image["reasons"]) == {"not_three_dimensional", "not_hounsfield", "no_orientation"}
    assert result["verdicts"] == {"unusable": 1}


def test_a_manifest_names_masks_below_the_root_of_their_scans(engine: Engine, work: Make, folder: Path) -> None:
    add_persons(engine, [1, 2])
    write_nifti(folder / "masks" / "one.nii.gz")
    (folder / "masks" / "two.txt").write_text("1")
    header = "person_id,acquired_at,path,mask"
    rows = ["1,2015-02-03,a/one.nii.gz,masks/one.nii.gz", "2,2016-02-03,b,"]
    wrong = ["2,2017-02-03,b,masks/none.nii.gz", "2,2018-02-03,b,masks/two.txt", "2,2019-02-03,b,../../m.nii.gz"]
    manifest = write_manifest(folder / "m.csv", *rows, *wrong, header=header)
    result = load(work(path=str(manifest), source="pacs", root={"images": str(folder)}))
    assert (result["loaded"], result["rejected"]) == (2, 3)
    assert [row["details"].get("mask") for row in query(engine, IMAGES)] == ["masks/one.nii.gz", None]
    assert [(row["rule"], row["column_name"]) for row in query(engine, REJECTS)] == [
        ("missing_mask", "mask"),
        ("mask_not_nifti", "mask"),
        ("mask_outside_root", "mask"),
    ]
    write_manifest(folder / "m.csv", "1,2015-02-03,a/one.nii.gz,", "2,2016-02-03,b,masks/one.nii.gz", header=header)
    again = load(work(path=str(manifest), source="pacs", root={"images": str(folder)}))
    assert (again["added"], again["unchanged"]) == (0, False)
    assert [row["details"].get("mask") for row in query(engine, IMAGES)] == [None, "masks/one.nii.gz"]
