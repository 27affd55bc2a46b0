"""The training loop, on one page. It knows volumes, targets and a recipe; its news is its observer's concern."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ml import checkpoint
from ml.config import Recipe
from ml.data import prefetch, threads_for
from ml.embed import embed, statistics, to_input
from ml.keeping import Diverged, Keeper, Kept, Observer, Result
from ml.normalisation import reestimate_statistics
from ml.parallel import SOLO, World
from ml.schedules import learning_rate
from ml.training import CALIBRATION, STATISTICS, Data, Training, own_facts, start_encoder

PATIENCE = 3
"""Steps in a row that may be skipped because a number is not finite."""
POINTS = 200
"""Points of a train loss curve, about."""


def pretrain(
    recipe: Recipe,
    data: Data,
    *,
    seed: int,
    folder: Path,
    observer: Observer,
    facts: Mapping[str, Any],
    weights: Path | None = None,
    kept: Kept | None = None,
    world: World = SOLO,
) -> Result:
    """Train an encoder and its head by AdamW, from the null model on, to the last epoch or the observer's word.

    Args:
        recipe: complete settings.
        data: volumes, rows and targets; the arm is the kind of its targets.
        seed: of weights, order and augmentation. Equal inputs give equal weights on a processor.
        folder: where checkpoints are written.
        observer: who watches.
        facts: kept in the checkpoint's header.
        weights: to start from, instead of random ones.
        kept: stops on the way of this very training, to go on from the last.
        world: which of several ranks this is; the observer of rank 0 alone is asked and told.

    Raises:
        ValueError: weights or a stop that do not fit.
        Diverged: numbers that are not finite, also after going back to a stop.
    """
    torch.set_num_threads(max(1, threads_for(recipe) // world.size))
    run = Training(recipe, data, seed, weights, world)
    if kept is not None and kept.last is not None:
        run.resume(kept.last, extends=kept.begins)
        run.follow()
    else:
        run.start()
        run.note_epoch()
    keeper = Keeper(run, folder, facts, observer, kept)
    while not run.is_over:
        try:
            if not train_on(run, keeper, observer):
                return keeper.hand_back()
        except Diverged as error:
            keeper.go_back(error)
    return keeper.finish()


def train_on(run: Training, keeper: Keeper, observer: Observer) -> bool:
    """Take step after step to the end of the run; False where the observer says to stop."""
    meter = _Meter(run, observer)
    run.train()
    with closing(prefetch(run.load, run.passes_from(run.step))) as batches:
        while not run.is_over:
            stop, due = run.world.agree([run.world.is_first and observer.stop(), keeper.is_due])
            if stop:
                return False
            if due:
                keeper.keep()
            rate = learning_rate(run.recipe, run.step, run.num_steps, run.plateau.scale)
            meter.note(take_step(run, batches, rate), rate)
            if run.step % run.steps_per_epoch == 0:
                values = run.note_epoch()
                meter.note_epoch(values)
                before = replace(run.selection)
                if run.selection.note(run.epoch, values) and not keeper.keep(is_best=True):
                    run.selection = replace(before, last_epoch=run.epoch)  # a best that is not kept is none
            if run.world.is_first:
                observer.progress(run.step, run.num_steps, run.epoch)
    return True


def take_step(run: Training, batches: Iterator[dict[str, Tensor]], rate: float) -> float:
    """Forward and backward over the scans of one step, and the optimiser; what was lost beyond the null model."""
    loss, null = torch.zeros(2, device=run.device).unbind()
    running = run.running
    before = [buffer.clone() for buffer in running]
    for _ in range(run.passes):
        batch = run.to_device(next(batches))
        output = run.output(batch)
        part = run.objective.loss(output, batch) / run.volumes_per_step
        part.backward()
        with torch.no_grad():
            loss, null = loss + part.detach(), null + run.objective.null_loss(batch) / run.volumes_per_step
    run.sum_up(loss, null)
    if not _update(run, rate, float(loss)) and running:
        torch._foreach_copy_(running, before)  # a step that is skipped leaves nothing of what is not finite
    run.share_statistics()
    return float(loss - null)


def _update(run: Training, rate: float, loss: float) -> bool:
    """One optimiser step; False: skipped as loss or gradient are not finite. Raises Diverged after some in a row."""
    clip = run.recipe.clip_norm or math.inf
    norm = float(nn.utils.clip_grad_norm_(run.named.values(), clip))
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    if is_finite:
        for group in run.optimiser.param_groups:
            group["lr"] = rate
        run.optimiser.step()
        run.note_step(loss)
        run.skipped = 0
    else:
        run.skipped += 1
        if run.skipped > PATIENCE:
            raise Diverged(run, loss, norm)
    run.optimiser.zero_grad(set_to_none=True)
    run.step += 1
    return is_finite


class _Meter:
    """Turns losses of steps into points of curves.

    A batch with many events loses much under any model. So the train loss is told as what the model lost beyond the
    null model on the same scans, plus what the null model loses over the whole train split: the same mean, less noise.
    """

    def __init__(self, run: Training, observer: Observer) -> None:
        self.run, self.observer = run, observer
        self.every = max(1, run.num_steps // POINTS)
        self.since, self.from_step = time.monotonic(), run.step

    def note(self, excess: float, rate: float) -> None:
        run = self.run
        if math.isfinite(excess):
            run.excess_sum, run.excess_count = run.excess_sum + excess, run.excess_count + 1
        if run.step % self.every == 0 and run.excess_count:
            speed = (run.step - self.from_step) * run.volumes_per_step / (time.monotonic() - self.since)
            loss = run.data.targets.null_loss + run.excess_sum / run.excess_count
            values = {"train_loss": loss, "learning_rate": rate, "volumes_per_second": speed}
            self.observer.curve(run.step, run.epoch, values)
            run.excess_sum, run.excess_count = 0.0, 0
            self.since, self.from_step = time.monotonic(), run.step

    def note_epoch(self, values: Mapping[str, float]) -> None:
        tuning = {name: value for name, value in values.items() if name.startswith("tuning")}
        if tuning:
            self.observer.curve(self.run.step, self.run.epoch, tuning)


def keep_untrained(
    recipe: Recipe, data: Data, *, seed: int, folder: Path, facts: Mapping[str, Any], weights: Path | None = None
) -> Result:
    """The arm `base` (`untrained` without weights): the weights as they are.

    Batch-norm statistics are those of train volumes, because the weights saw other scans.
    """
    torch.set_num_threads(threads_for(recipe))
    encoder = start_encoder(recipe, seed, weights)
    some = data.some(CALIBRATION, seed)
    device = next(encoder.parameters()).device
    reestimate_statistics(encoder, (to_input(torch.from_numpy(data.volume(i)[None]).to(device), recipe) for i in some))
    mean, sd = statistics(embed(encoder, recipe, data.volume, data.some(STATISTICS, seed)))
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors |= {"embedding.mean": torch.from_numpy(mean), "embedding.sd": torch.from_numpy(sd)}
    file = folder / "final.safetensors"
    checkpoint.save(file, tensors, {**facts, **own_facts(recipe, encoder, seed)})
    return Result(file=file, step=0, num_steps=0, finished=True, validation={})
