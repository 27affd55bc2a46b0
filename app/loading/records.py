"""Count the records of a text file without the decoder's help, and say what is unusual about its bytes.

One pass over the bytes in blocks, vectorised: sha256 of the file as it lies there, UTF-8, NUL, line ends, and records
by RFC 4180 (a line end inside quotes ends no record; a blank line is no record). Text that is not UTF-8, or packed by
zstd, is written anew as plain UTF-8 in the same pass, for the decoder.
"""

from __future__ import annotations

import codecs
import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from app.errors import InputError
from app.loading.places import BOMB_BYTES, refuse_bomb

BLOCK = 4 << 20
QUOTE, LF, CR = 34, 10, 13
_GZIP = 31
"""zlib's window bits for a gzip member."""
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """What one pass over a text file found."""

    sha256: str
    size: int
    records: int
    """Header included; right only where `quoted` and not `malformed`, or where no quote stands in the file."""
    quoted: bool
    """A quote stands somewhere."""
    malformed: bool
    """A quote stands where RFC 4180 allows none, or the last one never closes."""
    lines: int
    """Lines that are not blank, whatever quotes say."""
    has_nul: bool
    line_end: str
    r"""`\n`, `\r\n`, or `mixed` (a lone carriage return counts as mixed)."""
    bom: bool
    stamp: tuple[int, int] = field(compare=False)
    """Size and time of the last change, before it was read."""
    path: Path
    """Where the text lies in UTF-8: the file itself, or what was written anew."""
    zipped: bool
    """`path` is packed by gzip."""
    quote: str | None = '"'
    """What fields are quoted with; None where quotes are text."""

    @property
    def plain(self) -> bool:
        """True where a decoder with a fixed dialect has nothing to stumble over."""
        return not (self.malformed or self.has_nul or self.line_end == "mixed")


def blocks(
    path: Path, name: str, digest: Callable[[bytes], object] | None = None, encoding: str = "utf-8"
) -> Iterator[bytes]:
    """The text of a file in UTF-8, block by block; `digest` sees the bytes as they lie there.

    UTF-8 is passed on unread; other encodings are read strictly.

    Raises:
        InputError: a packed file is truncated, damaged or a bomb, or the text is not in its encoding.
    """
    raw = raw_blocks(path, name, digest)
    if encoding == "utf-8":
        yield from raw
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    lines, first = 0, True
    try:
        for block in raw:
            text = decoder.decode(block)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            lines += text.count("\n")
            if text:
                yield text.encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        lines += error.object[: error.start].decode(encoding, "replace").count("\n")
        raise InputError(
            f"Expected {encoding} in {name}, found other bytes in line {lines + 1}; name another with --encoding."
        ) from error


def raw_blocks(path: Path, name: str, digest: Callable[[bytes], object] | None = None) -> Iterator[bytes]:
    """The unpacked bytes of a file; how it is packed is told by its first bytes."""
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        suffix = path.suffix.lower()
        if magic.startswith(GZIP_MAGIC) or (not magic and suffix == ".gz"):
            yield from _guarded(_gunzip(file, name, digest), path, name)
        elif magic == ZSTD_MAGIC:
            yield from _guarded(_unzstd(file, name, digest), path, name)
        elif suffix in (".gz", ".zst"):
            kind = "gzip" if suffix == ".gz" else "zstd"
            raise InputError(
                f"Expected a whole {kind} file in {name}, found one that is truncated or damaged; copy it again."
            )
        else:
            while block := file.read(BLOCK):
                if digest:
                    digest(block)
                yield block


def _guarded(unpacked: Iterator[bytes], path: Path, name: str) -> Iterator[bytes]:
    size = 0
    for block in unpacked:
        size += len(block)
        if size > BOMB_BYTES:
            refuse_bomb(name, size, path.stat().st_size)
        yield block


def _unzstd(file: IO[bytes], name: str, digest: Callable[[bytes], object] | None) -> Iterator[bytes]:
    import pyarrow as pa

    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    try:
        while block := stream.read(BLOCK):
            yield block
    except OSError as error:
        raise InputError(
            f"Expected a whole zstd file in {name}, found one that is truncated or damaged; copy it again."
        ) from error
    if digest:
        file.seek(0)
        while raw := file.read(BLOCK):
            digest(raw)


def _gunzip(file: IO[bytes], name: str, digest: Callable[[bytes], object] | None) -> Iterator[bytes]:
    damaged = f"Expected a whole gzip file in {name}, found one that is truncated or damaged; copy it again."
    member, fresh = zlib.decompressobj(_GZIP), True
    while raw := file.read(BLOCK):
        if digest:
            digest(raw)
        while raw:
            try:
                out = member.decompress(raw, BLOCK)
            except zlib.error as error:
                raise InputError(damaged) from error
            fresh = False
            if out:
                yield out
            if not member.eof:
                raw = member.unconsumed_tail
                continue
            raw = member.unused_data.lstrip(b"\0")  # padding between members and at the end is allowed
            member, fresh = zlib.decompressobj(_GZIP), True
    if not fresh or file.tell() == 0:
        raise InputError(damaged)


