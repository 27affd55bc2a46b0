"""Batches in memory that is used again: never while somebody still sees what is in it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ml.batches import Batches

SHAPE = (4, 5, 6)


def numbered(item: int, out: NDArray[np.int16] | None = None) -> NDArray[np.int16]:
    """A volume full of its number, put into `out`."""
    if out is None:
        return np.full(SHAPE, item, np.int16)
    out[:] = item
    return out


def stored(item: int, out: NDArray[np.int16] | None = None) -> NDArray[np.int16]:
    """The same from a source that has its volumes at hand."""
    return np.full(SHAPE, item, np.int16)


@pytest.mark.parametrize("volume", [numbered, stored])
def test_a_batch_holds_its_volumes_in_order(volume: Callable[..., NDArray[np.int16]]) -> None:
    batch = Batches(SHAPE).stack(volume, [3, 1, 2])
    assert batch.shape == (3, *SHAPE)
    np.testing.assert_array_equal(batch[:, 0, 0, 0], [3, 1, 2])
    assert (batch == batch[:, :1, :1, :1]).all()


def test_memory_is_used_again_once_nobody_sees_it() -> None:
    batches = Batches(SHAPE)
    first = batches.stack(numbered, [1, 2])
    at = first.__array_interface__["data"]
    tensor, part = torch.from_numpy(first), first[1, 2:]
    del first
    gc.collect()
    second = batches.stack(numbered, [7, 8])
    assert second.__array_interface__["data"] != at, "a tensor still looks at the first"
    assert tensor[:, 0, 0, 0].tolist() == [1, 2]
    del tensor
    third = batches.stack(numbered, [9])
    assert third.__array_interface__["data"] != at, "a part still looks at the first"
    assert (part == 2).all()
    del part
    assert batches.stack(numbered, [5]).__array_interface__["data"] == at


def test_a_larger_batch_gives_smaller_memory_up() -> None:
    batches = Batches(SHAPE)
    for size in (1, 4, 2, 4):
        assert batches.stack(numbered, range(size))[:, 0, 0, 0].tolist() == list(range(size))


def test_threads_never_share_memory() -> None:
    batches = Batches(SHAPE)

    def one(k: int) -> bool:
        made = batches.stack(numbered, [k, k + 1])
        return bool((made[0] == k).all() and (made[1] == k + 1).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(400)))
