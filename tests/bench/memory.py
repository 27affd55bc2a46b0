"""`python -m tests.bench.memory SCAN [case …]`: memory and time of a training step on a real scan, a case a process.

SCAN is a NIfTI file or a DICOM series' folder. Each case is a child process with a cap on its address space, so that
one that does not fit is a row that says so. A row: case, volumes a pass, processor seconds and seconds a step (after a
first one where it is not the only one), greatest resident memory, that above what the process held before the step, and
the share of head and loss in the step.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

TASKS = 8_192
CAP_BYTES = 16 << 30
CASES: dict[str, tuple[str, dict[str, str], tuple[int, ...], int]] = {
    "densenet121 96³": ("densenet121", {"shape_zyx": "96,96,96"}, (1, 2, 4), 3),
    "densenet121 96³, recompute": ("densenet121", {"shape_zyx": "96,96,96", "recompute": "true"}, (1, 2, 4), 3),
    "swinunetr 64³": ("swinunetr", {"shape_zyx": "64,64,64"}, (1, 2, 4), 3),
    "swinunetr 64³, recompute": ("swinunetr", {"shape_zyx": "64,64,64", "recompute": "true"}, (1, 2, 4), 3),
    "densenet121, paper 224³, recompute": ("densenet121", {"recipe": "paper", "recompute": "true"}, (1,), 1),
    "densenet121, paper_lung, recompute": (
        *("densenet121", {"recipe": "paper_lung", "crop": "lung", "recompute": "true"}, (1,)),
        1,
    ),
    "densenet121, paper 224³": ("densenet121", {"recipe": "paper"}, (1,), 1),
}
"""Name → encoder, settings, volumes a pass, steps."""
GIB = 1 << 30


def main(scan: str, only: list[str]) -> None:
    """Run the cases whose names begin with one of `only`, or all."""
    print("case\tvolumes\tCPU s/step\ts/step\tpeak GiB\tstep GiB\thead and loss")
    for name, (_, _, batches, _) in CASES.items():
        if only and not any(name.startswith(one) for one in only):
            continue
        for batch in batches:
            run = [sys.executable, "-m", "tests.bench.memory", "--child", scan, name, str(batch)]
            done = subprocess.run(run, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["killed"])[-1]
                print(f"{name}\t{batch}\tdoes not run within {CAP_BYTES / GIB:.0f} GiB: {last[:100]}", flush=True)
                continue
            made = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}\t{batch}\t{made['cpu']:.2f}\t{made['seconds']:.2f}\t{made['peak']:.2f}\t{made['step']:.2f}\t{made['head']:.2%}",
                flush=True,
            )


def child(scan: Path, name: str, batch: int) -> dict[str, float]:
    """Measure one case in this process."""
    resource.setrlimit(resource.RLIMIT_AS, (CAP_BYTES, CAP_BYTES))
    import statistics

    import torch

    from ml.data import prefetch
    from ml.pretrain import take_step
    from ml.volume_cache import cores
    from tests.bench.gpu import head_seconds

    torch.set_num_threads(cores())
    _, _, _, steps = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        run = _training(scan, name, batch, Path(folder))
        run.train()
        before = _peak()
        passes = range(steps * run.passes_per_step)
        with closing(prefetch(run.load, passes)) as batches:
            took = [_timed(lambda: take_step(run, batches, 1e-4)) for _ in range(steps)]
        peak = _peak()
        taken, cpu = (statistics.median(one) for one in zip(*(took[1:] or took), strict=True))
        return {"seconds": taken, "cpu": cpu, "peak": peak, "step": peak - before, "head": head_seconds(run) / taken}


def _training(scan: Path, name: str, batch: int, folder: Path) -> Any:
    """A training on the one scan, as many times as its steps ask for."""
    import numpy as np

    from ml.config import read_recipe
    from ml.training import Data, Training
    from ml.tte_targets import TteTargets
    from ml.volume_cache import Cached, Source, VolumeCache, volume_recipe
    from tests.ml.arrays import exponential_labels

    encoder, settings, _, _ = CASES[name]
    recipe = read_recipe(encoder, {**settings, "batch": str(batch), "accumulate": "1", "epochs": "100"})
    cache = VolumeCache(folder / "cache", volume_recipe(recipe))
    source = Source(scan, "dicom" if scan.is_dir() else "nifti")
    cached = cache.prepare([source])[source]
    if not isinstance(cached, Cached):
        raise SystemExit(f"Expected a scan that can be read: {cached}")
    rows = np.arange(batch)
    targets = TteTargets(exponential_labels(max(batch, 8), TASKS), np.arange(max(batch, 8)))
    read = lambda row, out=None: cache.read(cached, out)  # noqa: E731
    return Training(recipe, Data(volume=read, train=rows, tuning=rows[:0], targets=targets), seed=0)


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of all processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _peak() -> float:
    """Greatest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        print(json.dumps(child(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
    else:
        main(sys.argv[1], sys.argv[2:])
