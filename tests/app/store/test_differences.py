"""What `diff loads` answers from the books, exactly or as sums over steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.errors import InputError, UnknownName
from app.loading.omop import load
from app.store.differences import chosen, difference
from app.store.work import InlineWork
from tests.app.loading.extracts import CONDITION_HEADER, CONDITIONS, PERSONS, conditions, extract, one, write

Make = Callable[..., InlineWork]


def asked(engine: Engine, first: str | None = None, second: str | None = None, source: str | None = None) -> Any:
    with engine.connect() as connection:
        found = difference(connection, chosen(connection, first, second, source))
    (line,) = [row for row in found["tables"] if row["table"] == "condition_occurrence"]
    return found["steps"], found["exact"], tuple(line.values())[1:6]


def test_the_last_two_deliveries_are_compared_by_key(tmp_path: Path, work: Make, engine: Engine) -> None:
    changed = [
        CONDITION_HEADER,
        CONDITIONS[1].replace(",301,", ",999,"),
        *CONDITIONS[3:],
        "30,1,301,2016-01-01,,,,0,,0",
    ]
    load(work(path=str(extract(tmp_path / "a"))))
    with pytest.raises(InputError, match="found one"):
        asked(engine)
    load(work(path=str(extract(tmp_path / "b", condition_occurrence=changed))))
    assert asked(engine) == (1, True, (20, 20, 1, 1, 1))
    load(work(path=str(extract(tmp_path / "c"))))
    assert asked(engine) == (1, True, (20, 20, 1, 1, 1))
    loads = [str(one(engine, f"SELECT min(load_id) FROM ops.load WHERE load_id > {n}")) for n in (0, 3, 6)]
    assert asked(engine, loads[0], loads[2]) == (2, False, (20, 20, 2, 2, 2))
    assert asked(engine, loads[2], loads[1]) == (1, True, (20, 20, 1, 1, 1))


def test_steps_that_only_add_add_up_exactly(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a"))))
    for n in (100, 101):
        lines = [CONDITION_HEADER, f"{n},1,301,2016-01-01,,,,0,,0"]
        load(work(path=str(write(tmp_path / str(n), {"condition_occurrence": lines})), mode="append"))
    first, last = (str(one(engine, f"SELECT {which}(delivery_id) FROM ops.load")) for which in ("min", "max"))
    assert asked(engine, first, last) == (2, True, (20, 22, 2, 0, 0))
    assert asked(engine, last, first) == (2, True, (22, 20, 0, 0, 2))


def test_deliveries_of_two_sources_are_not_compared(tmp_path: Path, work: Make, engine: Engine) -> None:
    load(work(path=str(extract(tmp_path / "a")), source="north"))
    load(work(path=str(write(tmp_path / "b", {"person": [PERSONS[0], "77,8507,1950,1,1,0,0,"]})), source="south"))
    last = str(one(engine, "SELECT max(load_id) FROM ops.load"))
    with pytest.raises(InputError, match="of one source"):
        asked(engine, "1", last)
    with pytest.raises(UnknownName):
        asked(engine, "1", "4711")
    load(
        work(
            path=str(extract(tmp_path / "c", condition_occurrence=conditions("21,1,1,2016-01-01,,,,0,,0"))),
            source="north",
        )
    )
    assert asked(engine, source="north") == (1, True, (20, 21, 1, 0, 0))
