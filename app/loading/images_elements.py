"""The elements of a DICOM header, read from the first bytes of a file, at the speed of reading them.

Only what most files are made of is understood: little-endian data sets with plain text, whose elements are of the type
that the dictionary gives them (DICOM PS3.5, 7.1 and 7.5). Anything else is None, and pydicom reads the file instead; a
test holds the two together on real files.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from struct import Struct, error
from typing import Any

FEW_BYTES = 16_384
"""As much as is read of a file at first: nearly all headers of single slices are shorter."""
FIRST_BYTES = 65_536
"""As much as is read of a file at the most; headers that are longer go to pydicom."""

_IMPLICIT = b"1.2.840.10008.1.2"
_OTHER_DATA_SETS = (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99")
"""Big endian, and deflated."""
_UID = re.compile(rb"[0-9.]{1,64}")
_META = 0x0002
_UNDEFINED = 0xFFFFFFFF
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT = frozenset(
    (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS")
) | frozenset((b"ST", b"TM", b"UI", b"UL", b"US"))


def _stored(tag: int) -> int:
    """A tag as four little-endian bytes read as one number: two numbers a tag would cost time."""
    return (tag & 0xFFFF) << 16 | tag >> 16


_PIXELS = frozenset(map(_stored, (0x7FE00008, 0x7FE00009, 0x7FE00010)))
_SYNTAX, _CHARACTER_SET = _stored(0x00020010), _stored(0x00080005)
_PIXEL_TAG = b"\xe0\x7f\x10\0"
_LAST_GROUP = 0x0028
"""No wanted element of an image has a later group."""
_STRANGE = frozenset(map(_stored, (0x52009229, 0x52009230)))
"""Where an enhanced object keeps what it says of frames."""
_SPECIAL = _PIXELS | _STRANGE | {_SYNTAX, _CHARACTER_SET}
_ITEM, _ITEM_END, _SEQUENCE_END = _stored(0xFFFEE000), _stored(0xFFFEE00D), _stored(0xFFFEE0DD)

_PADDING = "\0 \t\n\r\f\v"

_EXPLICIT_HEAD, _IMPLICIT_HEAD = Struct("<I2sH").unpack_from, Struct("<II").unpack_from
_WORD, _LENGTH = Struct("<H").unpack_from, Struct("<I").unpack_from


Wanted = Mapping[int, tuple[str, bytes]]
"""Stored tag → (keyword, value representation)."""


class _Strange(Exception):
    """The file is not of the plain kind."""


def wanted(tags: Mapping[int, tuple[str, str]]) -> Wanted:
    """Tag → (keyword, value representation) in the form in which `scan` takes it."""
    return {_stored(tag): (name, vr.encode()) for tag, (name, vr) in tags.items()}


def scan(data: bytes, size: int, tags: Wanted) -> dict[str, Any] | None:
    """The wanted elements of a data set.

    Args:
        data: the first bytes of a file.
        size: bytes of the whole file.
        tags: the elements that are wanted.

    Returns:
        name → str (stripped), or float, or list of float for decimals and integers; beside them `syntax` and
        `bytes_left`, what follows the header. None where the file is not of the plain kind.
    """
    if data[128:132] != b"DICM":
        return None
    try:
        return _scan(data, size, tags)
    except (_Strange, error, ValueError, IndexError):
        return None


def _scan(data: bytes, size: int, tags: Wanted) -> dict[str, Any]:
    found: dict[str, Any] = {}
    place, syntax = _after_meta(data)
    is_explicit, end = syntax != _IMPLICIT, len(data)
    while place < size:
        if is_explicit:
            tag, vr, length = _EXPLICIT_HEAD(data, place)
            start = place + 8
            if vr not in _SHORT:
                if vr not in _LONG:
                    raise _Strange
                (length,) = _LENGTH(data, start)
                start = place + 12
        else:
            tag, length = _IMPLICIT_HEAD(data, place)
            vr, start = None, place + 8
        if tag & 0xFFFF > _LAST_GROUP and (jump := _find_pixels(data, place, is_explicit, found)):
            place = jump
            break
        if tag in _SPECIAL:
            if tag in _PIXELS:
                break
            if tag in _STRANGE or b"\\" in data[start : start + length]:  # several character sets
                raise _Strange
        if length == _UNDEFINED:
            if vr == b"UN":
                raise _Strange
            place = _after_sequence(data, start, is_explicit)
            continue
        place = start + length
        if place > end:
            raise _Strange
        if tag in tags:
            name, expected = tags[tag]
            if vr is not None and vr != expected:
                raise _Strange
            value = _value(data[start:place], expected) if length else ""
            if value not in ("", []):
                found[name] = value
    found["syntax"], found["bytes_left"] = syntax.decode("ascii"), size - place
    return found


def _find_pixels(data: bytes, place: int, is_explicit: bool, found: Mapping[str, Any]) -> int | None:
    """Where the pixels of a simple image begin, without a look at the private elements before them.

    What looks like their tag counts only with the very length that the image's size asks for, or an undefined one.
    """
    size = found.get("Rows", 0) * found.get("Columns", 0) * found.get("SamplesPerPixel", 1)
    length = int(size * found.get("BitsAllocated", 0)) // 8
    if not length or "NumberOfFrames" in found:
        return None
    lengths = (length, length + length % 2, _UNDEFINED)
    while (place := data.find(_PIXEL_TAG, place)) > 0:
        _, vr, _, stated = _element(data, place, is_explicit)
        if stated in lengths and vr in (None, b"OW", b"OB"):
            return place
        place += 1
    return None


def _after_meta(data: bytes) -> tuple[int, bytes]:
    """Where the data set begins, and its transfer syntax."""
    place, syntax = 132, b""
    while _WORD(data, place)[0] == _META:
        tag, _, start, length = _element(data, place, True)
        place = start + length
        if tag == _SYNTAX:
            syntax = data[start:place].rstrip(b"\0 ")
    if not _UID.fullmatch(syntax) or syntax in _OTHER_DATA_SETS:
        raise _Strange
    return place, syntax


def _element(data: bytes, place: int, is_explicit: bool) -> tuple[int, bytes | None, int, int]:
    """Tag, value representation, where the value starts, its length."""
    if not is_explicit:
        tag, length = _IMPLICIT_HEAD(data, place)
        return tag, None, place + 8, length
    tag, vr, length = _EXPLICIT_HEAD(data, place)
    if vr in _SHORT:
        return tag, vr, place + 8, length
    if vr in _LONG:
        return tag, vr, place + 12, _LENGTH(data, place + 8)[0]
    raise _Strange


def _after_sequence(data: bytes, place: int, is_explicit: bool) -> int:
    """Where a sequence of undefined length ends; `place` is its first item."""
    while True:
        tag, length = _IMPLICIT_HEAD(data, place)
        place += 8
        if tag == _SEQUENCE_END:
            return place
        if tag != _ITEM:
            raise _Strange
        place = _after_item(data, place, is_explicit) if length == _UNDEFINED else place + length


def _after_item(data: bytes, place: int, is_explicit: bool) -> int:
    while _IMPLICIT_HEAD(data, place)[0] != _ITEM_END:
        _, vr, start, length = _element(data, place, is_explicit)
        if length == _UNDEFINED and vr == b"UN":
            raise _Strange
        place = _after_sequence(data, start, is_explicit) if length == _UNDEFINED else start + length
    return place + 8


@functools.lru_cache(4096)  # slices of a series have most values in common
def _value(raw: bytes, vr: bytes) -> Any:
    if vr == b"US":
        if len(raw) != 2:
            raise _Strange
        return float(_WORD(raw, 0)[0])
    if vr == b"DS" or vr == b"IS":
        numbers = [float(part) for part in raw.rstrip(b"\0 ").split(b"\\")] if raw.strip(b"\0 ") else []
        return numbers[0] if len(numbers) == 1 else numbers
    text = raw.decode("ascii").strip(_PADDING)  # other characters are pydicom's
    if "\0" in text or "\x1b" in text:  # the latter begins another character set
        raise _Strange
    return text
