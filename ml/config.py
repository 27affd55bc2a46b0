"""Recipes: the complete, checked settings of a training. A preset holds only what differs from the defaults below."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml.registry import find, hint
from ml.volumes import CENTRES, CROPS, GRIDS, SCALINGS

OUTPUTS = ("bottleneck", "decoder")
NORMS = ("auto", "group", "frozen", "batch")
SCHEDULES = ("one_cycle", "cosine", "plateau")
SELECTIONS = ("last", "best")
WATCHED = ("tuning_gain", "tuning_probe_c")
COMPILED = ("auto", "on", "off")
PRECISIONS = ("float32", "bfloat16")
STANDARDISATIONS = ("running", "none")
OBJECTIVES = ("piecewise", "discrete", "cox")
DEATHS = ("censors", "competes")
REDUCTIONS = ("events", "mean")
SMALLEST_RISK_SET = 8
"""Scans a forward pass of the objective cox: it compares no others with each other."""
LARGE = 1e9
RANGES = (
    (("epochs", "batch", "accumulate", "pieces", "rank"), 1, LARGE, "1 or more"),
    (("learning_rate", "scale_hu"), 1e-12, LARGE, "more than 0"),
    (("flip_x", "warm_up", "momentum"), 0, 1, "0 to 1"),
    (("ema", "zoom", "gain"), 0, 0.99999, "0 or more, and less than 1"),
    (("rotate_degrees",), 0, 180, "0 to 180"),
    (("shift_mm", "offset_hu", "noise_hu", "patience", "min_delta", "probe_scans"), 0, LARGE, "0 or more"),
    (("gamma",), 0, 10, "0 to 10"),
    (("weight_decay", "clip_norm", "head_sd"), 0, LARGE, "0 or more"),
    (("centre_hu",), -LARGE, LARGE, "a finite number"),
)
"""Settings, the smallest and largest allowed value, and both in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything a training depends on but its data, arm and seed (docs/science.md section 3)."""

    encoder: str
    """A name of ml.registry.encoders()."""
    weights: str = ""
    """Weights to start from: a safetensors file or a checkpoint; empty for random ones."""
    output: str = "bottleneck"
    """What SwinUNETR gives: bottleneck (768 numbers) or decoder (384, of rank 48)."""
    recompute: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again: less memory, more time."""
    norm: str = "auto"
    """Normalisation layers: group; frozen (the statistics of the weights file); batch (8 volumes a step or more);
    auto is frozen where weights are given, else group."""

    shape_zyx: tuple[int, ...] = (160, 192, 192)
    spacing_mm: tuple[float, ...] = (2.0,)
    """Of the grid: one number for all axes, or three (Z, Y, X)."""
    centre: str = "body"
    """Where the grid is centred: body, lung, mask (the manifest's, or NAME.mask.nii.gz beside the scan) or middle."""
    grid: str = "spacing"
    """spacing: RAS, at spacing_mm around the centre; stretch: the stored axes over the whole shape, as they lie."""
    crop: str = "none"
    """With grid=stretch: the box around the lungs (lung) or what the scan's mask marks (mask) is cut out first."""
    scaling: str = "window"
    """window: HU, clipped, centred and scaled as below; minmax: each scan's own range becomes 0 to 1."""
    clip_hu: tuple[float, ...] = (-1000.0, 1000.0)
    """What the cached volumes keep."""
    window_hu: tuple[float, ...] = (-1000.0, 1000.0)
    """What the encoder sees."""
    centre_hu: float = 0.0
    scale_hu: float = 500.0
    """The encoder's input is (HU clamped to the window - centre) / scale."""
    flip_x: float = 0.5
    """Chance that a training volume is mirrored left to right."""

    rotate_degrees: float = 0.0
    """Training volumes are turned in the axial plane by up to so much either way …"""
    zoom: float = 0.0
    """… made up to this share larger, or as much smaller …"""
    shift_mm: float = 0.0
    """… and moved by up to so much along each axis; what comes in is air."""
    offset_hu: float = 0.0
    """Their HU are raised or lowered by up to so much, alike in all voxels …"""
    noise_hu: float = 0.0
    """… and noise of a standard deviation of up to so much is added."""
    gain: float = 0.0
    """Their values are multiplied by 1 plus or minus up to so much …"""
    gamma: float = 0.0
    """… after their contrast was changed: (HU - least) / range to the power of up to 1 plus so much, or its inverse."""

    epochs: int = 20
    batch: int = 4
    """Volumes a forward pass."""
    accumulate: int = 1
    """Forward passes an optimiser step."""
    learning_rate: float = 1e-4
    """The largest of the schedule."""
    schedule: str = "cosine"
    warm_up: float = 0.05
    """Share of the steps until the largest learning rate."""
    ema: float = 0.0
    """Decay a step of a running average of the weights, which then is what is judged and kept; 0: none."""
    patience: int = 0
    """Epochs in a row without a better one that end the training; 0: it goes on to the last."""
    min_delta: float = 0.0
    """By how much an epoch has to be better."""
    watch: str = "tuning_gain"
    """The figure by which an epoch is better: tuning_gain, or tuning_probe_c (ml.selection)."""
    select: str = "last"
    """The weights that are kept at the end: those of the last epoch, or of the best."""
    probe_scans: int = 256
    """Train scans of the probe after each epoch; 0: none."""
    compile: str = "auto"
    """torch.compile of the encoder: auto where there is an accelerator, on or off."""
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    precision: str = "float32"
    """Of the encoder; head and loss are always float32."""

    objective: str = "piecewise"
    """Of the arm tte: piecewise (a constant hazard a piece of time), discrete (one chance a piece) or cox (scans of a
    batch against each other)."""
    death: str = "censors"
    """competes: the head says the hazard of death, too, as one more task of the arm tte."""
    reduction: str = "events"
    """The loss is per outcome (mtl, visit: per known label); mean: per output."""
    drop_without_events: bool = False
    """Leave out train scans without any outcome to come (arm tte)."""
    pieces: int = 8
    rank: int = 512
    """Width of the time-dependent representation Z."""
    head_sd: float = 0.02
    """Standard deviation of a task vector w at the start; over √width in the arms mtl and visit."""
    standardise: str = "running"
    """Non-affine standardisation of the embedding ahead of the head."""
    momentum: float = 0.05
    """Of its running statistics."""

    @property
    def spacing_zyx(self) -> tuple[float, float, float]:
        z, y, x = self.spacing_mm * 3 if len(self.spacing_mm) == 1 else self.spacing_mm
        return z, y, x

    def volumes_in_step(self, num_train: int) -> int:
        """Volumes a step; a cohort smaller than a step is one step an epoch."""
        return min(self.batch * self.accumulate, num_train)

    def passes_in_step(self, num_train: int) -> int:
        """Forward passes a step."""
        return -(-self.volumes_in_step(num_train) // self.batch)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def digest(self) -> str:
        """sha256 of all fields, hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


PRESETS = Path(__file__).parent / "presets"
PLAIN = {"str": str, "bool": bool}
FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


def read_recipe(encoder: str, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of an encoder, with `key=value` overrides as text; the key `recipe` names a preset beneath them.

    Raises:
        ValueError: unknown encoder or key (the nearest is suggested), or a value of another type or out of range.
    """
    values: dict[str, Any] = find(encoder).settings
    rest = dict(overrides or {})
    if "recipe" in rest:
        values |= read_preset(rest.pop("recipe"), encoder)
    for key, text in rest.items():
        _check_key(key)
        values[key] = _parse(key, text)
    return from_dict({"encoder": encoder, **values})


def read_preset(name: str, encoder: str) -> dict[str, Any]:
    """Settings of a preset for an encoder. Raises ValueError for an unknown one, with the nearest."""
    known = {file.stem: file for file in PRESETS.glob("*.toml")}
    if name not in known:
        raise ValueError(f"No preset of recipes named {name!r}.{hint(name, known)}")
    tables = tomllib.loads(known[name].read_text())
    under = read_preset(tables["base"], encoder) if "base" in tables else {}
    return {**under, **tables["all"], **tables.get(encoder, {})}


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from its stored form, checked. Raises ValueError."""
    for key in values:
        if key not in FIELDS:
            raise ValueError(f"No recipe setting named {key!r}.{hint(key, FIELDS)}")
    typed = {key: _typed(key, value) for key, value in values.items()}
    recipe = Recipe(**typed)
    _check(recipe)
    return recipe


def _check_key(key: str) -> None:
    if key == "encoder":
        raise ValueError("Expected the encoder as --encoder, got it as a recipe setting; leave encoder out of --set.")
    if key not in FIELDS:
        raise ValueError(f"No recipe setting named {key!r}.{hint(key, FIELDS)}")


def _parse(key: str, text: str) -> Any:
    """The value a text stands for, by the field's type."""
    kind = str(FIELDS[key].type)
    try:
        if kind.startswith("tuple[int"):
            return [int(part) for part in text.strip("[]()").split(",")]
        if kind.startswith("tuple[float"):
            return [float(part) for part in text.strip("[]()").split(",")]
        parsers: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": _truth}
        return parsers[kind](text)
    except ValueError:
        raise ValueError(f"Expected {_kind_in_words(kind)} for {key}, got {text!r}.") from None


def _truth(text: str) -> bool:
    """Raises ValueError for any other word."""
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _typed(key: str, value: Any) -> Any:
    """`value` as the field's type; JSON and TOML know lists, not tuples, and 2 for 2.0."""
    kind = str(FIELDS[key].type)
    if kind == "tuple[float, ...]" and _is_number(value, float):
        return (float(value),)
    if kind.startswith("tuple["):
        number = int if "int" in kind else float
        if isinstance(value, list | tuple) and all(_is_number(v, number) for v in value):
            return tuple(number(v) for v in value)
    elif (kind in PLAIN and isinstance(value, PLAIN[kind])) or (kind == "int" and _is_number(value, int)):
        return value
    elif kind == "float" and _is_number(value, float):
        return float(value)
    raise ValueError(f"Expected {_kind_in_words(kind)} for {key}, got {value!r}.")


def _is_number(value: Any, kind: type) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if kind is int else int | float)


