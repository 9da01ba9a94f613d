"""What becomes of a sketch before it travels: smaller numbers, and noise on request.

A sketch is U (r, p), orthonormal rows, with eigenvalues lam (r,). `pack` and `unpack` are the wire forms:

    float32   U as it is
    bf16      U rounded to bfloat16: 8 bits of mantissa, half the bytes
    int8      each row divided by its scale, max|row| / 127, rounded to the nearest whole number, ties to even: a quarter

No copy in float64 of a whole U is ever made: rows and blocks of columns are converted one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from common.numerics.rng import generator
from common.numerics.rows import column_blocks, orthonormal, residual_gram, right_singular

Codec = Literal["float32", "bf16", "int8"]
LEVELS = 127  # int8 without -128, so that a direction and its negative have mirrored codes
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below, a scale would lose digits or be flushed to zero


def pack(U: Tensor, how: Codec) -> dict[str, Tensor]:
    """Return the wire form of directions.

    int8 keeps every entry within half a scale (beside float32 rounding). A row whose entries are all below 1.5e-36 in
    magnitude is sent as zeros with scale 0.

    Args:
        U: Finite floating-point rows (r, p), r ≥ 0, p ≥ 1, in the range of the wire form.
        how: Name of the wire form.

    Returns:
        {"U": float32 or bfloat16 (r, p)}, or {"U": int8 (r, p), "scale": float32 (r,)}, on the device of U.

    Raises:
        ValueError: An unknown form, a shape or dtype that does not fit, or values not finite or beyond the form's range.
    """
    if how not in ("float32", "bf16", "int8"):
        raise ValueError(f"A sketch travels as float32, bf16 or int8, got {how!r}.")
    if U.ndim != 2 or U.shape[1] < 1 or not U.is_floating_point():
        raise ValueError(
            f"Directions must be floating-point rows (r, p) with p at least 1, got {tuple(U.shape)} of {U.dtype}."
        )
    U = U.detach()
    if how == "int8":
        return _pack_int8(U)
    wire = U.to(torch.float32 if how == "float32" else torch.bfloat16)
    _check_finite(wire, f"Directions sent as {how} must be finite and in its range.")
    return {"U": wire}


def unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the directions of a wire form, whoever sent it.

    Args:
        tensors: What `pack` returned.

    Returns:
        float32 (r, p).

    Raises:
        ValueError: Missing or unknown tensors, a wrong shape or dtype, a bad scale, or values that are not finite.
    """
    U = tensors.get("U")
    if U is None or U.ndim != 2 or U.shape[1] < 1:
        raise ValueError('A packed sketch needs rows "U" (r, p) with p at least 1.')
    coded = U.dtype == torch.int8
    if not coded and U.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"A packed sketch is float32, bfloat16 or int8, got {U.dtype}.")
    if set(tensors) != ({"U", "scale"} if coded else {"U"}):
        raise ValueError(f'A packed sketch is "U", with a "scale" exactly for int8; got {sorted(tensors)}.')
    if not coded:
        _check_finite(U, "A packed sketch must be finite.")
        return U.to(torch.float32)
    scale = tensors["scale"]
    if scale.dtype != torch.float32 or scale.shape != (len(U),):
        raise ValueError(
            f"The scales must be float32 ({len(U)},), one a direction, got {tuple(scale.shape)} of {scale.dtype}."
        )
    limit = torch.finfo(torch.float32).max / LEVELS
    if not ((scale >= 0) & (scale <= limit)).all():
        raise ValueError(f"The scales must be between 0 and {limit:.3g}.")
    if U.numel() and int(U.min()) < -LEVELS:
        raise ValueError(f"The codes must be between -{LEVELS} and {LEVELS}, got -128.")
    return U.to(torch.float32).mul_(scale[:, None])


def projection_error(U: Tensor, approx: Tensor) -> float:
    """Return the sine of the largest principal angle between two row spaces: ‖U (I - P)‖₂, P onto the span of approx.

    Args:
        U: Linearly independent rows (r, p), float32 or float64; they need not be orthonormal.
        approx: Rows (r, p) of the same dtype and device. Where they are dependent the span is smaller and the sine 1.

    Returns:
        In [0, 1]; 0 for r = 0. Its own error is about the dtype's epsilon, so compare in float64 what is close.

    Raises:
        ValueError: Different shapes, or as `orthonormal`.
    """
    if not len(U) and U.shape == approx.shape:
        return 0.0
    Q, A = _bases(U, approx)
    return min(1.0, math.sqrt(max(0.0, float(torch.linalg.eigvalsh(residual_gram(Q, A))[-1]))))


