"""Example pictures for the hospital's own eyes: they are written at the site and stay there.

Of a segmentation one PNG per case, three panels side by side: the image, with the truth over it, with the prediction over
it. File names are case aliases. Of a method that restyles images one PNG per other site: a training sample as it is, in
the other site's style, and how far the two differ. File names are the sites' aliases. Same weights and data, same bytes.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from client.trainer import Case, Dataset, Trainer
from common.federation import is_alias
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
MOST_STYLES = 32  # the coordinator says how many there are

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
            _write(folder / f"{_file_name(case.alias, written)}.png", draw_case(case, prediction))
            written += 1
    return written


def save_styles(
    folder: Path, samples: Iterable[tuple[str, Tensor]], *, spacing: tuple[float, ...] | None = None
) -> int:
    """Write how a training sample looks in other sites' styles, one picture by site; what is there is replaced.

    Args:
        folder: Where to write; it is made when there is something to write.
        samples: Other site's alias, and the sample (2, C, *S) as it is and in that style; drawn one at a time. The
            aliases come from the coordinator: one that is none is left out, as are pictures beyond `MOST_STYLES`.
        spacing: Millimetres by axis; None for a grid of equal steps.

    Returns:
        Number of pictures written.

    Raises:
        StorageError: The volume is full or cannot be written.
    """
    written = 0
    for alias, pair in itertools.islice(samples, MOST_STYLES):
        if is_alias(alias):
            _write(folder / f"{alias}.png", draw_restyled(pair.cpu().numpy().astype(np.float64), spacing))
            written += 1
    return written


def draw_restyled(pair: Array, spacing: tuple[float, ...] | None = None) -> Picture:
    """Return three panels: a sample as it is, in another style, and the absolute difference.

    All three have the same scale of intensities, that of the sample as it is: in the third, black is no change and
    white a change as large as the whole scale. A volume is cut through its middle, across its coarsest axis.

    Args:
        pair: (2, C, *S), S of two or three axes.
        spacing: Millimetres by axis; None for equal steps.

    Returns:
        RGB (height, width, 3).

    Raises:
        ValueError: Another number of axes.
    """
    axes = pair.ndim - 2
    if axes not in (2, 3):
        raise ValueError(f"A picture needs samples of two or three axes, got {axes}.")
    steps = tuple(spacing or (1.0,) * axes)
    if axes == 3:
        axis = coarsest_axis(steps)
        pair = np.take(pair, pair.shape[axis + 2] // 2, axis + 2)
        steps = tuple(step for number, step in enumerate(steps) if number != axis)
    size = panel_size(pair.shape[2:], steps)
    first, second = pair
    low, high = limits_of(first)
    planes = [
        windowed(first, (low, high)),
        windowed(second, (low, high)),
        windowed(np.abs(second - first), (0.0, high - low)),
    ]
    drawn = [_resized(_upright(plane, axes == 3), size, Image.Resampling.BILINEAR) for plane in planes]
    return _beside(drawn)


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
        axis = coarsest_axis(spacing)
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
    return _beside(panels)


def coarsest_axis(spacing: tuple[float, ...]) -> int:
    """Return the axis with the largest step, the last of equal ones."""
    return max(range(len(spacing)), key=lambda number: (spacing[number], number))


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


def limits_of(image: Array) -> tuple[float, float]:
    """Return the intensities of a plane (C, X, Y) that are shown as black and white."""
    low, high = np.percentile(_shown(image), WINDOW)
    return float(low), float(high)


def windowed(image: Array, limits: tuple[float, float] | None = None) -> Picture:
    """Return a plane (C, X, Y) as RGB (X, Y, 3): colours where it has three channels, else the first as grey.

    Args:
        image: The plane.
        limits: Intensities shown as black and white; the plane's own where None.
    """
    shown = _shown(image)
    low, high = limits or limits_of(image)
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


def _shown(image: Array) -> Array:
    return image if len(image) == 3 else image[:1].repeat(3, axis=0)


def _beside(panels: list[Picture]) -> Picture:
    gap = np.full((len(panels[0]), GAP, 3), 255, np.uint8)
    return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)


def _write(path: Path, picture: Picture) -> None:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG")
    write_bytes(path, stream.getvalue())


def _resized(rows: NDArray[Any], size: tuple[int, int], how: Image.Resampling) -> NDArray[Any]:
    return np.asarray(Image.fromarray(rows).resize(size, how))


def _file_name(alias: str, number: int) -> str:
    """Return an alias as a file name; aliases are plain words, but they come from a site's own file."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", alias).lstrip(".") or f"case-{number}"
