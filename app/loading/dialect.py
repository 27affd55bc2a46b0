"""How a text file is written: its encoding, delimiter, quotes and null texts; what the user says of them.

What is guessed is what bytes leave no doubt about. An encoding of single bytes, or a null text that could be a word,
is never guessed: it must be said.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import InputError
from app.loading.layouts import VERSIONS

DELIMITERS = (",", "\t", ";", "|")
NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
NO_QUOTE = "none"
NULLS = ("\\N", "NULL", "null")
"""Texts that stand for a missing value where a number or a time is expected; the empty field always does."""
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MAGIC = (
    (b"PK\x03\x04", "zip", ".zip"),
    (b"PAR1", "Parquet", ".parquet"),
)
_UNFIT = frozenset({"utf-7", "idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "mbcs", "oem"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the user says of an extract's files; None where it is to be told from the files."""

    delimiter: str | None = None
    null: str | None = None
    encoding: str | None = None
    quote: str | None = None
    """One character, or `none`."""
    cdm: str | None = None
    timezone: str | None = None

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Reading:
        """From a job's arguments.

        Raises:
            InputError: a value that cannot be used, naming its option.
        """
        cdm, zone = args.get("cdm"), args.get("timezone")
        if cdm is not None and cdm not in VERSIONS:
            raise InputError(f"Expected {', '.join(VERSIONS)} after --cdm, got {cdm!r}; name the version of the files.")
        if zone is not None:
            from app.loading.zones import read_zone

            read_zone(zone)
        return cls(
            delimiter=_delimiter(args.get("delimiter")),
            null=args.get("null"),
            encoding=_encoding(args.get("encoding")),
            quote=_quote(args.get("quote")),
            cdm=cdm,
            timezone=zone,
        )

    @property
    def nulls(self) -> tuple[str, ...]:
        """All texts that are read as a missing number or time."""
        return (*NULLS, self.null) if self.null is not None and self.null not in NULLS else NULLS

    def __str__(self) -> str:
        """What of it changes how rows are read; part of a delivery's digest."""
        return " ".join(f"{name}={getattr(self, name)!r}" for name in sorted(self.__dataclass_fields__))


def _delimiter(given: str | None) -> str | None:
    if given is None:
        return None
    named = {"\\t": "\t", **{name: character for character, name in NAMES.items()}, "pipe": "|"}
    found = named.get(given, given)
    if code := re.fullmatch(r"\\x([0-9a-fA-F]{2})", found):
        found = chr(int(code[1], 16))
    if len(found) != 1 or found in '"\r\n\0' or not found.isascii():
        raise InputError("Expected one ASCII character after --delimiter (or tab); give the one the files use.")
    return found


def _quote(given: str | None) -> str | None:
    if given is None or given.lower() == NO_QUOTE:
        return given and NO_QUOTE
    if len(given) != 1 or given in "\r\n\0" or not given.isascii() or given.isalnum():
        raise InputError("Expected one ASCII character or none after --quote; give the one the files use.")
    return given


def _encoding(given: str | None) -> str | None:
    if given is None:
        return None
    try:
        found = codecs.lookup(given)
        usable = bool(getattr(found, "_is_text_encoding", True)) and found.name not in _UNFIT
        codecs.getincrementaldecoder(given)
    except (LookupError, ValueError):
        usable = False
    if not usable:
        raise InputError(
            f"Expected the name of a text encoding after --encoding, got {given!r}; "
            "say for instance utf-8, utf-16 or windows-1252."
        )
    return found.name


def sniff_encoding(head: bytes, given: str | None) -> str:
    """The encoding of a file's first bytes: a byte order mark, what was given, UTF-16 by its zeros, else UTF-8."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    if given is not None and given != "utf-16":
        return given
    pairs = head[: len(head) // 2 * 2][:8192]
    low, high = pairs[0::2], pairs[1::2]
    if pairs and high.count(0) > 0.6 * len(high) and low.count(0) < 0.05 * len(low):
        return "utf-16-le"
    if pairs and low.count(0) > 0.6 * len(low) and high.count(0) < 0.05 * len(high):
        return "utf-16-be"
    return "utf-16-le" if given else "utf-8"


def refuse_magic(head: bytes, name: str) -> None:
    """Raise InputError where a file that is called text is none."""
    for magic, kind, suffix in MAGIC:
        if head.startswith(magic):
            raise InputError(f"Expected text in {name}, found {kind}; name it {suffix}, or export it again.")


def nulls_seen(text: str, delimiter: str, nulls: tuple[str, ...]) -> list[str]:
    """Which null texts stand as whole fields in a piece of a file."""
    edge = re.escape(delimiter)
    return [n for n in nulls if n and re.search(rf"(?:^|{edge}|\n){re.escape(n)}(?:{edge}|\r|\n|$)", text)]


def looks_quoted(text: str, delimiter: str, quote: str) -> bool:
    """Whether at least half of the quotes in a piece of a file stand where a field begins or ends."""
    edges = {delimiter, "\n", "\r", quote}
    padded, total, fitting = f"\n{text}\n", 0, 0
    at = padded.find(quote)
    while at >= 0:
        total += 1
        fitting += padded[at - 1] in edges or padded[at + 1] in edges
        at = padded.find(quote, at + 1)
    return fitting * 2 >= total


def dialect_words(
    *, delimiter: str, quoted: bool, quote: str, encoding: str, line_end: str, version: str | None, nulls: list[str]
) -> str:
    """A dialect in words: `bar, utf-16-le, CRLF, NULL is missing`."""
    words = [NAMES.get(delimiter, repr(delimiter))]
    if quoted:
        words.append("quoted" if quote == '"' else f"quoted by {quote}")
    if encoding != "utf-8":
        words.append(encoding)
    words += {"\r\n": ["CRLF"], "mixed": ["mixed line ends"]}.get(line_end, [])
    if version:
        words.append(f"no header, columns of CDM {version}")
    words += [f"{text} is missing" for text in nulls]
    return ", ".join(words)


HEAD_BYTES = 1 << 18
"""What is looked at of a file to tell how it is written."""


def head_of(path: Path, name: str, size: int = HEAD_BYTES) -> bytes:
    """The first decompressed bytes of a file."""
    from app.loading.records import raw_blocks

    head = b""
    for block in raw_blocks(path, name):
        head += block
        if len(head) >= size:
            break
    return head[:size]
