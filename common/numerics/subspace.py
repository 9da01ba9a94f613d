"""Leading eigenpairs of a large symmetric positive semidefinite matrix that is known by its products only.

References: FIPA (Chang, He, Hao 2026), eq. 10-12: subspace iteration with Rayleigh-Ritz. Tropp, Yurtsever, Udell,
Cevher: Fixed-rank approximation of a positive-semidefinite matrix from streaming data, NIPS 2017, Algorithm 3: the
Nyström approximation from one product.

Rows are directions: V is (L, p), eigenvectors are the rows of U (r, p). Beside what the operator itself needs, a call
holds two or three tensors (L, p) and small blocks. Small matrices are float64 on the CPU; see rows.py for the accuracy
of the bases. The same call on the same machine with the same number of threads gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.numerics.rows import (
    check_rows,
    column_blocks,
    cross_gram,
    fix_signs,
    fix_signs_,
    orthonormal,
    orthonormalise_,
    random_start,
    right_singular,
    transform_,
)

__all__ = [
    "Eigenpairs",
    "SymmetricOperator",
    "captured_energy",
    "dense_eigenpairs",
    "fix_signs",
    "nystrom",
    "orthonormal",
    "random_start",
    "subspace_iteration",
]

NOISE = (
    64.0  # times the dtype's epsilon and the largest eigenvalue: eigenvalues up to this are rounding, so zero
)
LARGEST_SHIFT = 1e-2  # of ‖H V‖_F: what the Nyström shift may grow to before the matrix counts as indefinite


class SymmetricOperator(Protocol):
    """A symmetric positive semidefinite matrix H (p, p), known by its products."""

    @property
    def size(self) -> int:
        """Return p."""

    def matmat(self, V: Tensor) -> Tensor:
        """Return the rows H v for the rows v of V (L, p), as a tensor of its own that the caller may overwrite."""


@dataclass(frozen=True)
class Eigenpairs:
    """Leading eigenpairs.

    Attributes:
        U: Orthonormal rows (r, p), signs as by `fix_signs`.
        lam: Eigenvalues (r,) ≥ 0, descending, in the dtype and on the device of U. What is below 64 ε of the largest
            (or L ε, with more than 64 rows) is exactly 0; the vectors of zeros are still orthonormal.
        residuals: ‖H u − λ u‖ (r,) with the eigenvalues as they are given, or None where they would cost products.
        products: Number of columns that H was multiplied with in all.
    """

    U: Tensor
    lam: Tensor
    residuals: Tensor | None
    products: int


def subspace_iteration(
    op: SymmetricOperator,
    rank: int,
    *,
    oversampling: int = 10,
    iterations: int = 2,
    start: Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Eigenpairs, Tensor]:
    """Compute leading eigenpairs by subspace iteration and Rayleigh-Ritz (FIPA, eq. 10-12).

        W = H V, V = orth(W), `iterations` times                      (10)
        S = V H Vᵀ = Y diag(λ) Yᵀ                                     (11)
        U = the first r rows of Yᵀ V                                  (12)

    The product H V of (11) also gives the residuals. The error of a leading direction shrinks by λ_{L+1} / λ_i per
    iteration.

    Args:
        op: The matrix H, size p.
        rank: r ≥ 1. More than p counts as p.
        oversampling: s ≥ 0; L = min(r + s, p) rows are iterated.
        iterations: q ≥ 0; each costs L products, and Rayleigh-Ritz L more.
        start: Rows (any number, p) to begin with, for example the basis of the round before; the first L are used,
            missing ones are drawn. None: all are drawn.
        seed: For drawn rows.
        dtype: float32 or float64.
        device: Where to compute; None: where `start` is, else the CPU.

    Returns:
        The r leading eigenpairs, and all L orthonormal rows (L, p) in descending order of their Ritz values, to start
        the next call with. U is a view of their first r rows.

    Raises:
        ValueError: An argument out of its range, a start of another size, or values that are not finite.
    """
    r, V = _begin(op, rank, oversampling, start, seed, dtype, device)
    if iterations < 0:
        raise ValueError(f"The number of iterations must be at least 0, got {iterations}.")
    for _ in range(iterations):
        V = orthonormalise_(_product(op, V))
    HV = _product(op, V)
    small = cross_gram(V, HV)
    _check_finite(small)
    values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
    lam = _without_noise(values.flip(0), dtype)
    residuals = _rotate_(V, HV, vectors.flip(1).T.contiguous(), lam)
    fix_signs_(V)
    found = Eigenpairs(
        V[:r],
        lam[:r].to(V.device, dtype),
        residuals[:r].to(V.device, dtype),
        (iterations + 1) * len(V),
    )
    return found, V


def nystrom(
    op: SymmetricOperator,
    rank: int,
    *,
    oversampling: int = 10,
    start: Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Eigenpairs, Tensor]:
    """Compute leading eigenpairs from one product with L rows (Tropp et al. 2017, Algorithm 3).

        W = H V + ν V,  V Wᵀ = C Cᵀ,  C⁻¹ W = X diag(s) U (thin SVD),  λ = max(0, s² − ν)

    The shift ν = ε ‖H V‖_F keeps the Cholesky factor alive where H is (nearly) singular; where rounding in H V is
    larger than that, ν grows tenfold at a time. With a cold start the result is a rough sketch; started with the
    basis of the round before it follows a matrix that changes slowly.

    Args:
        op: The matrix H, size p.
        rank: r ≥ 1. More than p counts as p.
        oversampling: s ≥ 0; L = min(r + s, p).
        start: As in `subspace_iteration`.
        seed: For drawn rows.
        dtype: float32 or float64.
        device: Where to compute; None: where `start` is, else the CPU.

    Returns:
        The r leading eigenpairs without residuals, and all L rows to start the next call with. U is a view of them.

    Raises:
        ValueError: As `subspace_iteration`, or H is clearly not positive semidefinite.
    """
    r, V = _begin(op, rank, oversampling, start, seed, dtype, device)
    W = _product(op, V)
    small = cross_gram(V, W)
    _check_finite(small)
    norm = float(torch.linalg.vector_norm(W, dtype=torch.float64))
    _check_finite(torch.tensor(norm))
    if norm == 0:
        return Eigenpairs(V[:r], torch.zeros(r, dtype=dtype, device=V.device), None, len(V)), V
    factor, shift = _shifted_factor(0.5 * (small + small.T), cross_gram(V, V), norm, dtype)
    W.add_(V, alpha=shift)
    transform_(W, torch.linalg.inv(factor))
    basis, singular = right_singular(W)
    lam = _without_noise(singular.square() - shift, dtype)
    return Eigenpairs(basis[:r], lam[:r].to(V.device, dtype), None, len(V)), basis


def dense_eigenpairs(H: Tensor, rank: int) -> Eigenpairs:
    """Compute leading eigenpairs of a small matrix that is given as such, in float64.

    Args:
        H: Symmetric (p, p), finite, float32 or float64.
        rank: r ≥ 1. More than p counts as p.

    Returns:
        The r leading eigenpairs in the dtype of H with their residuals; no products.

    Raises:
        ValueError: A matrix that is not square, not symmetric or not finite, or a rank below 1.
    """
    check_rows(H, "H")
    _check_rank(rank, 0)
    if H.shape[0] != H.shape[1]:
        raise ValueError(f"H must be square, got {tuple(H.shape)}.")
    wide = H.detach().to(torch.float64)
    _check_finite(wide)
    tolerance = torch.finfo(H.dtype).eps ** 0.5 * float(wide.abs().max())
    if float((wide - wide.T).abs().max()) > tolerance:
        raise ValueError("H must be symmetric; its entries differ from those of its transpose.")
    wide = 0.5 * (wide + wide.T)
    values, vectors = torch.linalg.eigh(wide)
    U = fix_signs_(vectors.flip(1).T[:rank].contiguous())
    lam = _without_noise(values.flip(0), H.dtype)[:rank]
    residuals = torch.linalg.vector_norm(U @ wide - lam[:, None] * U, dim=1)
    return Eigenpairs(U.to(H.dtype), lam.to(H.dtype), residuals.to(H.dtype), 0)


def captured_energy(op: SymmetricOperator, U: Tensor, exact_trace: float) -> float:
    """Return tr(U H Uᵀ) / exact_trace: the share of the energy in the span of U. Costs as many products as rows.

    Args:
        op: The matrix H, size p.
        U: Orthonormal rows (r, p); r may be 0.
        exact_trace: > 0, the trace of H, or the sum of its r largest eigenvalues to compare with the best rank-r span.

    Raises:
        ValueError: A trace that is not positive and finite, or rows of another size.
    """
    if not 0 < exact_trace < float("inf"):
        raise ValueError(f"The trace to compare with must be positive and finite, got {exact_trace}.")
    check_rows(U, "U")
    if U.shape[1] != op.size:
        raise ValueError(f"U has directions of size {U.shape[1]}, the matrix has size {op.size}.")
    if not len(U):
        return 0.0
    HU, total = _product(op, U), 0.0
    for block in column_blocks(2 * len(U), op.size):
        total += float((U[:, block].to(torch.float64) * HU[:, block].to(torch.float64)).sum())
    return total / exact_trace


def _check_rank(rank: int, oversampling: int) -> None:
    if rank < 1 or oversampling < 0:
        raise ValueError(
            f"The rank must be at least 1 and the oversampling at least 0, got {rank} and {oversampling}."
        )


def _check_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(
            "The matrix has values that are not finite; look for a loss or weights out of range."
        )


def _begin(
    op: SymmetricOperator,
    rank: int,
    oversampling: int,
    start: Tensor | None,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> tuple[int, Tensor]:
    """Check the arguments of an eigensolver; return the rank and the L orthonormal rows to begin with."""
    _check_rank(rank, oversampling)
    size = op.size
    if size < 1:
        raise ValueError(f"The matrix must have at least one dimension, got size {size}.")
    if device is None:
        device = "cpu" if start is None else start.device
    count = min(rank + oversampling, size)
    V = torch.empty(count, size, dtype=dtype, device=device)
    check_rows(V, "The basis")
    given = 0
    if start is not None:
        if start.ndim != 2 or start.shape[1] != size:
            raise ValueError(f"The start must have the shape (rows, {size}), got {tuple(start.shape)}.")
        given = min(len(start), count)
        V[:given] = start.detach()[:given]
    if given < count:
        V[given:] = random_start(count - given, size, seed, dtype, device)
    return min(rank, size), orthonormalise_(V)


def _product(op: SymmetricOperator, V: Tensor) -> Tensor:
    W = op.matmat(V).detach()
    if W.shape != V.shape:
        raise ValueError(f"The matrix product must have the shape {tuple(V.shape)}, got {tuple(W.shape)}.")
    return W.to(V.device, V.dtype)


def _without_noise(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Set what is negative or rounding, relative to the first and largest value, to exactly 0."""
    limit = max(NOISE, len(values)) * torch.finfo(dtype).eps * max(0.0, float(values[0]))
    return torch.where(values > limit, values, 0.0)


