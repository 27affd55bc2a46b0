"""The state of a training: encoder, head, optimiser and the step they are at; what a step reads, and how it is kept.

Shape suffixes: B = scan of a batch, D = embedding, K = task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ml import augment, checkpoint
from ml.batches import Batches, Volumes
from ml.config import Recipe
from ml.data import order
from ml.embed import autocast, embed, pick_device, place, statistics, to_input
from ml.encoders import Encoder, build_encoder
from ml.heads import Standardise
from ml.normalisation import batch_norms
from ml.objectives import objective_of
from ml.parallel import SOLO, World
from ml.schedules import Plateau
from ml.selection import Probe, Selection
from ml.targets import BinaryTargets
from ml.tte_targets import TteTargets
from ml.weights import load_weights

CALIBRATION = 256
"""Train volumes that start the standardisation or re-estimate batch normalisation."""
ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter."""
STATISTICS = 4096
"""Train volumes, at most, by whose embeddings a checkpoint's vectors are standardised."""
RETREAT_STEPS, RETREATS = 200, 50
"""A training that diverges goes back to a step that is a multiple of 200 or of a fiftieth of the run, if that is more:
keeping so many stops takes little of any training's time, and going back that far loses little of it."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What there is to learn from."""

    volume: Volumes
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
    torch.manual_seed(seed)
    encoder = build_encoder(recipe, has_statistics=weights is not None and checkpoint.has_statistics(weights))
    if weights is not None:
        load_weights(recipe, encoder, weights)
    return place(encoder, pick_device())


