"""Weights files of others into an encoder: ImageNet networks in two dimensions, self-supervised Swin, bare tensors.

Strict: every tensor that the encoder has comes from the file, and every tensor of the file is used or named as spare in
the encoder's recipe (a classifier, say). What was loaded stands in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ml import checkpoint
from ml.encoders import Encoder

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
OTHERS = ("head.", "embedding.", "average.", "optimiser.", "random")
"""What a checkpoint of ours holds beside its encoder."""
NAMED = 5
"""Tensors that an error names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What came of a weights file."""

    layout: str
    """lachesis, tensors, imagenet (inflated from two dimensions) or swin."""
    num_tensors: int
    spare: list[str]
    """Tensors of the file that the encoder has no use for."""


def load_weights(encoder: Encoder, file: Path, *, spare: Iterable[str] = ()) -> Loaded:
    """Start an encoder from a weights file: safetensors named as in one of the layouts.

    Args:
        encoder: changed in place.
        file: one of our checkpoints; bare tensors named as in the encoder or its body; an ImageNet DenseNet or ResNet
            with torchvision's names; MONAI's self-supervised Swin transformer, old or new.
        spare: beginnings of names that need not be used.

    Raises:
        ValueError: a tensor is missing, has another shape, or is left over; or the file is no safetensors file.
    """
    stored = checkpoint.shapes(file)
    wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    layout, source = _fitting(stored, wanted)
    taken = set(source.values())
    missing = [name for name in wanted if name not in source and not name.endswith("num_batches_tracked")]
    left = [name for name in stored if name not in taken and not name.startswith(OTHERS)]
    tolerated = [name for name in left if name.endswith(STATISTICS) or _short(name).startswith(tuple(spare))]
    wrong = [name for name, there in source.items() if _shape(stored[there], wanted[name]) != wanted[name]]
    for names, words in ((missing, "are missing"), (wrong, "have another shape")):
        _refuse(names, words, len(wanted))
    _refuse([name for name in left if name not in tolerated], "of the file are left over", len(stored))
    if any(len(stored[there]) == 4 and len(wanted[name]) == 5 for name, there in source.items()):
        layout = "imagenet"  # a ResNet's names are the same in two dimensions and in three
    state = encoder.state_dict()
    tensors = checkpoint.tensors(file)
    for name, there in source.items():
        state[name].copy_(inflate(tensors[there], wanted[name]))
    return Loaded(layout=layout, num_tensors=len(source), spare=sorted(set(tolerated)))


def inflate(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A convolution of two dimensions repeated along depth and divided by it; colours are summed where one is wanted.

    An input that is the same along depth gives the answer of two dimensions (Carreira & Zisserman 2017), but where
    padding with zeros along depth reaches.
    """
    if tensor.ndim != 4 or len(shape) != 5:
        return tensor
    if tensor.shape[1] == 3 and shape[1] == 1:
        tensor = tensor.sum(1, keepdim=True)
    depth = shape[2]
    return tensor.unsqueeze(2).repeat(1, 1, depth, 1, 1) / depth


def _shape(stored: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a stored tensor is brought to."""
    if len(stored) == 4 and len(wanted) == 5:
        inputs = 1 if (stored[1], wanted[1]) == (3, 1) else stored[1]
        return (stored[0], inputs, wanted[2], *stored[2:])
    return stored


def _refuse(names: list[str], words: str, total: int) -> None:
    if names:
        shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        raise ValueError(
            f"Expected a weights file that fits the encoder tensor by tensor, but {len(names)} of {total} tensors "
            f"{words}: {shown}."
        )


def _own(name: str) -> str:
    return name.removeprefix("encoder.")


def _bare(name: str) -> str:
    return f"body.{name}"


def _imagenet(name: str) -> str:
    """torchvision's name of a DenseNet's or ResNet's tensor, as MONAI has it."""
    name = name.removeprefix("features.")
    name = re.sub(r"(denselayer\d+\.)(norm|conv)\.?(\d)", r"\1layers.\2\3", name)
    return f"body.{name}"


def _swin(name: str) -> str:
    """Names of both self-supervised Swin files: `module.` and an older name of its layers, or `encoder.` and one more
    level of stages."""
    name = re.sub(r"^(module|encoder|swinViT)\.", "", name)
    name = re.sub(r"^(layers\d)\.0\.0\.", r"\1.0.", name)
    name = name.replace(".mlp.fc", ".mlp.linear")
    return f"body.swin.{name}"


LAYOUTS: dict[str, Callable[[str], str]] = {"lachesis": _own, "tensors": _bare, "imagenet": _imagenet, "swin": _swin}


def _fitting(stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> tuple[str, dict[str, str]]:
    """The layout under which most tensors find their place, and where each comes from."""
    best: tuple[str, dict[str, str]] = ("lachesis", {})
    for layout, rename in LAYOUTS.items():
        found = {rename(name): name for name in stored if rename(name) in wanted}
        if len(found) > len(best[1]):
            best = layout, found
    return best


def _short(name: str) -> str:
    return re.sub(r"^(module|encoder|swinViT|body)\.", "", name)
