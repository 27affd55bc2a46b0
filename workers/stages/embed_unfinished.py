"""Raw vectors of an embedding that has not ended: what was computed before a stop is not computed again.

A file an attempt, `runs/<job>/<fence>/embedded-<digest of the weights>.part`: records of a content's sha256 (32 bytes)
and its vector in float32. A torn last record is left out.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.stages.embed_located import Located

PATTERN = "embedded-*.part"
_ROWS = 1_000
"""Records looked at together."""


class Unfinished:
    """What attempts at embedding by some weights left behind, and where this one adds to it."""

    def __init__(self, folder: Path, weights: str, width: int) -> None:
        """
        Args:
            folder: of this attempt; those of others lie beside it.
            weights: digest of the weights file.
            width: numbers of a vector.
        """
        self.name = f"embedded-{weights[:32]}.part"
        self.file = folder / self.name
        self.width = width
        self.record = np.dtype([("content", "u1", (32,)), ("vector", "<f4", (width,))])
        if self.file.exists():  # begin where whole records end
            os.truncate(self.file, self._count(self.file) * self.record.itemsize)

    def locate(self, wanted: Collection[str]) -> Located:
        """Raw vectors of wanted contents, where they lie; of a content that was made twice, the later one."""
        found = Located(self.width)
        for file in sorted(self._files(), key=lambda file: file.stat().st_mtime_ns):
            if count := self._count(file):
                records = np.memmap(file, self.record, "r", shape=(count,))
                for start in range(0, count, _ROWS):
                    some = records[start : start + _ROWS]
                    whole = np.isfinite(some["vector"]).all(1)
                    rows = {
                        content: start + n
                        for n, digest in enumerate(some["content"])
                        if whole[n] and (content := bytes(digest).hex()) in wanted
                    }
                    found.put(records["vector"], rows)
        return found

    def add(self, contents: Sequence[str], raw_BD: NDArray[np.float32]) -> None:
        """Append vectors of contents (hexadecimal digests)."""
        rows = np.empty(len(contents), self.record)
        rows["content"] = [list(bytes.fromhex(content)) for content in contents]
        rows["vector"] = raw_BD
        with self.file.open("ab") as file:
            file.write(rows.tobytes())

    def remove(self) -> None:
        """Delete what attempts by these weights left behind."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _count(self, file: Path) -> int:
        return file.stat().st_size // self.record.itemsize

    def _files(self) -> list[Path]:
        runs = self.file.parent.parent.parent
        return sorted({*runs.glob(f"*/*/{self.name}"), *self.file.parent.glob(self.name)})
