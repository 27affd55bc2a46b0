"""Decoding in children: a bomb, a hang, a crash or too much memory costs the scan, and the work goes on."""

from __future__ import annotations

import gzip
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ml import decoding_child, volume_cache
from ml.decoding import Unreadable, decode
from ml.decoding_pool import DecodingPool, Limits
from ml.volume_cache import Cached, NoRoom, Source, VolumeCache
from ml.volumes import VolumeRecipe
from tests.app.loading.scans import write_dicom
from tests.ml.test_data import RECIPE, write


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A file that never ends to be opened."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    yield path


def why(found: dict[Source, Cached | str], source: Source) -> str:
    outcome = found[source]
    assert isinstance(outcome, str)
    return outcome


def test_a_small_compressed_file_that_asks_for_very_much_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((512, 512, 1024))
    header.set_sform(np.eye(4), 1)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    bomb = tmp_path / "bomb.nii.gz"
    with gzip.open(bomb, "wb", compresslevel=9) as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(512):
            file.write(bytes(1 << 20))
    assert bomb.stat().st_size < 1 << 20
    start = time.monotonic()
    with pytest.raises(Unreadable, match=r"at most 200 times its size, got one whose header asks for 0\.54 GB"):
        decode(bomb, "nifti")
    assert time.monotonic() - start < 1


def test_a_header_that_points_far_behind_the_end_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.nii", 0)
    content = bytearray(source.path.read_bytes())
    content[108:112] = struct.pack("<f", 3e11)  # vox_offset
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(Unreadable, match="asks for 300"):
        decode(tmp_path / "b.nii.gz", "nifti")


def test_a_deflated_bomb_ends_at_the_limit_of_memory_and_the_next_scan_is_read(tmp_path: Path) -> None:
    def swell(k: int, ds) -> None:
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        if k == 3:
            ds.add_new(0x00091001, "OB", bytes(400 << 20))
            ds.add_new(0x00090010, "LO", "X")

    bomb = Source(write_dicom(tmp_path / "bomb", edit=swell), "dicom")
    good = write(tmp_path / "good.nii", 0)
    limits = Limits(memory_bytes=900 << 20)
    found = VolumeCache(tmp_path / "cache", RECIPE, limits).prepare([bomb, good])
    assert "within 0.9 GB of memory" in why(found, bomb) or "crashed" in why(found, bomb)
    assert isinstance(found[good], Cached)


def test_a_scan_whose_reading_hangs_is_given_up_and_leaves_nothing_behind(tmp_path: Path, pipe: Path) -> None:
    hangs, good = Source(tmp_path, "dicom", (pipe,)), write(tmp_path / "good.nii", 0)
    cache = VolumeCache(tmp_path / "cache", RECIPE, Limits(wall_seconds=4))
    found = cache.prepare([hangs, good])
    assert "within 4 s, got one that took longer" in why(found, hangs)
    assert isinstance(found[good], Cached)
    assert not list(cache.folder.glob(".*"))


def test_a_pipe_in_the_place_of_a_scan_is_refused_at_once(pipe: Path) -> None:
    for format in ("nifti", "dicom"):
        with pytest.raises(Unreadable, match="a thing of another kind"):
            decode(pipe, format)


DYING = """
import os, signal, sys, time
print("ready", flush=True)
for line in sys.stdin:
    if "kill" in line:
        os.kill(os.getpid(), signal.SIGKILL)
    if "spin" in line:
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (1, -1))
        while True:
            pass
    print('{"kept": {}}', flush=True)
"""


def test_a_child_that_is_killed_costs_its_scan_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying_child.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended: list[int] = []
    requests = [(name, {"do": name}) for name in ("a", "kill", "b", "spin", "c")]
    with DecodingPool[str](2, Limits(), ended.append, module="dying_child") as pool:
        answers = dict(pool.run(requests))
    assert answers["kill"] == {"why": "Expected a readable volume; its decoder crashed.", "again": True}
    assert "of CPU time" in answers["spin"]["why"]
    assert all(answers[name] == {"kept": {}} for name in "abc")
    assert len(ended) == 2


def test_children_that_cannot_start_are_an_error_and_not_the_fault_of_a_scan(tmp_path: Path) -> None:
    with DecodingPool[str](1, Limits(), module="no_such_module") as pool, pytest.raises(RuntimeError, match="to start"):
        list(pool.run([("a", {})]))


def test_a_scan_that_comes_back_while_it_is_tried_again_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.nii", 0)
    away = tmp_path / "away"
    source.path.rename(away)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2 and away.exists():
            away.rename(source.path)

    monkeypatch.setattr("ml.volume_cache.time.sleep", sleep)
    assert isinstance(VolumeCache(tmp_path / "cache", RECIPE).prepare([source])[source], Cached)
    source.path.unlink()
    waited.clear()
    assert "found none at its place" in why(VolumeCache(tmp_path / "cache", RECIPE).prepare([source]), source)
    assert len(waited) == 2


