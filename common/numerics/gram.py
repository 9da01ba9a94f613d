"""FIPA's server step, streamed: (H + βI)⁻¹ b without a matrix or a basis of the parameters' size in memory.

Reference: Chang, He, Hao: Fisher-Informed Parameterwise Aggregation for Federated Learning with Heterogeneous Data, 2026.

The rows of all sites' sketches are stacked to V (R, p), R = Σ r_m, with σ = (N_m/N) λ and a = U_m Δθ_m per row:

    H = Σ_m (N_m/N) U_mᵀ Λ_m U_m = Vᵀ diag(σ) V,        b = Σ_m (N_m/N) U_mᵀ Λ_m U_m Δθ_m = Vᵀ (σ a)

The paper takes a thin QR of Vᵀ, which needs all of V at once. The Gram matrix G = V Vᵀ does the same from blocks of
columns: with W = diag(√σ) V the step is Wᵀ (W Wᵀ + βI)⁻¹ √σ a (push-through identity), so

    K = √σ G √σ = E D Eᵀ,        c = √σ E (D + β)⁻¹ Eᵀ √σ a,        (H + βI)⁻¹ b = Vᵀ c

D holds the non-zero eigenvalues of H themselves, not their squares or roots. V is read twice, once for G and once for
Vᵀ c. Nothing here needs orthonormal rows: rows rounded to fewer bits (quantised sketches) are taken as they are.

Accuracy: G carries a relative error of about 1e-16, so eigenvalues of H below about 1e-15 of the largest are rounding.
With β = 0 the pseudo-inverse drops what is below `rcond`; with β > 0 an eigenvalue λ enters with the relative error
1e-16 λ_max / (λ + β), so a β below 1e-8 λ_max costs digits.

Everything is float64. The same blocks give the same bytes on the same machine with the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

Blocks = Callable[[], Iterable[tuple[slice, Tensor]]]
"""One pass over V (R, p): adjoining slices of 0..p in order, each with V[:, slice] in any floating dtype.

A block may be overwritten when the next one is asked for. Every call begins a new pass with the same values.
"""

BLOCK_VALUES = 1 << 23  # values of all rows together that are held in float64 at once: 64 MiB
EPS = torch.finfo(torch.float64).eps
INDEFINITE = 1e-6  # a Gram matrix has no eigenvalue below minus this share of the largest


def gram(blocks: Blocks, extra: Callable[[slice], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return G = V Vᵀ, and v = V x for one more vector, in one pass over V.

    Args:
        blocks: V (R, p) in blocks; the products are formed on their device.
        extra: Returns x[slice] (n,) of a vector x (p,); None where there is none.

    Returns:
        G (R, R), symmetric to the bit, and v (R,), zeros without `extra`; float64 on the CPU.

    Raises:
        ValueError: No block; blocks or parts of x that do not fit; values not finite, or whose squares overflow.
    """
    total: Tensor | None = None
    along = torch.empty(0, dtype=torch.float64)
    for where, block in _columns(blocks):
        if total is None:
            total = torch.zeros(len(block), len(block), dtype=torch.float64, device=block.device)
            along = torch.zeros(len(block), dtype=torch.float64, device=block.device)
        total += _square(block)
        if extra is not None:
            part = extra(where).detach().to(block.device, torch.float64)
            if part.shape != block.shape[1:]:
                raise ValueError(
                    f"The vector beside the blocks must have the shape {tuple(block.shape[1:])} in columns "
                    f"{where.start} to {where.stop}, got {tuple(part.shape)}."
                )
            along += block @ part
    if total is None:
        raise ValueError("A Gram matrix needs at least one block of columns; got none.")
    total, along = total.cpu(), along.cpu()
    if not torch.isfinite(total.diagonal()).all():  # a sum of squares: no bad value can hide in it
        raise ValueError("The rows of a Gram matrix must be finite, with squares in the range of float64.")
    if not torch.isfinite(along).all():
        raise ValueError(
            "The vector beside the blocks must be finite, with products in the range of float64."
        )
    return total.tril() + total.tril(-1).T, along


def solve(G: Tensor, sigma: Tensor, a: Tensor, *, beta: float = 0.0, rcond: float = 1e-10) -> Tensor:
    """Return the coefficients c of (H + βI)⁻¹ b = Vᵀ c, or with β = 0 of the pseudo-inverse H⁺ b = Vᵀ c.

    Args:
        G: V Vᵀ (R, R), float64; its lower triangle is used.
        sigma: Weights σ of the rows (R,), finite, ≥ 0; all zero gives zeros.
        a: U_m Δθ_m of every row (R,), finite.
        beta: β ≥ 0, in the units of the eigenvalues of H.
        rcond: With β = 0, eigenvalues of H of at most this share of the largest count as zero, 0 ≤ rcond < 1. Below
            R times the rounding of float64 it is taken as that.

    Returns:
        c (R,), float64 on the CPU.

    Raises:
        ValueError: Shapes that do not fit, values out of range or not finite, or a G that is no Gram matrix.
    """
    G, a = _checked(G, a, "a")
    sigma = _vector(sigma, len(a), "sigma")
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number of at least 0, got {beta}.")
    _check_share(rcond)
    if (sigma < 0).any():
        raise ValueError(f"The weights sigma must be at least 0, got {float(sigma.min()):.3g}.")
    largest = float(sigma.max()) if len(sigma) else 0.0
    if largest == 0:
        return torch.zeros_like(a)
    # H, βI and b divided by one number: the step is the same, and nothing overflows
    root = (sigma / largest).sqrt()
    K = root[:, None] * G * root
    return root * _apply_inverse(K, root * a, shift=beta / largest, rcond=rcond)


