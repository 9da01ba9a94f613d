"""Example pictures of a segmentation, for the hospital's own eyes: they are written at the site and stay there.

One PNG per case, three panels side by side: the image, with the truth over it, with the prediction over it. File names
are case aliases. Same weights and data, same bytes.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from client.trainer import Case, Dataset, Trainer
from common.store import write_bytes

# Okabe and Ito's colours, which stay apart for colour-blind eyes; more classes start over.
COLOURS = np.array(
    [
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (213, 94, 0),
        (204, 121, 167),
        (0, 114, 178),
    ],
    dtype=np.float64,
)
OPACITY = 0.5
GAP = 4
SHORTEST, LONGEST = 256, 768  # pixels of a panel's longer side
WINDOW = (1.0, 99.0)  # percentiles shown as black and white

Picture = NDArray[np.uint8]
Classes = NDArray[np.int64]
Array = NDArray[np.float64]


def save_slices(
    folder: Path,
    dataset: Dataset,
    trainer: Trainer,
    weights: Mapping[str, Tensor],
    *,
    split: str,
    count: int = 3,
) -> int:
    """Write pictures of a split's first cases.

    Args:
        folder: Where to write; it is made.
        dataset: The site's cases.
        trainer: Lends the network.
        weights: State dict to predict with.
        split: Split to take cases from.
        count: Pictures at most.

    Returns:
        Number of pictures written; 0 where the task is no segmentation.

    Raises:
        PayloadError: Weights of another network.
    """
    if trainer.config.data.task != "segmentation":
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    with trainer.predicting(weights) as predict:
        for case in itertools.islice(dataset.evaluation_cases(split), count):
            prediction = predict(case.image).argmax(dim=1)[0].cpu().numpy()
            stream = io.BytesIO()
            Image.fromarray(draw_case(case, prediction)).save(stream, format="PNG")
            write_bytes(folder / f"{_file_name(case.alias, written)}.png", stream.getvalue())
            written += 1
    return written


def draw_case(case: Case, prediction: Classes) -> Picture:
    """Return the three panels of a case.

    A volume is cut across its coarsest axis, so that its finest plane is seen, where the truth has most foreground.

    Args:
        case: One case, 2D or 3D.
        prediction: Class numbers (*S).

    Returns:
        RGB (height, width, 3).
    """
    image: Array = case.image[0].cpu().numpy().astype(np.float64)
    truth: Classes = case.label[0, 0].cpu().numpy()
    spacing = case.spacing or (1.0,) * truth.ndim
    upwards = truth.ndim == 3
    if truth.ndim == 3:
        axis = max(range(3), key=lambda number: (spacing[number], number))
        place = fullest_slice(truth, axis)
        image, truth = np.take(image, place, axis + 1), np.take(truth, place, axis)
        prediction = np.take(prediction, place, axis)
        spacing = tuple(step for number, step in enumerate(spacing) if number != axis)
    size = panel_size(truth.shape, spacing)
    grey = _resized(_upright(windowed(image), upwards), size, Image.Resampling.BILINEAR)
    panels = [grey]
    for classes in (truth, prediction):
        drawn = _resized(_upright(classes, upwards).astype(np.int32), size, Image.Resampling.NEAREST)
        panels.append(overlaid(grey, drawn))
    gap = np.full((size[1], GAP, 3), 255, np.uint8)
    return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)


def fullest_slice(truth: Classes, axis: int) -> int:
    """Return the slice across an axis with most foreground; the middle one where there is none."""
    others = tuple(number for number in range(truth.ndim) if number != axis)
    voxels = np.count_nonzero(truth, axis=others)
    return int(voxels.argmax()) if voxels.any() else truth.shape[axis] // 2


def panel_size(shape: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[int, int]:
    """Return (width, height) in pixels of a plane: its proportions in millimetres, not too small, not too large."""
    extent = [length * step for length, step in zip(shape, spacing, strict=True)]
    pixels = min(max(max(shape), SHORTEST), LONGEST) / max(extent)
    return max(1, round(extent[0] * pixels)), max(1, round(extent[1] * pixels))


def windowed(image: Array) -> Picture:
    """Return a plane (C, X, Y) as RGB (X, Y, 3): colours where it has three channels, else the first as grey."""
    shown = image if len(image) == 3 else image[:1].repeat(3, axis=0)
    low, high = np.percentile(shown, WINDOW)
    scaled = (shown - low) / (high - low) if high > low else np.zeros_like(shown)
    return np.moveaxis(np.round(np.clip(scaled, 0, 1) * 255), 0, -1).astype(np.uint8)


def overlaid(grey: Picture, classes: NDArray[np.int32]) -> Picture:
    """Return a picture with every class but background tinted in its colour."""
    tint = COLOURS[(classes - 1) % len(COLOURS)]
    mixed = np.round((1 - OPACITY) * grey + OPACITY * tint).astype(np.uint8)
    return np.where((classes > 0)[..., None], mixed, grey)


def _upright(plane: NDArray[Any], upwards: bool) -> NDArray[Any]:
    """Turn a plane (X, Y, ...) into rows: pictures are stored from the top, volumes from the bottom."""
    rows = plane.swapaxes(0, 1)
    return np.ascontiguousarray(rows[::-1] if upwards else rows)


def _resized(rows: NDArray[Any], size: tuple[int, int], how: Image.Resampling) -> NDArray[Any]:
    return np.asarray(Image.fromarray(rows).resize(size, how))


def _file_name(alias: str, number: int) -> str:
    """Return an alias as a file name; aliases are plain words, but they come from a site's own file."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", alias).lstrip(".") or f"case-{number}"
