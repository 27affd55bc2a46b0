"""Attempts at a training that get into trouble: `python -m tests.workers.dying` forks one for each line it reads.

One that is killed dies at a moment: an audited call of the interpreter (open, rename, remove, copy) or a commit, so
that the code under test has no seam for it. In the middle of a write the kernel itself ends the process, by a limit of
the size of files.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Engine, event
from torch import Tensor

from app.settings import Settings
from app.store import attempts, jobs
from app.store.session import make_engine
from ml import keeping, parallel, training
from ml.training import Training
from workers import ranks
from workers.attempt import JobWork, execute
from workers.board import Board

WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile")
WRITING = os.O_WRONLY | os.O_RDWR


class Moments:
    """Counts moments from the first stop of `step` on; dies at the one that is asked for."""

    def __init__(self, home: Path, step: int, at: int | None, *, halfway: bool) -> None:
        self.home, self.step, self.at, self.halfway = str(home), step, at, halfway
        self.seen: list[str] = []
        self.started = False

    def watch(self, engine: Engine) -> None:
        """Begin to look at what this process does."""
        event.listen(engine, "commit", lambda connection: self.note("commit"))
        sys.addaudithook(self.hear)

    def hear(self, name: str, args: tuple[Any, ...]) -> None:
        """An audited call is about to be made."""
        if name not in WATCHED or not isinstance(args[0], (str, os.PathLike)):
            return
        path = str(args[0])
        reads = name == "open" and not (args[2] or 0) & WRITING and Path(path).suffix
        if not path.startswith(self.home) or reads or "/cache/" in path:
            return
        if name == "os.mkdir" and not self.started:
            return
        self.started = self.started or f"step-{self.step}.safetensors" in path
        self.note(f"{name} {self.kind(path)}")

    def kind(self, path: str) -> str:
        """What a path is, without its numbers."""
        place = path.removeprefix(self.home).split("/")[1]
        last = Path(path).name
        suffix = next((s for s in ("safetensors", "log") if s in last), "folder")
        return f"{place}/{'part' if last.startswith('.') else suffix}"

    def note(self, what: str) -> None:
        """One moment more."""
        if not self.started:
            return
        self.seen.append(what)
        if self.at == len(self.seen) - 1:
            if not self.halfway:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def attempt(told: dict[str, Any]) -> None:
    """Claim the job and work at it until it ends or this process does."""
    home = Path(told["home"])
    engine = make_engine(told["url"])
    with engine.begin() as connection:
        attempts.register_worker(connection, "w", host="h", pid=1, queues=["gpu"], version="0", device=None)
        claim = jobs.claim(
            connection, worker_id="w", host="h", pid=os.getpid(), version="0", lease=60.0, job_id=told["job"]
        )
    assert claim is not None
    if told["every_step"]:
        keeping.KEEP_SECONDS = keeping.KEEP_TIMES = 0.0
    settings = Settings(home=home, home_is_named=True)
    if told["trouble"]:
        TROUBLES[told["trouble"]](home)
    work = JobWork(claim, database_url=told["url"], settings=settings, board=Board())
    moments = Moments(home, told["step"], told["at"], halfway=told["halfway"])
    moments.watch(work.engine)
    execute(work)
    Path(told["answer"]).write_text(json.dumps(moments.seen))


AT_STEP = 4


def _on_rank_1(trouble: Callable[[], object]) -> None:
    """Have it happen in the other rank's forward pass of one step."""
    honest = Training.embedding

    def embedding(run: Training, batch: Mapping[str, Tensor]) -> Tensor:
        if run.world.rank == 1 and run.step == AT_STEP:
            trouble()
        return honest(run, batch)

    Training.embedding = embedding  # type: ignore[assignment, method-assign]


def hang() -> None:
    """Rank 1 is stopped, and not waited for as long as otherwise."""
    parallel.PATIENCE = dt.timedelta(seconds=10)
    ranks.GRACE_SECONDS = 1.0
    _on_rank_1(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def diverge() -> None:
    """Steps in a row are not finite, until the training has gone back."""
    honest = Training.embedding

    def embedding(run: Training, batch: Mapping[str, Tensor]) -> Tensor:
        made = honest(run, batch)
        return made * float("nan") if made.requires_grad and run.turn == 0 and run.step in range(8, 12) else made

    training.RETREAT_STEPS = 6
    Training.embedding = embedding  # type: ignore[assignment, method-assign]


def no_shm() -> None:
    """Fail in the words in which NCCL does."""
    raise RuntimeError(
        "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled system error\n"
        "Last error:\nError while creating shared memory segment /dev/shm/nccl-3Y4Kmh (size 9637888)"
    )


def cut_volumes(home: Path) -> None:
    """All cached volumes lose half of what they hold, or are gone, in the middle of the run."""
    honest = Training.load

    def load(run: Training, micro: int) -> dict[str, Tensor]:
        if micro == AT_STEP * run.passes_per_step:
            for place, file in enumerate(sorted(home.rglob("cache/*/*.npy"))):
                os.truncate(file, file.stat().st_size // 2) if place % 2 else file.unlink()
        return honest(run, micro)

    Training.load = load  # type: ignore[method-assign]


def lose_prefetch() -> None:
    """The thread that reads ahead dies."""
    honest = Training.load

    def load(run: Training, micro: int) -> dict[str, Tensor]:
        if micro == AT_STEP * run.passes_per_step:
            raise SystemExit
        return honest(run, micro)

    Training.load = load  # type: ignore[method-assign]


TROUBLES: dict[str, Callable[[Path], None]] = {
    "hang": lambda home: hang(),
    "no memory": lambda home: _on_rank_1(lambda: torch.empty(1 << 50)),
    "other error": lambda home: _on_rank_1(lambda: Path("/nowhere").read_text()),
    "diverges": lambda home: diverge(),
    "no shm": lambda home: _on_rank_1(no_shm),
    "cut volumes": cut_volumes,
    "lost prefetch": lambda home: lose_prefetch(),
}


def fork(work: Callable[[], None]) -> int:
    """Do it in a process of its own; how that ended, as `Popen.returncode`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    """Read what is asked for, a line each, and say how the attempt ended."""
    for line in sys.stdin:
        print(fork(lambda: attempt(json.loads(line))), flush=True)  # noqa: B023


if __name__ == "__main__":
    main()
