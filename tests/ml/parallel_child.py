"""One rank, for tests: `python -m tests.ml.parallel_child RANK RENDEZVOUS SLOW` says what it heard.

Where SLOW is `word`, rank 0 takes longer for its word than ranks wait for gradients; where it is `sum`, rank 1 is late.
"""

from __future__ import annotations

import datetime as dt
import sys
import time
from pathlib import Path

import torch

from ml import parallel


def main(rank: int, rendezvous: Path, slow: str) -> None:
    """Meet the other rank, hear rank 0's word, sum up."""
    parallel.PATIENCE = dt.timedelta(seconds=3)
    world = parallel.World.join(rank, 2, rendezvous)
    if slow == "word" and world.is_first:
        time.sleep(6)
    word = world.agree({"path": "ä", "none": None} if world.is_first else None)
    if slow == "sum" and not world.is_first:
        time.sleep(8)
    total = torch.tensor([1.0 + rank])
    try:
        world.all_sum([total])
    except RuntimeError:
        print("gave up")
    else:
        print(word, float(total))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
