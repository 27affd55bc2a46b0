"""Real and derived scans, each with the verdict and the reasons that it must have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.loading.images import read_header
from app.loading.images_header import Header
from app.loading.images_read import FolderFacts, read_folder

OK, SUSPECT, UNUSABLE = "ok", "suspect", "unusable"
TRICKY, QA, D2N = "dicom_derived_tricky", "ct_dcm_qa_ct", "ct_dicom2nifti_tests"
GENERIC = "ct_dicom2nifti_tests/generic"
FEW_MR = {"not_ct", "too_few_slices", "not_hounsfield"}

CASES: list[tuple[str, str, set[str]]] = [
    (f"{TRICKY}/ok_shuffled_names", OK, set()),
    (f"{TRICKY}/reversed_instance_numbers", OK, set()),
    (f"{TRICKY}/rle", OK, set()),
    (f"{TRICKY}/j2k_lossless", OK, set()),
    (f"{TRICKY}/per_slice_rescale_differs", OK, set()),
    (f"{TRICKY}/junk_in_folder", OK, set()),
    (f"{TRICKY}/no_dates", OK, set()),
    (f"{TRICKY}/missing_middle_slice", SUSPECT, {"uneven_spacing"}),
    (f"{TRICKY}/last_gap_doubled", SUSPECT, {"uneven_spacing"}),
    (f"{TRICKY}/duplicate_file_same_sop", SUSPECT, {"duplicate_slices"}),
    (f"{TRICKY}/duplicate_position_new_sop", SUSPECT, {"duplicate_positions"}),
    (f"{TRICKY}/two_series_one_folder", SUSPECT, {"several_series"}),
    (f"{TRICKY}/one_slice_other_rows", SUSPECT, {"mixed_geometry"}),
    (f"{TRICKY}/monochrome1", SUSPECT, {"monochrome1"}),
    (f"{TRICKY}/patient_id_changes_midseries", SUSPECT, {"mixed_persons"}),
    (f"{TRICKY}/no_rescale_tags", SUSPECT, {"no_rescale"}),
    (f"{TRICKY}/no_image_position", UNUSABLE, {"no_position"}),
    (f"{TRICKY}/two_slices_only", UNUSABLE, {"too_few_slices"}),
    (f"{TRICKY}/truncated_one_file", UNUSABLE, {"truncated"}),
    (f"{QA}/GE", SUSPECT, {"uneven_spacing", "tilted_gantry"}),
    (f"{QA}/Philips/S21610/S2010", SUSPECT, {"tilted_gantry"}),
    (f"{QA}/Philips/S21570/S2010", OK, set()),
    (f"{QA}/Philips/S21570/S1000", UNUSABLE, {"localizer", "too_few_slices"}),
    (f"{QA}/Philips/S21570/S4010", UNUSABLE, {"mixed_geometry", "one_position", "too_few_slices", "secondary_capture"}),
    (f"{D2N}/failing/gantrytilting/001", UNUSABLE, {"too_few_slices", "tilted_gantry"}),
    (f"{D2N}/failing/notavolume/001", UNUSABLE, {"one_position", "too_few_slices"}),
    (f"{D2N}/failing/sliceincrement/001", UNUSABLE, {"too_few_slices", "uneven_spacing"}),
    (f"{D2N}/failing/sliceincrement/002", UNUSABLE, {"too_few_slices", "uneven_spacing", "tilted_gantry"}),
    (f"{D2N}/failing/slicecount/001", UNUSABLE, FEW_MR),
    *((f"{GENERIC}/{name}/001", UNUSABLE, FEW_MR) for name in ("anatomical", "compressed", "compressed_j2k")),
    *((f"{GENERIC}/compressed_{name}/001", UNUSABLE, FEW_MR) for name in ("jpeg", "jpegls", "rle")),
    (f"{GENERIC}/anatomical/001_implicit", UNUSABLE, FEW_MR),
    (f"{GENERIC}/anatomical/002_non_isotropic", UNUSABLE, {"not_ct", "too_few_slices"}),
    (f"{GENERIC}/rgb/001", UNUSABLE, FEW_MR | {"colour", "secondary_capture"}),
    ("ct_totalsegmentator/example_ct_dicom", OK, set()),
    ("ct_lung_pet_ct_dx_A0001/3.000000-5mm-41315", OK, set()),
    ("ct_ibsi/ibsi_validation/dicom/STS_044/CT/image", OK, set()),
    ("ct_ibsi/ibsi_2_digital_phantom/dicom/orientation", UNUSABLE, {"not_hounsfield", "derived"}),
    ("ct_lungmask", UNUSABLE, {"too_few_slices"}),
    ("dicom_pydicom_data/693_J2KR.dcm", UNUSABLE, {"too_few_slices"}),
    ("dicom_pydicom_data/693_UNCR.dcm", UNUSABLE, {"too_few_slices"}),
    ("dicom_pydicom_data/bad_sequence.dcm", UNUSABLE, {"too_few_slices"}),
    ("dicom_pydicom_data/explicit_VR-UN.dcm", UNUSABLE, {"too_few_slices"}),
    ("dicom_pydicom_data/eCT_Supplemental.dcm", UNUSABLE, {"too_few_slices", "derived"}),
    ("dicom_pydicom_data/liver.dcm", UNUSABLE, FEW_MR | {"derived"}),
    ("dicom_pydicom_data/emri_small.dcm", UNUSABLE, {"not_ct", "no_spacing", "not_hounsfield"}),
    ("dicom_pydicom_data/OT-PAL-8-face.dcm", "unreadable_file", set()),
    ("nifti_derived_tricky/base_ras_i16.nii.gz", OK, set()),
    ("nifti_derived_tricky/same_voxels_LPS.nii.gz", OK, set()),
    ("nifti_derived_tricky/same_voxels_PIR.nii.gz", OK, set()),
    ("nifti_derived_tricky/float_nan_inf.nii.gz", OK, set()),
    ("nifti_derived_tricky/four_d_1vol.nii.gz", OK, set()),
    ("nifti_derived_tricky/slope1_inter-1024_u16.nii", OK, set()),
    ("nifti_derived_tricky/BAD_truncated_gzip.nii.gz", UNUSABLE, {"truncated"}),
    ("ct_niivue_images/CT_AVM.nii.gz", UNUSABLE, {"not_hounsfield"}),
    ("ct_niivue_images/CT_pitch.nii.gz", UNUSABLE, {"not_hounsfield", "oblique"}),
]
"""Path → verdict (or the rule of a file that is none) and all reasons."""


@pytest.mark.parametrize(("path", "verdict", "reasons"), CASES, ids=[case[0] for case in CASES])
def test_every_case_has_its_verdict_and_its_reasons(
    real_data: Path, path: str, verdict: str, reasons: set[str]
) -> None:
    place = real_data / path
    if not place.exists():
        pytest.skip(f"these extracts have no {path}")
    found = read_header(place)
    if isinstance(found, str):
        assert found == verdict
        return
    assert (found.verdict, set(found.reasons)) == (verdict, reasons)


def test_spacing_comes_from_positions(real_data: Path) -> None:
    thick = read_header(real_data / "ct_totalsegmentator" / "example_ct_dicom")
    tilted = read_header(real_data / QA / "Philips" / "S21610" / "S2010")
    assert isinstance(thick, Header)
    assert isinstance(tilted, Header)
    assert thick.spacing_mm
    assert tilted.spacing_mm
    assert (thick.spacing_mm[2], thick.slice_thickness_mm) == (2.0, 3.0)
    assert tilted.spacing_mm[2] == pytest.approx(2.371, abs=1e-3)


def folder_work(tmp_path: Path) -> Any:
    return SimpleNamespace(folder=tmp_path, progress=lambda *args: None, check=lambda: None)


def test_a_walk_tells_two_series_of_one_folder_apart(real_data: Path, tmp_path: Path) -> None:
    found = list(read_folder(folder_work(tmp_path), real_data / TRICKY / "two_series_one_folder", FolderFacts()))
    headers = [series.found for series in found if isinstance(series.found, Header)]
    assert sorted((h.verdict, h.slices) for h in headers) == [("ok", 8), ("ok", 12)]
    assert sorted(len(series.files) for series in found) == [8, 12]


def test_a_walk_through_everything_agrees_with_each_place_by_itself(real_data: Path, tmp_path: Path) -> None:
    facts = FolderFacts()
    root = real_data / QA
    found = {s.path: s.found for s in read_folder(folder_work(tmp_path), root, facts)}
    assert found.keys() >= {"GE", *(f"Philips/{name}" for name in ("S21570/S1000", "S21570/S4010", "S21610/S2010"))}
    for path, header in found.items():
        alone = read_header(root / path)
        assert isinstance(header, Header)
        assert isinstance(alone, Header)
        assert (header.verdict, set(header.reasons)) == (alone.verdict, set(alone.reasons)), path
    assert facts.aside["not_an_image"] == len(list(root.rglob("DIRFILE")))
