"""Headers read by child processes: many at a time, and none of them able to take the load down.

A file whose reading kills a child, or takes too long, costs that file alone: its batch is read again one by one.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import IO, Any, cast

BATCH = 64
BATCH_SECONDS, FILE_SECONDS = 60.0, 30.0
"""How long a batch may take, and a file by itself."""
CRASHED, TIMEOUT = "header_crashed", "header_timeout"
KEPT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
"""What of the environment the children see: no password."""

Job = tuple[Any, str, str]
"""Key, format (nifti or dicom), path."""


class _Died(Exception):
    """A child ended, or was ended because it took too long; its argument is the rule for its file."""


class _Child:
    """One process that answers lines."""

    def __init__(self, module: str) -> None:
        environment = {key: value for key in KEPT if (value := os.environ.get(key))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries quote values there
            env=environment | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        self.rest = b""

    def ask(self, wanted: list[tuple[str, str]], limit: float) -> list[Any]:
        """Answers to [format, path], in order.

        Raises:
            _Died: it did, or had to.
        """
        until = time.monotonic() + limit
        stdin, stdout = cast("IO[bytes]", self.process.stdin), cast("IO[bytes]", self.process.stdout)
        try:
            stdin.write(json.dumps(wanted).encode() + b"\n")
            stdin.flush()
        except OSError:
            raise _Died(CRASHED) from None
        parts = [self.rest]
        while b"\n" not in parts[-1]:
            if not select.select([stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise _Died(TIMEOUT)
            part = os.read(stdout.fileno(), 1 << 20)
            if not part:
                raise _Died(CRASHED)
            parts.append(part)
        answer, _, self.rest = b"".join(parts).partition(b"\n")
        found: list[Any] = json.loads(answer)
        return found

    def end(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                try:
                    stream.close()
                except OSError:
                    continue
        self.process.wait()


class HeaderPool:
    """Children that read headers; a context manager, for they are processes.

    Args:
        children: how many; by default one a processor, but two at least, for they also wait for disks.
        batch_seconds: limit of a batch.
        file_seconds: limit of one file, once its batch has failed.
        module: what the children run.
    """

    def __init__(
        self,
        children: int = 0,
        *,
        batch_seconds: float = BATCH_SECONDS,
        file_seconds: float = FILE_SECONDS,
        module: str = "app.loading.images_child",
    ) -> None:
        self.children = children or max(2, min(len(os.sched_getaffinity(0)), 16))
        self.limits = batch_seconds, file_seconds
        self.module = module
        self.idle: list[_Child] = []
        self.busy: set[_Child] = set()
        self.lock = threading.Lock()
        self.threads = ThreadPoolExecutor(self.children, "headers")

    def __enter__(self) -> HeaderPool:
        return self

    def __exit__(self, *error: object) -> None:
        with self.lock:
            every = [*self.idle, *self.busy]
        for child in every:
            child.end()
        self.threads.shutdown(wait=True, cancel_futures=True)

    def read(self, jobs: Iterable[Job]) -> Iterator[tuple[Any, Any]]:
        """(key, what `images_child.read_one` gives, or header_crashed or header_timeout), in the order of `jobs`,
        which is read a few batches ahead."""
        rest = iter(jobs)
        ahead: deque[tuple[list[Job], Future[list[Any]]]] = deque()
        while True:
            while len(ahead) < 3 * self.children and (batch := list(islice(rest, BATCH))):
                ahead.append((batch, self.threads.submit(self._read_batch, [(f, p) for _, f, p in batch])))
            if not ahead:
                return
            batch, future = ahead.popleft()
            for (key, _, _), answer in zip(batch, future.result(), strict=True):
                yield key, answer

    def _read_batch(self, wanted: list[tuple[str, str]]) -> list[Any]:
        batch_seconds, file_seconds = self.limits
        try:
            return self._ask(wanted, batch_seconds)
        except _Died:
            return [self._read_alone(one, file_seconds) for one in wanted]

    def _read_alone(self, wanted: tuple[str, str], limit: float) -> Any:
        try:
            return self._ask([wanted], limit)[0]
        except _Died as death:
            return str(death)

    def _ask(self, wanted: list[tuple[str, str]], limit: float) -> list[Any]:
        with self.lock:
            child = self.idle.pop() if self.idle else _Child(self.module)
            self.busy.add(child)
        try:
            answer = child.ask(wanted, limit)
        except _Died:
            child.end()
            with self.lock:
                self.busy.discard(child)
            raise
        with self.lock:
            self.busy.discard(child)
            self.idle.append(child)
        return answer
