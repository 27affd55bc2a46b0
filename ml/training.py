"""The state of a training: encoder, head, optimiser and the step they are at; what a step reads, and how it is kept.

Shape suffixes: B = scan of a batch, D = embedding, K = task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ml import checkpoint
from ml.config import Recipe
from ml.data import mirrored, order
from ml.embed import autocast, embed, pick_device, place, statistics, to_input
from ml.encoders import Encoder, batch_norms, build_encoder, choose_norm
from ml.heads import Standardise
from ml.objectives import objective_of
from ml.targets import BinaryTargets
from ml.tte_targets import TteTargets

CALIBRATION = 256
"""Train volumes that start the standardisation or re-estimate batch normalisation."""
ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter."""
STATISTICS = 4096
"""Train volumes, at most, by whose embeddings a checkpoint's vectors are standardised."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What there is to learn from."""

    volume: Callable[[int], NDArray[np.int16]]
    """Row of the cohort → (Z, Y, X) in HU."""
    train: NDArray[np.int64]
    """Rows of the train split."""
    tuning: NDArray[np.int64]
    """Rows of the tuning split; may be empty."""
    targets: TteTargets | BinaryTargets
    num_dropped: int = 0
    """Train scans left out because no outcome is to come."""

    def some(self, n: int, seed: int) -> list[int]:
        """Up to n train rows, by chance."""
        rows: list[int] = np.random.default_rng([seed, 3]).permutation(self.train)[:n].tolist()
        return rows


def start_encoder(recipe: Recipe, seed: int, weights: Path | None = None) -> Encoder:
    """An encoder on its device: random by seed, or with the given weights.

    Raises:
        ValueError: weights that do not fit, or a normalisation that they rule out.
    """
    norm = choose_norm(recipe.norm, has_statistics=weights is not None and checkpoint.has_statistics(weights))
    torch.manual_seed(seed)
    encoder = build_encoder(recipe.encoder, norm)
    if weights is not None:
        checkpoint.load_weights(encoder, weights)
    return place(encoder, pick_device())


