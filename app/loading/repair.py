"""Read a text file that a fixed dialect would stumble over, record by record: slow, exact, and only for such files.

Records whose shape is broken are named; the others are written again, every field quoted, for the decoder.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from app.loading.records import blocks

MAX_RECORD = 1 << 20
"""Characters of a record at the most; a longer one is a quote that never closes, or no table."""
MAX_LINES = 10_000


@dataclass(slots=True)
class Repaired:
    """What was found in a file, and where its sound records went."""

    path: Path
    records: int = 0
    """Data records read, sound or not."""
    broken: list[tuple[int, str]] = field(default_factory=list)
    """(record number from 1, rule) of those that are not in `path`, ascending."""


class Broken(Exception):
    """A record breaks a rule of shape."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


def lines(path: Path, name: str) -> Iterator[str]:
    """Lines without their ends; a lone carriage return ends a line, too."""

    class Stream(io.RawIOBase):
        def __init__(self) -> None:
            self.blocks, self.rest = blocks(path, name), b""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # noqa: ANN001
            while not self.rest:
                block = next(self.blocks, None)
                if block is None:
                    return 0
                self.rest = block
            part = self.rest[: len(buffer)]
            buffer[: len(part)] = part
            self.rest = self.rest[len(part) :]
            return len(part)

    with io.TextIOWrapper(io.BufferedReader(Stream(), 1 << 20), encoding="utf-8-sig", newline=None) as text:
        for line in text:
            yield line.removesuffix("\n")


def split_record(text: str, delimiter: str, quote: str | None) -> list[str] | None:
    """Fields of a record; None where a quoted field is still open at its end.

    A quote inside a field that does not begin with one is text. Raises Broken where something follows a closing quote.
    """
    if quote is None or quote not in text:
        return text.split(delimiter)
    fields, at = [], 0
    while True:
        if text.startswith(quote, at):
            value, at = _quoted(text, at + 1, quote)
            if at < 0:
                return None
            if at < len(text) and text[at] != delimiter:
                raise Broken("malformed_quotes")
        else:
            end = text.find(delimiter, at)
            value, at = (text[at:], len(text)) if end < 0 else (text[at:end], end)
        fields.append(value)
        if at >= len(text):
            return fields
        at += 1
        if at == len(text):
            return [*fields, ""]


def _quoted(text: str, at: int, quote: str) -> tuple[str, int]:
    """The value of a quoted field that begins at `at`, and where it ends; -1 where it does not."""
    parts = []
    while True:
        end = text.find(quote, at)
        if end < 0:
            return "", -1
        parts.append(text[at:end])
        if not text.startswith(quote, end + 1):
            return "".join(parts), end + 1
        parts.append(quote)
        at = end + 2


def records(source: Iterator[str], delimiter: str, quote: str | None) -> Iterator[list[str] | Broken]:
    """Records of a file, blank lines left out.

    A broken record ends with its first line, and reading goes on at the next one.
    """
    pending: list[str] = []
    while True:
        first = pending.pop() if pending else next(source, None)
        if first is None:
            return
        if first == "":
            continue
        taken = [first]
        try:
            while (fields := split_record("\n".join(taken), delimiter, quote)) is None:
                following = pending.pop() if pending else next(source, None)
                if following is None:
                    raise Broken("malformed_quotes")
                taken.append(following)
                if len(taken) > MAX_LINES or sum(map(len, taken)) > MAX_RECORD:
                    raise Broken("malformed_quotes")
        except Broken as broken:
            pending.extend(reversed(taken[1:]))
            yield broken
            continue
        yield fields


def repair(
    path: Path,
    name: str,
    into: Path,
    *,
    delimiter: str,
    quote: str | None,
    width: int,
    check: Callable[[], None],
    header: bool = True,
) -> Repaired:
    """Write the sound records of `path`, UTF-8, to `into` (comma, quoted, header 0, 1, …), and say which are broken.

    Rules: `wrong_number_of_fields`, `malformed_quotes`, `nul_byte`, `record_too_long`.
    """
    import csv

    found = Repaired(into)
    with into.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow([str(i) for i in range(width)])
        reader = records(lines(path, name), delimiter, quote)
        if header:
            next(reader, None)
        for number, record in enumerate(reader, 1):
            found.records = number
            if number % 10_000 == 0:
                check()
            rule = record.rule if isinstance(record, Broken) else _shape(record, width)
            if rule is None:
                # a line end inside a field is none of the columns we keep, and the decoder's affair no more
                writer.writerow([value.replace("\n", " ") for value in record])  # type: ignore[union-attr]
            else:
                found.broken.append((number, rule))
    return found


def _shape(record: list[str], width: int) -> str | None:
    if len(record) == width + 1 and record[-1] == "":
        record.pop()  # a delimiter at the end of the line
    if len(record) != width:
        return "wrong_number_of_fields"
    if any("\0" in value for value in record):
        return "nul_byte"
    return "record_too_long" if sum(map(len, record)) > MAX_RECORD else None
