from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from app.export.curves import crc32c, masked, write_csv, write_events

POINTS: list[dict[str, Any]] = [
    {"name": "train_loss", "step": 3, "epoch": 0, "value": 2.5, "seconds": 1_700_000_000.25},
    {"name": "tuning_gain", "step": 300, "epoch": 1, "value": -0.125, "seconds": 1_700_000_100.5},
]


@pytest.mark.parametrize(
    ("data", "crc"), [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)]
)
def test_the_checksum_is_that_of_the_standard(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


def records(data: bytes) -> list[bytes]:
    """The contents of an event file, each checked as a reader of it does."""
    found = []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        assert struct.unpack_from("<I", data, 8)[0] == masked(data[:8])
        found.append(data[12 : 12 + length])
        assert struct.unpack_from("<I", data, 12 + length)[0] == masked(found[-1])
        data = data[16 + length :]
    return found


def test_an_event_file_holds_a_version_and_each_point(tmp_path: Path) -> None:
    write_events(tmp_path / "e", POINTS)
    version, first, second = records((tmp_path / "e").read_bytes())
    assert version.endswith(b"brain.Event:2")
    assert first[:9] == b"\x09" + struct.pack("<d", 1_700_000_000.25) and first[9:11] == b"\x10\x03"
    assert b"train_loss" in first and first.endswith(b"\x15" + struct.pack("<f", 2.5))
    assert second[9:12] == b"\x10\xac\x02", "300 as a varint"
    assert second.endswith(struct.pack("<f", -0.125))


def test_the_csv_has_a_line_a_point(tmp_path: Path) -> None:
    write_csv(tmp_path / "c.csv", POINTS)
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert lines[:2] == ["name,step,epoch,value,seconds", "train_loss,3,0,2.5,1700000000.25"]
