"""Sizes as people read them."""

from __future__ import annotations

import pytest

from app.cli.sizes import counted, in_words


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (1_250_000, "1.25 MB"), (9_996_000, "10.0 MB"),
     (99_960_000, "100 MB"), (999_600_000, "1.00 GB"), (240e9, "240 GB"), (3.2e18, "3200 PB")],
)  # fmt: skip
def test_sizes_have_three_digits_and_a_unit(size: float, said: str) -> None:
    assert in_words(size) == said


def test_one_is_not_several() -> None:
    assert [counted(n, "file") for n in (0, 1, 2, 1000)] == ["0 files", "1 file", "2 files", "1,000 files"]
