"""Child processes that decode scans: many at a time, each capped, and none of them able to take the work down."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar, cast

K = TypeVar("K")
TICK_SECONDS = 0.5
KEPT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
"""What of the environment the children see: no password."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one scan may cost."""

    memory_bytes: int = 8 << 30
    """Address space of a child; its libraries map half a gigabyte of it."""
    cpu_seconds: int = 600
    wall_seconds: float = 900.0


class _Child(Generic[K]):
    """One process that decodes scan after scan."""

    def __init__(self, module: str, limits: Limits) -> None:
        environment = {key: value for key in KEPT if (value := os.environ.get(key))}
        limit = [str(limits.memory_bytes), str(limits.cpu_seconds), str(os.getpid())]
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *limit],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries quote values there
            env=environment | ONE_THREAD,
        )
        self.stdout = cast("IO[bytes]", self.process.stdout)
        self.rest, self.is_ready = b"", False
        self.key: K | None = None
        self.until = 0.0

    def begin(self, key: K, request: Answer, until: float) -> None:
        self.key, self.until = key, until
        stdin = cast("IO[bytes]", self.process.stdin)
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except OSError:  # it has died, as reading will show
            return

    def read(self) -> Answer | None:
        """The answer, once it is whole. Raises EOFError where the child has died."""
        part = os.read(self.stdout.fileno(), 1 << 16)
        if not part:
            raise EOFError
        *lines, self.rest = (self.rest + part).split(b"\n")
        for line in lines:
            if self.is_ready:
                found: Answer = json.loads(line)
                return found
            self.is_ready = True
        return None

    def end(self) -> int:
        """Kill it; how it ended, as `Popen.returncode`."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                cast("IO[bytes]", stream).close()
            except OSError:
                continue
        return self.process.wait()


class DecodingPool(Generic[K]):
    """Children that decode; a context manager, for they are processes.

    Args:
        children: how many at the most.
        limits: of one scan.
        ended: called with the id of a child that was ended or died in the middle of a scan.
        module: what the children run.
    """

    def __init__(
        self,
        children: int,
        limits: Limits,
        ended: Callable[[int], None] = lambda process: None,
        module: str = "ml.decoding_child",
    ) -> None:
        self.children, self.limits, self.ended, self.module = children, limits, ended, module
        self.idle: list[_Child[K]] = []
        self.busy: list[_Child[K]] = []

    def __enter__(self) -> DecodingPool[K]:
        return self

    def __exit__(self, *error: object) -> None:
        for child in (*self.idle, *self.busy):
            child.end()
        for child in self.busy:
            self.ended(child.process.pid)

    def run(
        self, requests: Iterable[tuple[K, Answer]], tick: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[K, Answer]]:
        """(key, answer) as they come; a child that dies or takes too long answers `why`, and `again` if it died.

        Args:
            requests: keys and what a child is asked.
            tick: called twice a second or more; what it raises ends the work.

        Raises:
            RuntimeError: children end before they are ready.
        """
        waiting = deque(requests)
        while waiting or self.busy:
            while waiting and len(self.busy) < self.children:
                child = self.idle.pop() if self.idle else _Child[K](self.module, self.limits)
                self.busy.append(child)
                child.begin(*waiting.popleft(), time.monotonic() + self.limits.wall_seconds)
            for child in self._heard():
                answer = self._answer(child)
                if answer is not None:
                    yield cast("K", child.key), answer
            tick()

    def _heard(self) -> list[_Child[K]]:
        """Children that say something or are out of time; waits for them, but no longer than a tick."""
        now = time.monotonic()
        wait = min([TICK_SECONDS, *(max(0.0, child.until - now) for child in self.busy)])
        with selectors.DefaultSelector() as selector:
            for child in self.busy:
                selector.register(child.stdout, selectors.EVENT_READ, child)
            heard: list[_Child[K]] = [key.data for key, _ in selector.select(wait)]
        now = time.monotonic()
        return heard + [child for child in self.busy if child.until <= now and child not in heard]

    def _answer(self, child: _Child[K]) -> Answer | None:
        if child.until <= time.monotonic():
            self._bury(child)
            seconds = f"{self.limits.wall_seconds:g}"
            return {"why": f"Expected a scan that is decoded within {seconds} s, got one that took longer."}
        try:
            answer = child.read()
        except EOFError:
            return self._why(child, self._bury(child))
        if answer is not None:
            self.busy.remove(child)
            self.idle.append(child)
        return answer

    def _why(self, child: _Child[K], code: int) -> Answer:
        if not child.is_ready:
            raise RuntimeError(f"Expected a decoder to start, it ended with {code}; is there too little memory?")
        if code == -signal.SIGXCPU:
            seconds = self.limits.cpu_seconds
            return {"why": f"Expected a scan that is decoded within {seconds} s of CPU time, got one that took more."}
        return {"why": "Expected a readable volume; its decoder crashed.", "again": True}

    def _bury(self, child: _Child[K]) -> int:
        self.busy.remove(child)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may have ended by itself, by a signal that tells why
            child.process.wait(0.2 if child.until > time.monotonic() else 0)
        code = child.end()
        self.ended(child.process.pid)
        return code