class _Counter:
    """State carried from block to block."""

    def __init__(self, delimiter: int, quote: int = QUOTE) -> None:
        self.delimiter, self.quote = delimiter, quote
        self.records = self.lines = self.quotes = 0
        self.malformed = False
        self.previous = LF  # the byte before the block: the file begins as if after a line end
        self.content_outside = False  # bytes since the last line end, quotes considered
        self.content = False  # bytes since the last line end
        self.lf = self.crlf = self.cr = 0
        self.closing_at_end = False  # the last byte seen was a closing quote: judge it by the next block's first byte

    def feed(self, block: Bytes) -> None:
        before = np.empty_like(block)
        before[0], before[1:] = self.previous, block[:-1]
        ends = np.flatnonzero(block == LF)
        self._line_ends(block, before, ends)
        is_quote = block == self.quote
        quotes = np.flatnonzero(is_quote) if is_quote.any() else np.empty(0, np.int64)
        if len(quotes) or self.closing_at_end:
            self._judge(block, before, quotes)
        self.lines += self._filled(block, before, ends, "content")
        if self.quotes % 2 or len(quotes):
            inside = (np.searchsorted(quotes, ends) + self.quotes) % 2
            ends = ends[inside == 0]
        self.records += self._filled(block, before, ends, "content_outside")
        self.quotes += len(quotes)
        self.previous = int(block[-1])

    def _line_ends(self, block: Bytes, before: Bytes, ends: np.ndarray[Any, Any]) -> None:
        crlf = int(np.count_nonzero(before[ends] == CR))
        returns = int(np.count_nonzero(block == CR))
        self.lf += len(ends) - crlf
        self.crlf += crlf
        self.cr += returns

    def _filled(self, block: Bytes, before: Bytes, ends: np.ndarray[Any, Any], state: str) -> int:
        """Lines among those that end at `ends` that hold anything; remembers the unfinished last one."""
        held = bool(getattr(self, state))
        if not len(ends):
            setattr(self, state, held or bool((block != CR).any()))
            return 0
        starts = np.empty(len(ends), np.int64)
        starts[0], starts[1:] = 0, ends[:-1] + 1
        lengths = ends - starts - ((before[ends] == CR) & (ends > starts))
        filled = int(np.count_nonzero(lengths[1:] > 0)) + int(held or lengths[0] > 0)
        tail = block[ends[-1] + 1 :]
        setattr(self, state, len(tail) > 0 and bool((tail != CR).any()))
        return filled

    def _judge(self, block: Bytes, before: Bytes, quotes: np.ndarray[Any, Any]) -> None:
        """An opening quote follows a delimiter, a line end or a closing quote; a closing one precedes such."""
        after_ok = (self.delimiter, LF, CR, self.quote)
        if self.closing_at_end and int(block[0]) not in after_ok:
            self.malformed = True
        self.closing_at_end = False
        if not len(quotes):
            return
        first_opens = self.quotes % 2 == 0
        opening, closing = (quotes[0::2], quotes[1::2]) if first_opens else (quotes[1::2], quotes[0::2])
        if not np.isin(before[opening], (self.delimiter, LF, self.quote)).all():
            self.malformed = True
        if len(closing) and closing[-1] == len(block) - 1:
            self.closing_at_end = True
            closing = closing[:-1]
        if not np.isin(block[closing + 1], after_ok).all():
            self.malformed = True

    def finish(self) -> None:
        self.records += self.content_outside
        self.lines += self.content
        if self.quotes % 2:
            self.malformed = True

    @property
    def line_end(self) -> str:
        if self.cr == 0:
            return "\n"
        return "\r\n" if self.cr == self.crlf and self.lf == 0 else "mixed"


def scan(
    path: Path,
    name: str,
    delimiter: str,
    check: Callable[[], None],
    *,
    quote: str = '"',
    encoding: str = "utf-8",
    spool: Callable[[], Path] | None = None,
) -> Scan:
    """Read a text file once.

    Args:
        path: the file.
        name: how messages call it.
        delimiter: one character of the file's dialect.
        check: called between blocks; may raise to stop.
        quote: the character that is looked for as a quote.
        encoding: of the file's bytes.
        spool: gives the path of a new file for text that the decoder cannot read as it lies there.

    Raises:
        InputError: it is not in its encoding, its gzip or zstd is truncated, or there is no room to write it anew.
    """
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    counter = _Counter(ord(delimiter), ord(quote))
    has_nul, bom, first = False, False, True
    before = path.stat()
    magic = _magic(path)
    anew = spool() if spool and (encoding != "utf-8" or magic == ZSTD_MAGIC) else None
    out = anew.open("xb") if anew else None
    try:
        for block in blocks(path, name, digest.update, encoding):
            check()
            if out:
                out.write(block)
            decoder.decode(block)
            if first:
                bom, first = block.startswith(codecs.BOM_UTF8), False
                block = block[3:] if bom else block
            if block:
                has_nul = has_nul or b"\0" in block
                counter.feed(np.frombuffer(block, np.uint8))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line = counter.lines + error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"Expected UTF-8 in {name}, found other bytes at about line {line}; "
            "name its encoding, for instance --encoding windows-1252."
        ) from error
    except OSError as error:
        raise InputError(f"Expected room to write {name} anew in UTF-8, found none left; make room.") from error
    finally:
        if out:
            out.close()
    counter.finish()
    return Scan(
        sha256=digest.hexdigest(),
        size=before.st_size,
        stamp=(before.st_size, before.st_mtime_ns),
        records=counter.records,
        quoted=counter.quotes > 0,
        malformed=counter.malformed,
        lines=counter.lines,
        has_nul=has_nul,
        line_end=counter.line_end,
        bom=bom,
        path=anew or path,
        zipped=anew is None and magic.startswith(GZIP_MAGIC),
    )


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)
