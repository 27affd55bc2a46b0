"""Curves of trainings as TensorBoard event files and as CSV.

An event file is a sequence of TFRecords (https://www.tensorflow.org/tutorials/load_data/tfrecord): length, its masked
CRC-32C, the data, its masked CRC-32C, all little-endian. The data is a protobuf `Event` with a wall time (field 1,
double), a step (2, varint) and either a file version (3) or a summary (5) of one value with a tag (1) and a number (2).
"""

from __future__ import annotations

import csv
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import Connection

_POINTS = """
SELECT t.name, t.step, t.epoch, t.value, extract(epoch FROM t.at)::float8 AS seconds
FROM ops.training_step t WHERE t.job_id = :job ORDER BY t.step, t.name
"""
_JOB = "SELECT job_id, name FROM model.checkpoint WHERE checkpoint_id = :checkpoint"


@dataclass(frozen=True, slots=True)
class Written:
    """The curves of one training."""

    checkpoint: str
    points: int
    folder: str


def export(connection: Connection, names: Iterable[str], folder: Path) -> list[Written]:
    """Write the curves of the trainings of some checkpoints, a folder each.

    Raises:
        InputError: a checkpoint has no curves.
    """
    from sqlalchemy import text

    from app.store.artifacts import find_checkpoint

    written = []
    for name in names:
        found = find_checkpoint(connection, name)
        job = connection.execute(text(_JOB), {"checkpoint": found.checkpoint_id}).one()
        points = [dict(row) for row in connection.execute(text(_POINTS), {"job": job.job_id}).mappings()]
        if not points:
            raise InputError(f"Expected curves of checkpoint {name!r}, found none: nothing was trained for it.")
        place = folder / f"{job.name}-{job.job_id}"
        place.mkdir(parents=True, exist_ok=True)
        write_events(place / f"events.out.tfevents.{int(points[0]['seconds'])}.lachesis", points)
        write_csv(place / "curves.csv", points)
        written.append(Written(name, len(points), str(place)))
    return written


def write_csv(file: Path, points: list[dict[str, Any]]) -> None:
    """One line a point: name, step, epoch, value, seconds."""
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(points[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(points)


def write_events(file: Path, points: list[dict[str, Any]]) -> None:
    """One event a point, written anew: the same curves make the same file."""
    events = [_event(points[0]["seconds"], 0, 3, b"brain.Event:2")]
    for point in points:
        tag = point["name"].encode()
        value = _text(1, tag) + b"\x15" + struct.pack("<f", point["value"])
        events.append(_event(point["seconds"], point["step"], 5, _text(1, value)))
    file.write_bytes(b"".join(map(record, events)))


def record(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def masked(data: bytes) -> int:
    """The CRC-32C of some bytes, turned and shifted as TFRecords have it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Castagnoli's cyclic redundancy check (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _row(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_row(byte) for byte in range(256)]


def _event(seconds: float, step: int, field: int, content: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", seconds) + b"\x10" + _varint(step) + _text(field, content)


def _text(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
