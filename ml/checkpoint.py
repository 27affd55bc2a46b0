"""Weights and training state as safetensors: tensors, and one JSON text beside them; nothing is ever unpickled.

Names of tensors: `encoder.*`, `head.*`, `embedding.mean`, `embedding.sd` (of raw train embeddings); a stop on the way
has `optimiser.<parameter>.*` and `random`, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ml.config import Recipe, from_dict
from ml.encoders import Encoder, build_encoder

KEY = "lachesis"
MOST_HEADER_BYTES = 32 << 20
"""Some hundred thousand tensors; a larger header is a bomb or no header."""


class NotFinite(ValueError):
    """Numbers that nobody could go on from."""


def save(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a file that is whole or absent, and that reads back. Equal content gives an equal file.

    Raises:
        NotFinite: a number is not.
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"Expected finite numbers in {name}, found others; nothing was saved.")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(flat, part, {KEY: json.dumps(dict(facts), sort_keys=True)})
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        if set(shapes(part)) != set(tensors):
            raise OSError("the checkpoint does not read back as written")
        part.replace(file)
    except (SafetensorError, OSError, ValueError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{file.name} cannot be written: {error}") from None


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, from the header alone. Raises ValueError for a file of another kind."""
    return {name: tuple(shape) for name, shape in _header(file)[0].items()}


def facts(file: Path) -> dict[str, Any]:
    """What was written beside the tensors."""
    return _header(file)[1]


def _header(file: Path) -> tuple[dict[str, list[int]], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as opened_raw:
        size = int.from_bytes(opened_raw.read(8), "little")
    if size > MOST_HEADER_BYTES:
        raise ValueError(
            f"Expected a safetensors file with a header of {MOST_HEADER_BYTES:,} bytes at the most, got {size:,}; is "
            "it a file of another kind?"
        )
    try:
        with safe_open(file, "pt") as opened:
            stored = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            text = (opened.metadata() or {}).get(KEY, "{}")
            return stored, json.loads(text)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"Expected a safetensors file, got something else ({error}).") from None


def tensors(file: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): opened.get_tensor(name) for name in names}


def load_module(module: nn.Module, file: Path, prefix: str) -> None:
    """Put stored weights into a module after comparing names and shapes with the header.

    Raises:
        ValueError: weights are missing or of another shape, naming the first.
    """
    stored = {n.removeprefix(prefix): s for n, s in shapes(file).items() if n.startswith(prefix)}
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            raise ValueError(f"Expected weights {prefix}{name} of shape {shape}, found {stored.get(name, 'none')}.")
    state = tensors(file, prefix)
    module.load_state_dict({name: state[name] for name in wanted})


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """An encoder as a checkpoint keeps it."""

    encoder: Encoder
    """In evaluation mode."""
    recipe: Recipe
    mean: Tensor | None
    """(D,) of raw train embeddings; None in a stop on the way."""
    sd: Tensor | None


def load_encoder(file: Path) -> Trained:
    """The encoder of any checkpoint of ours. Raises ValueError for other files."""
    recipe = from_dict(facts(file).get("recipe") or {})
    encoder = build_encoder(recipe, facts(file)["norm"])
    load_module(encoder, file, "encoder.")
    kept = tensors(file, "embedding.")
    return Trained(encoder=encoder.eval(), recipe=recipe, mean=kept.get("mean"), sd=kept.get("sd"))


def has_statistics(file: Path) -> bool:
    """True where a weights file holds statistics of batch normalisation."""
    return any(name.endswith("running_mean") for name in shapes(file))
