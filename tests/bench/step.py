"""Row `step`: pretraining with the real data path against the bare encoder's forward and backward pass.

Ours reads volumes from the cache, makes targets, computes loss, gradient and the optimiser's step; the bare encoder
sees resident random volumes and a sum. densenet121 at 64³, two volumes a pass, the recipe's own four passes a step.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import nibabel
import numpy as np
import torch

from ml.config import Recipe, read_recipe
from ml.data import prefetch
from ml.embed import autocast, pick_device, place
from ml.encoders import build_encoder
from ml.pretrain import take_step
from ml.training import Data, Training
from ml.tte_targets import TteTargets
from ml.volume_cache import Cached, Source, VolumeCache, cores, volume_recipe
from tests.bench import Row, median_ratio
from tests.ml.arrays import exponential_labels

SIDE, SCANS, TASKS, BATCH = 64, 8, 1024, 2


def run() -> list[Row]:
    """Median over 5 pairs, each of one epoch of few scans, after one that warms up."""
    settings = {"shape_zyx": f"{SIDE},{SIDE},{SIDE}", "batch": str(BATCH), "epochs": "100"}
    recipe = read_recipe("densenet121", settings)
    torch.set_num_threads(cores())
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = _ours(recipe, Path(folder)), _bare(recipe)
        ours()
        bare()
        ratio, seconds, _ = median_ratio(ours, bare)
    device = pick_device().type
    target = 0.95 if device == "cuda" else 0.9
    print(f"# step: {SCANS / seconds:.3g} volumes a second, densenet121 at {SIDE}³ on {device}", file=sys.stderr)
    return [Row(row="step", figure=ratio, unit=f"of the bare encoder's rate ({device})", target=target)]


def _ours(recipe: Recipe, folder: Path) -> Callable[[], object]:
    """One epoch of a training on NIfTI files, with labels of many tasks."""
    cache = VolumeCache(folder / "cache", volume_recipe(recipe))
    found = cache.prepare([_scan(folder / f"{i}.nii.gz", i) for i in range(SCANS)])
    cached = [c for c in found.values() if isinstance(c, Cached)]
    rows = np.arange(SCANS)
    targets = TteTargets(exponential_labels(SCANS, TASKS), rows)
    training = Training(
        recipe, Data(volume=lambda i: cache.read(cached[i]), train=rows, tuning=rows[:0], targets=targets), seed=0
    )
    training.train()

    def epoch() -> None:
        steps = range(training.step, training.step + training.steps_per_epoch)
        passes = range(steps.start * training.passes_per_step, steps.stop * training.passes_per_step)
        with closing(prefetch(training.load, passes)) as batches:
            for _ in steps:
                take_step(training, batches, 1e-4)

    return epoch


def _scan(file: Path, seed: int) -> Source:
    """A noisy scan of 4 mm that becomes a volume of the recipe's 2 mm."""
    voxels = np.random.default_rng(seed).normal(-500, 300, (40, 40, 40)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([4.0, 4.0, 4.0, 1.0])), file)
    return Source(file, "nifti")


def _bare(recipe: Recipe) -> Callable[[], object]:
    """As many volumes, resident, through the encoder and back."""
    device = pick_device()
    encoder = place(build_encoder(recipe.encoder), device).train()
    volumes = [
        torch.randn(BATCH, 1, SIDE, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last_3d)
        for _ in range(SCANS // BATCH)
    ]

    def epoch() -> None:
        for volume in volumes:
            with autocast(recipe, device):
                embedding = encoder(volume)
            embedding.sum().backward()
            encoder.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return epoch