def _kind_in_words(kind: str) -> str:
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
    return words.get(kind, "whole numbers with commas" if "int" in kind else "numbers with commas")


def _check(recipe: Recipe) -> None:
    """Raise ValueError for the first setting out of range, naming it."""
    for key, known in (
        ("norm", NORMS),
        ("output", OUTPUTS),
        ("centre", CENTRES),
        ("grid", GRIDS),
        ("crop", CROPS),
        ("scaling", SCALINGS),
        ("schedule", SCHEDULES),
        ("select", SELECTIONS),
        ("watch", WATCHED),
        ("compile", COMPILED),
        ("precision", PRECISIONS),
        ("standardise", STANDARDISATIONS),
        ("objective", OBJECTIVES),
        ("death", DEATHS),
        ("reduction", REDUCTIONS),
    ):
        if getattr(recipe, key) not in known:
            raise ValueError(f"Expected one of {', '.join(known)} for {key}, got {getattr(recipe, key)!r}.")
    for keys, low, high, words in RANGES:
        for key in keys:
            if not (low <= getattr(recipe, key) <= high):
                raise ValueError(f"Expected {words} for {key}, got {getattr(recipe, key)!r}.")
    if len(recipe.shape_zyx) != 3 or min(recipe.shape_zyx) < 8:
        raise ValueError(f"Expected three sizes of 8 voxels or more for shape_zyx, got {list(recipe.shape_zyx)}.")
    if len(recipe.spacing_mm) not in (1, 3) or not all(0 < mm <= LARGE for mm in recipe.spacing_mm):
        raise ValueError(f"Expected one or three spacings above 0 for spacing_mm, got {list(recipe.spacing_mm)}.")
    if recipe.scaling == "minmax" and (recipe.offset_hu or recipe.noise_hu):
        raise ValueError(
            "Expected offset_hu and noise_hu of 0 for scaling=minmax, whose volumes have no HU; set them to 0."
        )
    if recipe.crop != "none" and recipe.grid != "stretch":
        raise ValueError(
            f"Expected grid=stretch for crop={recipe.crop}, got grid={recipe.grid}; use centre={recipe.crop} to keep "
            "the spacing, or set grid=stretch."
        )
    for key in ("clip_hu", "window_hu"):
        low_high = getattr(recipe, key)
        if len(low_high) != 2 or not low_high[0] < low_high[1]:
            raise ValueError(f"Expected low,high for {key}, got {list(low_high)}.")
    if recipe.watch == "tuning_probe_c" and not recipe.probe_scans:
        raise ValueError("Expected probe_scans above 0 for watch=tuning_probe_c, got 0; use 256.")
    if recipe.objective == "cox" and recipe.batch < SMALLEST_RISK_SET:
        raise ValueError(
            f"Expected batch {SMALLEST_RISK_SET} or more for objective=cox, which compares the scans of a batch, got "
            f"{recipe.batch}; use a larger batch or objective=piecewise."
        )
    if recipe.output == "decoder" and recipe.encoder != "swinunetr":
        raise ValueError(f"Expected output=decoder for swinunetr alone, got it for {recipe.encoder}; leave it out.")
    if recipe.norm == "batch" and recipe.batch < 8:
        raise ValueError(f"Expected batch 8 or more for norm=batch, got {recipe.batch}; use norm=group or frozen.")
