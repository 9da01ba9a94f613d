"""Reading a CT volume in MetaImage form and sampling it by millimetres."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from common.errors import DataError


@dataclass(frozen=True)
class Scan:
    """A CT with its geometry.

    Attributes:
        values: (X, Y, Z) in the file's own type.
        origin: Millimetres (LPS) of voxel 0, 0, 0.
        inverse: (3, 3) millimetres to voxels.
    """

    values: NDArray[np.generic]
    origin: NDArray[np.float64]
    inverse: NDArray[np.float64]

    def sample(self, points: NDArray[np.float64], *, outside: float) -> NDArray[np.float64]:
        """Return linearly interpolated values.

        Args:
            points: (3, *S) millimetres, LPS.
            outside: Value beyond the volume.

        Returns:
            (*S) float64.
        """
        shift = (points.ndim - 1) * (1,)
        places = np.tensordot(self.inverse, points - self.origin.reshape(3, *shift), axes=1)
        # only the block around the points is turned into float: a CT has 100 million voxels
        low = np.clip(np.floor(places.reshape(3, -1).min(axis=1)).astype(int) - 1, 0, None)
        high = np.clip(np.ceil(places.reshape(3, -1).max(axis=1)).astype(int) + 2, 0, self.values.shape)
        if bool((low >= high).any()):
            return np.full(points.shape[1:], outside)
        block = self.values[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        return map_coordinates(
            block.astype(np.float64),
            places - low.reshape(3, *shift),
            order=1,
            mode="constant",
            cval=outside,
        )


def read_scan(path: Path, alias: str) -> Scan:
    """Read a MetaImage volume (.mhd with its .raw or .zraw, or .mha).

    Args:
        path: The header file.
        alias: How it is called in the sentence.

    Raises:
        DataError: Damaged, without its voxels, or not three-dimensional.
    """
    import itk  # slow to import

    try:
        image = itk.imread(str(path))
        values = np.transpose(itk.array_from_image(image))
        spacing = np.array([float(length) for length in image.GetSpacing()])
        origin = np.array([float(length) for length in image.GetOrigin()])
        direction = np.asarray(itk.array_from_matrix(image.GetDirection()), dtype=np.float64)
    except Exception as error:  # ITK raises RuntimeError and more on a broken file
        raise DataError(
            f"{alias}: the CT cannot be read; its .mhd or .raw is damaged or missing. Unpack the subset again.",
            detail=f"{path}: {type(error).__name__}: {error}",
        ) from error
    if values.ndim != 3:
        raise DataError(f"{alias}: the CT has {values.ndim} axes, expected 3.", detail=str(path))
    inverse = np.linalg.inv(direction @ np.diag(spacing))
    return Scan(values, origin, inverse.astype(np.float64))
