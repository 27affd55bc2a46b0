from __future__ import annotations

import threading
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ml.config import read_recipe
from ml.data import mirrored, order, permuted_among, prefetch
from ml.volume_cache import Cached, Source, VolumeCache, volume_recipe
from ml.volumes import VolumeRecipe
from tests.app.loading.scans import chest, write_dicom, write_nifti

RECIPE = volume_recipe(read_recipe("tiny", {"shape_zyx": "16,16,16"}))


def write(path: Path, seed: int) -> Source:
    voxels = np.random.default_rng(seed).normal(-700, 150, (16, 16, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([9.0, 9.0, 9.0, 1.0])), path)
    return Source(path, "nifti")


def test_a_path_is_decoded_once_and_read_again_when_it_changes(tmp_path: Path) -> None:
    source, twin = write(tmp_path / "a.nii", 0), Source(tmp_path / "a.nii", "nifti")
    cache = VolumeCache(tmp_path / "cache", RECIPE)
    found = cache.prepare([source, twin, source])
    first = found[source]
    assert isinstance(first, Cached)
    assert len(list(cache.folder.glob("*.npy"))) == 1
    voxels = cache.read(first)
    assert voxels.dtype == np.int16
    assert first.mean_hu == pytest.approx(voxels.mean())
    (tmp_path / "a.nii").unlink()
    write(tmp_path / "a.nii", 1)
    second = VolumeCache(tmp_path / "cache", RECIPE).prepare([source])[source]
    assert isinstance(second, Cached)
    assert second.content_sha256 != first.content_sha256
    assert not list(cache.folder.glob(".*")), "no half-written file stays"


def test_a_series_is_read_again_when_one_of_its_slices_changes(tmp_path: Path) -> None:
    source = Source(write_dicom(tmp_path / "series"), "dicom")
    cache = VolumeCache(tmp_path / "cache", RECIPE)
    first, again = (cache.prepare([source])[source] for _ in range(2))
    assert isinstance(first, Cached) and first == again
    folder_time = source.path.stat().st_mtime_ns
    for file, other in zip(
        sorted(source.path.iterdir()),
        sorted(write_dicom(tmp_path / "other", chest(seed=1)).iterdir()),
        strict=True,
    ):
        file.write_bytes(other.read_bytes())
    assert source.path.stat().st_mtime_ns == folder_time
    second = cache.prepare([source])[source]
    assert isinstance(second, Cached) and second.content_sha256 != first.content_sha256


def test_what_is_cached_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.nii", 0)
    first = VolumeCache(tmp_path / "cache", RECIPE).prepare([source])

    def refuse(*args: object) -> None:
        raise AssertionError("decoded twice")

    monkeypatch.setattr("ml.volume_cache.DecodingPool", refuse)
    assert VolumeCache(tmp_path / "cache", RECIPE).prepare([source]) == first


def test_many_volumes_are_decoded_in_processes_and_bad_ones_have_a_reason(tmp_path: Path) -> None:
    sources = [write(tmp_path / f"{i}.nii", i) for i in range(20)]
    (tmp_path / "3.nii").write_bytes(b"\0" * 400)
    sources.append(Source(tmp_path / "absent.nii", "nifti"))
    seen: list[tuple[int, int]] = []
    found = VolumeCache(tmp_path / "cache", RECIPE).prepare(sources, lambda done, total: seen.append((done, total)))
    bad = {source.path.name for source, outcome in found.items() if isinstance(outcome, str)}
    assert bad == {"3.nii", "absent.nii"}
    assert seen[-1] == (21, 21)
    assert all(str(tmp_path) not in reason for reason in found.values() if isinstance(reason, str))


def test_order_and_mirroring_depend_on_seed_epoch_and_scan_alone() -> None:
    assert sorted(order(0, 0, 50)) == list(range(50))
    assert order(0, 1, 50).tolist() != order(0, 0, 50).tolist() == order(0, 0, 50).tolist()
    rows = np.arange(400)
    flips = mirrored(0, 2, rows, 0.5)
    np.testing.assert_array_equal(mirrored(0, 2, rows[::-1], 0.5), flips[::-1])
    assert 150 < flips.sum() < 250
    assert not mirrored(0, 2, rows, 0).any()


def test_permuted_volumes_stay_in_their_split_and_leave_their_person() -> None:
    rng = np.random.default_rng(0)
    persons = np.sort(rng.integers(0, 200, 300))
    groups = (persons % 3) - 1
    source = permuted_among(groups, persons, seed=1)
    assert sorted(source) == list(range(300))
    np.testing.assert_array_equal(groups[source], groups)
    np.testing.assert_array_equal(source[groups < 0], np.flatnonzero(groups < 0))
    moved = persons[source[groups >= 0]] != persons[groups >= 0]
    assert moved.mean() > 0.9


def test_prefetching_keeps_the_order_and_stops_with_its_reader() -> None:
    assert list(prefetch(lambda i: i * i, range(50))) == [i * i for i in range(50)]
    items = prefetch(lambda i: i, range(10_000))
    assert next(items) == 0
    items.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda i: 1 // (i - 3), range(5)))


def test_a_volume_is_put_where_it_is_wanted_and_a_cut_one_is_made_again(tmp_path: Path) -> None:
    cache = VolumeCache(tmp_path / "cache", VolumeRecipe((12, 16, 14), 3.0))
    source = Source(write_nifti(tmp_path / "a.nii.gz"), "nifti")
    cached = cache.prepare([source])[source]
    assert isinstance(cached, Cached)
    out = np.zeros((2, 12, 16, 14), np.int16)
    assert cache.read(cached, out[1]) is not None
    np.testing.assert_array_equal(out[1], cache.read(cached))
    assert not out[0].any()
    file = cache.folder / cached.file
    file.write_bytes(file.read_bytes()[:-100])
    np.testing.assert_array_equal(cache.read(cached, out[0]), out[1])
