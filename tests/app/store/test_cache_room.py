"""Room for cached volumes: what goes first, what never goes, and what is said where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.embedded import environment
from app.errors import InputError, UnknownName
from app.settings import Settings, read_settings
from app.store.cache_room import CacheRoom, folder

MB = 1_000_000


def fill(root: Path, recipe: str, *names: str, age: float = 0) -> None:
    """Volumes of 1 MB, the first unused for longest."""
    (root / recipe).mkdir(parents=True, exist_ok=True)
    (root / recipe / "recipe.json").write_text(json.dumps({"spacing_mm": 2.0}))
    for i, name in enumerate(names):
        file = root / recipe / f"{name}.npy"
        file.write_bytes(bytes(MB))
        (root / recipe / f"{name}_source.json").write_text(json.dumps({"file": file.name}))
        then = time.time() - 86_400 * age - 1000 + i
        os.utime(file, (then, then))


def left(root: Path) -> set[str]:
    return {f"{file.parent.name}/{file.stem}" for file in root.rglob("*.npy")}


def test_what_was_unused_for_longest_goes_first_and_no_more_than_is_needed(tmp_path: Path) -> None:
    fill(tmp_path, "r", "a", "b", "c", "d")
    lease, removed = CacheRoom(tmp_path, 5 * MB).claim(["r/d.npy"], 3 * MB, "3 volumes")
    assert removed == 2
    assert left(tmp_path) == {"r/c", "r/d"}
    lease.close()


def test_what_a_running_job_uses_stays_until_its_process_ends(tmp_path: Path) -> None:
    fill(tmp_path, "r", "a", "b", "c")
    code = (
        "import sys, pathlib; from app.store.cache_room import CacheRoom\n"
        "lease, _ = CacheRoom(pathlib.Path(sys.argv[1])).claim(['r/a.npy'], 0, '')\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as job:
        assert job.stdout and job.stdout.readline() == b"held\n"
        room = CacheRoom(tmp_path, 3 * MB)
        assert room.listing()[0]["in_use"] == 1
        with pytest.raises(
            InputError, match=r"3 volumes \(0\.00 GB\), but .*LACHESIS_CACHE_SIZE is 0\.00 GB, of which"
        ):
            room.claim([], 3 * MB, "3 volumes")
        assert left(tmp_path) == {"r/a", "r/b", "r/c"}, "nothing goes where it would not suffice"
        room.claim([], 2 * MB, "2 volumes")[0].close()
        assert left(tmp_path) == {"r/a"}
        assert room.remove() == (0, 0)
        job.kill()
        job.wait()
    assert room.remove() == (1, MB), "a lease ends with its process, however that ends"
    assert left(tmp_path) == set()
    assert not list((tmp_path / ".in_use").iterdir())


def test_a_job_that_is_still_writing_keeps_its_room_and_its_new_files(tmp_path: Path) -> None:
    fill(tmp_path, "r", "old")
    first, _ = CacheRoom(tmp_path, 4 * MB).claim([], 2 * MB, "2 volumes")
    (tmp_path / "r" / "new.npy").write_bytes(bytes(MB))
    first.note([], MB)
    with pytest.raises(InputError, match="room in the cache for 3 volumes"):
        CacheRoom(tmp_path, 4 * MB).claim([], 3 * MB, "3 volumes")
    CacheRoom(tmp_path, 4 * MB).claim([], 2 * MB, "2 volumes")[0].close()
    assert left(tmp_path) == {"r/new"}


def test_a_disk_without_room_is_refused_before_anything_is_written_or_removed(tmp_path: Path) -> None:
    fill(tmp_path, "r", "a")
    with pytest.raises(InputError, match=r"18,945 volumes .*\(10,000,000 GB\), but .* GB are free on its disk"):
        CacheRoom(tmp_path).claim([], 10**16, "18,945 volumes of 9000 × 9000 × 9000")
    assert left(tmp_path) == {"r/a"}


def test_no_need_removes_nothing_even_over_the_cap_of_what_is_in_use(tmp_path: Path) -> None:
    fill(tmp_path, "r", "a", "b")
    lease, removed = CacheRoom(tmp_path, MB).claim(["r/a.npy", "r/b.npy"], 0, "0 volumes")
    assert removed == 0 and left(tmp_path) == {"r/a", "r/b"}
    lease.close()


def test_removing_by_recipe_and_age_takes_facts_and_empty_folders_along(tmp_path: Path) -> None:
    fill(tmp_path, "aaaa", "x", age=40)
    fill(tmp_path, "bbbb", "y", "z")
    room = CacheRoom(tmp_path)
    assert room.remove(unused_days=30) == (1, MB)
    assert not (tmp_path / "aaaa").exists()
    with pytest.raises(UnknownName, match="recipe in the cache"):
        room.remove(["cccc"])
    assert room.remove(["bb"]) == (2, 2 * MB)
    assert room.listing() == []
    assert CacheRoom(tmp_path / "nowhere").remove() == (0, 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("200GB", 200 * 10**9), ("1.5 TB", 15 * 10**11), ("2gib", 2 << 30), ("10mb", 10**7), ("7B", 7), ("", None)],
)
def test_sizes_are_read_with_their_unit_and_handed_to_workers(text: str, size: int | None, tmp_path: Path) -> None:
    settings = read_settings({"LACHESIS_CACHE_SIZE": text, "LACHESIS_CACHE": str(tmp_path)})
    assert settings.cache_bytes == size
    again = read_settings(environment(settings))
    assert (again.cache_bytes, folder(again)) == (size, tmp_path)


@pytest.mark.parametrize("text", ["lots", "200", "0GB", "-1GB", "1e3GB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="Expected a size like 200GB"):
        read_settings({"LACHESIS_CACHE_SIZE": text})


def test_the_cache_lies_in_the_home_unless_a_folder_is_named(tmp_path: Path) -> None:
    assert folder(Settings(home=tmp_path)) == tmp_path / "cache"
    assert folder(Settings(home=tmp_path, cache=tmp_path / "big")) == tmp_path / "big"
    assert folder(Settings(home=None, artifacts=str(tmp_path / "shared"))) == tmp_path / "shared" / "cache"
