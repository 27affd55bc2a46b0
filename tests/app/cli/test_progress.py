"""How far a job is, in words: pace and time left are those of the last minute that was watched."""

from __future__ import annotations

from typing import Any

import pytest

from app.cli.follow import Lines, Pace, bar, per_second, progress_words


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def job(done: int | None, total: int | None = 1_000_000, **more: Any) -> dict[str, Any]:
    values = {"state": "running", "fence": 1, "unit": "rows", "note": "reading measurement", "silent_seconds": 1.0}
    return {**values, "done": done, "total": total, **more}


def paced(*seen: tuple[float, int]) -> Pace:
    clock = Clock()
    pace = Pace(clock)
    for clock.now, done in seen:
        pace.see(job(done))
    return pace


def test_rows_a_second_and_the_time_left_are_told() -> None:
    pace = paced((0, 0), (10, 500_000))
    assert pace.rate == 50_000
    assert pace.seconds_left == 10
    words = progress_words(job(500_000), pace)
    assert words == "500,000 of 1,000,000 rows, 50,000 rows/s, about 10 s left, reading measurement"


def test_nothing_is_said_of_the_pace_before_something_was_done() -> None:
    for seen in [(), ((0, 0),), ((0, 7), (5, 7))]:
        assert paced(*seen).rate is None
        assert progress_words(job(7), paced(*seen)) == "7 of 1,000,000 rows, reading measurement"


def test_a_resumed_job_does_not_count_what_was_done_before() -> None:
    assert paced((0, 900_000), (10, 910_000)).seconds_left == 90


def test_the_pace_is_that_of_the_last_minute() -> None:
    fast_then_slow = [(float(t), t * 10_000) for t in range(31)] + [(30.0 + t, 300_000 + t) for t in range(1, 91)]
    assert paced(*fast_then_slow).rate == pytest.approx(1, rel=0.05)


def test_another_phase_begins_anew() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.see(job(1_000_000))
    clock.now = 5
    assert pace.see(job(0, total=2_000)).rate is None


def test_a_job_without_a_total_has_a_pace_and_no_time_left() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.see(job(0, total=None))
    clock.now = 2
    assert (
        progress_words(job(10, total=None), pace.see(job(10, total=None))) == "10 rows, 5 rows/s, reading measurement"
    )


def test_slow_units_are_told_in_seconds_each() -> None:
    assert per_second(0.125, "scans") == "8 s/scan"
    assert per_second(1_234_567, "rows") == "1,230,000 rows/s"
    assert per_second(2.5, "step") == "2.5 step/s"


def test_without_a_terminal_a_line_comes_every_half_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("app.cli.follow.time.monotonic", clock)
    lines = Lines("load omop")
    for clock.now in range(0, 65, 5):
        lines.show(job(int(clock.now) * 1000))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("lachesis: load omop: ") for line in said)
    assert "1,000 rows/s" in said[1]


def test_work_in_this_process_is_told_alike(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("app.cli.follow.time.monotonic", clock)
    with bar("simulate", 100, "persons") as advance:
        clock.now = 40
        advance(10)
    assert "simulate: 10 of 100 persons" in capsys.readouterr().err
