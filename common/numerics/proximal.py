"""Proximal operators of the norms that pFedNet fuses sites with: prox_t(a) = argmin_w t‖w‖_p + ½‖w - a‖², p in {1, 2, ∞}.

Reference: Parikh, Boyd: Proximal Algorithms, Foundations and Trends in Optimization 2014, Section 6.5.

    p = 1   sign(a) max(|a| - t, 0)
    p = 2   max(0, 1 - t / ‖a‖₂) a
    p = ∞   a - P(a), P the projection onto the l1 ball of radius t (Moreau); it cuts off |a| at some level

The printed equation (8) of pFedNet, [1 - t / ‖a‖_q]₊ a with q dual to p, is the second line for every p. For p = 1 and ∞
it is right only in where it is zero.

Everything goes over many vectors at once, along one dimension. A vector of no entry is left as it is.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Norm = Literal[1, 2, "inf"]


def prox_norm(a: Tensor, t: float, p: Norm, *, dim: int = 0) -> Tensor:
    """Return argmin_w t‖w‖_p + ½‖w - a‖² for every vector along a dimension.

    Args:
        a: Finite float32 or float64 values; by default each column of a matrix is a vector.
        t: Threshold ≥ 0, finite; 0 gives a back to the bit.
        p: 1, 2 or "inf".
        dim: The dimension the vectors lie along.

    Returns:
        Values in the shape and dtype of a.

    Raises:
        ValueError: Another p, or as `soft_threshold`.
    """
    if p == 1:
        return soft_threshold(a, t)
    if p == 2:
        return block_soft_threshold(a, t, dim=dim)
    if p == "inf":
        return prox_max_norm(a, t, dim=dim)
    raise ValueError(f'The norm is 1, 2 or "inf", got {p!r}.')


def soft_threshold(a: Tensor, t: float) -> Tensor:
    """Return sign(a) max(|a| - t, 0), the proximal operator of t‖·‖₁.

    Args:
        a: float32 or float64 values of any shape.
        t: Threshold ≥ 0.

    Raises:
        ValueError: Not floating point, or a bad threshold.
    """
    _check(a, t)
    return a - a.clamp(-t, t) if t else a.clone()


def block_soft_threshold(a: Tensor, t: float, *, dim: int = 0) -> Tensor:
    """Return max(0, 1 - t / ‖a‖₂) a for every vector along a dimension, the proximal operator of t‖·‖₂.

    Args:
        a: float32 or float64 values.
        t: Threshold ≥ 0.
        dim: The dimension the vectors lie along.

    Raises:
        ValueError: As `soft_threshold`.
    """
    _check(a, t)
    if not t:
        return a.clone()
    norm = torch.linalg.vector_norm(a, dim=dim, keepdim=True)
    # a zero vector stays zero: its factor is clamped before anything is divided by its norm
    return a * ((norm - t).clamp(min=0) / torch.where(norm > 0, norm, 1.0))


def prox_max_norm(a: Tensor, t: float, *, dim: int = 0) -> Tensor:
    """Return a - P(a), P the projection onto the l1 ball of radius t: the proximal operator of t‖·‖_∞.

    Since P is a soft threshold at some level θ, this is a with its magnitudes cut off at θ.

    Args:
        a: float32 or float64 values.
        t: Threshold ≥ 0.
        dim: The dimension the vectors lie along.

    Raises:
        ValueError: As `soft_threshold`.
    """
    _check(a, t)
    if not t or not a.numel():
        return a.clone()
    level = _ball_level(a, t, dim)
    return torch.minimum(torch.maximum(a, -level), level)


def project_l1_ball(a: Tensor, radius: float, *, dim: int = 0) -> Tensor:
    """Return the nearest point w with ‖w‖₁ ≤ radius for every vector along a dimension.

    Duchi, Shalev-Shwartz, Singer, Chandra: Efficient Projections onto the l1-Ball, ICML 2008, Figure 1 (by sorting).

    Args:
        a: float32 or float64 values.
        radius: ≥ 0; a vector within the ball is given back to the bit.
        dim: The dimension the vectors lie along.

    Raises:
        ValueError: As `soft_threshold`.
    """
    _check(a, radius)
    if not a.numel():
        return a.clone()
    if not radius:
        return torch.zeros_like(a)
    level = _ball_level(a, radius, dim)
    return torch.where(level > 0, a - torch.minimum(torch.maximum(a, -level), level), a)


def check_threshold(value: float, name: str = "the threshold") -> None:
    """Refuse a weight that is negative or not finite.

    Raises:
        ValueError: It is.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"A finite value of at least 0 is needed for {name}, got {value}.")


def _check(a: Tensor, t: float) -> None:
    check_threshold(t)
    if a.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"A proximal operator takes float32 or float64, got {a.dtype}.")


def _ball_level(a: Tensor, radius: float, dim: int) -> Tensor:
    """Return the θ with Σ max(|a| - θ, 0) = radius for vectors outside the ball, 0 for those within it."""
    # the largest first; sums in float64, for a float32 sum over millions of entries loses the radius
    sizes = a.abs().to(torch.float64).sort(dim=dim, descending=True).values
    shape = [1] * a.ndim
    shape[dim] = -1
    count = torch.arange(1, a.shape[dim] + 1, dtype=torch.float64, device=a.device).reshape(shape)
    levels = (sizes.cumsum(dim=dim) - radius) / count
    # sizes > levels holds for the first entries and no later one; the last of them gives θ
    last = (sizes > levels).sum(dim=dim, keepdim=True).clamp(min=1) - 1
    return levels.gather(dim, last).clamp(min=0).to(a.dtype)
