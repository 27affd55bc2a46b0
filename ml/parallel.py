"""Several processes that train one model, each on a device of its own: who they are, and what they tell each other.

Every step's passes are shared out among the ranks, gradients are summed, and all ranks take the same optimiser step:
the training is that of one process with the same recipe, but for the order of sums and for running statistics, which
are the mean of the ranks'. Rank 0 alone judges, keeps stops and knows an observer; the others follow its word.
"""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

PATIENCE = dt.timedelta(minutes=10)
"""How long a rank waits for the gradients of others before it gives up."""
WORD_PATIENCE = dt.timedelta(days=7)
"""How long it waits for rank 0's word, which comes only after rank 0 has judged an epoch or kept a stop."""


@dataclass(frozen=True, slots=True)
class World:
    """One rank of `size`."""

    rank: int = 0
    size: int = 1
    words: Any = None
    """The group by which rank 0 speaks: always on the processor, and with its own patience."""
    roll: Any = None
    """Where tensors go by devices: the group, on the processor, by which ranks first see that all of them are there.
    A message between devices that nobody answers does not fail; it ends the process, or hangs it."""

    @classmethod
    def join(cls, rank: int, size: int, rendezvous: Path) -> World:
        """Meet the other ranks at a file on this host; each on a device of its own, or all on the processor."""
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks are of one host
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(
            backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=PATIENCE
        )
        words = torch.distributed.new_group(backend="gloo", timeout=WORD_PATIENCE)
        roll = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if backend == "nccl" else None
        return cls(rank, size, words, roll)

    @property
    def is_first(self) -> bool:
        """Whether this rank judges, keeps and speaks."""
        return self.rank == 0

    def own(self, passes: range) -> range:
        """The passes of a step that are this rank's."""
        return passes[self.rank :: self.size]

    @torch.no_grad()
    def all_sum(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all ranks into each tensor; one message."""
        self._together(tensors, lambda flat: torch.distributed.all_reduce(flat))

    @torch.no_grad()
    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Put rank 0's numbers into each tensor."""
        self._together(tensors, lambda flat: torch.distributed.broadcast(flat, 0))

    def _together(self, tensors: Sequence[Tensor], send: Any) -> None:
        if self.size == 1 or not tensors:
            return
        if self.roll is not None:
            torch.distributed.barrier(group=self.roll)
        flat = _flatten_dense_tensors(list(tensors))
        send(flat)
        for tensor, value in zip(tensors, _unflatten_dense_tensors(flat, list(tensors)), strict=True):
            tensor.copy_(value)

    def agree(self, word: Any) -> Any:
        """What rank 0 says, as JSON."""
        if self.size == 1:
            return word
        said = json.dumps(word).encode() if self.is_first else b""
        length = torch.tensor([len(said)])
        torch.distributed.broadcast(length, 0, group=self.words)
        text = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_first:
            text.copy_(torch.frombuffer(bytearray(said), dtype=torch.uint8))
        torch.distributed.broadcast(text, 0, group=self.words)
        return json.loads(bytes(text.tolist()))


SOLO = World()
