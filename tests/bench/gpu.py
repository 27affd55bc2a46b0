"""`python -m tests.bench.gpu [-o FOLDER]`: checks and measures everything that wants an accelerator, in a few minutes.

Results agree with the processor's (loss, resume, precision); a step and embedding run at the bare encoder's rate; how
fast each encoder is, with which memory, and how that scales; what the published run would take; what a step consists
of. Each row is written as it is made, and one that fails or does not fit is a row that says so. `--small` runs all of
it at tiny sizes on whatever there is: that shows that the script works, and nothing else. A device that hangs ends the
script after five minutes, with where it stood; the rows made until then are kept.
"""

from __future__ import annotations

import argparse
import datetime as dt
import faulthandler
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ml.config import Recipe, read_recipe
from ml.embed import embed, pick_device
from ml.keeping import Keeper, Silent
from ml.objectives import objective_of
from ml.pretrain import train_on
from ml.training import Training
from ml.tte_targets import TteTargets
from tests.bench import loss as loss_row
from tests.bench import median_ratio, seconds
from tests.bench.step import bare, bare_forward, training

EPOCHS, SCANS = 20, 18_945
"""The published run."""
PUBLISHED_HOURS = "864 to 1,440"
SECONDS = 90.0
"""After which no further row of an encoder begins."""
HUNG_SECONDS = 300.0
"""No row takes so long."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    encoders: tuple[str, ...]
    sides: tuple[int, ...]
    batches: tuple[int, ...]
    tasks: int
    scans: int
    full: tuple[int, ...]
    """Sizes of the volumes of the published run, as ours."""


FULL = Plan(
    ("densenet121", "swinunetr", "resnet18", "resnet50", "resnet152"), (96, 224), (1, 2, 4, 8), 8_192, 16,
    (160, 192, 192),
)  # fmt: skip
SMALL = Plan(("tiny", "densenet121"), (32,), (1, 2), 64, 4, (32, 32, 32))


class Report:
    """Rows as they come: on the screen, and in two files."""

    def __init__(self, folder: Path, device: torch.device, *, small: bool) -> None:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "processor (no accelerator)"
        self.about = {"device": name, "date": dt.date.today().isoformat(), "torch": torch.__version__, "small": small}
        self.rows: list[dict[str, Any]] = []
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{name}, torch {torch.__version__}, {self.about['date']}{', small sizes: no measurement' * small}"
        (folder / "gpu.md").write_text("")
        self.line(f"{title}\n\n| row | figure | unit |\n| --- | --- | --- |")

    def line(self, text: str) -> None:
        """On the screen and in gpu.md, at once."""
        print(text, flush=True)
        with (self.folder / "gpu.md").open("a") as file:
            file.write(f"{text}\n")

    def add(self, row: str, figure: float | str, unit: str) -> None:
        """One more."""
        self.rows.append({"row": row, "figure": figure, "unit": unit})
        shown = f"{figure:.4g}" if isinstance(figure, float) else figure
        self.line(f"| {row} | {shown} | {unit} |")
        (self.folder / "gpu.json").write_text(json.dumps({**self.about, "rows": self.rows}, indent=1))

    def run(self, row: str, work: Callable[[], Iterator[tuple[str, float | str, str]]]) -> None:
        """Add what `work` yields; where it fails, that."""
        faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
        try:
            for made in work():
                self.add(*made)
        except torch.OutOfMemoryError:
            self.add(row, "does not fit", "memory")
        except Exception as error:
            self.add(row, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
        finally:
            faulthandler.cancel_dump_traceback_later()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 where a row failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("gpu-bench"), help="folder for gpu.json, gpu.md and profile.txt"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script without an accelerator")
    asked = parser.parse_args(arguments)
    device = pick_device()
    if device.type != "cuda" and not asked.small:
        print("Expected an accelerator, found none; --small tries the script without one.", file=sys.stderr)
        return 2
    plan = SMALL if asked.small else FULL
    report = Report(asked.out, device, small=asked.small)
    report.run("check-loss", lambda: check_loss(plan, device))
    with tempfile.TemporaryDirectory() as folder:
        for name in plan.encoders:
            began = time.monotonic()
            for side in plan.sides:
                report.run(f"{name}-{side}", lambda n=name, s=side: rates(plan, n, s, Path(folder)))  # type: ignore[misc]
                if time.monotonic() - began > SECONDS:
                    break
        first = plan.encoders[-1] if asked.small else plan.encoders[0]
        report.run("check-resume", lambda: check_resume(plan, first, Path(folder)))
        report.run("scaling", lambda: scaling(plan, first, Path(folder)))
        report.run("published-run", lambda: published_run(plan, first, Path(folder)))
        report.run("profile", lambda: profile(plan, first, Path(folder), asked.out / "profile.txt"))
    return int(any(row["figure"] == "failed" for row in report.rows))


def recipe_of(name: str, shape: tuple[int, ...], batch: int) -> Recipe:
    """A recipe at some size; tiny has its own spacing."""
    settings = {"shape_zyx": ",".join(map(str, shape)), "batch": str(batch), "accumulate": "1", "epochs": "100"}
    return read_recipe(name, settings | {"probe_scans": "0"})


def synchronised(work: Callable[[], object]) -> Callable[[], None]:
    """The work, and the wait for the device."""

    def run() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def check_loss(plan: Plan, device: torch.device) -> Iterator[tuple[str, float | str, str]]:
    """The loss and its gradient on the device against the dense definition on the processor."""
    targets = TteTargets(loss_row.labels(), np.arange(loss_row.SCANS))
    objective = objective_of(Recipe(encoder="tiny"), targets, device)
    rows = np.arange(4)
    logits = torch.randn(4, len(targets.edges) - 1, targets.width) - 9
    there = logits.clone().to(device).requires_grad_()
    batch = {n: torch.from_numpy(np.ascontiguousarray(a)).to(device) for n, a in targets.batch(rows).items()}
    objective.loss(there, batch).backward()
    here = objective_of(Recipe(encoder="tiny"), targets, torch.device("cpu"))
    wanted = loss_row.dense(here, rows, logits)()  # type: ignore[arg-type]
    assert there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), wanted, rtol=1e-3, atol=1e-4)
    yield "check-loss", "ok", f"gradient of {targets.width} tasks as on the processor"


def rates(plan: Plan, name: str, side: int, folder: Path) -> Iterator[tuple[str, float | str, str]]:
    """A step and embedding against the bare encoder, volumes a second, memory, share of head and loss."""
    batch = 2
    recipe = recipe_of(name, (side,) * 3, batch)
    run, epoch = training(recipe, folder / f"{name}-{side}", scans=plan.scans, tasks=plan.tasks)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    ours = synchronised(epoch)
    ours()
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    theirs = synchronised(bare(recipe, plan.scans))
    theirs()
    ratio, took, _ = median_ratio(ours, theirs, pairs=3)
    row = f"{name}-{side}"
    yield f"step-{row}", ratio, "of the bare encoder's rate (≥ 0.95)"
    yield f"train-{row}", plan.scans / took, "volumes/s"
    if memory is not None:
        yield f"memory-{row}", memory, f"GiB at batch {batch}"
    if not all(bool(torch.isfinite(p).all()) for p in run.encoder.parameters()):
        raise ValueError("Expected finite weights after training, found others.")
    yield f"loss-share-{row}", 100 * head_seconds(run) / (took / plan.scans * batch), "% of a step (< 2)"
    items = list(range(plan.scans))
    embedding = synchronised(lambda: embed(run.encoder, recipe, run.data.volume, items))
    alone = synchronised(bare_forward(recipe, plan.scans))
    embedding(), alone()
    ratio, took, _ = median_ratio(embedding, alone, pairs=3)
    yield f"embed-{row}", ratio, "of the bare forward's rate (≥ 0.95)"
    yield f"embedded-{row}", plan.scans / took, "volumes/s"


def head_seconds(run: Training) -> float:
    """Forward and backward of head and loss alone, a batch."""
    batch = run.to_device(run.load(0))
    embedding = torch.randn(len(batch["voxels"]), run.encoder.width, device=run.device, requires_grad=True)

    def once() -> None:
        run.objective.loss(run.head(embedding), batch).backward()

    work = synchronised(once)
    work()
    return min(seconds(work) for _ in range(5))


class Until(Silent):
    """Stops after a step."""

    def __init__(self, last: int, step: int = 0) -> None:
        self.last, self.step = last, step

    def stop(self) -> bool:
        return self.step >= self.last

    def progress(self, step: int, total: int, epoch: int) -> None:
        self.step = step


def check_resume(plan: Plan, name: str, folder: Path) -> Iterator[tuple[str, float | str, str]]:
    """Weights after a stop and a resume beside those of one run; they differ by no more than two runs do.

    On the processor no two differ. On an accelerator sums are taken in an order that chance decides.
    """
    recipe = recipe_of(name, (plan.sides[0],) * 3, 2)

    def started() -> Training:
        run, _ = training(recipe, folder / f"{name}-{plan.sides[0]}", scans=plan.scans, tasks=plan.tasks)
        return run

    whole, other, part = started(), started(), started()
    for run, steps in ((whole, 4), (other, 4), (part, 2)):
        watch = Until(steps)
        train_on(run, Keeper(run, folder / "stops", {}, watch), watch)
    part.save(folder / "stop.safetensors", {})
    again = started()
    again.resume(folder / "stop.safetensors")
    watch = Until(4, step=2)
    train_on(again, Keeper(again, folder / "stops", {}, watch), watch)
    chance, far = apart(whole, other), apart(whole, again)
    yield "check-chance", chance, "largest difference of a weight between two runs of four steps"
    yield "check-resume", far, "the same, of four steps at once and in two (at most three times as much)"
    if far > 3 * chance:
        raise ValueError(f"Expected a resumed run to end as an uninterrupted one does, its weights differ by {far:g}.")


def apart(one: Training, other: Training) -> float:
    """The largest difference of a weight."""
    pairs = zip(one.named.values(), other.named.values(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def scaling(plan: Plan, name: str, folder: Path) -> Iterator[tuple[str, float | str, str]]:
    """Volumes a second by batch."""
    for batch in plan.batches:
        recipe = recipe_of(name, (plan.sides[0],) * 3, batch)
        _, epoch = training(recipe, folder / f"{name}-{plan.sides[0]}", scans=plan.scans, tasks=plan.tasks)
        work = synchronised(epoch)
        work()
        yield f"train-{name}-{plan.sides[0]}-batch-{batch}", plan.scans / seconds(work), "volumes/s"


def published_run(plan: Plan, name: str, folder: Path) -> Iterator[tuple[str, float | str, str]]:
    """Hours of the published run at our volumes' size."""
    recipe = recipe_of(name, plan.full, 2)
    _, epoch = training(recipe, folder / f"{name}-full", scans=plan.scans, tasks=plan.tasks)
    work = synchronised(epoch)
    work()
    rate = plan.scans / min(seconds(work) for _ in range(2))
    yield f"train-{name}-full", rate, f"volumes/s of {'×'.join(map(str, plan.full))}"
    hours = EPOCHS * SCANS / rate / 3600
    yield "published-run", hours, f"hours of {EPOCHS} × {SCANS:,} scans (≤ 24; published: {PUBLISHED_HOURS})"


def profile(plan: Plan, name: str, folder: Path, file: Path) -> Iterator[tuple[str, float | str, str]]:
    """What a step consists of."""
    recipe = recipe_of(name, (plan.sides[0],) * 3, 2)
    _, epoch = training(recipe, folder / f"{name}-{plan.sides[0]}", scans=plan.scans, tasks=plan.tasks)
    epoch()
    with torch.profiler.profile() as found:
        synchronised(epoch)()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    file.write_text(found.key_averages().table(sort_by=order, row_limit=25))
    yield "profile", "ok", str(file)


if __name__ == "__main__":
    sys.exit(main())