def test_a_scan_that_changes_while_it_is_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.nii", 0)
    read = volume_cache.read_volume

    def change(path: Path, *rest: object) -> object:
        made = read(path, *rest)  # type: ignore[arg-type]
        write(path, 1)
        os.utime(path, (1, 1))
        return made

    monkeypatch.setattr("ml.volume_cache.read_volume", change)
    answer = decoding_child.answer(request(source, tmp_path), 1 << 30)
    assert answer["again"] and "changed while it was read" in answer["why"]
    assert not list(tmp_path.glob("*.npy"))


def request(source: Source, folder: Path) -> dict[str, object]:
    return VolumeCache(folder, RECIPE)._request(source) | {"folder": str(folder)}


def test_a_full_disk_ends_the_work_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    source = write(tmp_path / "a.nii", 0)
    with monkeypatch.context() as patch:
        patch.setattr("ml.volume_cache._write", full)
        assert decoding_child.answer(request(source, tmp_path), 1 << 30) == {"full": True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii"]
    monkeypatch.setattr(DecodingPool, "run", lambda self, requests, tick: iter([(source, {"full": True})]))
    with pytest.raises(NoRoom, match="found it full"):
        VolumeCache(tmp_path / "cache", RECIPE).prepare([source])


def test_a_real_disk_that_is_full_is_told_from_an_unreadable_scan(tmp_path: Path) -> None:
    """/dev/full refuses every byte."""
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full here")
    source = write(tmp_path / "a.nii", 0)
    for recipe in (RECIPE, VolumeRecipe((64, 128, 128), 9.0)):  # shorter and longer than what is written at once
        asked = request(source, tmp_path) | {"recipe": recipe.to_dict()}
        stem = volume_cache.stem_of(source, recipe)
        (tmp_path / f".{stem}.{os.getpid()}").symlink_to("/dev/full")
        assert decoding_child.answer(asked, 1 << 30) == {"full": True}
        assert not list(tmp_path.glob("*.npy")) + list(tmp_path.glob(".*"))


def test_what_a_tick_raises_ends_the_work_and_its_children(tmp_path: Path, pipe: Path) -> None:
    def stop(done: int, total: int) -> None:
        if time.monotonic() > until:
            raise KeyboardInterrupt

    until = time.monotonic() + 1
    with pytest.raises(KeyboardInterrupt):
        VolumeCache(tmp_path / "cache", RECIPE).prepare([Source(tmp_path, "dicom", (pipe,))], stop)
    assert time.monotonic() - until < 5


def test_a_volume_that_left_the_cache_is_made_again_and_equal_voxels_lie_there_once(tmp_path: Path) -> None:
    first, twin = write(tmp_path / "a.nii", 0), write(tmp_path / "b.nii", 0)
    cache = VolumeCache(tmp_path / "cache", RECIPE)
    found = cache.prepare([first, twin])
    assert len(list(cache.folder.glob("*.npy"))) == 1
    cached = found[first]
    assert isinstance(cached, Cached)
    before = np.array(cache.read(cached))
    (cache.folder / cached.file).unlink()
    np.testing.assert_array_equal(cache.read(cached), before)
    (cache.folder / cached.file).unlink()
    first.path.unlink()
    twin.path.unlink()
    with pytest.raises(ValueError, match="could not be made again"):
        cache.read(cached)


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    sources = [write(tmp_path / f"{i}.nii", i) for i in range(12)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        one, two = pool.map(fill, [tmp_path / "cache"] * 2, [sources] * 2)
    assert one == two
    assert all(isinstance(outcome, Cached) for outcome in one.values())
    cache = VolumeCache(tmp_path / "cache", RECIPE)
    assert len(list(cache.folder.glob("*.npy"))) == 12
    assert not list(cache.folder.glob(".*"))


def fill(folder: Path, sources: list[Source]) -> dict[Source, Cached | str]:
    return VolumeCache(folder, RECIPE).prepare(sources)


def test_the_key_of_a_recipe_does_not_change_with_how_its_spacing_is_written(tmp_path: Path) -> None:
    folders = {
        VolumeCache(tmp_path, VolumeRecipe((16, 16, 16), spacing)).folder for spacing in (9.0, 9, (9.0, 9.0, 9.0))
    }
    assert len(folders) == 1
    assert VolumeRecipe.from_dict(RECIPE.to_dict()).to_dict() == RECIPE.to_dict()
