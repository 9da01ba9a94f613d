"""Scanners: what makes the images of one hospital look unlike those of the next.

A scanner changes how tissues differ in brightness, shades the image (coil), thickens slices, cuts the field of view,
adds noise, and stores values in a range and orientation of its own. The first three are fixed by name, so that a
trial's hospitals can be talked about; more are drawn from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from monai.transforms import RandBiasField, RandRicianNoise
from numpy.typing import NDArray

from client.data.mni.anatomy import Array, Subject, label_of

Stored = Literal["uint8", "int16", "float32"]
_SCALE: dict[Stored, float] = {"uint8": 190.0, "int16": 2900.0, "float32": 1.0}
_TOP: dict[Stored, float] = {"uint8": 255.0, "int16": 4095.0, "float32": np.inf}


@dataclass(frozen=True)
class Scanner:
    """One hospital's way of imaging.

    Attributes:
        title: A few words for people.
        contrast: Brightness of CSF, GM and WM; white matter is near 1.
        detail: How much of the T1's fine structure beyond its tissues is seen.
        shading: Size of the bias field's polynomial coefficients; 0 none, 0.3 strong.
        noise: Standard deviation of the Rician noise, relative to white matter.
        thick: A slice is this many times thicker than wide.
        cut_mm: Taken off the field of view at the top and at the bottom.
        stored: Type of the stored values, which also fixes their range (255, 4095, about 1).
        flipped: Stored left-posterior-superior instead of right-anterior-superior.
        atrophy: Its patients' mean widening of the fluid spaces; see `draw_subject`.
    """

    title: str
    contrast: tuple[float, float, float]
    detail: float
    shading: float
    noise: float
    thick: int
    cut_mm: tuple[float, float]
    stored: Stored
    flipped: bool
    atrophy: float


NAMED = (
    Scanner(
        "clean, even, whole head",
        contrast=(0.30, 0.68, 1.00),
        detail=1.0,
        shading=0.03,
        noise=0.02,
        thick=1,
        cut_mm=(0.0, 0.0),
        stored="int16",
        flipped=False,
        atrophy=0.2,
    ),
    Scanner(
        "low contrast, strong coil shading, short field of view, 8 bit",
        contrast=(0.52, 0.76, 0.94),
        detail=0.6,
        shading=0.22,
        noise=0.03,
        thick=1,
        cut_mm=(12.0, 36.0),
        stored="uint8",
        flipped=True,
        atrophy=0.4,
    ),
    Scanner(
        "slices of double thickness, noisy, older patients",
        contrast=(0.20, 0.60, 0.90),
        detail=0.8,
        shading=0.08,
        noise=0.09,
        thick=2,
        cut_mm=(0.0, 0.0),
        stored="float32",
        flipped=False,
        atrophy=0.8,
    ),
)


def scanner(index: int, seed: int) -> Scanner:
    """Return the scanner of hospital number `index` (from 0): one of `NAMED`, or one drawn from the seed."""
    if index < len(NAMED):
        return NAMED[index]
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7919, index]))
    low = float(rng.uniform(0.2, 0.5))
    grey = float(rng.uniform(0.60, 0.78))
    stored: Stored = ("uint8", "int16", "float32")[int(rng.integers(3))]  # type: ignore[assignment]
    return Scanner(
        "drawn from the seed",
        contrast=(low, grey, float(rng.uniform(0.9, 1.05))),
        detail=float(rng.uniform(0.5, 1.0)),
        shading=float(rng.uniform(0.02, 0.2)),
        noise=float(rng.uniform(0.015, 0.08)),
        thick=int(rng.integers(1, 3)),
        cut_mm=(float(rng.uniform(0, 12)), float(rng.uniform(0, 36))),
        stored=stored,
        flipped=bool(rng.integers(2)),
        atrophy=float(rng.uniform(0.1, 0.8)),
    )


def scan(
    person: Subject, machine: Scanner, affine: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.generic], NDArray[np.uint8], NDArray[np.float64]]:
    """Image a person.

    Args:
        person: On the common grid.
        machine: Whose scanner.
        affine: Of the common grid, without rotation.
        rng: Bias field, noise and the exposure of this one scan are drawn from it.

    Returns:
        Stored values (X, Y, Z), label map of the same shape, affine (voxel to millimetres, RAS).
    """
    signal = np.tensordot(np.array(machine.contrast, np.float32), person.tissue, axes=1)
    signal = np.maximum(signal + machine.detail * person.detail, 0)
    signal = _shaded(signal, machine.shading, rng)
    tissue, affine = _cut(person.tissue, machine, affine), affine.copy()
    signal = _cut(signal[None], machine, affine)[0]
    affine[2, 3] += round(machine.cut_mm[1] / affine[2, 2]) * affine[2, 2]
    if machine.thick > 1:
        signal, tissue = _thicken(signal[None], machine.thick)[0], _thicken(tissue, machine.thick)
        affine[2, 3] += affine[2, 2] * (machine.thick - 1) / 2
        affine[2, 2] *= machine.thick
    signal = signal * float(np.exp(rng.normal(0, 0.08)))
    noise = RandRicianNoise(prob=1.0, std=machine.noise, sample_std=False)
    noise.set_random_state(seed=int(rng.integers(2**32)))
    signal = _plain(noise(torch.from_numpy(signal)))
    image, label = _stored(signal, machine.stored), label_of(tissue)
    if machine.flipped:
        flip = np.diag([-1.0, -1.0, 1.0, 1.0])
        flip[0, 3], flip[1, 3] = image.shape[0] - 1, image.shape[1] - 1
        image, label, affine = image[::-1, ::-1], label[::-1, ::-1], affine @ flip
    return np.ascontiguousarray(image), np.ascontiguousarray(label), affine


def _shaded(signal: Array, size: float, rng: np.random.Generator) -> Array:
    if size <= 0:
        return signal
    field = RandBiasField(degree=3, coeff_range=(-size, size), prob=1.0)
    field.set_random_state(seed=int(rng.integers(2**32)))
    return _plain(field(torch.from_numpy(signal[None])))[0]


def _cut(maps: Array, machine: Scanner, affine: NDArray[np.float64]) -> Array:
    top, bottom = (round(length / affine[2, 2]) for length in machine.cut_mm)
    return maps[..., bottom : maps.shape[-1] - top]


def _thicken(maps: Array, factor: int) -> Array:
    """Average neighbouring slices; slices at the top that fill no thick one are left out."""
    whole = maps.shape[-1] // factor * factor
    return maps[..., :whole].reshape(*maps.shape[:-1], -1, factor).mean(axis=-1)


def _stored(signal: Array, kind: Stored) -> NDArray[np.generic]:
    """Scale to the scanner's range. Fractions are rounded, so that no processor's last bit shows in the file."""
    scaled = np.clip(signal.astype(np.float64) * _SCALE[kind], 0, _TOP[kind])
    return np.round(scaled, 4 if kind == "float32" else 0).astype(kind)


def _plain(tensor: object) -> Array:
    return np.asarray(torch.as_tensor(tensor), dtype=np.float32)