def span_error(U: Tensor, approx: Tensor) -> float:
    """Return ‖P_U - P_approx‖_F, the Frobenius distance of the orthogonal projections onto two row spaces.

    It is √2 times the root of the sum of squared sines of all principal angles; at most √(2r).

    Args:
        U: Linearly independent rows (r, p), float32 or float64.
        approx: Rows (r, p) of the same dtype and device.

    Raises:
        ValueError: As `projection_error`.
    """
    if not len(U) and U.shape == approx.shape:
        return 0.0
    Q, A = _bases(U, approx)
    return math.sqrt(max(0.0, float(residual_gram(Q, A).trace() + residual_gram(A, Q).trace())))


def clip_and_noise(U: Tensor, lam: Tensor, *, clip: float, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Bound the factor of a sketch in norm, add Gaussian noise to it and diagonalise it again.

    The factor is F = diag(lam)^½ U, so that H ≈ Fᵀ F; clipped to ‖F‖_F ≤ clip; noise of standard deviation noise · clip
    (noise itself where clip is 0) is added to every entry; a thin SVD gives the new U and lam.

    No privacy guarantee is accounted for: a name for ε and δ would need the sensitivity of F to one patient and the
    number of rounds, and neither is known here. It only blurs what is sent.

    Args:
        U: Orthonormal rows (r, p), float32 or float64.
        lam: Eigenvalues (r,) ≥ 0, in the dtype of U.
        clip: Largest ‖F‖_F, ≥ 0; 0 is off.
        noise: ≥ 0; 0 is off.
        seed: Of the noise; the same numbers on every device. Any whole number.

    Returns:
        New U and lam. Where nothing is to be done (both off; no rows; no noise and within the norm) these are the very
        tensors that were given; where only the norm is clipped U is.

    Raises:
        ValueError: A value out of its range or not finite, or shapes that do not fit.
    """
    for name, value in (("clip", clip), ("noise", noise)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")
    if U.ndim != 2 or lam.shape != (len(U),):
        raise ValueError(
            f"A sketch is U (r, p) with lam (r,), got {tuple(U.shape)} and {tuple(lam.shape)}; send one value a row."
        )
    if not (torch.isfinite(lam) & (lam >= 0)).all():
        raise ValueError("The eigenvalues of a sketch must be finite and at least 0.")
    if not len(U) or (clip == 0 and noise == 0):
        return U, lam
    norm = math.sqrt(float(lam.sum(dtype=torch.float64)))
    factor = min(1.0, clip / norm) if clip and norm else 1.0
    if noise == 0:
        return (U, lam) if factor == 1 else (U, lam * factor**2)
    sd, random = noise * clip if clip else noise, generator("clip_and_noise", seed)
    F = U.detach().clone()
    for row, value in zip(F, lam.tolist(), strict=True):
        row *= factor * math.sqrt(value)
        drawn = torch.randn(U.shape[1], generator=random, dtype=torch.float32)
        row += sd * drawn.to(row.device, row.dtype)
    basis, singular = right_singular(F)
    return basis, singular.square().to(lam.device, lam.dtype)


def _pack_int8(U: Tensor) -> dict[str, Tensor]:
    codes = torch.empty(U.shape, dtype=torch.int8, device=U.device)
    scales = torch.zeros(len(U), dtype=torch.float32, device=U.device)
    for row, code, scale in zip(U, codes, scales, strict=True):
        peak = float(torch.linalg.vector_norm(row.to(torch.float32), ord=math.inf))
        if not math.isfinite(peak):
            raise ValueError("Directions sent as int8 must be finite and in the range of float32.")
        if peak / LEVELS < SMALLEST_SCALE:
            code.zero_()
            continue
        scale.fill_(peak / LEVELS)
        for block in column_blocks(1, len(row)):
            steps = torch.round(row[block].to(torch.float64) / float(scale))  # ties to even
            code[block] = steps.clamp_(-LEVELS, LEVELS).to(torch.int8)
    return {"U": codes, "scale": scales}


def _check_finite(rows: Tensor, sentence: str) -> None:
    for row in rows:  # row by row: the mask of a whole sketch would be a quarter of its size
        if not torch.isfinite(row).all():
            raise ValueError(sentence)


def _bases(U: Tensor, approx: Tensor) -> tuple[Tensor, Tensor]:
    if U.shape != approx.shape or U.dtype != approx.dtype:
        raise ValueError(
            f"Row spaces are compared at one shape and dtype, got {tuple(U.shape)} of {U.dtype} and "
            f"{tuple(approx.shape)} of {approx.dtype}."
        )
    Q = orthonormal(U, dependent="drop")
    if len(Q) < len(U):
        raise ValueError("The rows of U must be linearly independent.")
    return Q, orthonormal(approx, dependent="drop")
