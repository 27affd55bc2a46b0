"""Vectors of contents that stay in files, mapped, until a block of them is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ml import tensor_file


class Located:
    """Content → where its vector lies: an array, most often a mapped file, and a row of it."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._arrays: list[NDArray[np.float32]] = []
        self._where: dict[str, tuple[int, int]] = {}

    def put(self, array_ND: NDArray[np.float32], rows: Mapping[str, int]) -> None:
        """Contents and their rows; they take the place of earlier ones."""
        if rows:
            self._arrays.append(array_ND)
            self._where |= {content: (len(self._arrays) - 1, row) for content, row in rows.items()}

    def __contains__(self, content: object) -> bool:
        return content in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def take(self, contents: Sequence[str]) -> NDArray[np.float32]:
        """(B, D) vectors of contents that are here."""
        made_BD = np.empty((len(contents), self.width), np.float32)
        where = np.array([self._where[content] for content in contents], np.int64).reshape(-1, 2)
        for number in np.unique(where[:, 0]).tolist():
            mine = where[:, 0] == number
            made_BD[mine] = self._arrays[number][where[mine, 1]]
        return made_BD


def locate_published(files: Iterable[Path], wanted: Collection[str], width: int) -> Located:
    """Standardised vectors of wanted contents in files of earlier embeddings; of several, that of the first file.

    Files from before contents were kept in them, and such as are none of ours, hold nothing.
    """
    found = Located(width)
    for file in files:
        try:
            arrays = tensor_file.read(file)
            contents, vectors_ND = arrays["content"], arrays["embedding"]
        except (KeyError, ValueError, OSError):
            continue
        if vectors_ND.shape[1:] != (width,):
            continue
        rows = {
            content: row
            for row, digest in enumerate(contents)
            if (content := bytes(digest).hex()) in wanted and content not in found
        }
        found.put(vectors_ND, rows)
        if len(found) == len(wanted):
            break
    return found
