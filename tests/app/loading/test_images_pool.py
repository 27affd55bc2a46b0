"""Children that read headers: what one of them may do to a load, and that the quick reader and pydicom agree."""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import pydicom
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.uid import DeflatedExplicitVRLittleEndian

from app.loading import images_dicom
from app.loading.images_child import MEMORY_BYTES, read_one
from app.loading.images_elements import FIRST_BYTES, scan
from app.loading.images_pool import HeaderPool
from tests.app.loading.scans import write_dicom, write_nifti


def test_a_crash_or_a_hang_costs_only_its_own_file() -> None:
    paths = [f"f{i}" for i in range(200)]
    paths[20], paths[21], paths[90] = "crash one", "hang", "crash two"
    started = time.monotonic()
    with HeaderPool(2, batch_seconds=3, file_seconds=2, module="tests.app.loading.fragile_child") as pool:
        found = dict(pool.read((i, "dicom", path) for i, path in enumerate(paths)))
    assert time.monotonic() - started < 30
    assert list(found) == list(range(200))
    faults = {i: answer for i, answer in found.items() if isinstance(answer, str)}
    assert faults == {20: "header_crashed", 21: "header_timeout", 90: "header_crashed"}
    assert found[199] == [{"file": "f199"}]


def test_no_child_outlives_its_pool() -> None:
    with HeaderPool(2, module="tests.app.loading.fragile_child") as pool:
        answers = pool.read((i, "dicom", "f") for i in range(1000))
        next(answers)
        children = [child.process for child in (*pool.idle, *pool.busy)]
    assert children
    assert all(child.poll() is not None for child in children)


@pytest.mark.long
def test_a_header_that_unpacks_to_more_than_the_memory_is_refused(tmp_path: Path) -> None:
    file = write_dicom(tmp_path / "a") / "000.dcm"
    ds = pydicom.dcmread(file)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(file)
    data, uid = file.read_bytes(), DeflatedExplicitVRLittleEndian.encode()
    packer, block = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS), b"\0" * (1 << 24)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)  # such blocks may follow one another
    file.write_bytes(data[: data.index(uid) + len(uid)] + packed * (2 * MEMORY_BYTES // len(block)))
    with HeaderPool(1) as pool:
        ((_, answer),) = pool.read([(0, "dicom", str(file))])
    assert answer in ("header_too_large", "header_crashed")


def test_what_is_no_scan_has_a_rule(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("about")
    assert read_one("dicom", str(tmp_path / "none")) == "missing_file"
    assert read_one("dicom", str(tmp_path / "empty")) == "empty_file"
    assert read_one("dicom", str(tmp_path / "text")) == "not_dicom"
    assert read_one("nifti", str(tmp_path / "empty")) == "unreadable_file"
    assert read_one("nifti", str(tmp_path / "none")) == "missing_file"
    facts = read_one("nifti", str(write_nifti(tmp_path / "a.nii")))
    assert facts["slices"] == 12


def slowly(file: Path) -> list[images_dicom.Image]:
    return images_dicom._read_slowly(file)


def test_the_quick_reader_finds_what_pydicom_finds_in_real_files(real_data: Path) -> None:
    quick = total = 0
    folders = ("dicom_derived_tricky", "ct_dcm_qa_ct", "ct_dicom2nifti_tests", "ct_totalsegmentator", "ct_lungmask")
    for folder in (*folders, "dicom_pydicom_data", "ct_ibsi", "ct_lung_pet_ct_dx_A0001"):
        for file in sorted((real_data / folder).rglob("*")):
            if not file.is_file() or file.suffix in (".json", ".gz", ".md", ".nii", ".txt"):
                continue
            data = file.open("rb").read(FIRST_BYTES)
            found = scan(data, file.stat().st_size, images_dicom._wanted())
            total += data[128:132] == b"DICM"
            if found is not None:
                quick += 1
                assert [found | {"file": file.name}] == slowly(file), file.name
    assert quick > 0.8 * total


@pytest.fixture(scope="module")
def slice_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dicom(tmp_path_factory.mktemp("series") / "a", PatientSex="F", AccessionNumber="A1") / "003.dcm"


@settings(max_examples=300, deadline=None)
@example(place=244, value=244, cut=0)  # a length that swallows what follows the syntax
@given(place=st.integers(132, 1100), value=st.integers(0, 255), cut=st.integers(0, 1500))
def test_damage_never_makes_the_quick_reader_say_other_than_pydicom(
    slice_file: Path, place: int, value: int, cut: int
) -> None:
    """A byte changed, the file cut: the quick reader says the same, or leaves it to pydicom."""
    data = bytearray(slice_file.read_bytes())
    data[place] = value
    data = data[: max(200, len(data) - cut)] if cut % 3 == 0 else data
    other = slice_file.with_name(f"other{os.getpid()}")
    other.write_bytes(data)
    found = scan(bytes(data), len(data), images_dicom._wanted())
    if found is None:
        return
    try:
        expected = slowly(other)
    except images_dicom.Unreadable:
        return  # pydicom is stricter than what the file's elements say
    shown = {key: value for key, value in found.items() if key != "bytes_left"}
    assert {key: expected[0].get(key) for key in shown} == shown


def test_masks_beside_scans_are_no_scans(tmp_path: Path) -> None:
    from app.loading.images_walk import walk

    for name in ("a.nii.gz", "a.mask.nii.gz", "b.mask.nii", "mask.nii"):
        (tmp_path / name).touch()
    assert list(walk(tmp_path)) == [("nifti", "a.nii.gz"), ("nifti", "mask.nii")]
