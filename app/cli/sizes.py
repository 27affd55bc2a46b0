"""Bytes as people read them."""

from __future__ import annotations

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def in_words(size: float) -> str:
    """Three digits and a unit, in powers of 1000: 999 bytes, 1.25 MB, 240 GB."""
    power = 0
    while power < len(UNITS) - 1 and abs(size) >= 999.5:
        size, power = size / 1000, power + 1
    digits = 0 if power == 0 or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {UNITS[power]}"


def counted(number: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
