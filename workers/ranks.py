"""The other ranks of a training: forks of the job's process, which hold its labels and volumes already.

Forked before anything touches a device or starts threads of torch. They die with the job's process, hear nothing but
rank 0 and write nothing to the store; where one ends before its time, the attempt fails, and the next one goes on from
the last stop. What failed in it reaches rank 0 through a pipe, as class and first line.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import InputError, RankEnded
from workers.supervisor import die_with_parent

if TYPE_CHECKING:
    from ml.parallel import World

GRACE_SECONDS = 20.0
"""For ranks to end by themselves after rank 0 has."""
LONGEST_WORD = 2_000
"""Bytes of an error that a rank passes on; a pipe holds more, so that nobody waits for a reader."""


@dataclass(frozen=True, slots=True)
class Child:
    """Another rank."""

    rank: int
    words: int
    """Where its error can be read once it has ended."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A rank that ended before its time."""

    rank: int
    code: int
    said: str
    """Class and first line of its error; empty where it was killed."""
    lacked: str
    """`memory` or `shm`, where it had too little of that, as the next attempt would have, too."""

    def __str__(self) -> str:
        if self.code < 0:
            return f"Rank {self.rank} was ended by {signal.Signals(-self.code).name}"
        return f"Rank {self.rank} failed ({self.said or f'code {self.code}'})"


def lacking(error: BaseException) -> str:
    """What there was too little of: `memory` of a device or the host, or room in `shm`; empty for other errors."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return "memory"
    return "shm" if "/dev/shm/nccl" in str(error) else ""  # noqa: S108 - where devices put their messages


def check_devices(count: int) -> int:
    """Devices of this process. Raises InputError where there are some, but fewer than asked for."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asks the driver without touching it: forks would inherit that
    import torch

    found = torch.cuda.device_count()
    if 0 < found < count:
        raise InputError(
            f"Expected {count} devices for --gpus {count}, CUDA shows {found} to this job; ask for as many, or name "
            "them by UUID in LACHESIS_DEVICES where the worker starts."
        )
    return found


@contextmanager
def ranks(count: int, folder: Path, follow: Callable[[World], object]) -> Iterator[World]:
    """Rank 0 of `count`, while the others, forks of this process, run `follow`.

    Raises:
        RankEnded: one of them failed or was killed.
        MemoryError: one of them had too little memory.
        InputError: devices had no room for their messages.
    """
    from ml.parallel import SOLO, World

    if count == 1:
        yield SOLO
        return
    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = folder / f"rendezvous-{uuid.uuid4().hex}"
    children: dict[int, Child] = {}
    finished = False
    try:
        for rank in range(1, count):
            children |= _fork(rank, count, rendezvous, follow)
        yield World.join(0, count, rendezvous)
        finished = True
    except RuntimeError as error:
        lacked = lacking(error)
        ended = None if lacked else _first_ended(children)
        if ended is not None and ended.lacked == "memory":
            raise MemoryError(f"rank {ended.rank}: {ended.said}") from error
        if "shm" in (lacked, ended.lacked if ended is not None else ""):
            raise no_shm() from None
        what = str(ended) if ended is not None else _unheard(error)
        if not what:
            raise
        raise RankEnded(f"{what}; the training goes on from its last stop.") from error
    finally:
        if not finished:  # those who are left wait for somebody who may be gone
            _kill(children)
        _leave()
        _end(children)
        rendezvous.unlink(missing_ok=True)


def _fork(rank: int, count: int, rendezvous: Path, follow: Callable[[World], object]) -> dict[int, Child]:
    """Start a rank; its process and what is known of it."""
    parent = os.getpid()
    words, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        return {pid: Child(rank, words)}
    code = 1
    try:
        die_with_parent(parent)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 is told, and tells
        from ml.parallel import World

        follow(World.join(rank, count, rendezvous))
        code = 0
    except BaseException as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or ["no message"])[0]
        os.write(tell, f"{lacking(error)}\n{type(error).__name__}: {first}".encode()[:LONGEST_WORD])
    finally:
        os._exit(code)


def _first_ended(children: dict[int, Child]) -> Ended | None:
    """The rank that failed, if one did: rather one that was killed or had no memory than those that missed it."""
    failed: list[Ended] = []
    deadline = time.monotonic() + 2.0
    while children and time.monotonic() < deadline:
        found = [one for one in _reap(children) if one.code]
        if found and not failed:
            deadline = min(deadline, time.monotonic() + 0.5)
        failed += found
        time.sleep(0.05)
    return min(failed, key=lambda one: (one.code > 0, not one.lacked), default=None)


def no_shm() -> InputError:
    """What to do where /dev/shm has no room for what devices tell each other, as in many containers."""
    try:
        status = os.statvfs("/dev/shm")  # noqa: S108
        there = f"{status.f_bavail * status.f_frsize / 1e6:,.0f} MB"
    except OSError:
        there = "none at all"
    return InputError(
        f"Expected room in /dev/shm for what devices tell each other, found {there}; give the container more "
        "(`docker run --shm-size=1g` or `--ipc=host`), or use --gpus 1."
    )


def _unheard(error: RuntimeError) -> str:
    """Whether a rank that lives did not answer in time, in words; empty where something else went wrong."""
    from ml.parallel import PATIENCE

    told = "timed out" in str(error).lower() or "timeout" in str(error).lower()
    return f"A rank did not answer for {PATIENCE.total_seconds():g} s" if told else ""


def _leave() -> None:
    """Leave the group; in a thread, for a group of devices with a message that nobody answers may never let go."""
    import torch

    def leave() -> None:
        with suppress(Exception):
            torch.distributed.destroy_process_group()

    if torch.distributed.is_initialized():
        thread = threading.Thread(target=leave, daemon=True)
        thread.start()
        thread.join(GRACE_SECONDS)


def _end(children: dict[int, Child]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while children:
        _reap(children)
        if time.monotonic() > deadline:
            _kill(children)
        time.sleep(0.02)


def _kill(children: dict[int, Child]) -> None:
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _reap(children: dict[int, Child]) -> list[Ended]:
    """Those that have ended by now; they are taken out."""
    ended = []
    for pid, child in list(children.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del children[pid]
            lacked, _, said = os.read(child.words, LONGEST_WORD).decode(errors="replace").partition("\n")
            os.close(child.words)
            ended.append(Ended(child.rank, os.waitstatus_to_exitcode(status), said, lacked))
    return ended
