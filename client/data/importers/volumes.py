"""What the importers of volumes share: headers, a robust maximum, and settings that suit the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage

from common.errors import DataError

VOLUME_SUFFIXES = (".nii.gz", ".nii")
# A patch axis is a multiple of this, so that a net of up to five levels halves it without a rest.
_PATCH_STEP = 16
_PATCH_TOP = 64
_SPACING_AGREES = 0.05
# A percentile needs no more voxels than this; larger images are looked at on a coarser grid.
_ENOUGH = 4e6


def volume_suffix(path: Path) -> str:
    """Return ".nii.gz" or ".nii".

    Raises:
        DataError: Another ending.
    """
    for suffix in VOLUME_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise DataError(
        "The source lists a file that is no NIfTI volume; expected names ending in .nii.gz or .nii.",
        detail=str(path),
    )


def stem_of(path: Path) -> str:
    """Return the file's name without its volume ending: the key of a case in tables."""
    return path.name[: -len(volume_suffix(path))]


def open_volume(path: Path, alias: str) -> SpatialImage:
    """Open a NIfTI file, reading its header alone.

    Args:
        path: The file.
        alias: How the case is called in the sentence.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        image = nib.load(path)
    except Exception as error:  # a broken header raises anything at all
        raise _unreadable(path, alias, error) from error
    if not isinstance(image, SpatialImage):
        raise _unreadable(path, alias, TypeError("no spatial image"))
    return image


def voxels(image: SpatialImage, alias: str) -> np.ndarray:
    """Return an open volume's values, scaled as its header says.

    Raises:
        DataError: The file is damaged.
    """
    try:
        return np.asanyarray(image.dataobj)
    except Exception as error:
        raise _unreadable(Path(str(image.get_filename())), alias, error) from error


def robust_maximum(path: Path, alias: str) -> float:
    """Return the 99th percentile of an image's finite values, as a float.

    Unlike the maximum it is not moved by a single bright voxel.

    Raises:
        DataError: The file is damaged, or has no finite value.
    """
    image = open_volume(path, alias)
    step = max(1, int(np.ceil((np.prod(image.shape) / _ENOUGH) ** (1 / 3))))
    values = voxels(image, alias)[::step, ::step, ::step]
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise DataError(f"{alias}: the image has no finite value. Leave it out.", detail=str(path))
    return float(np.percentile(finite, 99))


@dataclass(frozen=True)
class Geometry:
    """Size and spacing of one volume, first three axes."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    codes: str


def geometry(path: Path, alias: str) -> Geometry:
    """Read a volume's geometry from its header.

    Raises:
        DataError: The file is damaged or has fewer than three axes.
    """
    image = open_volume(path, alias)
    if len(image.shape) < 3:
        raise DataError(f"{alias}: the image has {len(image.shape)} axes, expected 3.", detail=str(path))
    spacing = tuple(float(length) for length in np.linalg.norm(image.affine[:3, :3], axis=0))
    return Geometry(
        tuple(image.shape[:3]), spacing, "".join(str(code) for code in nib.aff2axcodes(image.affine))
    )


def grid_settings(found: Sequence[Geometry]) -> dict[str, Any]:
    """Return `patch`, `spacing` and `orientation` that suit a set of volumes.

    The spacing is the median one where volumes differ by more than a twentieth, else none: nothing is resampled
    without need. The orientation is RAS where they differ. The patch is at most 64 and fits into a median volume.

    Args:
        found: At least one.
    """
    spacings = np.array([item.spacing for item in found])
    sizes = np.array([item.size for item in found], dtype=np.float64)
    settings: dict[str, Any] = {}
    if len({item.codes for item in found}) > 1:
        settings["orientation"] = "RAS"
        order = [_axis_order(item.codes) for item in found]
        spacings = np.array([row[places] for row, places in zip(spacings, order, strict=True)])
        sizes = np.array([row[places] for row, places in zip(sizes, order, strict=True)])
    usual = np.median(spacings, axis=0)
    if float((np.abs(spacings - usual) / usual).max()) > _SPACING_AGREES:
        settings["spacing"] = [round(float(length), 3) for length in usual]
        sizes = sizes * spacings / usual
    middle = np.median(sizes, axis=0) // _PATCH_STEP * _PATCH_STEP
    settings["patch"] = [int(length) for length in np.clip(middle, _PATCH_STEP, _PATCH_TOP)]
    return settings


def _axis_order(codes: str) -> list[int]:
    """Return which stored axis runs right-left, front-back and up-down."""
    return [next(i for i, code in enumerate(codes) if code in pair) for pair in ("LR", "PA", "IS")]


def _unreadable(path: Path, alias: str, error: Exception) -> DataError:
    return DataError(
        f"{alias}: the volume cannot be read; it is missing or damaged. Look at the source, or download it again.",
        detail=f"{path}: {type(error).__name__}: {error}",
    )
