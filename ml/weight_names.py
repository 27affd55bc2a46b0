"""How the weights files that there are name their tensors, each told by names that only it has."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ml.config import Recipe
from ml.registry import find

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
"""Endings of what torch saves by default, which is never read."""
Place = tuple[str | None, str]
"""The encoder's tensor, or None and why a tensor is left out ("" for no reason)."""
NOWHERE: Place = (None, "")


def nothing(name: str) -> bool:
    """True of no tensor."""
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to name the tensors of an encoder."""

    name: str
    place: Callable[[str], Place]
    """Tensor of the file → where it goes."""
    first: str = ""
    """The encoder's first kernel, whose inputs may be red, green and blue in the file."""
    is_zero: Callable[[str], bool] = nothing
    """Tensors of the encoder that are zero where the file has none."""
    may_begin_anew: Callable[[str], bool] = nothing
    """Tensors of the encoder that a file may lack."""


def stripped(name: str) -> str:
    """A name without what wrappers for several devices put ahead."""
    return name.removeprefix("module.")


def recognise(recipe: Recipe, names: Collection[str]) -> Layout:
    """The layout of a file by the names of its tensors."""
    bare = {stripped(name) for name in names}
    if any(name.startswith("encoder.body.") for name in bare):
        return Layout(name="a checkpoint of Lachesis", place=_of_checkpoint)
    if any(name.startswith("body.") for name in bare):
        return Layout(name="the encoder", place=lambda name: (name, ""))
    kind = recipe.encoder
    if kind == "densenet121":
        return Layout(name="torchvision and MONAI", place=_densenet, first="body.conv0.weight")
    if kind in ("resnet18", "resnet50", "resnet152"):
        return Layout(
            name="torchvision and MONAI",
            place=_resnet,
            first="body.conv1.weight",
            is_zero=lambda name: name.endswith(".downsample.0.bias"),
        )
    if kind == "swinunetr":
        return _swin_layout(recipe, bare)
    spare = tuple(find(kind).about.get("spare", ()))
    return Layout(name="the module", place=lambda name: _own(name, spare))


def _of_checkpoint(name: str) -> Place:
    if name.startswith("encoder."):
        return name.removeprefix("encoder."), ""
    part = name.partition(".")[0]
    known = {"head": "the head", "embedding": "statistics of embeddings", "optimiser": "the optimiser"}
    return None, known.get(part, "state of a training")


def _own(name: str, spare: tuple[str, ...]) -> Place:
    """A module's own names; those that its `about` calls spare have no place."""
    if spare and name.startswith(spare):
        return None, "spare"
    return f"body.{name}", ""


# --- torchvision and MONAI ------------------------------------------------------------------------------------------

_DENSE_LAYER = re.compile(r"(denselayer\d+)\.(?:layers\.)?(norm|conv)\.?([12])\.")
_DENSENET = re.compile(r"(?:conv0|norm0|norm5|denseblock[1-4]|transition[1-3])\.")
_RESNET = re.compile(r"(?:conv1|bn1|layer[1-4])\.")


def _densenet(name: str) -> Place:
    """`features.denseblock1.denselayer1.norm1.weight`, or norm.1 of older files; MONAI says `layers.` ahead."""
    if name.startswith(("classifier.", "class_layers.")):
        return None, "the classifier"
    bare = name.removeprefix("features.")
    place = "body." + _DENSE_LAYER.sub(r"\1.layers.\2\3.", bare)
    return (place, "") if _DENSENET.match(bare) else NOWHERE


def _resnet(name: str) -> Place:
    if name.startswith("fc."):
        return None, "the classifier"
    return (f"body.{name}", "") if _RESNET.match(name) else NOWHERE


# --- SwinUNETR ------------------------------------------------------------------------------------------------------

_SWIN = re.compile(r"(?:swinViT|swin_vit|encoder)\.(?=(?:patch_embed|layers\d|norm)\.|mask_token)")
_TWICE = re.compile(r"^(layers\d\.0\.)0\.")
_DECODER = re.compile(r"(?:encoder(?:10|[1-4])|decoder[1-5])\.")
_HEADS = ("rotation_head", "rotation_pre", "contrastive_head", "contrastive_pre", "convTrans3d", "conv.")


def _swin_layout(recipe: Recipe, names: Collection[str]) -> Layout:
    """Three releases: a whole SwinUNETR, one with `encoder.` and a `0.` too many, and a bare Swin transformer."""
    decoder = recipe.output == "decoder"
    swin = "body.net.swinViT." if decoder else "body.swin."
    if any(name.startswith(("swinViT.", "swin_vit.")) for name in names):
        layout = "a SwinUNETR of MONAI"
    elif any(name.startswith("encoder.") for name in names):
        layout = "a self-supervised SwinUNETR (encoder.)"
    else:
        layout = "a Swin transformer"

    def place(name: str) -> Place:
        bare = _SWIN.sub("", name, count=1) if _SWIN.match(name) else name
        if bare == "mask_token":
            return None, "the token of masked patches"
        if bare.startswith("norm."):
            return None, "a last norm that SwinUNETR does not have"
        if bare.startswith(_HEADS):
            return None, "heads of the self-supervised training"
        if _DECODER.match(name) or name.startswith("out."):
            return (
                (f"body.net.{name}" if _DECODER.match(name) else f"body.{name}", "") if decoder else (None, "decoder")
            )
        if not bare.startswith(("patch_embed.", "layers")):
            return NOWHERE
        bare = _TWICE.sub(r"\1", bare).replace(".mlp.fc", ".mlp.linear")
        return swin + bare, ""

    def may_begin_anew(name: str) -> bool:
        return decoder and not name.startswith(swin)

    return Layout(name=layout, place=place, may_begin_anew=may_begin_anew, first=f"{swin}patch_embed.proj.weight")
