"""What headers tell of a scan, and that the voxels agree with it."""

from __future__ import annotations

import datetime as dt
import gzip
import random
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import MPEG2MPML

from app.loading.images import read_header
from app.loading.images_dicom import read_dicom
from app.loading.images_header import REASONS, Header, Unreadable, parse_moment
from app.loading.images_nifti import read_nifti
from ml.volumes import VolumeRecipe, read_volume
from tests.app.loading.scans import chest, set_pixels, write_dicom, write_enhanced, write_nifti

RECIPE = VolumeRecipe((12, 16, 14), 3.0)

Edit = Callable[[int, FileDataset], object]


def fields(only: Callable[[int], bool] = lambda k: True, **values: object) -> Edit:
    """Set fields of some slices; None deletes one."""

    def edit(k: int, ds: FileDataset) -> None:
        if only(k):
            for name, value in values.items():
                if value is None:
                    delattr(ds, name)
                else:
                    setattr(ds, name, value)

    return edit


def copy_of(name: str, uid: str | None) -> Edit:
    """Write slice 3 twice, under its own or another SOP instance UID."""

    def edit(k: int, ds: FileDataset) -> None:
        if k == 3:
            original = str(ds.SOPInstanceUID)
            ds.SOPInstanceUID = uid or original
            pydicom.dcmwrite(Path(ds.filename) / name, ds)
            ds.SOPInstanceUID = original

    return edit


def smaller_slice(k: int, ds: FileDataset) -> None:
    if k == 11:
        ds.Rows, ds.Columns = 4, 4
        ds.PixelData = np.zeros((4, 4), "<i2").tobytes()


def tilted(k: int, ds: FileDataset) -> None:
    x, y, z = ds.ImagePositionPatient
    ds.ImagePositionPatient = [x, y + z * 0.3, z]


def other_series(k: int, ds: FileDataset) -> None:
    if k < 5:
        series, uid = ds.SeriesInstanceUID, ds.SOPInstanceUID
        ds.SeriesInstanceUID, ds.SOPInstanceUID = "1.2.3", f"1.2.3.{k}"
        pydicom.dcmwrite(Path(ds.filename) / f"other{k}", ds)
        ds.SeriesInstanceUID, ds.SOPInstanceUID = series, uid


def junk(k: int, ds: FileDataset) -> None:
    if k == 0:
        folder = Path(ds.filename)
        (folder / "DICOMDIR.txt").write_text("about")
        (folder / ".hidden").write_bytes(b"\0" * 10)
        (folder / "empty").write_bytes(b"")


def a_film(k: int, ds: FileDataset) -> None:
    ds.file_meta.TransferSyntaxUID = MPEG2MPML
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True


def no_rescale(k: int, ds: FileDataset) -> None:
    ds.RescaleIntercept = 0
    set_pixels(ds, chest()[::-1, ::-1, k].T)
    del ds.RescaleSlope, ds.RescaleIntercept


def unsigned_without_rescale(k: int, ds: FileDataset) -> None:
    del ds.RescaleSlope, ds.RescaleIntercept
    ds.PixelRepresentation = 0


def unsigned_from_zero(k: int, ds: FileDataset) -> None:
    ds.RescaleIntercept, ds.PixelRepresentation = 0, 0
    set_pixels(ds, chest()[::-1, ::-1, k].T + 1024)


def far_away(k: int, ds: FileDataset) -> None:
    if k == 11:
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], 100_000]


def last_gap_doubled(k: int, ds: FileDataset) -> None:
    if k == 11:
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, y, z + 3]


def damaged(k: int, ds: FileDataset) -> None:
    if k == 11:
        path = Path(ds.filename) / "damaged.dcm"
        ds.SOPInstanceUID = "1.2.3.5"
        pydicom.dcmwrite(path, ds)
        path.write_bytes(path.read_bytes().replace(b"33.0", b"CAN."))


