"""The other ranks of a training: forks of the job's process, which hold its labels and volumes already.

Forked before anything touches a device or starts threads of torch. They die with the job's process, hear nothing but
rank 0 and write nothing to the store; where one ends before its time, the attempt fails, and the next one goes on from
the last stop.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import InputError, RankEnded
from workers.supervisor import die_with_parent

if TYPE_CHECKING:
    from ml.parallel import World

GRACE_SECONDS = 20.0
"""For ranks to end by themselves after rank 0 has."""


def check_devices(count: int) -> int:
    """Devices of this process. Raises InputError where there are some, but fewer than asked for."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks the driver without touching it: forks would inherit that
    import torch

    found = torch.cuda.device_count()
    if 0 < found < count:
        raise InputError(f"Expected {count} devices for --gpus {count}, found {found} on this host; ask for as many.")
    return found


@contextmanager
def ranks(count: int, folder: Path, follow: Callable[[World], object]) -> Iterator[World]:
    """Rank 0 of `count`, while the others, forks of this process, run `follow`.

    Raises:
        RankEnded: one of them failed or was killed.
    """
    import torch

    from ml.parallel import SOLO, World

    if count == 1:
        yield SOLO
        return
    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = folder / f"rendezvous-{uuid.uuid4().hex}"
    children = {_fork(rank, count, rendezvous, follow): rank for rank in range(1, count)}
    try:
        yield World.join(0, count, rendezvous)
    except RuntimeError as error:
        ended = "" if isinstance(error, torch.OutOfMemoryError) else _ended(children) or _unheard(error)
        if not ended:
            raise
        raise RankEnded(f"{ended}; the training goes on from its last stop.") from error
    finally:
        with suppress(Exception):
            torch.distributed.destroy_process_group()
        _end(children)
        rendezvous.unlink(missing_ok=True)


def _fork(rank: int, count: int, rendezvous: Path, follow: Callable[[World], object]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent(parent)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 is told, and tells
        from ml.parallel import World

        follow(World.join(rank, count, rendezvous))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(children: dict[int, int]) -> str:
    """Which rank failed, in words; empty where none did."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        for rank, code in _reap(children):
            if code:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
                return f"Rank {rank} {how}"
        time.sleep(0.05)
    return ""


def _unheard(error: RuntimeError) -> str:
    """Whether a rank that lives did not answer in time, in words; empty where something else went wrong."""
    from ml.parallel import PATIENCE

    told = "timed out" in str(error).lower() or "timeout" in str(error).lower()
    return f"A rank did not answer for {PATIENCE.total_seconds():g} s" if told else ""


def _end(children: dict[int, int]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while children:
        _reap(children)
        if time.monotonic() > deadline:
            for pid in children:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _reap(children: dict[int, int]) -> list[tuple[int, int]]:
    """(rank, exit code) of those that have ended by now; they are taken out."""
    ended = []
    for pid, rank in list(children.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del children[pid]
            ended.append((rank, os.waitstatus_to_exitcode(status)))
    return ended