def _rotate_(V: Tensor, HV: Tensor, T: Tensor, lam: Tensor) -> Tensor:
    """Replace V by T V in place and return ‖T H V − diag(lam) T V‖ by rows, float64 on the CPU."""
    T, lam = T.to(V.device), lam.to(V.device)
    squares = torch.zeros(len(V), dtype=torch.float64, device=V.device)
    for block in column_blocks(2 * len(V), V.shape[1]):
        ahead = T @ HV[:, block].to(torch.float64)  # before V is written: HV may be V itself
        rotated = (T @ V[:, block].to(torch.float64)).to(V.dtype)
        V[:, block] = rotated
        squares += (ahead - lam[:, None] * rotated.to(torch.float64)).square().sum(dim=1)
    return squares.sqrt().cpu()


def _shifted_factor(small: Tensor, gram: Tensor, norm: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the Cholesky factor of V H Vᵀ + ν V Vᵀ and the shift ν, the first in ε, 10 ε, ... (times norm) to work."""
    shift = torch.finfo(dtype).eps * norm
    while shift <= LARGEST_SHIFT * norm:
        factor, failed = torch.linalg.cholesky_ex(small + shift * gram)
        if not int(failed):
            return factor, shift
        shift *= 10
    raise ValueError("The matrix is not positive semidefinite, so it has no Nyström approximation.")
