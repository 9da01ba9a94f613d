"""Orthonormal bases of a few very long rows: Cholesky-QR with pivots, block by block, with a small memory.

A basis here is a tensor (L, p) whose rows are directions: L is tens to hundreds, p may be ten millions. Everything that
is large is read and written in blocks of columns; everything that is small (L × L) is float64 on the CPU.

The method is Cholesky-QR applied twice (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya: Roundoff error analysis of the
CholeskyQR2 algorithm, ETNA 44, 2015), with the Gram matrix in float64. It squares the condition number, so it is used
only on rows that a pivoted Cholesky factor calls well conditioned; the other rows are projected against these, brought
back to unit length and treated the same way (block Gram-Schmidt, projected until nothing is left). So rows whose
lengths or angles differ by many powers of ten lose no accuracy, and dependent rows are found.

Devices: CPU and CUDA (float64 is needed). The same input gives the same bytes on the same machine with the same number
of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from common.numerics.rng import generator

BLOCK_VALUES = 1 << 20  # values of all rows together that are held in float64 at once: 8 MiB
LEAST_PIVOT = 1e-10  # squared: Cholesky-QR works on rows with a condition number up to about 1e5
CLEAN = {torch.float32: 4.0, torch.float64: 64.0}  # times the dtype's epsilon: orthonormal up to rounding
DEPENDENT = {
    torch.float32: 1e-6,
    torch.float64: 1e-13,
}  # a row that keeps less of its length is a sum of the others
MOST_PASSES = 3  # Cholesky-QR, or projection, in a row; two suffice, the third is for rows at the limit


def check_rows(rows: Tensor, name: str) -> None:
    """Refuse what the functions of this module cannot take.

    Raises:
        ValueError: Not (L, p) with p ≥ 1, or neither float32 nor float64.
    """
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"{name} must have the shape (rows, p) with p at least 1, got {tuple(rows.shape)}.")
    if rows.dtype not in CLEAN:
        raise ValueError(f"{name} must be float32 or float64, got {rows.dtype}; convert it first.")


def column_blocks(rows: int, size: int) -> Iterator[slice]:
    """Yield slices that cut 0..size into blocks of at most `BLOCK_VALUES` values over all rows."""
    width = max(1, BLOCK_VALUES // max(1, rows))
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def cross_gram(A: Tensor, B: Tensor) -> Tensor:
    """Return A Bᵀ, computed in float64.

    Args:
        A: Rows (L, p).
        B: Rows (M, p), on the same device.

    Returns:
        float64 (L, M) on the CPU.
    """
    total = torch.zeros(len(A), len(B), dtype=torch.float64, device=A.device)
    for block in column_blocks(len(A) + len(B), A.shape[1]):
        total += A[:, block].to(torch.float64) @ B[:, block].to(torch.float64).T
    return total.cpu()


def residual_gram(B: Tensor, Q: Tensor) -> Tensor:
    """Return the Gram matrix of what orthonormal rows Q leave of B: (B − (B Qᵀ) Q)(B − (B Qᵀ) Q)ᵀ.

    The difference is formed before it is squared, so small remainders keep their digits.

    Args:
        B: Rows (M, p).
        Q: Orthonormal rows (L, p), on the same device.

    Returns:
        float64 (M, M) on the CPU.
    """
    weights = cross_gram(B, Q).to(B.device)
    total = torch.zeros(len(B), len(B), dtype=torch.float64, device=B.device)
    for block in column_blocks(len(B) + len(Q), B.shape[1]):
        rest = B[:, block].to(torch.float64) - weights @ Q[:, block].to(torch.float64)
        total += rest @ rest.T
    return (0.5 * (total + total.T)).cpu()


def transform_(rows: Tensor, T: Tensor) -> Tensor:
    """Replace the rows by T · rows in place and return the Gram matrix of the result as it is stored.

    Args:
        rows: (L, p), float32 or float64; overwritten.
        T: float64 (L, L).

    Returns:
        float64 (L, L) on the CPU, symmetric.
    """
    T = T.to(rows.device)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in column_blocks(len(rows), rows.shape[1]):
        stored = (T @ rows[:, block].to(torch.float64)).to(rows.dtype)
        rows[:, block] = stored
        stored = stored.to(torch.float64)
        total += stored @ stored.T
    return (0.5 * (total + total.T)).cpu()


def orthonormal(V: Tensor, *, dependent: Literal["replace", "drop"] = "replace") -> Tensor:
    """Return an orthonormal basis of the row space.

    Accuracy, measured as the largest entry of |Q Qᵀ − I|: about 1e-7 in float32 and 1e-14 in float64, also for rows
    that are nearly dependent. A row is dependent if the others leave less than 1e-6 (float32) or 1e-13 (float64) of its
    own length.
    The rows of the result are not in the order of V; independent ones come first.

    Args:
        V: Rows (L, p) with L ≤ p, finite, float32 or float64, of any lengths. Unchanged.
        dependent: "replace" puts fixed pseudo-random directions, made orthogonal to the others, in the place of
            dependent and zero rows, so that L rows come back; "drop" leaves them out.

    Returns:
        Rows (L, p), or fewer with "drop", in the dtype and on the device of V.

    Raises:
        ValueError: A shape or dtype that does not fit, more rows than columns, or a value that is not finite.
    """
    check_rows(V, "V")
    return orthonormalise_(V.detach().clone(), dependent=dependent)


def orthonormalise_(rows: Tensor, *, dependent: Literal["replace", "drop"] = "replace") -> Tensor:
    """Do what `orthonormal` does in the memory of its argument, which is overwritten."""
    check_rows(rows, "V")
    count, size = rows.shape
    if count > size and dependent == "replace":
        raise ValueError(
            f"{count} orthonormal rows do not fit into {size} dimensions; give at most {size} rows."
        )
    done = _absorb_(rows, 0)
    if dependent == "drop":
        return rows[:done]
    attempt = 0
    while done < count:
        rows[done:] = random_start(count - done, size, attempt, rows.dtype, rows.device)
        done, attempt = _absorb_(rows, done), attempt + 1
    return rows


def random_start(
    rows: int, size: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Return standard normal rows, the same numbers on every device and in every dtype.

    They are drawn row by row in float32 on the CPU, so the first rows do not depend on how many are asked for.

    Args:
        rows: Number of rows, at least 0.
        size: p, at least 1.
        seed: Any whole number.
        dtype: Of the result.
        device: Of the result.
    """
    random = generator("random_start", seed)
    made = torch.empty(rows, size, dtype=dtype, device=device)
    for row in made:
        row.copy_(torch.randn(size, generator=random, dtype=torch.float32))
    return made