class Training:
    """One run. Begins at the null model of the train split; every batch is a function of the seed and the step."""

    def __init__(self, recipe: Recipe, data: Data, seed: int, weights: Path | None = None, world: World = SOLO) -> None:
        self.recipe, self.data, self.seed, self.world = recipe, data, seed, world
        self.batches = Batches(recipe.shape_zyx)
        self.encoder = start_encoder(recipe, seed, weights)
        self.device = next(self.encoder.parameters()).device
        if recipe.compile == "on" or (recipe.compile == "auto" and self.device.type == "cuda"):
            torch._dynamo.config.suppress_errors = True  # where it cannot be compiled it runs as it is
            self.encoder.compile()  # in place: names of weights stay
        self.objective = objective_of(recipe, data.targets, self.device)
        self.head = self.objective.head(self.encoder.width).to(self.device)
        self.named = {
            f"{part}.{name}": parameter
            for part, module in (("encoder", self.encoder), ("head", self.head))
            for name, parameter in module.named_parameters()
        }
        self.optimiser = _optimiser(recipe, list(self.named.values()))
        # scans left over by a shuffle have their turn in the next epoch
        self.volumes_per_step = recipe.volumes_in_step(len(data.train))
        self.passes_per_step = recipe.passes_in_step(len(data.train))
        if self.passes_per_step < world.size:
            raise ValueError(
                f"Expected a step of at least {world.size} passes for {world.size} devices, got "
                f"{self.passes_per_step}; use --set accumulate={world.size} with a smaller batch, or fewer devices."
            )
        self.steps_per_epoch = len(data.train) // self.volumes_per_step
        self.num_steps = recipe.epochs * self.steps_per_epoch
        self.step, self.skipped, self.turn = 0, 0, 0
        """Steps taken, those skipped in a row, and how often the run went back."""
        self.retreat = 0
        """The step to go back to, where its stop is kept; 0 is the start."""
        self.weights = weights
        self.average = {name: p.detach().clone() for name, p in self.named.items()} if recipe.ema else {}
        self.plateau = Plateau()
        self.selection = Selection(watch=recipe.watch, min_delta=recipe.min_delta, patience=recipe.patience)
        self.epoch_loss = [0.0, 0.0]
        """Sum of the train losses of this epoch's steps, and how many."""
        self.excess_sum, self.excess_count = 0.0, 0
        """Of what the model lost beyond the null model in the steps since the last point of the curve."""
        self.history: list[dict[str, float]] = []
        """Figures on tuning, one entry an epoch, the null model's start first."""
        probed = np.array(data.some(recipe.probe_scans, seed), np.int64)
        self.probe = Probe(data.targets.labels, probed, data.tuning) if recipe.probe_scans else None

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step // self.steps_per_epoch

    @property
    def is_over(self) -> bool:
        """Whether the last step is taken, or nothing better came for too long."""
        return self.step >= self.num_steps or self.selection.is_over

    @property
    def is_at_retreat(self) -> bool:
        """Whether this is a step to go back to; the recipe alone says which are, not the clock."""
        every = max(RETREAT_STEPS, -(-self.num_steps // RETREATS))
        return self.step > 0 and self.step % every == 0 and not self.skipped

    def passes_from(self, step: int) -> list[int]:
        """This rank's forward passes from a step on."""
        per = self.passes_per_step
        return [p for s in range(step, self.num_steps) for p in self.world.own(range(s * per, (s + 1) * per))]

    @property
    def passes(self) -> int:
        """This rank's forward passes in a step."""
        return len(self.world.own(range(self.passes_per_step)))

    def sum_up(self, loss: Tensor, null: Tensor) -> None:
        """Make gradients and losses those of all ranks."""
        if self.world.size > 1:
            for parameter in self.named.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.world.all_sum([loss, null, *(p.grad for p in self.named.values() if p.grad is not None)])

    @property
    def running(self) -> list[Tensor]:
        """Running statistics of both parts, which forward passes change."""
        return [b for m in (self.encoder, self.head) for b in m.buffers() if b.is_floating_point()]

    def share_statistics(self) -> None:
        """Running statistics as the mean of all ranks'."""
        if self.world.size > 1:
            self.world.all_sum(self.running)
            for buffer in self.running:
                buffer.div_(self.world.size)

    def follow(self) -> None:
        """Begin with rank 0's weights and statistics."""
        states = [t for m in (self.encoder, self.head) for t in m.state_dict().values() if t.is_floating_point()]
        self.world.follow([*states, *self.average.values()])

    def train(self) -> None:
        """Put both parts in train mode."""
        self.encoder.train()
        self.head.train()

    def calibrate(self) -> None:
        """Start the head's standardisation from the embeddings of some train volumes."""
        if isinstance(self.head.standardise, Standardise):
            raw = embed(self.encoder, self.recipe, self.data.volume, self.data.some(CALIBRATION, self.seed))
            self.head.standardise.set(torch.from_numpy(raw).to(self.device))

    def start(self) -> None:
        """Calibrate, and begin with rank 0's numbers."""
        if self.world.is_first:
            self.calibrate()
        self.world.agree(None)  # which may come as late as it likes
        self.follow()

    @torch.no_grad()
    def begin_again(self) -> None:
        """Be what the run was ahead of its first step."""
        fresh = Training(self.recipe, self.data, self.seed, self.weights, self.world)
        fresh.start()
        for ours, theirs in ((self.encoder, fresh.encoder), (self.head, fresh.head)):
            ours.load_state_dict(theirs.state_dict())
        for name, value in self.average.items():
            value.copy_(fresh.average[name])
        self.optimiser.state.clear()
        self.step = self.retreat = 0
        self.plateau, self.selection, self.history = fresh.plateau, fresh.selection, self.history[:1]
        self.epoch_loss, self.excess_sum, self.excess_count = [0.0, 0.0], 0.0, 0

    def rows(self, micro: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch and the scans of forward pass `micro`, counted from the start of the run."""
        step, part = divmod(micro, self.passes_per_step)
        epoch, place = divmod(step, self.steps_per_epoch)
        shuffled = self.data.train[order(self.seed, epoch, len(self.data.train), self.turn)]
        inside = shuffled[place * self.volumes_per_step : (place + 1) * self.volumes_per_step]
        return epoch, inside[part * self.recipe.batch : (part + 1) * self.recipe.batch]

    def rows_of_step(self, step: int) -> NDArray[np.int64]:
        """All scans of a step."""
        first = step * self.passes_per_step
        return np.concatenate([self.rows(micro)[1] for micro in range(first, first + self.passes_per_step)])

    def load(self, micro: int) -> dict[str, Tensor]:
        """Volumes (int16), what chance does to them, and targets of one forward pass."""
        epoch, rows = self.rows(micro)
        return self._tensors(rows, augment.draw(self.recipe, self.seed, epoch, rows))

    def _tensors(self, rows: NDArray[np.int64], drawn: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
        voxels = self.batches.stack(self.data.volume, rows.tolist())
        arrays = {"voxels": voxels, **drawn, **self.data.targets.batch(rows)}
        made = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return {name: t.pin_memory() for name, t in made.items()} if self.device.type == "cuda" else made

    def embedding(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, D) float32 of the volumes of a batch, changed as drawn."""
        voxels_BZYX = augment.apply(batch["voxels"], batch, self.recipe)
        with autocast(self.recipe, self.device):
            embedding_BD: Tensor = self.encoder(to_input(voxels_BZYX, self.recipe))
        return embedding_BD.float()

    def output(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the head says of the volumes of a batch; float32 from the embedding on."""
        made: Tensor = self.head(self.embedding(batch))
        return made

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch where the encoder is."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def note_step(self, loss: float) -> None:
        """Count a step that was taken; the average of the weights follows them, quickly at first."""
        self.epoch_loss = [self.epoch_loss[0] + loss, self.epoch_loss[1] + 1]
        if self.average:
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            averages, weights = list(self.average.values()), [p.detach() for p in self.named.values()]
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While it lasts, the weights are their running average, where there is one."""
        held = {name: p.detach().clone() for name, p in self.named.items()} if self.average else {}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(held)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.named[name].copy_(value)

    @torch.inference_mode()
    def validate(self, rows: NDArray[np.int64]) -> tuple[float, float, NDArray[np.float32]]:
        """Mean loss a scan over `rows`, of the model and of the null model; and the embeddings (N, D)."""
        self.encoder.eval()
        self.head.eval()
        model, null, embeddings = 0.0, 0.0, []
        for begin in range(0, len(rows), 4 * self.recipe.batch):
            some = rows[begin : begin + 4 * self.recipe.batch]
            batch = self.to_device(self._tensors(some, {}))
            embedding_BD = self.embedding(batch)
            model += float(self.objective.loss(self.head(embedding_BD), batch))
            null += float(self.objective.null_loss(batch))
            embeddings.append(embedding_BD.cpu().numpy())
        self.train()
        return model / len(rows), null / len(rows), np.concatenate(embeddings)

    def note_epoch(self) -> dict[str, float]:
        """Judge the model on tuning and add it to the history; empty without tuning scans."""
        if self.epoch_loss[1]:
            self.plateau.note(self.epoch_loss[0] / self.epoch_loss[1])
        self.epoch_loss = [0.0, 0.0]
        if len(self.data.tuning) == 0:
            return {}
        self.history.append(self.world.agree(self._judge() if self.world.is_first else None))
        return self.history[-1]

    def _judge(self) -> dict[str, float]:
        with self.averaged():
            loss, null, tuning_ND = self.validate(self.data.tuning)
            values = {"epoch": self.epoch, "tuning_loss": loss, "null_loss": null, "tuning_gain": null - loss}
            c = self._probe_c(tuning_ND)
        return values if c is None else values | {"tuning_probe_c": c}

    def _probe_c(self, tuning_ND: NDArray[np.float32]) -> float | None:
        if self.probe is None or not self.probe.tasks:
            return None
        train_ND = embed(self.encoder, self.recipe, self.data.volume, self.probe.train.tolist())
        self.train()
        return self.probe.c(train_ND, tuning_ND)

    def save(self, file: Path, facts: Mapping[str, Any]) -> Path:
        """A stop on the way: everything that `resume` needs."""
        tensors = self._weights() | {"random": torch.get_rng_state()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, parameter in self.named.items():
            kept = self.optimiser.state[parameter]
            tensors |= {f"optimiser.{name}.{key}": value for key, value in kept.items()}
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "turn": self.turn,
            "retreat": self.retreat,
            "epoch_loss": self.epoch_loss,
            "excess": [self.excess_sum, self.excess_count],
            "plateau": asdict(self.plateau),
            "selection": asdict(self.selection),
        }
        checkpoint.save(file, tensors, {**self._facts(facts), **state})
        return file

    def finish(self, file: Path, facts: Mapping[str, Any]) -> Path:
        """The end: weights, and mean and SD of the raw embeddings of train volumes."""
        self._set(self.average)
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

    def take_weights(self, file: Path) -> None:
        """The weights of a stop, and their average; nothing else of it."""
        checkpoint.load_module(self.encoder, file, "encoder.")
        checkpoint.load_module(self.head, file, "head.")
        stored = checkpoint.tensors(file, "average.")
        for name, value in self.average.items():
            value.copy_(stored[name])

    def resume(self, file: Path, *, extends: bool = False) -> None:
        """Go on from a stop on the way; where it `extends` a training, from its end to a later last epoch.

        Raises:
            ValueError: the file is of another training.
        """
        facts = checkpoint.facts(file)
        theirs, ours = facts.get("recipe") or {}, self.recipe.to_dict()
        if extends:
            theirs, ours = theirs | {"epochs": 0}, ours | {"epochs": 0}
        if "step" not in facts or (theirs, facts.get("seed")) != (ours, self.seed):
            raise ValueError("Expected a stop of this very training to go on from, found a file of another one.")
        self.take_weights(file)
        stored = checkpoint.tensors(file, "optimiser.")
        for name, parameter in self.named.items():
            kept = {key: stored[f"{name}.{key}"] for key in ADAM if f"{name}.{key}" in stored}
            self.optimiser.state[parameter] = {
                key: value.to(self.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                for key, value in kept.items()
            }
        torch.set_rng_state(checkpoint.tensors(file, "random")[""])
        self.step, self.skipped, self.turn = facts["step"], facts["skipped"], facts["turn"]
        self.retreat = self.step if extends else facts.get("retreat", 0)
        self.epoch_loss, (self.excess_sum, self.excess_count) = facts["epoch_loss"], facts["excess"]
        self.plateau = Plateau(**facts["plateau"])
        self.selection = Selection(**facts["selection"])
        self.history = facts["epochs"]
        if extends:
            self.selection.from_epoch = self.epoch


def own_facts(recipe: Recipe, encoder: Encoder, seed: int) -> dict[str, Any]:
    """What every checkpoint says of itself."""
    norm = "frozen" if encoder.frozen_statistics else "batch" if batch_norms(encoder) else "group"
    own: dict[str, Any] = {"recipe": recipe.to_dict(), "norm": norm, "width": encoder.width, "seed": seed}
    return own | ({"loaded": encoder.loaded.to_dict()} if encoder.loaded is not None else {})


def _optimiser(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW; biases and the like do not decay, or a task's rate would drift towards one event a day."""
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
