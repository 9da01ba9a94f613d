"""Subjects: the MNI152 average brain and its tissue maps, deformed smoothly at random.

T1 and tissue maps ship with nilearn, so nothing is downloaded. The maps are deformed together and the labels are
taken from the deformed maps, so that image and label cannot come apart by interpolation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects, gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

Array = NDArray[np.float32]

LABELS = ("background", "CSF", "GM", "WM")
# Field of view around the brain, with room for the deformations; 48x56x48 voxels at 4 mm.
FOV_MM = (192.0, 224.0, 192.0)
CENTRE_MM = (0.0, -17.0, 5.0)
_FWHM_TO_SIGMA = 1 / 2.3548
# Deformations as (smoothness, size), both in mm: the shape of the head, and that of gyri and ventricles. Size over
# smoothness stays near 0.1, so that the field does not fold.
_DEFORMATIONS = ((40.0, 4.0), (16.0, 1.6))


@dataclass(frozen=True)
class Template:
    """The average brain, smoothed to the resolution that it will be sampled at.

    Attributes:
        maps: (4, X, Y, Z) float32: T1 in 0 to 1, grey matter, white matter, brain mask.
        affine: Template voxel to millimetres (RAS).
        means: T1 value of pure CSF, GM and WM.
    """

    maps: Array
    affine: NDArray[np.float64]
    means: tuple[float, float, float]


@dataclass(frozen=True)
class Subject:
    """One simulated person on the common grid.

    Attributes:
        tissue: (3, X, Y, Z) float32: fractions of CSF, GM and WM; what is missing to 1 is background.
        detail: (X, Y, Z) float32: what the T1 shows beyond its tissues' mean values.
    """

    tissue: Array
    detail: Array


def load_template(voxel_mm: float) -> Template:
    """Load the template and smooth it to a voxel size.

    Args:
        voxel_mm: Edge of the voxels that it will be sampled with.
    """
    # nilearn takes two seconds to import, and who reads written data needs none of it
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    image = load_mni152_template(resolution=1)
    t1, grey, white = (
        loaded.get_fdata(dtype=np.float32)
        for loaded in (
            image,
            load_mni152_gm_template(resolution=1),
            load_mni152_wm_template(resolution=1),
        )
    )
    brain = t1 > 0
    grey, white = grey * brain, white * brain
    fluid = np.clip(1 - grey - white, 0, 1) * brain
    csf, gm, wm = (float(np.median(t1[part > 0.9])) for part in (fluid, grey, white))
    sigma = voxel_mm * _FWHM_TO_SIGMA if voxel_mm > 1 else 0.0
    # after the smoothing half a voxel apart is near enough, and an eighth of the memory is faster to sample
    step = max(1, int(voxel_mm // 2))
    start, box = _around(brain, margin=int(np.ceil(3 * sigma)) + 1)
    parts = (part[box] for part in (t1, grey, white, brain.astype(np.float32)))
    smooth = (
        gaussian_filter(part, sigma, truncate=3.0, mode="constant") if sigma else part for part in parts
    )
    affine = np.asarray(image.affine, dtype=np.float64) @ np.diag([step, step, step, 1.0])
    affine[:3, 3] = (image.affine @ np.array([*start, 1.0]))[:3]
    return Template(np.stack([part[::step, ::step, ::step] for part in smooth]), affine, (csf, gm, wm))


def _around(mask: NDArray[np.bool_], margin: int) -> tuple[list[int], tuple[slice, ...]]:
    """Return first voxel and slices of the box around a mask, with a margin where there is room."""
    (box,) = find_objects(mask.astype(np.uint8))
    start = [max(0, part.start - margin) for part in box]
    return start, tuple(slice(low, part.stop + margin) for low, part in zip(start, box, strict=True))


def grid_shape(voxel_mm: float) -> tuple[int, int, int]:
    """Return the voxels by axis of the common grid."""
    x, y, z = (round(length / voxel_mm) for length in FOV_MM)
    return x, y, z


def grid_affine(voxel_mm: float) -> NDArray[np.float64]:
    """Return the common grid's affine: voxel to millimetres, RAS, centred on the brain."""
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = np.array(CENTRE_MM) - voxel_mm * (np.array(grid_shape(voxel_mm)) - 1) / 2
    return affine


def draw_subject(
    template: Template, voxel_mm: float, rng: np.random.Generator, *, atrophy: float = 0.0
) -> Subject:
    """Draw a person: head size and pose, shape, thickness of the cortex, width of the fluid spaces.

    Args:
        template: From `load_template` for the same voxel size.
        voxel_mm: Edge of a voxel.
        rng: Everything is drawn from it.
        atrophy: Mean log-odds of fluid against tissue; 0.5 widens the fluid spaces as age does.
    """
    shape = grid_shape(voxel_mm)
    points = _deformed_points(shape, voxel_mm, rng)
    inverse = np.linalg.inv(template.affine)
    places = np.tensordot(inverse[:3, :3], points, axes=1) + inverse[:3, 3, None, None, None]
    t1, grey, white, brain = (map_coordinates(part, places, order=1) for part in template.maps)
    fluid = np.clip(brain - grey - white, 0, 1)
    detail = t1 - sum(mean * part for mean, part in zip(template.means, (fluid, grey, white), strict=True))
    fluid = fluid * np.exp(atrophy + 0.25 * rng.standard_normal())
    grey = grey * np.exp(0.2 * _smooth_noise(shape, 20.0 / voxel_mm, rng))
    tissue = np.stack([fluid, grey, white])
    tissue *= brain / np.maximum(tissue.sum(axis=0), 1e-6)
    return Subject(tissue.astype(np.float32), detail.astype(np.float32))


def label_of(tissue: Array) -> NDArray[np.uint8]:
    """Return the label map of tissue fractions (3, X, Y, Z): the largest of background, CSF, GM and WM."""
    background = 1 - tissue.sum(axis=0, keepdims=True)
    return np.concatenate([background, tissue]).argmax(axis=0).astype(np.uint8)


def _deformed_points(
    shape: tuple[int, int, int], voxel_mm: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return (3, X, Y, Z): the place in the template, in mm, that each voxel of the subject shows."""
    affine = grid_affine(voxel_mm)
    voxels = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij")).astype(np.float64)
    centred = voxels * voxel_mm + (affine[:3, 3] - np.array(CENTRE_MM))[:, None, None, None]
    angles = rng.normal(0, 4, 3)
    stretch = np.diag(np.exp(rng.normal(0, 0.04, 3)))
    shear = np.eye(3) + np.triu(rng.normal(0, 0.02, (3, 3)), 1)
    matrix = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ shear @ stretch
    shift = rng.normal(0, 2, 3)
    points = np.tensordot(matrix, centred, axes=1) + (np.array(CENTRE_MM) + shift)[:, None, None, None]
    for smoothness, size in _DEFORMATIONS:
        for axis in range(3):
            points[axis] += size * _smooth_noise(shape, smoothness / voxel_mm, rng)
    return points


def _smooth_noise(shape: tuple[int, int, int], sigma: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return smooth noise of mean 0 and standard deviation 1; `sigma` is its smoothness in voxels."""
    noise = gaussian_filter(rng.standard_normal(shape), sigma, mode="reflect", truncate=3.0)
    return (noise - noise.mean()) / noise.std()