def fix_signs(U: Tensor) -> Tensor:
    """Return the rows with signs chosen so that the entry of largest magnitude (the first at ties) is positive."""
    return fix_signs_(U.detach().clone())


def fix_signs_(U: Tensor) -> Tensor:
    """Do what `fix_signs` does in the memory of its argument."""
    if U.shape[1]:
        for row in U:  # row by row: |U| as a whole would be a copy
            if row[row.abs().argmax()] < 0:
                row.neg_()
    return U


def right_singular(E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the right singular vectors and singular values of a wide matrix (its thin SVD without the left side).

    E = R Q with orthonormal Q, then the SVD of the small R: singular values far below the largest keep orthonormal
    vectors, which the eigenvectors of E Eᵀ would not give.

    Args:
        E: Rows (L, p) with L ≤ p, finite, float32 or float64. Unchanged.

    Returns:
        Orthonormal rows (L, p) like E with signs as by `fix_signs`, and float64 values (L,) on the CPU, descending.

    Raises:
        ValueError: As `orthonormal`.
    """
    Q = orthonormal(E)
    values, right = torch.linalg.svd(cross_gram(E, Q))[1:]
    transform_(Q, right)
    return fix_signs_(Q), values


def _absorb_(rows: Tensor, done: int) -> int:
    """Make rows[done:] orthonormal and orthogonal to the orthonormal rows[:done]; return how many there are then.

    Dependent rows end up as zeros at the end.
    """
    count, clean, least = len(rows), CLEAN[rows.dtype] * torch.finfo(rows.dtype).eps, DEPENDENT[rows.dtype]
    gram, scale = _scaled_gram(rows, done)
    length = gram.diagonal()[done:].sqrt()
    left = torch.where(
        length > 0, 1 / length, 0.0
    )  # times the length: 1, the share of each row not yet spanned
    projections = 0
    while done < count:
        length = gram.diagonal()[done : done + len(left)].sqrt()
        alive = torch.nonzero(left * length > least).flatten()
        left, length = (left * length)[alive], length[alive]
        T = torch.zeros(count, count, dtype=torch.float64)
        T[:done, :done] = torch.eye(done, dtype=torch.float64)
        if not len(alive):
            transform_(rows, T)
            break
        unit, end = 1 / length, done + len(alive)
        cross = unit[:, None] * gram[done + alive, :done]
        T[torch.arange(done, end), done + alive] = unit * scale[alive]
        scale = torch.ones(len(alive), dtype=torch.float64)
        if done and projections < MOST_PASSES and cross.abs().max() > clean:
            T[done:end, :done] -= cross
            gram, projections = transform_(rows, T), projections + 1
            continue
        rest = unit[:, None] * gram[done + alive][:, done + alive] * unit
        chosen, order = _well_conditioned(rest, least / left)
        T[done:end] = T[done:end][order]
        T[done : done + len(chosen)] = chosen @ T[done : done + len(chosen)]
        done, left, projections = done + len(chosen), left[order[len(chosen) :]], 0
        gram = _polish_(rows, transform_(rows, T), done)
    return done


def _scaled_gram(rows: Tensor, done: int) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix with rows[done:] divided by their largest entry, and these factors (rows - done,).

    The largest entry becomes 1, so squares neither overflow nor vanish.
    """
    peak = torch.linalg.vector_norm(rows[done:], ord=torch.inf, dim=1).to(torch.float64)
    if not torch.isfinite(peak).all():
        raise ValueError("Rows to be made orthonormal must be finite; found an infinite value or NaN.")
    scale = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    scale[done:] = torch.where(peak > 0, 1 / peak, 0.0)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in column_blocks(len(rows), rows.shape[1]):
        scaled = scale[:, None] * rows[:, block].to(torch.float64)
        total += scaled @ scaled.T
    return (0.5 * (total + total.T)).cpu(), scale[done:].cpu()


def _well_conditioned(gram: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Choose well-conditioned rows of a Gram matrix with unit diagonal by a pivoted Cholesky factor.

    Args:
        gram: float64 (n, n).
        least: What the rows chosen before must leave of a row (n,), each below 1; the choice ends at the first row
            with less.

    Returns:
        C⁻¹ (k, k) for the k ≥ 1 chosen rows (C their Cholesky factor), and the order of all rows, the chosen first.
    """
    packed, pivots, rank, _ = dpstrf(gram.numpy(), tol=LEAST_PIVOT, lower=1)
    order, factor = torch.from_numpy(pivots.astype("int64") - 1), torch.from_numpy(packed).tril()
    enough = factor.diagonal()[:rank] > least[order[:rank]]
    count = int(enough.to(torch.int64).cumprod(0).sum())
    return _inverse_factor(factor[:count, :count].contiguous()), order


def _inverse_factor(factor: Tensor) -> Tensor:
    identity = torch.eye(len(factor), dtype=torch.float64)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def _polish_(rows: Tensor, gram: Tensor, front: int) -> Tensor:
    """Repeat Cholesky-QR on rows[:front] until they are orthonormal up to rounding; return the Gram matrix."""
    clean = CLEAN[rows.dtype] * torch.finfo(rows.dtype).eps
    for _ in range(MOST_PASSES):
        block = gram[:front, :front]
        if (block - torch.eye(front, dtype=torch.float64)).abs().max() <= clean:
            break
        T = torch.eye(len(rows), dtype=torch.float64)
        T[:front, :front] = _inverse_factor(torch.linalg.cholesky(block))
        gram = transform_(rows, T)
    return gram
