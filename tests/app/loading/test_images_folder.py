"""Folders of any mess: what becomes a scan, whose it is, and what is set aside with which rule."""

from __future__ import annotations

import csv
import datetime as dt
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import generate_uid
from sqlalchemy import Engine, text

from app.errors import InputError
from app.loading.images import load
from app.loading.omop import load as load_omop
from app.store.work import InlineWork
from ml.volumes import VolumeRecipe, read_volume
from tests.app.loading.scans import chest, write_dicom, write_nifti
from tests.app.loading.test_images import IMAGES, REJECTS, add_persons, query, write_manifest

Make = Callable[..., InlineWork]
RECIPE = VolumeRecipe((12, 16, 14), 3.0)


def move_into(folder: Path, series: Path, prefix: str) -> None:
    """Put the files of a series into a folder that others are in, without their extension."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(series.iterdir()):
        file.rename(folder / f"{prefix}{file.stem}")


def voxels(root: Path, row: dict[str, Any]) -> np.ndarray:
    """The volume of a row of omop.image_occurrence, (Z, Y, X)."""
    files = tuple(root / name for name in row["details"].get("files", ()))
    return read_volume(root / row["path"], row["format"], RECIPE, files).voxels


def expected(seed: int) -> np.ndarray:
    return np.clip(chest(seed=seed), -1000, 1000).transpose(2, 1, 0)


def rejects(engine: Engine) -> dict[str, int]:
    rows = query(engine, "SELECT rule, count(*) AS n FROM ops.reject GROUP BY rule")
    return {row["rule"]: row["n"] for row in rows}


def an_object(path: Path, sop_class: str, modality: str) -> None:
    """A DICOM object without pixels."""
    folder = write_dicom(path.parent / "made")
    ds = pydicom.dcmread(folder / "000.dcm")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.Modality, ds.SeriesInstanceUID = modality, generate_uid()
    del ds.PixelData, ds.Rows, ds.Columns
    pydicom.dcmwrite(path, ds)
    shutil.rmtree(folder)


def test_a_flat_export_of_everything_becomes_its_series(engine: Engine, work: Make, tmp_path: Path) -> None:
    root, made = tmp_path / "export", tmp_path / "made"
    flat = root / "DICOM" / "PAT_é" / "0001"
    move_into(flat, write_dicom(made / "a", chest(seed=1)), "IM")
    move_into(flat, write_dicom(made / "b", chest(seed=2), PatientID="2"), "JM")
    move_into(flat, write_dicom(made / "s", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "LM")
    move_into(flat, write_dicom(made / "c", SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "SC")
    move_into(flat, write_dicom(made / "m", Modality="MR"), "MR")
    an_object(flat / "SR1", "1.2.840.10008.5.1.4.1.1.88.67", "SR")
    an_object(flat / "PR1", "1.2.840.10008.5.1.4.1.1.11.1", "PR")
    (flat / "empty").write_bytes(b"")
    (flat / "VERSION").write_text("3")
    (root / "DICOMDIR").write_bytes(b"\0" * 200)
    (root / "viewer.exe").write_bytes(b"MZ")
    os.mkfifo(flat / "pipe")
    (flat / "loop").symlink_to(root)
    (flat / "itself").symlink_to(flat / "itself")
    add_persons(engine, [1, 2])
    result = load(work(path=str(root), match="person_id"))
    rows = query(engine, "SELECT * FROM omop.image_occurrence ORDER BY path")
    assert [(r["person_id"], r["verdict"], r["reasons"]) for r in rows] == [
        (1, "ok", []),
        (2, "ok", []),
        (1, "unusable", ["localizer"]),
        (1, "unusable", ["secondary_capture"]),
    ]
    np.testing.assert_array_equal(voxels(root, rows[0]), expected(1))
    np.testing.assert_array_equal(voxels(root, rows[1]), expected(2))
    assert rejects(engine) == {"not_ct": 1, "dose_report": 1, "not_an_image": 1}
    assert result["files_aside"] == {"empty_file": 1, "not_dicom": 1}
    assert (result["read"], result["loaded"], result["rejected"]) == (7, 4, 3)
    with (tmp_path / "work" / "set_aside.csv").open() as file:
        listed = {row["rule"] for row in csv.DictReader(file)}
    assert listed == {"not_ct", "dose_report", "not_an_image", "empty_file", "not_dicom"}
    again = load(work(path=str(root), match="person_id"))
    assert again["unchanged"]


def test_a_series_whose_files_are_spread_over_folders_is_one_scan(engine: Engine, work: Make, tmp_path: Path) -> None:
    root = tmp_path / "export"
    for file in sorted(write_dicom(tmp_path / "made", chest(seed=3)).iterdir()):
        move = root / f"DIR{int(file.stem) // 5}"
        move.mkdir(parents=True, exist_ok=True)
        file.rename(move / file.name)
    add_persons(engine, [1])
    load(work(path=str(root), match="person_id"))
    (row,) = query(engine, IMAGES)
    assert (row["verdict"], row["slices"], len(row["details"]["files"])) == ("ok", 12, 12)
    np.testing.assert_array_equal(voxels(root, row), expected(3))


def test_a_copy_of_a_series_counts_once_and_a_uid_given_twice_is_suspect(
    engine: Engine, work: Make, tmp_path: Path
) -> None:
    root = tmp_path / "export"
    write_dicom(root / "a" / "s")
    shutil.copytree(root / "a", root / "b")
    write_dicom(root / "c", SeriesInstanceUID="1.2.3", SeriesTime="101112")
    write_dicom(root / "d", chest(seed=4), SeriesInstanceUID="1.2.3", SeriesTime="101112")
    add_persons(engine, [1])
    result = load(work(path=str(root), match="person_id"))
    assert result["rejects_by_rule"] == {"duplicate_record": 1}
    rows = query(engine, "SELECT * FROM omop.image_occurrence ORDER BY path")
    assert [(r["path"], r["reasons"]) for r in rows] == [
        ("a/s", []),
        ("c", ["series_uid_reused"]),
        ("d", ["series_uid_reused"]),
    ]
    np.testing.assert_array_equal(voxels(root, rows[2]), expected(4))


def test_volumes_under_one_uid_are_told_apart_by_plane_and_by_acquisition(
    engine: Engine, work: Make, tmp_path: Path
) -> None:
    root = tmp_path / "export"

    def sagittal(k: int, ds: FileDataset) -> None:
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [0, 1, 0, 0, 0, -1], [3.0 * k, 0, 0]

    same = {"SeriesInstanceUID": "1.2.3"}
    write_dicom(root / "one" / "axial", **same)
    move_into(root / "one", write_dicom(tmp_path / "sagittal", chest((14, 16, 9)), edit=sagittal, **same), "S")
    move_into(root / "one", root / "one" / "axial", "A")
    (root / "one" / "axial").rmdir()
    for phase in (1, 2):
        made = write_dicom(
            tmp_path / f"p{phase}", chest(seed=phase), AcquisitionNumber=phase, SeriesInstanceUID="1.2.4"
        )
        move_into(root / "two", made, f"P{phase}")
    add_persons(engine, [1])
    load(work(path=str(root), match="person_id"))
    rows = query(engine, "SELECT * FROM omop.image_occurrence ORDER BY path")
    assert [(r["verdict"], r["orientation"], r["slices"]) for r in rows] == [
        ("ok", "axial", 12),
        ("ok", "sagittal", 9),
        ("ok", "axial", 12),
        ("ok", "axial", 12),
    ]
    assert len({r["image_key"] for r in rows}) == 4
    assert {r["series_uid"] for r in rows} == {"1.2.3", "1.2.4"}
    np.testing.assert_array_equal(voxels(root, rows[2]), expected(1))
    np.testing.assert_array_equal(voxels(root, rows[3]), expected(2))


def test_ids_are_compared_as_text(engine: Engine, work: Make, tmp_path: Path) -> None:
    root = tmp_path / "export"
    write_dicom(root / "a", PatientID="00123456")
    write_dicom(root / "b", PatientID="123456")
    write_dicom(root / "c", PatientID="X-9")
    write_nifti(root / "sub-X9" / "ct" / "sub-X9_20150203_ct.nii.gz")
    add_persons(engine, [123456, 7, 8, 9])
    with engine.begin() as connection:
        for person, value in ((123456, "A"), (7, "00123456"), (8, "X-9"), (9, "X9")):
            connection.execute(
                text("UPDATE omop.person SET person_source_value = :v WHERE person_id = :p"), {"v": value, "p": person}
            )
    by_id = load(work(path=str(root), match="person_id", source="one"))
    assert [(r["person_id"], r["path"]) for r in query(engine, IMAGES)] == [(123456, "b")]
    assert by_id["rejects_by_rule"] == {"unknown_person": 1, "no_person_in_header": 1, "no_person_in_name": 1}
    shutil.rmtree(root / "b")
    by_value = load(work(path=str(root), match="person_source_value", source="two"))
    rows = query(engine, "SELECT * FROM omop.image_occurrence i JOIN ops.load USING (load_id) WHERE root = 'images'")
    assert {(r["person_id"], r["path"]) for r in rows} == {
        (123456, "b"),
        (7, "a"),
        (8, "c"),
        (9, "sub-X9/ct/sub-X9_20150203_ct.nii.gz"),
    }
    assert by_value["rejected"] == 0


def test_a_source_value_of_two_persons_names_neither(engine: Engine, work: Make, tmp_path: Path) -> None:
    write_dicom(tmp_path / "export" / "a", PatientID="M1")
    add_persons(engine, [1, 2])
    with engine.begin() as connection:
        connection.execute(text("UPDATE omop.person SET person_source_value = 'M1'"))
    result = load(work(path=str(tmp_path / "export"), match="person_source_value"))
    assert result["rejects_by_rule"] == {"ambiguous_person": 1}


def test_a_file_says_whose_scans_are(engine: Engine, work: Make, tmp_path: Path) -> None:
    root = tmp_path / "export"
    write_dicom(root / "a", PatientID="M1", AccessionNumber="ACC1")
    write_dicom(root / "b", PatientID="M2", SeriesInstanceUID="1.2.9")
    write_dicom(root / "c" / "deep", PatientID="M3")
    write_dicom(root / "d", PatientID="M4")
    match = write_manifest(
        tmp_path / "match.csv",
        "1,,,ACC1,M1,",
        "2,1.2.9,,,M2,2016-05-06T07:08:09",
        "3,,c,,,",
        "1,9.9.9,,,,",
        header="person_id,series_uid,path,accession,patient_id,acquired_at",
    )
    add_persons(engine, [1, 2, 3])
    result = load(work(path=str(root), match=str(match)))
    rows = query(engine, IMAGES)
    assert [(r["person_id"], r["path"]) for r in rows] == [(1, "a"), (2, "b"), (3, "c/deep")]
    assert (rows[1]["acquired_at"], rows[1]["acquired_at_source"]) == (dt.datetime(2016, 5, 6, 7, 8, 9), "match_file")
    assert result["rejects_by_rule"] == {"not_in_match_file": 1}
    assert result["unused_match_lines"] == 1


def test_a_file_says_which_masks_scans_have(engine: Engine, work: Make, tmp_path: Path) -> None:
    root = tmp_path / "export"
    write_dicom(root / "a", SeriesInstanceUID="1.2.8")
    write_dicom(root / "b", SeriesInstanceUID="1.2.9")
    write_nifti(root / "a.mask.nii.gz")
    header = "person_id,series_uid,mask"
    match = write_manifest(tmp_path / "match.csv", "1,1.2.8,a.mask.nii.gz", "2,1.2.9,gone.nii.gz", header=header)
    add_persons(engine, [1, 2])
    result = load(work(path=str(root), match=str(match)))
    assert result["rejects_by_rule"] == {"missing_mask": 1}
    assert [(r["person_id"], r["details"]["mask"]) for r in query(engine, IMAGES)] == [(1, "a.mask.nii.gz")]
    write_manifest(tmp_path / "match.csv", "1,1.2.8,a.mask.nii.gz", "1,1.2.8,", header=header)
    with pytest.raises(InputError, match="line 3: the series_uid of line 2 again, with another person, time or mask"):
        load(work(path=str(root), match=str(match)))


def test_faults_of_a_matching_file_are_named_by_line_and_nothing_is_loaded(
    engine: Engine, work: Make, tmp_path: Path
) -> None:
    write_dicom(tmp_path / "export" / "a")
    match = write_manifest(tmp_path / "match.csv", "007,M1", "1,", "1,M1", "2,M1", "1", header="person_id,patient_id")
    with pytest.raises(InputError) as error:
        load(work(path=str(tmp_path / "export"), match=str(match)))
    said = str(error.value)
    assert all(f"line {line}:" in said for line in (2, 3, 5, 6))
    assert "of line 4 again" in said
    assert "007" not in said
    with pytest.raises(InputError, match="columns person_id and one or more"):
        load(work(path=str(tmp_path / "export"), match=str(write_manifest(tmp_path / "m2.csv", "1", header="person"))))
    assert query(engine, IMAGES) == []


def test_headers_that_contradict_their_persons_stop_a_load(engine: Engine, work: Make, tmp_path: Path) -> None:
    root = tmp_path / "export"
    write_dicom(root / "a", PatientID="1", PatientSex="F", PatientBirthDate="19500102")
    write_dicom(root / "b", PatientID="2", PatientSex="F", PatientBirthDate="19500102")
    write_dicom(root / "c", PatientID="3", PatientSex="O", PatientBirthDate="1951")
    add_persons(engine, [1, 2, 3])
    with engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE omop.person SET birth_time = '1950-06-01', gender_concept_id = CASE person_id WHEN 1 THEN 8507 "
                "ELSE 8532 END"
            )
        )
    with pytest.raises(InputError, match="differs for 2 of 3"):
        load(work(path=str(root), match="person_id"))
    assert query(engine, IMAGES) == []
    load(work(path=str(root), match="person_id", allow_conflicts=True))
    assert [(r["verdict"], r["reasons"]) for r in query(engine, IMAGES)] == [
        ("suspect", ["identity_conflict"]),
        ("ok", []),
        ("suspect", ["identity_conflict"]),
    ]
    kept = str(query(engine, "SELECT to_jsonb(i) AS row FROM omop.image_occurrence i"))
    assert "1950" not in kept


def test_the_share_of_scans_that_meet_a_record_of_their_day_is_said_and_kept(
    engine: Engine, work: Make, tmp_path: Path
) -> None:
    root = tmp_path / "export"
    for person in range(1, 6):
        write_dicom(root / str(person), PatientID=str(person))
    add_persons(engine, list(range(1, 6)))
    first = load(work(path=str(root), match="person_id"))
    assert "warning" in first["summary"]
    assert (first["scan_days"]["scans"], first["scan_days"]["with_ct_or_visit"]) == (5, 0)
    (book,) = query(engine, "SELECT flags_by_rule FROM ops.load WHERE kind = 'images'")
    assert book["flags_by_rule"] == {"no_ct_or_visit_that_day": 5}
    (tmp_path / "ehr").mkdir()
    write_manifest(
        tmp_path / "ehr" / "person.csv",
        *(f"{person},8507,1950" for person in range(1, 6)),
        header="person_id,gender_concept_id,year_of_birth",
    )
    write_manifest(
        tmp_path / "ehr" / "visit_occurrence.csv",
        "1,1,9201,2015-02-01 08:00:00,2015-02-05",
        "2,2,9202,2015-02-03,",
        "3,3,9202,2015-02-04,",
        header="visit_occurrence_id,person_id,visit_concept_id,visit_start_datetime,visit_end_datetime",
    )
    write_manifest(
        tmp_path / "ehr" / "procedure_occurrence.csv",
        "1,4,11,2015-02-03",
        "2,5,12,2015-02-03",
        header="procedure_occurrence_id,person_id,procedure_concept_id,procedure_date",
    )
    write_manifest(
        tmp_path / "ehr" / "concept.csv",
        "11,CT of chest without contrast,Procedure,SNOMED,Procedure,S,1,1970-01-01,2099-12-31,",
        "12,Octet of blood,Procedure,SNOMED,Procedure,S,2,1970-01-01,2099-12-31,",
        header="concept_id,concept_name,domain_id,vocabulary_id,concept_class_id,standard_concept,concept_code,"
        "valid_start_date,valid_end_date,invalid_reason",
    )
    load_omop(work(path=str(tmp_path / "ehr"), source="extract"))
    second = load(work(path=str(root), match="person_id"))["scan_days"]
    assert second == {"scans": 5, "with_ct": 1, "with_ct_or_visit": 3, "ct_by": "concept name"}
    with engine.begin() as connection:
        connection.execute(text("UPDATE omop.concept SET concept_code = '77477000' WHERE concept_id = 12"))
        connection.execute(text("INSERT INTO omop.concept_ancestor VALUES (12, 12, 0, 0)"))
    third = load(work(path=str(root), match="person_id"))["scan_days"]
    assert third == {"scans": 5, "with_ct": 1, "with_ct_or_visit": 3, "ct_by": "SNOMED 77477000"}


def test_the_json_file_beside_a_nifti_file_tells_what_its_header_cannot(
    engine: Engine, work: Make, tmp_path: Path
) -> None:
    root = tmp_path / "export"
    write_nifti(root / "sub-1" / "sub-1_ct.nii.gz")
    (root / "sub-1" / "sub-1_ct.json").write_text(
        '{"Modality": "CT", "AcquisitionDate": "2015-02-03", "AcquisitionTime": "10:11:12.5", "ConvolutionKernel": '
        '"B30f", "SliceThickness": 3, "StudyInstanceUID": "1.2", "BodyPartExamined": "CHEST", "ImageType": ["AXIAL"]}'
    )
    write_nifti(root / "sub-1" / "sub-1_mr.nii.gz")
    (root / "sub-1" / "sub-1_mr.json").write_text('{"Modality": "MR", "SeriesDate": "20150203"}')
    add_persons(engine, [1])
    load(work(path=str(root), match="person_id"))
    ct, mr = query(engine, IMAGES)
    assert (ct["acquired_at"], ct["date_only"]) == (dt.datetime(2015, 2, 3, 10, 11, 12), False)
    assert (ct["kernel"], ct["slice_thickness_mm"], ct["study_uid"]) == ("B30f", 3.0, "1.2")
    assert (ct["details"]["body_part"], ct["details"]["image_type"]) == ("CHEST", "AXIAL")
    assert (mr["verdict"], mr["reasons"]) == ("unusable", ["not_ct"])


def test_damaged_and_truncated_files_cost_their_series_and_nothing_else(
    engine: Engine, work: Make, tmp_path: Path
) -> None:
    root = tmp_path / "export"
    whole, cut, lone = write_dicom(root / "1"), write_dicom(root / "2", PatientID="2"), root / "3"
    lone.mkdir()
    file = whole / "003.dcm"
    damaged = file.read_bytes().replace(b"RS\0", b"\xff\xff\0").replace(b"DS", b"\xfe\xfe")
    (whole / "zz").write_bytes(damaged)
    (lone / "zz").write_bytes(damaged)
    (cut / "004.dcm").write_bytes((cut / "004.dcm").read_bytes()[:-50])
    (root / "4.nii.gz").write_bytes(b"\x1f\x8b" + b"\0" * 50)
    add_persons(engine, [1, 2])
    result = load(work(path=str(root), match="person_id"))
    assert [(r["person_id"], r["verdict"], r["reasons"]) for r in query(engine, IMAGES)] == [
        (1, "suspect", ["damaged_slices"]),
        (2, "unusable", ["truncated"]),
    ]
    assert result["rejects_by_rule"] == {"damaged_file": 1, "unreadable_file": 1}
    assert query(engine, REJECTS) != []
