"""Volumes stacked to batches in memory that is used again.

Fresh memory costs a page fault every 4 KiB, which takes longer than copying what goes there.
Shape suffixes: B = scan of a batch.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Volumes(Protocol):
    """Where volumes come from."""

    def __call__(self, item: int, out: NDArray[np.int16] | None = None, /) -> NDArray[np.int16]:
        """(Z, Y, X) in HU; into `out` where it is given and the source can do so, else as it lies there."""


class Batches:
    """Makes batches; the memory of one serves another as soon as nobody refers to its array, nor to a view of it."""

    def __init__(self, shape_zyx: Sequence[int]) -> None:
        self.shape_zyx = tuple(shape_zyx)
        self._free: deque[NDArray[np.uint8]] = deque()

    def stack(self, volume: Volumes, items: Sequence[int]) -> NDArray[np.int16]:
        """(B, Z, Y, X); by any number of threads."""
        made_BZYX = self._empty((len(items), *self.shape_zyx))
        for place, item in zip(made_BZYX, items, strict=True):
            found = volume(item, place)
            if found is not place:
                place[:] = found
        return made_BZYX

    def _empty(self, shape: tuple[int, ...]) -> NDArray[np.int16]:
        size = math.prod(shape) * np.dtype(np.int16).itemsize
        block = self._block(size)
        array = np.frombuffer(block.data, np.int16, math.prod(shape))
        weakref.finalize(array, self._free.append, block).atexit = False  # views refer to this array, not to the block
        return array.reshape(shape)

    def _block(self, size: int) -> NDArray[np.uint8]:
        """One that is free and large enough; smaller ones are given up."""
        while self._free:
            try:
                block = self._free.popleft()
            except IndexError:  # another thread took the last
                break
            if block.nbytes >= size:
                return block
        return np.empty(size, np.uint8)
