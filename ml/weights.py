"""Weights to start from: which tensor of a file is which of an encoder, and what a file says of itself.

Every tensor of the encoder and of the file is accounted for by name and shape, from the header, before any is read.
What does not fit is one error that names it all; what is left over or begins anew is told and kept. No pickle is read.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ml.checkpoint import MOST_HEADER_BYTES, facts, has_statistics, shapes
from ml.config import FIELDS, Recipe, from_dict
from ml.encoders import Encoder, build_encoder
from ml.weight_names import PICKLES, Layout, recognise, stripped

MOST_TENSORS = 20_000
"""A file with more is no encoder's; the largest here has 1,000."""
MOST_NAMES = 100
"""Names in one error."""
DECLARED = ("window_hu", "centre_hu", "scale_hu")
"""What a weights file may say of the input that it was trained on."""
CONSTANT = ("relative_position_index", "num_batches_tracked")
"""Endings of tensors that are the same in every encoder of a kind, or that count: files may lack them."""

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """Which tensor of a file goes where."""

    layout: str
    """Whose names the file uses."""
    source: dict[str, str] = field(default_factory=dict)
    """Tensor of the encoder → tensor of the file."""
    inflated: tuple[str, ...] = ()
    """Kernels of the encoder that are two-dimensional in the file."""
    left: dict[str, list[str]] = field(default_factory=dict)
    """Why → tensors of the file that the encoder has no use for."""
    zeros: tuple[str, ...] = ()
    """Shifts that the file's network does not have."""
    anew: tuple[str, ...] = ()
    """Tensors of the encoder that begin as in a new one."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for the checkpoint's facts."""
        return {
            "layout": self.layout,
            "num_loaded": len(self.source),
            "num_inflated": len(self.inflated),
            "left": self.left,
            "zeros": list(self.zeros),
            "anew": list(self.anew),
        }

    def __str__(self) -> str:
        parts = [f"weights: {len(self.source)} tensors loaded, named as in {self.layout}"]
        parts += [f"{len(self.inflated)} kernels inflated along depth"] if self.inflated else []
        parts += [f"left in the file: {why} ({_some(names)})" for why, names in self.left.items()]
        parts += [f"zero: {_some(self.zeros)}"] if self.zeros else []
        parts += [f"begin anew: {_some(self.anew)}"] if self.anew else []
        return "; ".join(parts)


def _some(names: list[str] | tuple[str, ...], most: int = 4) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- what a file says -----------------------------------------------------------------------------------------------


def check_header(file: Path) -> dict[str, Shape]:
    """Names and shapes of a weights file after a look at the size of its header.

    Raises:
        ValueError: a file of another kind, or a header too large for any encoder.
    """
    if file.suffix in PICKLES:
        raise ValueError(
            f"Expected weights as .safetensors, got {file.suffix}: such files are pickles, which run code when they "
            "are read; docs/encoders.md says how to convert one."
        )
    with file.open("rb") as opened:
        begin = opened.read(8)
    size = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
    if size <= MOST_HEADER_BYTES and not 2 <= size <= file.stat().st_size - 8:
        raise ValueError("Expected a safetensors file for weights, got another kind of file, or part of one.")
    found = shapes(file)
    if len(found) > MOST_TENSORS:
        raise ValueError(f"Expected {MOST_TENSORS:,} tensors at most in a weights file, got {len(found):,}.")
    return found


def declared(file: Path) -> dict[str, Any]:
    """The input that a weights file says it was trained on: window_hu, centre_hu, scale_hu, those that it names.

    One of our checkpoints says it by its recipe, others by metadata of the same names, as text.

    Raises:
        ValueError: a value is no number.
    """
    from safetensors import safe_open

    check_header(file)
    recipe = facts(file).get("recipe")
    if recipe:
        return {key: recipe[key] for key in DECLARED if key in recipe}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    made: dict[str, Any] = {}
    for key in DECLARED:
        if key in metadata:
            try:
                numbers = [float(part) for part in metadata[key].strip("[]() ").split(",")]
            except ValueError:
                raise ValueError(
                    f"Expected numbers for {key} in the weights file's metadata, got {metadata[key]!r}."
                ) from None
            made[key] = numbers if str(FIELDS[key].type).startswith("tuple") else numbers[0]
    return made


def take_declared(recipe: Recipe, file: Path, given: Mapping[str, Any]) -> Recipe:
    """The recipe with the input that a weights file declares.

    Args:
        recipe: complete settings.
        file: the weights.
        given: settings that somebody chose; they are not overruled.

    Raises:
        ValueError: a chosen setting differs from what the file declares.
    """
    says = {**recipe.to_dict(), **declared(file)}
    if "clip_hu" not in given:  # cached volumes have to keep what the encoder sees
        ends = (says["clip_hu"], says["window_hu"])
        says["clip_hu"] = [min(low for low, _ in ends), max(high for _, high in ends)]
    settled = from_dict(says)
    for key in DECLARED:
        if key in given and getattr(settled, key) != getattr(recipe, key):
            raise ValueError(
                f"Expected {key}={_text(getattr(settled, key))}, which the weights were trained with, got "
                f"{_text(getattr(recipe, key))}; leave --set {key} out."
            )
    return settled


def _text(value: Any) -> str:
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value:g}"


# --- matching -------------------------------------------------------------------------------------------------------


