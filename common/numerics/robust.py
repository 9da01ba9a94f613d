"""Robust reductions over sites, coordinate by coordinate: median and trimmed mean.

Reference: Yin, Chen, Kannan, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates, ICML 2018.

    med{x^i : i ∈ [m]}_k  = median of the k-th coordinates                                         (Definition 1)
    trmean_β{x^i}_k       = mean of the k-th coordinates without the largest and the smallest
                            β share of them, 0 ≤ β < 1/2                                           (Definition 2)

Neither is weighted. A site says itself how many cases it has, so a weight would let one bad site buy influence; with
every site counting once, fewer than half of them (fewer than the share β) cannot move a coordinate beyond what honest
sites sent.

Everything is computed in float64 from sorted values, so the order of the sites changes no bit; for that, zeros lose
their sign where there are several sites. One site alone gives back its values to the bit. Sorting goes over blocks of
coordinates: beside its input and its result, a call holds a few blocks, however large the tensor is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_VALUES = 1 << 21  # values of all sites together that are sorted at once: 16 MiB in float64
ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996; it means 29


def coordinate_median(stack: Tensor) -> Tensor:
    """Return the coordinate-wise median (Yin et al. 2018, Definition 1).

    Args:
        stack: Finite values, one site per entry of the first axis.

    Returns:
        float64 tensor without the first axis; for an even number of sites the mean of the two middle values.

    Raises:
        ValueError: No site, or a value that is not finite.
    """
    return _by_blocks(stack, _middle)


def trimmed_mean(stack: Tensor, trim: float) -> Tensor:
    """Return the coordinate-wise trimmed mean (Yin et al. 2018, Definition 2).

    Args:
        stack: Finite values, one site per entry of the first axis.
        trim: β, the share of the sites cut off at each end of every coordinate, 0 ≤ β < 1/2; see `cut_count`.

    Returns:
        float64 tensor without the first axis: the mean of the values left.

    Raises:
        ValueError: No site, a share out of its range, or a value that is not finite.
    """
    cut = cut_count(len(stack), trim) if stack.ndim else 0

    def mean(ordered: Tensor) -> Tensor:
        return _mean(ordered[cut : len(ordered) - cut])

    return _by_blocks(stack, mean)


def cut_count(sites: int, trim: float) -> int:
    """Return how many values are cut at each end: ⌊trim · sites⌋, so below 1 / trim sites nothing is cut.

    Args:
        sites: Number of sites.
        trim: Share of the sites, 0 ≤ trim < 1/2.

    Raises:
        ValueError: The share is out of its range.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"The share cut off at each end must be at least 0 and below 0.5, got {trim}.")
    return max(0, min(math.floor(trim * sites + ROUNDING), (sites - 1) // 2))


def _by_blocks(stack: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a reduction of sorted float64 values (sites, coordinates) to all coordinates, block by block."""
    if stack.ndim == 0 or len(stack) == 0:
        raise ValueError("A reduction over sites needs at least one site on the first axis.")
    sites, flat = len(stack), stack.detach().flatten(1) if stack.ndim > 1 else stack.detach().unsqueeze(1)
    result = torch.empty(flat.shape[1], dtype=torch.float64)
    width = max(1, BLOCK_VALUES // sites)
    for start in range(0, flat.shape[1], width):
        block = flat[:, start : start + width].to(torch.float64)
        if not torch.isfinite(block).all():
            # sorting would put a NaN at one end and so hide it
            raise ValueError("A robust reduction needs finite values.")
        if sites == 1:
            result[start : start + width] = block[0]
        else:
            # -0.0 equals 0.0 in the order but not in its bits: without the sum the order of the sites would show
            result[start : start + width] = reduce((block + 0.0).sort(dim=0).values)
    return result.reshape(stack.shape[1:])


def _middle(ordered: Tensor) -> Tensor:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else _mean(ordered[half - 1 : half + 1])


def _mean(ordered: Tensor) -> Tensor:
    """Return the mean over the first axis; values near the end of float64 do not overflow on the way."""
    mean = ordered.sum(dim=0) / len(ordered)
    return torch.where(torch.isfinite(mean), mean, (ordered / len(ordered)).sum(dim=0))
