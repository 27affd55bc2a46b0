"""Ranks wait for rank 0's word as long as it takes, and for gradients of others not for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def heard_by_two(folder: Path, slow: str) -> list[str]:
    """What each of two ranks, processes of their own, says that it heard."""
    command = [sys.executable, "-m", "tests.ml.parallel_child"]
    both = [
        subprocess.Popen([*command, str(rank), str(folder / "meet"), slow], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        return [process.communicate(timeout=120)[0].strip() for process in both]
    finally:
        for process in both:
            process.kill()


def test_a_long_judgement_of_rank_0_is_waited_for(tmp_path: Path) -> None:
    assert heard_by_two(tmp_path, "word") == ["{'path': 'ä', 'none': None} 3.0"] * 2


def test_a_rank_that_is_silent_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    assert heard_by_two(tmp_path, "sum")[0] == "gave up"
