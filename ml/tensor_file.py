"""Safetensors files written and read a block at a time, so that arrays larger than memory are fine.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length of a JSON header
(little-endian), the header with name, type, shape and offsets of each array, then the arrays without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16", "uint8": "U8"}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in TYPES.items()}
_MOST_HEADER_BYTES = 100_000_000


def create(file: Path, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, NDArray[Any]]:
    """A new file of zeros, mapped: what is written to the arrays is in the file.

    Args:
        file: replaced where it exists.
        arrays: name → (type, shape); types as in TYPES.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, (kind, shape) in sorted(arrays.items(), key=lambda item: (-np.dtype(item[1][0]).itemsize, item[0])):
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        header[name] = {"dtype": TYPES[kind], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the widest type comes first, so that each array is aligned
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
    return _mapped(file, header, 8 + len(text), "r+")


def read(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file, mapped: only what is looked at is read. Raises ValueError where it is no such file."""
    with file.open("rb") as source:
        first = source.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _MOST_HEADER_BYTES + 1
        if length > _MOST_HEADER_BYTES:
            raise ValueError("Expected a safetensors file, got something else.")
        header = json.loads(source.read(length))
    header.pop("__metadata__", None)
    return _mapped(file, header, 8 + length, "r")


def _mapped(file: Path, header: Mapping[str, Any], offset: int, mode: Any) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for name, facts in header.items():
        kind, shape, begin = _DTYPES[facts["dtype"]], tuple(facts["shape"]), offset + facts["data_offsets"][0]
        if 0 in shape:  # nothing can be mapped
            found[name] = np.empty(shape, kind)
        else:
            found[name] = np.memmap(file, kind, mode, begin, shape)
    return found
