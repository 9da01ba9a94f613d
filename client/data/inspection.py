"""What can be wrong with one decoded case, said once: the loader refuses a case for it, the check lists it.

A problem of level "error" is one for which training refuses the case, so that a site whose check is clean can
run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from torch import Tensor

from client.data.formats import Format, Volume
from common.config import DataConfig
from common.errors import DataError
from common.site_summary import spacing_is_off

Level = Literal["error", "warning"]
# Largest distance between an image's and its mask's voxels, in voxels: headers are rounded, grids are not.
_AFFINE_WARN = 0.05
_AFFINE_ERROR = 0.5
_WHOLE = 1e-3  # a label stored through a scale factor may miss its whole number by this much


@dataclass(frozen=True)
class Problem:
    """One finding of a check.

    Attributes:
        level: "error" stops a run at this site; "warning" is for a person to judge.
        code: Short fixed word, counted in the site's summary.
        case: Case alias, or "" for the site as a whole.
        field: What it is about: a key, a column, "image", "label".
        sentence: Safe sentence: what was expected, what was got, what to do.
        detail: Path or foreign text, for the hospital's own terminal alone.
    """

    level: Level
    code: str
    case: str
    field: str
    sentence: str
    detail: str = ""


def image_problems(
    volume: Volume, case: str, channels: tuple[str, ...], config: DataConfig | None
) -> Iterator[Problem]:
    """Yield what is wrong with an image by itself: channels, values, spacing, dtype, constant content."""
    data = volume.data
    if data.shape[0] != len(channels):
        count, wanted = data.shape[0], len(channels)
        yield _error(
            "channels",
            case,
            "image",
            f"the image has {count} channels, expected {wanted}; list one file per channel",
        )
    if data.is_floating_point():
        bad = int((~torch.isfinite(data)).sum())
        if bad:
            sentence = (
                f"the image has {bad} values that are not finite (NaN or infinite); repair or export it again"
            )
            yield _error("nonfinite", case, "image", sentence)
            return
    if volume.dtype == "float64":
        yield _warn(
            "dtype",
            case,
            "image",
            "the image is stored as float64, which doubles its size; float32 is enough",
        )
    low, high = float(data.min()), float(data.max())
    if low == high:
        yield _warn(
            "constant", case, "image", "every voxel of the image has the same value; look whether it is empty"
        )
    if config is None:
        return
    if config.normalise == "range" and (low < 0 or high > 255):
        sentence = (
            f"values run from {low:g} to {high:g}, but normalise=range expects 0 to 255; set normalise=case"
        )
        yield _error("range", case, "image", sentence)
    spacing = oriented(volume, volume.spacing, config.orientation)
    if config.spacing and len(config.spacing) == len(spacing) and spacing_is_off(spacing, config):
        got = " x ".join(f"{value:g}" for value in spacing)
        want = " x ".join(f"{value:g}" for value in config.spacing)
        sentence = (
            f"the spacing is {got} mm; expected {want} mm within a ratio of {1 + config.spacing_tolerance:g}"
        )
        yield _error("spacing-tolerance", case, "image", sentence)


def label_problems(label: Volume, image: Volume, case: str, classes: int) -> Iterator[Problem]:
    """Yield what is wrong with a mask: its grid against the image's, its values against the classes."""
    if label.data.shape[0] != 1:
        sentence = f"the label has {label.data.shape[0]} channels, expected one of class numbers; merge them"
        yield _error("label-channels", case, "label", sentence)
        return
    if label.size != image.size:
        got = _sizes(label.size)
        sentence = f"the label has {got} voxels, the image {_sizes(image.size)}; they must share a grid"
        yield _error("shape", case, "label", sentence)
    else:
        yield from _affine_problems(label, image, case)
    if label.data.is_floating_point():
        if not bool(torch.isfinite(label.data).all()):
            sentence = "the label has values that are not finite; export it again"
            yield _error("label-nonfinite", case, "label", sentence)
            return
        if bool(((label.data - label.data.round()).abs() > _WHOLE).any()):
            sentence = "the label has values between whole numbers; resample it with nearest neighbour"
            yield _error("label-fraction", case, "label", sentence)
            return
    values = distinct(label.data)
    if is_one_mark(values, label.format, classes):
        return
    outside = int(((values < 0) | (values >= classes)).sum())
    if outside:
        sentence = f"{outside} label values lie outside 0 to {classes - 1}; correct the mask or 'labels'"
        yield _error("label-values", case, "label", sentence)


def refuse(problems: Iterator[Problem], site: str, detail: str) -> None:
    """Raise for the first error among problems.

    Raises:
        DataError: With the problem's sentence, site and case alias.
    """
    for problem in problems:
        if problem.level == "error":
            raise DataError(f"{site}, {problem.case}: {problem.sentence}.", detail=detail, site=site)


def class_indices(label: Volume, classes: int) -> Tensor:
    """Return a checked mask as class numbers, uint8 (or int16 above 256 classes), shape (1, *S).

    A picture whose only non-zero value is, say, 255 marks class 1 of two.
    """
    data = label.data
    if is_one_mark(distinct(data), label.format, classes):
        data = data > 0
    elif data.is_floating_point():
        data = data.round()
    return data.to(torch.uint8 if classes <= 256 else torch.int16)


def distinct(data: Tensor) -> Tensor:
    """Return the distinct whole values of finite data, sorted, as int64."""
    whole = data.round().to(torch.int64) if data.is_floating_point() else data
    low, high = int(whole.min()), int(whole.max())
    if low < 0 or high > 4096:
        return torch.unique(whole).to(torch.int64)
    return torch.nonzero(torch.bincount(whole.reshape(-1))).reshape(-1)  # no sort of a whole volume


def is_one_mark(values: Tensor, kind: Format, classes: int) -> bool:
    """Tell whether a picture's values are 0 and one mark, of background and one class."""
    return (
        kind is Format.PICTURE
        and classes == 2
        and int((values > 0).sum()) == 1
        and int((values < 0).sum()) == 0
    )


def oriented(volume: Volume, values: tuple[float, ...], orientation: str | None) -> tuple[float, ...]:
    """Return values by axis in the order of a target orientation (unchanged without one, or in 2D)."""
    if orientation is None or not volume.orientation:
        return values
    transform = ornt_transform(io_orientation(volume.affine), axcodes2ornt(tuple(orientation)))
    result = list(values)
    for source, (target, _) in enumerate(transform):
        result[int(target)] = values[source]
    return tuple(result)


def _affine_problems(label: Volume, image: Volume, case: str) -> Iterator[Problem]:
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in image.size], indexing="ij")).reshape(
        len(image.size), -1
    )
    points = np.zeros((4, corners.shape[1]))
    points[: len(image.size)], points[3] = corners, 1.0
    apart = np.linalg.norm(((label.affine - image.affine) @ points)[:3], axis=0).max() / min(image.spacing)
    if apart > _AFFINE_ERROR:
        sentence = (
            f"image and label lie up to {apart:.2g} voxels apart; resample the label onto the image's grid"
        )
        yield _error("affine", case, "label", sentence)
    elif apart > _AFFINE_WARN:
        sentence = (
            f"image and label lie up to {apart:.2g} voxels apart; the image's geometry is used for both"
        )
        yield _warn("affine", case, "label", sentence)


def _sizes(size: tuple[int, ...]) -> str:
    return "x".join(str(length) for length in size)


def _error(code: str, case: str, field: str, sentence: str) -> Problem:
    return Problem("error", code, case, field, sentence)


def _warn(code: str, case: str, field: str, sentence: str) -> Problem:
    return Problem("warning", code, case, field, sentence)