def match(recipe: Recipe, encoder: Encoder, found: Mapping[str, Shape]) -> Match:
    """Which tensor of a file goes where in an encoder.

    Args:
        recipe: whose encoder it is.
        encoder: the encoder.
        found: names and shapes of the file's tensors.

    Raises:
        ValueError: names every tensor that has no place, has another shape, or is missing.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    layout = recognise(recipe, found)
    source: dict[str, str] = {}
    left: dict[str, list[str]] = defaultdict(list)
    inflated: list[str] = []
    faults: dict[str, list[str]] = defaultdict(list)
    for name, shape in found.items():
        target, why = layout.place(stripped(name))
        if target is None and why:
            left[why].append(name)
        elif target is None or target not in wanted:
            _set_aside(name, target, wanted, left, faults)
        elif target in source:
            faults["that stand twice"].append(name)
        elif shape != wanted[target] and not _inflates(target, shape, wanted[target], layout):
            if layout.may_begin_anew(target):
                left["of another shape"].append(name)
            else:
                faults["of another shape"].append(f"{name} {list(shape)} instead of {list(wanted[target])}")
        else:
            source[target] = name
            inflated += [target] if shape != wanted[target] else []
    missing = [name for name in wanted if name not in source]
    zeros = [name for name in missing if layout.is_zero(name)]
    anew = [name for name in missing if name.endswith(CONSTANT) or layout.may_begin_anew(name)]
    faults["that are missing"] += [name for name in missing if name not in {*zeros, *anew}]
    _refuse(recipe, layout, len(source), faults, found)
    begun = tuple(name for name in anew if not name.endswith(CONSTANT))
    return Match(
        layout=layout.name,
        source=source,
        inflated=tuple(inflated),
        left=dict(left),
        zeros=tuple(zeros),
        anew=begun,
    )


def _set_aside(
    name: str,
    target: str | None,
    wanted: Mapping[str, Shape],
    left: dict[str, list[str]],
    faults: dict[str, list[str]],
) -> None:
    """A tensor without a place: statistics that group normalisation has no use for, a counter, or a fault."""
    if target is not None and target.endswith(("running_mean", "running_var", "num_batches_tracked")):
        layer = target.rpartition(".")[0]
        if f"{layer}.weight" in wanted and f"{layer}.running_mean" not in wanted:
            left["statistics that norm=group has no use for"].append(name)
            return
    faults["without a place"].append(name)


def _inflates(target: str, shape: Shape, wanted: Shape, layout: Layout) -> bool:
    """True where a 2D kernel (O, I, Y, X) becomes a 3D one (O, I, Z, Y, X) of the same Y and X."""
    channels = shape[1:2] == wanted[1:2] or (target == layout.first and shape[1:2] == (3,) and wanted[1:2] == (1,))
    return len(shape) == 4 and len(wanted) == 5 and channels and (shape[0], *shape[2:]) == (wanted[0], *wanted[3:])


def _refuse(
    recipe: Recipe, layout: Layout, num_loaded: int, faults: Mapping[str, list[str]], found: Mapping[str, Shape]
) -> None:
    """Raise one ValueError that names every fault."""
    if not any(faults.values()):
        return
    if num_loaded == 0:
        raise ValueError(
            f"Expected weights of the encoder {recipe.encoder}, found none among {len(found):,} tensors "
            f"({_some(list(found))}); docs/encoders.md lists the names that are understood."
        )
    told = "; ".join(f"{why}: {_some(names, MOST_NAMES)}" for why, names in faults.items() if names)
    raise ValueError(
        f"Expected weights that fit the encoder {recipe.encoder} tensor by tensor (named as in {layout.name}), got "
        f"{num_loaded:,} that fit, and tensors {told}."
    )


def try_encoder(recipe: Recipe, file: Path | None = None) -> Match | None:
    """Build an encoder and see what would be loaded from a file, by its header alone, ahead of hours of other work.

    Raises:
        ValueError: as `build_encoder` and `load_weights` do.
    """
    found = {} if file is None else check_header(file)
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(recipe, has_statistics=file is not None and has_statistics(file))
    return None if file is None else match(recipe, encoder, found)


# --- loading --------------------------------------------------------------------------------------------------------


def load_weights(recipe: Recipe, encoder: Encoder, file: Path) -> Match:
    """Start an encoder from a weights file; what was loaded, and what was not.

    A 2D kernel is repeated along depth and divided by it, so that an input which is constant along depth gives the 2D
    network's answer, wherever no kernel reaches over the ends of depth: there zeros stand in. The first kernel is
    summed over red, green and blue, ahead: a grey voxel stands in all three.

    Raises:
        ValueError: tensors that do not fit, all named, or numbers that are not finite.
    """
    from safetensors import safe_open

    matched = match(recipe, encoder, check_header(file))
    state = encoder.state_dict()
    with safe_open(file, "pt") as opened:
        for target, name in matched.source.items():
            tensor = opened.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"Expected finite numbers in the weights file, found others in {name}.")
            made = inflate(tensor, state[target].shape) if target in matched.inflated else tensor
            state[target] = made.to(state[target].dtype)
    state |= {target: torch.zeros_like(state[target]) for target in matched.zeros}
    encoder.load_state_dict(state)
    encoder.loaded = matched
    return matched


def inflate(kernel_OIYX: Tensor, shape: Shape) -> Tensor:
    """A 2D kernel as a 3D one of a shape (O, I, Z, Y, X); summed over its inputs where only one is wanted."""
    kernel = kernel_OIYX.float()
    if shape[1] == 1 and kernel.shape[1] == 3:
        kernel = kernel.sum(1, keepdim=True)
    return kernel[:, :, None].expand(shape).clone() / shape[2]