CASES: list[tuple[str, Edit, str, set[str]]] = [
    ("plain", lambda k, ds: None, "ok", set()),
    ("reversed numbers", lambda k, ds: setattr(ds, "InstanceNumber", 50 - k), "ok", set()),
    ("junk", junk, "ok", set()),
    ("missing slice", lambda k, ds: k != 5, "suspect", {"uneven_spacing"}),
    ("last gap doubled", last_gap_doubled, "suspect", {"uneven_spacing"}),
    ("far away", far_away, "unusable", {"uneven_spacing", "most_slices_missing"}),
    ("copy", copy_of("zz", None), "suspect", {"duplicate_slices"}),
    ("same position", copy_of("zz", "1.2.3.4"), "suspect", {"duplicate_positions"}),
    ("damaged", damaged, "suspect", {"damaged_slices"}),
    ("two series", other_series, "suspect", {"several_series"}),
    ("other size", smaller_slice, "suspect", {"mixed_geometry"}),
    ("tilt", tilted, "suspect", {"tilted_gantry"}),
    ("no rescale", no_rescale, "suspect", {"no_rescale"}),
    ("unsigned", unsigned_without_rescale, "unusable", {"not_hounsfield"}),
    ("unsigned from zero", unsigned_from_zero, "unusable", {"not_hounsfield"}),
    ("monochrome1", fields(PhotometricInterpretation="MONOCHROME1"), "suspect", {"monochrome1"}),
    ("persons", fields(lambda k: k > 6, PatientID="2"), "suspect", {"mixed_persons"}),
    ("no modality", fields(Modality=None), "ok", set()),
    ("localizer", fields(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "unusable", {"localizer"}),
    ("modality", fields(Modality="PT"), "unusable", {"not_ct"}),
    ("frames without groups", fields(NumberOfFrames=2), "unusable", {"multi_frame", "truncated"}),
    ("no position", fields(lambda k: k == 2, ImagePositionPatient=None), "unusable", {"no_position"}),
    ("one position", fields(ImagePositionPatient=[0, 0, 0]), "unusable", {"one_position", "too_few_slices"}),
    ("two slices", lambda k, ds: k < 2, "unusable", {"too_few_slices"}),
    ("no spacing", fields(PixelSpacing=None), "unusable", {"no_spacing"}),
    ("truncated", lambda k, ds: None, "unusable", {"truncated"}),
    ("no decoder", a_film, "unusable", {"no_decoder"}),
]


@pytest.mark.parametrize(("name", "edit", "verdict", "reasons"), CASES, ids=[case[0] for case in CASES])
def test_verdicts_of_dicom_series_and_whether_their_voxels_can_be_read(
    tmp_path: Path, name: str, edit: Edit, verdict: str, reasons: set[str]
) -> None:
    folder = write_dicom(tmp_path / "series", edit=edit)
    if name == "truncated":
        file = folder / "006.dcm"
        file.write_bytes(file.read_bytes()[:-10])
    header = read_dicom(folder)
    assert set(header.reasons) == reasons
    assert header.verdict == verdict
    agrees(header, folder)


def agrees(header: Header, path: Path) -> None:
    """Usable by its headers means readable, with the geometry the headers say."""
    if header.verdict != "unusable":
        volume = read_volume(path, header.format, RECIPE)
        assert header.spacing_mm is not None
        assert header.slices is not None
        if "uneven_spacing" not in header.reasons and "tilted_gantry" not in header.reasons:
            sizes, codes = (header.rows, header.columns, header.slices), header.orientation or ""
            axis = next((i for i, code in enumerate(codes) if code in "SI"), 2) if header.format == "nifti" else 2
            length = (sizes[axis] or 0) * header.spacing_mm[axis]
            assert volume.z_coverage == pytest.approx(length, rel=1e-3)
    elif set(header.reasons) - {"too_few_slices", "localizer"}:
        with pytest.raises(ValueError, match="Expected"):
            read_volume(path, header.format, RECIPE)


def test_damaged_headers_are_refused_without_a_word_of_what_is_in_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Random damage to any byte of a header ends in a verdict or a refusal that quotes nothing."""
    rng = random.Random(0)
    series = write_dicom(tmp_path / "series", PatientID="CANARY", SeriesTime="CANARY")
    slice_file, nifti = series / "004.dcm", write_nifti(tmp_path / "a.nii")
    whole = {slice_file: slice_file.read_bytes(), nifti: nifti.read_bytes()}
    outcomes = set()
    for turn in range(150):
        path = (slice_file, nifti)[turn % 2]
        content = bytearray(whole[path])
        for _ in range(rng.choice((1, 1, 4, 20))):
            content[rng.randrange(min(348, len(content)) if path == nifti else 900)] = rng.randrange(256)
        path.write_bytes(content)
        found = read_header(series if path == slice_file else nifti)
        outcomes.add(found if isinstance(found, str) else found.verdict)
        try:
            read_volume(series if path == slice_file else nifti, "dicom" if path == slice_file else "nifti", RECIPE)
        except ValueError as error:
            assert str(error).startswith("Expected")
            assert "CANARY" not in str(error)
        path.write_bytes(whole[path])
    assert outcomes == {"ok", "suspect", "unusable", "unreadable_file"}
    assert "CANARY" not in "".join(capfd.readouterr())


def test_every_reason_is_one_of_those_listed() -> None:
    assert {reason for *_, reasons in CASES for reason in reasons} <= REASONS.keys()


def test_an_enhanced_object_reads_as_its_slices_one_by_one(tmp_path: Path) -> None:
    folder = write_enhanced(tmp_path)
    enhanced, plain = read_dicom(folder), read_dicom(tmp_path / "frames")
    assert enhanced.verdict == "ok"
    for name in ("rows", "columns", "slices", "spacing_mm", "slice_thickness_mm", "orientation", "hu_state"):
        assert getattr(enhanced, name) == getattr(plain, name)
    agrees(enhanced, folder)
    file = folder / "all.dcm"
    file.write_bytes(file.read_bytes()[:-10])
    assert read_dicom(folder).reasons == ("truncated",)


def test_geometry_of_a_sagittal_series_with_its_slices_apart(tmp_path: Path) -> None:
    def edit(k: int, ds: FileDataset) -> None:
        ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        ds.ImagePositionPatient = [4.0 * k, 0, 0]
        ds.PixelSpacing = [2, 2.5]

    header = read_dicom(write_dicom(tmp_path / "series", edit=edit))
    assert header.orientation == "sagittal"
    assert header.spacing_mm == [2, 2.5, 4]
    assert header.verdict == "ok"


@pytest.mark.parametrize(
    ("values", "at", "source", "date_only"),
    [
        ({"AcquisitionDateTime": "20150203040506.78+0100"}, "2015-02-03 04:05:06", "AcquisitionDateTime", False),
        (
            {"AcquisitionDate": "20150204", "AcquisitionTime": "040506"},
            "2015-02-04 04:05:06",
            "AcquisitionDate",
            False,
        ),
        ({}, "2015-02-03 10:11:12", "SeriesDate", False),
        ({"SeriesDate": None}, "2015-02-03 23:59:59", "StudyDate", True),
        ({"SeriesTime": "000000"}, "2015-02-03 23:59:59", "SeriesDate", True),
        ({"SeriesTime": None}, "2015-02-03 23:59:59", "SeriesDate", True),
    ],
)
def test_the_best_attribute_tells_when(
    tmp_path: Path, values: dict[str, str | None], at: str, source: str, date_only: bool
) -> None:
    found = read_dicom(write_dicom(tmp_path / "series", edit=fields(**values))).acquired
    assert found is not None
    assert (str(found.at), found.source, found.date_only) == (at, source, date_only)


def test_a_series_without_dates_has_no_time(tmp_path: Path) -> None:
    edit = fields(SeriesDate=None, StudyDate=None)
    assert read_dicom(write_dicom(tmp_path / "series", edit=edit)).acquired is None


@pytest.mark.parametrize("make", ["missing", "empty folder", "text", "not dicom"])
def test_what_is_no_scan_is_unreadable(tmp_path: Path, make: str) -> None:
    path = tmp_path / "x"
    if make != "missing":
        path.mkdir()
    if make == "text":
        (path / "a.dcm").write_text("hello")
    if make == "not dicom":
        write_nifti(path / "a.nii")
    with pytest.raises(Unreadable):
        read_dicom(path)


def test_a_moment_reads_iso_and_dicom_and_nothing_else() -> None:
    def moment(text: str) -> tuple[dt.datetime, bool] | None:
        found = parse_moment(text, "manifest")
        return (found.at, found.date_only) if found else None

    day, time = (dt.datetime(2015, 2, 3, 23, 59, 59), True), (dt.datetime(2015, 2, 3, 4, 5, 6), False)
    for text in ("2015-02-03", "20150203", "2015-02-03T00:00:00", "2015-02-03 00:00:00.000"):
        assert moment(text) == day
    for text in ("2015-02-03T04:05:06", "2015-02-03 04:05:06.9", "20150203040506", "2015-02-03T04:05:06Z"):
        assert moment(text) == time
    assert moment("2015-02-03T04:05:06+02:00") == time
    for text in ("", "03/02/2015", "2015-02-30", "17991231", "23000101", "yesterday", "201502", "\N{DIGIT ONE}x"):
        assert moment(text) is None


def with_header(path: Path, offset: int, content: bytes, affine: np.ndarray | None = None) -> Path:
    raw = bytearray(nibabel.Nifti1Image(chest(), affine).to_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    return path


def make_nifti(folder: Path, name: str) -> Path:
    path = folder / "a.nii"
    affine = np.diag([3.0, 3, 3, 1])
    if name == "plain":
        return write_nifti(path)
    if name == "gzip":
        return write_nifti(folder / "a.nii.gz")
    if name == "members":
        raw = nibabel.Nifti1Image(chest(), affine).to_bytes()
        (folder / "a.nii.gz").write_bytes(gzip.compress(raw[:3000]) + gzip.compress(raw[3000:]))
        return folder / "a.nii.gz"
    if name == "nifti2":
        nibabel.Nifti2Image(chest(), affine).to_filename(path)
    if name == "big endian":
        nibabel.Nifti1Image(chest().astype(">i2"), affine, nibabel.Nifti1Header(endianness=">")).to_filename(path)
    if name == "pair":
        nibabel.Nifti1Pair(chest(), affine).to_filename(folder / "a.hdr")
        return folder / "a.hdr"
    if name == "no orientation":
        write = nibabel.Nifti1Image(chest(), None)
        write.header.set_zooms((3, 3, 3))
        write.to_filename(path)
    if name == "forms disagree":
        image = nibabel.Nifti1Image(chest(), affine)
        image.set_qform(np.diag([-3.0, -3, 3, 1]), 1)
        image.set_sform(affine, 1)
        image.to_filename(path)
    if name == "oblique":
        turn = np.array([[0.94, -0.342, 0], [0.342, 0.94, 0], [0, 0, 1]])
        nibabel.Nifti1Image(chest(), nibabel.affines.from_matvec(turn * 3)).to_filename(path)
    if name == "metres":
        image = nibabel.Nifti1Image(chest(), np.diag([0.003, 0.003, 0.003, 1]))
        image.header.set_xyzt_units("meter")
        image.to_filename(path)
    if name == "not metres":
        image = nibabel.Nifti1Image(chest(), affine)
        image.header.set_xyzt_units("meter")
        image.to_filename(path)
    if name == "metres unsaid":
        write_nifti(path, affine=np.diag([0.003, 0.003, 0.003, 1]))
    if name == "zero spacing":
        return with_header(path, 88, bytes(4))
    if name == "four dimensions":
        write_nifti(path, np.stack([chest()] * 2, -1))
    if name == "one slice":
        write_nifti(path, chest()[:, :, :1])
    if name == "eight bit":
        write_nifti(path, chest().clip(0, 255).astype(np.uint8))
    if name == "unsigned":
        write_nifti(path, (chest() + 1024).astype(np.uint16))
    if name.startswith("unsigned from"):
        lowest = int(name.split()[-1])
        image = nibabel.Nifti1Image((chest() - chest().min()).astype(np.uint16), affine)
        image.header.set_slope_inter(1, lowest)
        image.to_filename(path)
    if name == "colour":
        write_nifti(path, np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    if name == "truncated":
        path.write_bytes(write_nifti(path).read_bytes()[:-100])
    if name == "truncated gzip":
        path = write_nifti(folder / "a.nii.gz")
        path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("name", "verdict", "reasons"),
    [
        ("plain", "ok", set()),
        ("gzip", "ok", set()),
        ("members", "ok", set()),
        ("nifti2", "ok", set()),
        ("big endian", "ok", set()),
        ("pair", "ok", set()),
        ("no orientation", "suspect", {"no_orientation"}),
        ("forms disagree", "suspect", {"orientations_disagree"}),
        ("oblique", "suspect", {"oblique"}),
        ("metres", "suspect", {"not_millimetres"}),
        ("not metres", "suspect", {"not_millimetres"}),
        ("metres unsaid", "unusable", {"no_spacing"}),
        ("zero spacing", "unusable", {"no_spacing", "no_orientation"}),
        ("four dimensions", "unusable", {"not_three_dimensional"}),
        ("one slice", "unusable", {"too_few_slices"}),
        ("eight bit", "unusable", {"not_hounsfield"}),
        ("unsigned", "unusable", {"not_hounsfield"}),
        ("unsigned from 10", "unusable", {"not_hounsfield"}),
        ("unsigned from -1024", "ok", set()),
        ("colour", "unusable", {"colour"}),
        ("truncated", "unusable", {"truncated"}),
        ("truncated gzip", "unusable", {"truncated"}),
    ],
)
def test_verdicts_of_nifti_files_and_whether_their_voxels_can_be_read(
    tmp_path: Path, name: str, verdict: str, reasons: set[str]
) -> None:
    path = make_nifti(tmp_path, name)
    header = read_nifti(path)
    assert set(header.reasons) == reasons
    assert header.verdict == verdict
    agrees(header, path)


def test_real_series_agree_with_their_headers(real_data: Path) -> None:
    folders = [
        real_data / "ct_lung_pet_ct_dx_A0001" / "3.000000-5mm-41315",
        real_data / "ct_totalsegmentator" / "example_ct_dicom",
        *sorted(f for f in (real_data / "dicom_derived_tricky").iterdir() if f.is_dir()),
        *sorted(f.parent for f in (real_data / "ct_dcm_qa_ct").rglob("*") if f.is_file() and f.suffix == ".dcm"),
    ]
    for folder in dict.fromkeys(folders):
        agrees(read_dicom(folder), folder)
    for path in sorted((real_data / "nifti_derived_tricky").glob("*.nii*")):
        try:
            header = read_nifti(path)
        except Unreadable:
            with pytest.raises(ValueError, match="Expected"):
                read_volume(path, "nifti", RECIPE)
        else:
            agrees(header, path)
