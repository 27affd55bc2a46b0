"""Rows `step` and `embed`: the real data path against the bare encoder, on the processor or an accelerator.

Ours reads volumes from the cache, makes targets, computes loss, gradient and the optimiser's step (or embeds); the bare
encoder sees resident random volumes and a sum. densenet121 at 64³, two volumes a pass, the recipe's own four passes a
step.
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
from ml.embed import autocast, embed, pick_device, place
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
    device = pick_device().type
    with tempfile.TemporaryDirectory() as folder:
        made, ours = training(recipe, Path(folder), scans=SCANS, tasks=TASKS)
        theirs = bare(recipe, SCANS)
        ours(), theirs()
        ratio, seconds, _ = median_ratio(ours, theirs)
        embedding, forward = (
            lambda: embed(made.encoder, recipe, made.data.volume, range(SCANS)),
            bare_forward(recipe, SCANS),
        )
        embedding(), forward()
        embedded, apart, _ = median_ratio(embedding, forward)
    target = 0.95 if device == "cuda" else 0.9
    print(f"# step: {SCANS / seconds:.3g} volumes a second, densenet121 at {SIDE}³ on {device}", file=sys.stderr)
    print(f"# embed: {SCANS / apart:.3g} volumes a second", file=sys.stderr)
    return [
        Row(row="step", figure=ratio, unit=f"of the bare encoder's rate ({device})", target=target),
        Row(row="embed", figure=embedded, unit=f"of the bare forward's rate ({device})", target=0.95),
    ]


def training(recipe: Recipe, folder: Path, *, scans: int, tasks: int) -> tuple[Training, Callable[[], object]]:
    """A training on NIfTI files with labels of many tasks, and one epoch of it."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = VolumeCache(folder / "cache", volume_recipe(recipe))
    found = cache.prepare([_scan(folder / f"{i}.nii.gz", i) for i in range(scans)])
    cached = [c for c in found.values() if isinstance(c, Cached)]
    rows = np.arange(scans)
    targets = TteTargets(exponential_labels(scans, tasks), rows)
    made = Training(
        recipe,
        Data(volume=lambda i, out=None: cache.read(cached[i], out), train=rows, tuning=rows[:0], targets=targets),
        seed=0,
    )
    made.train()

    def epoch() -> None:
        made.train()
        steps = range(made.step, made.step + made.steps_per_epoch)
        passes = range(steps.start * made.passes_per_step, steps.stop * made.passes_per_step)
        with closing(prefetch(made.load, passes)) as batches:
            for _ in steps:
                take_step(made, batches, 1e-4)

    return made, epoch


def _scan(file: Path, seed: int) -> Source:
    """A noisy scan of 4 mm that becomes a volume of the recipe's 2 mm."""
    if not file.exists():
        voxels = np.random.default_rng(seed).normal(-500, 300, (40, 40, 40)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([4.0, 4.0, 4.0, 1.0])), file)
    return Source(file, "nifti")


def bare(recipe: Recipe, scans: int) -> Callable[[], object]:
    """As many volumes, resident, through the encoder and back."""
    device = pick_device()
    encoder = place(build_encoder(recipe), device).train()
    if recipe.compile != "off" and device.type == "cuda":
        encoder.compile()
    volumes = _resident(recipe, scans, device)

    def epoch() -> None:
        for volume in volumes:
            with autocast(recipe, device):
                embedding = encoder(volume)
            embedding.sum().backward()
            encoder.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return epoch


def bare_forward(recipe: Recipe, scans: int) -> Callable[[], object]:
    """As many volumes, resident, through the encoder in evaluation mode."""
    device = pick_device()
    encoder = place(build_encoder(recipe), device).eval()
    if recipe.compile != "off" and device.type == "cuda":
        encoder.compile()
    volumes = _resident(recipe, scans, device)

    @torch.inference_mode()
    def forward() -> None:
        for volume in volumes:
            with autocast(recipe, device):
                encoder(volume)

    return forward


def _resident(recipe: Recipe, scans: int, device: torch.device) -> list[torch.Tensor]:
    shape = (recipe.batch, 1, *recipe.shape_zyx)
    made = (torch.randn(shape, device=device) for _ in range(max(1, scans // recipe.batch)))
    return [volume.contiguous(memory_format=torch.channels_last_3d) for volume in made]