class Training:
    """One run. Begins at the null model of the train split; every batch is a function of the seed and the step."""

    def __init__(self, recipe: Recipe, data: Data, seed: int, weights: Path | None = None) -> None:
        self.recipe, self.data, self.seed = recipe, data, seed
        self.encoder = start_encoder(recipe, seed, weights)
        self.device = next(self.encoder.parameters()).device
        self.objective = objective_of(recipe, data.targets, self.device)
        self.head = self.objective.head(self.encoder.width).to(self.device)
        self.named = {
            f"{part}.{name}": parameter
            for part, module in (("encoder", self.encoder), ("head", self.head))
            for name, parameter in module.named_parameters()
        }
        self.optimiser = _optimiser(recipe, list(self.named.values()))
        # a cohort smaller than a step is one step an epoch; scans left over by a shuffle have their turn in the next
        self.volumes_per_step = min(recipe.volumes_per_step, len(data.train))
        self.passes_per_step = -(-self.volumes_per_step // recipe.batch)
        self.steps_per_epoch = len(data.train) // self.volumes_per_step
        self.num_steps = recipe.epochs * self.steps_per_epoch
        self.step, self.skipped = 0, 0
        self.excess_sum, self.excess_count = 0.0, 0
        """Of what the model lost beyond the null model in the steps since the last point of the curve."""
        self.history: list[dict[str, float]] = []
        """Losses on tuning, one entry an epoch, the null model's start first."""

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step // self.steps_per_epoch

    def train(self) -> None:
        """Put both parts in train mode."""
        self.encoder.train()
        self.head.train()

    def calibrate(self) -> None:
        """Start the head's standardisation from the embeddings of some train volumes."""
        if isinstance(self.head.standardise, Standardise):
            raw = embed(self.encoder, self.recipe, self.data.volume, self.data.some(CALIBRATION, self.seed))
            self.head.standardise.set(torch.from_numpy(raw).to(self.device))

    def rows(self, micro: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch and the scans of forward pass `micro`, counted from the start of the run."""
        step, part = divmod(micro, self.passes_per_step)
        epoch, place = divmod(step, self.steps_per_epoch)
        shuffled = self.data.train[order(self.seed, epoch, len(self.data.train))]
        inside = shuffled[place * self.volumes_per_step : (place + 1) * self.volumes_per_step]
        return epoch, inside[part * self.recipe.batch : (part + 1) * self.recipe.batch]

    def load(self, micro: int) -> dict[str, Tensor]:
        """Volumes (int16, mirrored by chance) and targets of one forward pass."""
        epoch, rows = self.rows(micro)
        voxels = np.stack([self.data.volume(int(row)) for row in rows])
        flip = mirrored(self.seed, epoch, rows, self.recipe.flip_x)
        voxels[flip] = voxels[flip, :, :, ::-1]
        return self._tensors(voxels, rows)

    def _tensors(self, voxels: NDArray[np.int16], rows: NDArray[np.int64]) -> dict[str, Tensor]:
        arrays = {"voxels": voxels, **self.data.targets.batch(rows)}
        made = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return {name: t.pin_memory() for name, t in made.items()} if self.device.type == "cuda" else made

    def output(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the head says of the volumes of a batch; float32 from the embedding on."""
        with autocast(self.recipe, self.device):
            embedding_BD = self.encoder(to_input(batch["voxels"], self.recipe))
        made: Tensor = self.head(embedding_BD.float())
        return made

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch where the encoder is."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    @torch.inference_mode()
    def validate(self, rows: NDArray[np.int64]) -> tuple[float, float]:
        """Mean loss a scan over `rows`, of the model and of the null model."""
        self.encoder.eval()
        self.head.eval()
        model, null = 0.0, 0.0
        for begin in range(0, len(rows), 4 * self.recipe.batch):
            some = rows[begin : begin + 4 * self.recipe.batch]
            batch = self.to_device(self._tensors(np.stack([self.data.volume(int(row)) for row in some]), some))
            output = self.output(batch)
            model += float(self.objective.loss(output, batch))
            null += float(self.objective.null_loss(batch))
        self.train()
        return model / len(rows), null / len(rows)

    def note_epoch(self) -> dict[str, float]:
        """Judge the model on tuning and add it to the history; empty without tuning scans."""
        if len(self.data.tuning) == 0:
            return {}
        loss, null = self.validate(self.data.tuning)
        self.history.append({"epoch": self.epoch, "tuning_loss": loss, "null_loss": null, "tuning_gain": null - loss})
        return self.history[-1]

    def save(self, file: Path, facts: Mapping[str, Any]) -> Path:
        """A stop on the way: everything that `resume` needs."""
        tensors = self._weights() | {"random": torch.get_rng_state()}
        for name, parameter in self.named.items():
            kept = self.optimiser.state[parameter]
            tensors |= {f"optimiser.{name}.{key}": value for key, value in kept.items()}
        state = {"step": self.step, "skipped": self.skipped, "excess": [self.excess_sum, self.excess_count]}
        checkpoint.save(file, tensors, {**self._facts(facts), **state})
        return file

    def finish(self, file: Path, facts: Mapping[str, Any]) -> Path:
        """The end: weights, and mean and SD of the raw embeddings of train volumes."""
        some = self.data.some(STATISTICS, self.seed)
        mean, sd = statistics(embed(self.encoder, self.recipe, self.data.volume, some))
        kept = {"embedding.mean": torch.from_numpy(mean), "embedding.sd": torch.from_numpy(sd)}
        checkpoint.save(file, self._weights() | kept, self._facts(facts))
        return file

    def _weights(self) -> dict[str, Tensor]:
        encoder = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        return encoder | {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}

    def _facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {**facts, **own_facts(self.recipe, self.encoder, self.seed), "epochs": self.history}

    def resume(self, file: Path) -> None:
        """Go on from a stop on the way.

        Raises:
            ValueError: the file is of another training.
        """
        facts = checkpoint.facts(file)
        if "step" not in facts or (facts.get("recipe"), facts.get("seed")) != (self.recipe.to_dict(), self.seed):
            raise ValueError("Expected a stop of this very training to go on from, found a file of another one.")
        checkpoint.load_module(self.encoder, file, "encoder.")
        checkpoint.load_module(self.head, file, "head.")
        stored = checkpoint.tensors(file, "optimiser.")
        for name, parameter in self.named.items():
            kept = {key: stored[f"{name}.{key}"] for key in ADAM if f"{name}.{key}" in stored}
            self.optimiser.state[parameter] = {
                key: value.to(self.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                for key, value in kept.items()
            }
        torch.set_rng_state(checkpoint.tensors(file, "random")[""])
        self.step, self.skipped = facts["step"], facts["skipped"]
        self.excess_sum, self.excess_count = facts["excess"]
        self.history = facts["epochs"]


def own_facts(recipe: Recipe, encoder: Encoder, seed: int) -> dict[str, Any]:
    """What every checkpoint says of itself."""
    norm = "frozen" if encoder.frozen_statistics else "batch" if batch_norms(encoder) else "group"
    return {"recipe": recipe.to_dict(), "norm": norm, "width": encoder.width, "seed": seed}


def _optimiser(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW; biases and the like do not decay, or a task's rate would drift towards one event a day."""
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
