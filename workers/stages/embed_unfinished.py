"""Raw vectors of an embedding that has not ended: what was computed before a stop is not computed again.

A file an attempt, `runs/<job>/<fence>/embedded-<digest of the weights>.part`: records of a content's sha256 (32 bytes)
and its vector in float32. A torn last record is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PATTERN = "embedded-*.part"


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
        self.record = np.dtype([("content", "u1", (32,)), ("vector", "<f4", (width,))])

    def read(self) -> dict[str, NDArray[np.float32]]:
        """Content → raw vector."""
        found: dict[str, NDArray[np.float32]] = {}
        for file in self._files():
            rows = np.fromfile(file, self.record, count=file.stat().st_size // self.record.itemsize)
            found |= {bytes(row["content"]).hex(): row["vector"] for row in rows if np.isfinite(row["vector"]).all()}
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

    def _files(self) -> list[Path]:
        runs = self.file.parent.parent.parent
        return sorted({*runs.glob(f"*/*/{self.name}"), *self.file.parent.glob(self.name)})