def combine(blocks: Blocks, coefficients: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield Vᵀ c block by block.

    Args:
        blocks: V (R, p) in blocks.
        coefficients: c (R,), finite.

    Yields:
        Adjoining slices of 0..p in order, each with a tensor (n,) of its own, float64, on the device of the block.

    Raises:
        ValueError: Shapes that do not fit, or a coefficient that is not finite.
    """
    c = _vector(coefficients, None, "coefficients")
    for where, block in _columns(blocks):
        if len(block) != len(c):
            raise ValueError(
                f"V has {len(block)} rows and there are {len(c)} coefficients; give one for each row."
            )
        yield where, c.to(block.device) @ block


def _columns(blocks: Blocks) -> Iterator[tuple[slice, Tensor]]:
    """Yield the blocks in float64, checked, and cut where they hold more than `BLOCK_VALUES`."""
    rows, end = -1, 0
    scratch = torch.empty(0, dtype=torch.float64)
    for where, block in blocks():
        if block.ndim != 2 or not block.is_floating_point():
            raise ValueError(
                f"A block must be floating-point (rows, columns), got {tuple(block.shape)} of {block.dtype}."
            )
        if rows not in (-1, len(block)):
            raise ValueError(f"All blocks must have the same rows, got {rows} and {len(block)}.")
        rows, stop = len(block), end + block.shape[1]
        if where != slice(end, stop):
            raise ValueError(
                f"Blocks must adjoin in order: expected columns {end} to {stop}, got {where.start} to {where.stop}."
            )
        block, width = block.detach(), max(1, BLOCK_VALUES // max(1, rows))
        for start in range(0, stop - end, width):
            part = block[:, start : start + width]
            if part.dtype != torch.float64:
                if scratch.numel() < part.numel() or scratch.device != part.device:
                    scratch = torch.empty(part.numel(), dtype=torch.float64, device=part.device)
                # into the same memory again: fresh pages would cost more than the conversion
                part = scratch[: part.numel()].view(part.shape).copy_(part)
            yield slice(end + start, end + start + part.shape[1]), part
        end = stop


def _square(block: Tensor) -> Tensor:
    """Return B Bᵀ; on the CPU through NumPy, which computes half of it (BLAS syrk) where torch computes all."""
    if block.device.type != "cpu":
        return block @ block.T
    array = block.numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # told by the caller, who looks at the sum
        return torch.from_numpy(array @ array.T)


def _apply_inverse(K: Tensor, right: Tensor, *, shift: float, rcond: float) -> Tensor:
    """Return (K + shift I)⁻¹ times a vector, or its pseudo-inverse times it for shift 0."""
    if not len(K):
        return right
    D, E = torch.linalg.eigh(K)
    if D[0] < -INDEFINITE * D.abs().max():
        raise ValueError(
            f"A Gram matrix has no negative eigenvalue, got {float(D[0]):.3g} beside {float(D[-1]):.3g}; pass V Vᵀ."
        )
    if D[-1] <= 0:
        return torch.zeros_like(right)
    # what is left below the rounding of K is noise, and its inverse would be large noise
    least = D[-1] * (len(K) * EPS if shift else max(rcond, len(K) * EPS))
    D = D.clamp(min=0) + shift
    gain = torch.where(least < D, 1 / D, 0.0)
    return E @ (gain * (E.T @ right))


def _checked(G: Tensor, vector: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if G.ndim != 2 or G.shape[0] != G.shape[1]:
        raise ValueError(f"G must be square, got {tuple(G.shape)}.")
    G = G.detach().to("cpu", torch.float64)
    if not torch.isfinite(G).all():
        raise ValueError("G must be finite.")
    if (G.diagonal() < 0).any():
        raise ValueError("A Gram matrix has squares on its diagonal, got a negative number; pass V Vᵀ.")
    return G, _vector(vector, len(G), name)


def _vector(vector: Tensor, length: int | None, name: str) -> Tensor:
    if vector.ndim != 1 or length not in (None, len(vector)):
        raise ValueError(
            f"{name} must be a vector with one number a row of V{'' if length is None else f' ({length})'}, "
            f"got {tuple(vector.shape)}."
        )
    vector = vector.detach().to("cpu", torch.float64)
    if not torch.isfinite(vector).all():
        raise ValueError(f"{name} must be finite.")
    return vector


def _check_share(rcond: float) -> None:
    if not 0 <= rcond < 1:
        raise ValueError(f"rcond must be at least 0 and below 1, got {rcond}.")
