"""Building encoders: (B, 1, Z, Y, X) → (B, D), with their `width` D.

Each file of this folder is an encoder: a function of the file's name that returns a module, whose feature map is pooled
by its mean. Encoders of others come from packages and files of their own: ml/registry.py finds all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ml.config import Recipe, read_recipe
from ml.normalisation import batch_norms, choose_norm, exchange_batch_norms, has_learnt_statistics
from ml.registry import find

if TYPE_CHECKING:
    from ml.weights import Match


class Encoder(nn.Module):
    """A body whose feature map is pooled by its mean; a body that gives vectors is left as it is."""

    def __init__(
        self, body: nn.Module, width: int, *, frozen_statistics: bool = False, recompute: bool = False
    ) -> None:
        super().__init__()
        self.body, self.width, self.frozen_statistics, self.recompute = body, width, frozen_statistics, recompute
        self.loaded: Match | None = None
        """What a weights file brought, where one did."""

    def forward(self, volume_B1ZYX: Tensor) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            features: Tensor = _recomputed(self.body, volume_B1ZYX)
        else:
            features = self.body(volume_B1ZYX)
        # the pooled embedding is float32 inside a bf16 step, too
        pooled_BD = features.float().mean((2, 3, 4)) if features.ndim == 5 else features.float()
        if pooled_BD.shape != (len(volume_B1ZYX), self.width):
            expected = (len(volume_B1ZYX), self.width)
            raise ValueError(f"Expected embeddings of shape {expected} from the encoder, got {tuple(features.shape)}.")
        return pooled_BD

    def train(self, mode: bool = True) -> Encoder:
        """Train mode; batch normalisation with frozen statistics stays as in evaluation."""
        super().train(mode)
        if self.frozen_statistics:
            for layer in batch_norms(self):
                layer.eval()
        return self


def build_encoder(recipe: Recipe | str, norm: str | None = None, *, has_statistics: bool = False) -> Encoder:
    """A new encoder, its weights drawn from torch's global generator unless its function brings some.

    Args:
        recipe: complete settings, or the name of an encoder whose own recipe is meant.
        norm: group, frozen (batch normalisation whose statistics stay) or batch; that of the recipe by default.
        has_statistics: weights with statistics of batch normalisation will be loaded.

    Raises:
        ValueError: unknown name, a norm that the encoder does not have, or a module that is no encoder.
    """
    recipe = read_recipe(recipe) if isinstance(recipe, str) else recipe
    known = find(recipe.encoder)
    function = known.load()
    takes_recipe = bool(inspect.signature(function).parameters)
    body = function(recipe) if takes_recipe else function()
    if not isinstance(body, nn.Module):
        raise ValueError(f"Expected a torch module from the encoder {known.name}, got {type(body).__name__}.")
    width = getattr(body, "width", None) or known.width or _tried_width(body, recipe)
    if norm is None:
        useful = has_statistics and bool(batch_norms(body))
        norm = choose_norm(recipe.norm, has_statistics=useful or has_learnt_statistics(body))
    if norm != "group" and not batch_norms(body):
        raise ValueError(
            f"Expected norm=group for the encoder {known.name}, got {norm}; it has no batch normalisation."
        )
    if norm == "group":
        exchange_batch_norms(body)
    outside = recipe.recompute and isinstance(body, nn.Sequential)
    if recipe.recompute and not outside and not takes_recipe:
        raise ValueError(f"Expected recompute=false for the encoder {known.name}, got true; it is not made of parts.")
    return Encoder(body, width, frozen_statistics=norm == "frozen", recompute=outside)


@torch.no_grad()
def _tried_width(body: nn.Module, recipe: Recipe) -> int:
    """D of a module that does not say it, by embedding an empty volume: a small one, or one of the recipe's size.

    Raises:
        ValueError: neither goes through.
    """
    why = ""
    body.eval()
    for shape_zyx in ((64, 64, 64), recipe.shape_zyx):
        try:
            made = body(torch.zeros(1, 1, *shape_zyx))
            body.train()
            return int(made.shape[1])
        except (RuntimeError, ValueError, AttributeError, IndexError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
        f"Expected the encoder {recipe.encoder} to take a volume (1, 1, {', '.join(map(str, recipe.shape_zyx))}), it "
        f"did not ({why}); mend it, or set `module.width = D` where it takes other sizes alone."
    )


# --- recomputing instead of keeping ---------------------------------------------------------------------------------


@torch.compiler.disable
def _recomputed(body: nn.Module, x: Tensor) -> Tensor:
    """The body's output; of each part only the input is kept, the rest is computed again on the way back."""
    for part in _parts(body):
        x = checkpoint(_run, part, x, use_reentrant=False, context_fn=partial(_contexts, part))
    return x


def _run(part: list[nn.Module], x: Tensor) -> Tensor:
    for layer in part:
        x = layer(x)
    return x


def _parts(body: nn.Module) -> Iterator[list[nn.Module]]:
    """A Sequential in parts: runs of single layers, and each block by itself; a plain Sequential inside is opened."""
    single: list[nn.Module] = []
    for layer in _opened(body):
        if next(layer.children(), None) is None:
            single.append(layer)
            continue
        if single:
            yield single
            single = []
        yield [layer]
    if single:
        yield single


def _opened(body: nn.Module) -> Iterator[nn.Module]:
    for layer in body.children():
        if type(layer) is nn.Sequential:
            yield from _opened(layer)
        else:
            yield layer


def _contexts(part: list[nn.Module]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first and the second computation: batch normalisation notes its statistics in the first alone."""
    return nullcontext(), _without_tracking(part)


@contextmanager
def _without_tracking(part: list[nn.Module]) -> Iterator[None]:
    layers = [norm for layer in part for norm in batch_norms(layer) if norm.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in layers]
    for norm in layers:  # the same operations as the first time, or the two would not match
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(layers, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
