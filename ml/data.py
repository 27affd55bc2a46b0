"""The order of scans, the chance of their changes, and reading them ahead of their use.

A training batch is a pure function of (seed, epoch, step), so that resuming needs no state of a sampler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ml.config import Recipe
from ml.volume_cache import cores

T = TypeVar("T")


def threads_for(recipe: Recipe) -> int:
    """Threads for the computations of a step; small volumes gain less by a second one than they lose in waiting."""
    return 1 if recipe.batch * int(np.prod(recipe.shape_zyx)) < 1_000_000 else cores()


def order(seed: int, epoch: int, n: int, turn: int = 0) -> NDArray[np.int64]:
    """The order of n train scans in an epoch; another one in each further turn at it."""
    return np.random.default_rng([seed, epoch, turn] if turn else [seed, epoch]).permutation(n)


def mirrored(seed: int, epoch: int, rows: NDArray[np.int64], chance: float) -> NDArray[np.bool_]:
    """Which of the scans `rows` are mirrored in an epoch; each by (seed, epoch, scan), whatever batch it is in."""
    return np.array([np.random.default_rng([seed, epoch, int(row), 1]).random() < chance for row in rows], np.bool_)


def permuted_among(groups: NDArray[np.int64], persons: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """(N,) for each scan the scan whose volume it gets instead: persons are permuted inside their group.

    Args:
        groups: (N,) split of each scan; scans with a negative one keep their volumes.
        persons: (N,) person of each scan.
        seed: of the permutation.
    """
    source = np.arange(len(groups))
    rng = np.random.default_rng([seed, 2])
    for group in np.unique(groups[groups >= 0]):
        rows = np.flatnonzero(groups == group)
        _, person = np.unique(persons[rows], return_inverse=True)
        place = rng.permutation(int(person.max()) + 1)
        source[rows[np.argsort(person, kind="stable")]] = rows[np.argsort(place[person], kind="stable")]
    return source


def prefetch(make: Callable[[int], T], items: Iterable[int], *, threads: int = 2) -> Generator[T, None, None]:
    """make(i) for each item in order, a few ahead of their use, in threads."""
    pool = ThreadPoolExecutor(threads, "prefetch")
    ahead: deque[Future[T]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(make, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
