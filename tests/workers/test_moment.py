"""What several connections read at once is what one transaction sees."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
from sqlalchemy import Connection, Engine

from app.store import moment, tasks
from app.store.work import InlineWork
from ml.labelling import LabelArrays, Sparse
from tests.workers.test_coded_outcomes import SPECS, filled
from workers import bridge
from workers.stages.label import label

Make = Callable[..., InlineWork]

__all__ = ["filled"]


@pytest.fixture
def numbers(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE public.number AS SELECT n FROM generate_series(0, 99) n")


def read(connection: Connection, part: int) -> tuple[list[int], int, int]:
    """Numbers of a tenth, the server's process and the thread that asked."""
    found = connection.exec_driver_sql(f"SELECT n FROM public.number WHERE n / 10 = {part} ORDER BY n").scalars().all()
    return list(found), connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one(), threading.get_ident()


def test_all_parts_are_of_one_moment_and_in_order(
    engine: Engine, numbers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    together, gone = threading.Barrier(3, timeout=30), threading.Event()

    def read_late(connection: Connection, part: int) -> tuple[list[int], int, int]:
        if part < 3 and together.wait() == 0:  # all three are at work; one of them lets another take the rows away
            with engine.begin() as other:
                other.exec_driver_sql("DELETE FROM public.number")
            gone.set()
        assert gone.wait(30)
        return read(connection, part)

    with engine.connect() as connection:
        found = moment.read_parts(connection, read_late, range(10))
        own = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        assert connection.exec_driver_sql("SELECT count(*) FROM public.number").scalar_one() == 0
    assert [n for rows, _, _ in found for n in rows] == list(range(100))
    assert len({pid for _, pid, _ in found}) == 3 == len({thread for _, _, thread in found})
    assert own not in {pid for _, pid, _ in found}


def test_what_a_transaction_wrote_it_reads_itself(engine: Engine, numbers: None) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("DELETE FROM public.number WHERE n < 50")
        found = moment.read_parts(connection, read, range(10))
        assert [n for rows, _, _ in found for n in rows] == list(range(50, 100))
        assert {pid for _, pid, _ in found} == {connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()}
        connection.rollback()


def test_an_error_in_a_part_ends_all_and_leaves_the_transaction_usable(engine: Engine, numbers: None) -> None:
    def fail(connection: Connection, part: int) -> int:
        return int(connection.exec_driver_sql(f"SELECT 1 / ({part} - 7)").scalar_one())

    with engine.connect() as connection:
        with pytest.raises(Exception, match="division by zero"):
            moment.read_parts(connection, fail, range(10))
        assert connection.exec_driver_sql("SELECT count(*) FROM public.number").scalar_one() == 100


def same(one: LabelArrays, other: LabelArrays) -> bool:
    """Whether two readings of labels agree in every array."""
    for field in fields(LabelArrays):
        a, b = getattr(one, field.name), getattr(other, field.name)
        pairs = [(a.ptr, b.ptr), (a.task, b.task), (a.seconds, b.seconds)] if isinstance(a, Sparse) else [(a, b)]
        for left, right in pairs:
            if (left is None) != (right is None) or (left is not None and not np.array_equal(left, right)):
                return False
            if left is not None and left.dtype != right.dtype:
                return False
    return True


def test_labels_read_in_stretches_are_those_read_at_once(
    engine: Engine, work: Make, filled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks.build(work(name="more", cohort="c", specs=[*SPECS, {"name": "m", "concepts": [10], "clock": "discharge"}]))
    label(work(name="l", cohort="c", tasks="more"))
    with engine.connect() as connection:
        info = bridge.find_label_set(connection, "l")
        whole = bridge.read_labels(connection, info)
        some = bridge.read_labels(connection, info, whole.member[5:40:3])
        monkeypatch.setattr(bridge, "STRETCH_MEMBERS", 7)
        assert same(bridge.read_labels(connection, info), whole)
        assert not same(some, whole) and some.member.tolist() == whole.member[5:40:3].tolist()
    assert len(whole.member) == 60 and len(whole.events.task) and len(whole.priors.task) and len(whole.windows.task)


def test_a_cohort_of_nobody_has_empty_labels(engine: Engine, work: Make, filled: None) -> None:
    label(work(name="l", cohort="c", tasks="t"))
    with engine.begin() as connection:
        info = bridge.find_label_set(connection, "l")
        connection.exec_driver_sql("DELETE FROM label.tte")
        labels = bridge.read_labels(connection, info)
    assert not len(labels.member) and len(labels.start_seconds) == len(SPECS) and labels.events.ptr.tolist() == [0]
