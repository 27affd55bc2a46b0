"""Stage `slices`: the middle slices of some scans as one picture, seen as an encoder sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.errors import InputError
from app.store import artifacts
from app.store.work import Work
from workers.bridge import read_some_scans
from workers.scan_volumes import prepare

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST = 12
"""Scans in a picture."""
CAPTION = "Nearest by embedding; not a prognosis, not a medical device."


def slices(work: Work) -> dict[str, Any]:
    """Draw `args["shown"]` (image and title each), read as the encoder of `args["checkpoint"]`, to `args["out"]`.

    Raises:
        InputError: none of them can be read, or the file cannot be written.
    """
    from ml.config import from_dict

    shown = list(work.args["shown"])[:MOST]
    with work.connect() as connection:
        checkpoint = artifacts.find_checkpoint(connection, str(work.args["checkpoint"]))
        scans = read_some_scans(connection, work.settings, [int(one["image"]) for one in shown])
    recipe = from_dict(checkpoint.recipe.get("settings", {}))
    volumes = prepare(work, recipe, scans)
    pictures = [
        (str(one["title"]), volumes.read(int(one["image"]))) for one in shown if int(one["image"]) in volumes.cached
    ]
    out = Path(str(work.args["out"]))
    try:
        draw(pictures, recipe.window_hu, out)
    except OSError as error:
        raise InputError(f"Expected {out.name} to be writable by the worker, got: {error.strerror}.") from None
    return {"name": out.name, "drawn": len(pictures), **volumes.failures()}


def draw(pictures: Sequence[tuple[str, NDArray[np.int16]]], window_hu: Sequence[float], out: Path) -> None:
    """Axial and coronal middle slices of (Z, Y, X) volumes, a column each, grey over the window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.8 * len(pictures) + 0.4, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(pictures), squeeze=False)
    low, high = window_hu
    for column, (title, volume_ZYX) in enumerate(pictures):
        z, y, _ = (size // 2 for size in volume_ZYX.shape)
        for row, slice_ in enumerate((volume_ZYX[z, ::-1], volume_ZYX[::-1, y])):  # front and head up
            axes[row, column].imshow(slice_, cmap="gray", vmin=low, vmax=high)
            axes[row, column].set_axis_off()
        axes[0, column].set_title(title, fontsize=7)
    figure.supxlabel(CAPTION, fontsize=6)
    figure.savefig(out, format="png")
