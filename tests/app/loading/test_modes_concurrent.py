"""Two loaders at once: of one source the second judges by what the first published; of two, neither minds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from app.loading.omop import load
from app.settings import Settings
from app.store.work import InlineWork
from tests.app.loading.extracts import CONDITION_HEADER, PERSONS, extract, one, rows, write


def at_once(engine: Engine, settings: Settings, folder: Path, *several: dict[str, Any]) -> list[dict[str, Any]]:
    """Loads started together, each with a folder of its own."""

    def run(numbered: tuple[int, dict[str, Any]]) -> dict[str, Any]:
        number, args = numbered
        return load(InlineWork(engine, args=args, folder=folder / f"work{number}", settings=settings))

    with ThreadPoolExecutor(len(several)) as pool:
        return list(pool.map(run, enumerate(several)))


def test_the_same_append_twice_at_once_is_applied_once(tmp_path: Path, engine: Engine, settings: Settings) -> None:
    at_once(engine, settings, tmp_path, {"path": str(extract(tmp_path / "a"))})
    new = [f"{i},1,301,2016-01-01,,,,0,,0" for i in range(100, 150)]
    path = str(write(tmp_path / "b", {"condition_occurrence": [CONDITION_HEADER, *new]}))
    found = at_once(engine, settings, tmp_path, *({"path": path, "mode": "append"} for _ in range(3)))
    assert sorted(result["unchanged"] for result in found) == [False, True, True]
    assert one(engine, "SELECT count(*) FROM omop.event") == 70
    assert one(engine, "SELECT num_events FROM omop.timeline WHERE person_id = 1") == 54


def test_different_deltas_at_once_are_both_there(tmp_path: Path, engine: Engine, settings: Settings) -> None:
    at_once(engine, settings, tmp_path, {"path": str(extract(tmp_path / "a"))})
    paths = [
        write(tmp_path / f"d{n}", {"condition_occurrence": [CONDITION_HEADER, f"{n},1,{n},2016-01-01,,,,0,,0"]})
        for n in (100, 101, 102)
    ]
    at_once(engine, settings, tmp_path, *({"path": str(path), "mode": "upsert"} for path in paths))
    assert one(engine, "SELECT count(*) FROM omop.event") == 23
    assert one(engine, "SELECT num_events FROM omop.timeline WHERE person_id = 1") == 7
    assert rows(engine, "SELECT max(num_after) FROM ops.load_change WHERE table_name = 'condition_occurrence'") == [
        (23,)
    ]


def test_two_sources_at_once_are_both_there(tmp_path: Path, engine: Engine, settings: Settings) -> None:
    north = {"path": str(extract(tmp_path / "a")), "source": "north"}
    files = {
        "person": [PERSONS[0], "77,8507,1950,1,1,0,0,"],
        "condition_occurrence": [CONDITION_HEADER, "1,77,300,2015-01-01,,,,0,,0"],
    }
    south = {"path": str(write(tmp_path / "b", files)), "source": "south"}
    at_once(engine, settings, tmp_path, north, south)
    assert one(engine, "SELECT count(*) FROM omop.event") == 21
    assert one(engine, "SELECT count(*) FROM omop.timeline") == 6
