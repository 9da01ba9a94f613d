"""FIPA's adaptive rules: how many eigenpairs a site sends in a round, and how many local steps it takes.

Reference: FIPA (Chang, He, Hao 2026). The paper names the adaptive rank and steps but prints no formula; these are the
rules of the authors' published experiments, with every case that they leave undefined clamped as documented here.
g is the site's gradient at the broadcast parameters, k the round counted from 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-12  # added to the gradient norms in the rank rule, as in the published experiments


def adaptive_rank(
    lam: Tensor,
    k: int,
    own_gradient: float,
    total_gradient: float,
    *,
    C_e: float = 1.0,
    most: float = 0.99,
    at_least: int = 1,
) -> int:
    """Return how many leading eigenpairs to keep in round k.

    An eigenvalue is kept if it is larger than t λ_max with

        t = min( C_e / (k (‖g_m‖ + ‖Σ_j g_j‖ + 1e-12)), most )

    so the rank grows with the rounds, and shrinks where the gradients become small.

    Clamps: t never exceeds `most`, so the largest eigenvalue counts whenever it is positive, also where both gradients
    are 0. The result is at least `at_least`, also where all eigenvalues are 0, and at most the number of eigenvalues.

    Args:
        lam: Eigenvalues (r,), r ≥ 1, ≥ 0 and descending.
        k: Round, ≥ 1.
        own_gradient: ‖g_m‖ ≥ 0, the norm of the site's gradient.
        total_gradient: ‖Σ_j g_j‖ ≥ 0, the norm of the sum over the sites.
        C_e: ≥ 0.
        most: Largest threshold, 0 ≤ most < 1.
        at_least: Smallest rank, ≥ 1.

    Raises:
        ValueError: A value out of its range or not finite, or eigenvalues that are not descending.
    """
    _check_round(k)
    own, total = (
        _at_least_zero(own_gradient, "own_gradient"),
        _at_least_zero(total_gradient, "total_gradient"),
    )
    if not 0 <= most < 1:
        raise ValueError(f"The largest threshold must be at least 0 and below 1, got {most}.")
    if at_least < 1:
        raise ValueError(f"The smallest rank must be at least 1, got {at_least}.")
    if lam.ndim != 1 or not len(lam):
        raise ValueError(f"Eigenvalues must be a vector with at least one value, got {tuple(lam.shape)}.")
    values = lam.detach().to("cpu", torch.float64)
    if not torch.isfinite(values).all() or values[-1] < 0 or (values.diff() > 0).any():
        raise ValueError("Eigenvalues must be finite, at least 0 and in descending order.")
    threshold = min(_at_least_zero(C_e, "C_e") / k / (own + total + TINY), most)
    kept = int((values > threshold * values[0]).sum())
    return min(max(kept, at_least), len(values))


def adaptive_steps(
    k: int, own_gradient: float, lam_min: float, lr: float, *, C_t: float = 0.1, cap: int = 200
) -> int:
    """Return how many local steps to take in round k.

        τ = ⌈ log(C_t / (k ‖g‖)) / log(1 - η λ_min) ⌉, within 1..cap

    Gradient steps of size η shrink the slowest kept direction by 1 - η λ_min each: τ steps bring the gradient to C_t / k.

    Clamps, in this order:
        C_t / (k ‖g‖) ≥ 1, also with ‖g‖ = 0: the gradient is as small as asked already; 1 step.
        λ_min = 0 or η = 0, or so small that 1 - η λ_min is 1: no number of steps suffices; `cap` steps.
        η λ_min ≥ 1: one step covers the direction (or jumps beyond its minimum); 1 step.
        C_t = 0: an exact solution is asked for; `cap` steps.

    Args:
        k: Round, ≥ 1.
        own_gradient: ‖g‖ ≥ 0.
        lam_min: Smallest kept eigenvalue, ≥ 0.
        lr: η ≥ 0, the local learning rate.
        C_t: ≥ 0.
        cap: Most steps, ≥ 1.

    Raises:
        ValueError: A value out of its range or not finite.
    """
    _check_round(k)
    gradient, lam = _at_least_zero(own_gradient, "own_gradient"), _at_least_zero(lam_min, "lam_min")
    rate, target = _at_least_zero(lr, "lr"), _at_least_zero(C_t, "C_t") / k
    if cap < 1:
        raise ValueError(f"The most steps must be at least 1, got {cap}.")
    if target >= gradient:
        return 1
    gain = rate * lam
    if gain == 0:
        return cap
    if gain >= 1:
        return 1
    if target == 0:
        return cap
    steps = (math.log(target) - math.log(gradient)) / math.log1p(-gain)  # log1p: gains below 1e-16 count too
    return max(1, math.ceil(min(steps, cap)))


def _check_round(k: int) -> None:
    if k < 1:
        raise ValueError(f"Rounds are counted from 1, got {k}.")


def _at_least_zero(value: float, name: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")
    return float(value)
