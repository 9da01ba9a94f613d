"""CER, the communication efficient regulariser of pFedNet: an update becomes piecewise constant.

Reference: Zhao et al.: Medical Federated Model with Mixture of Personalized and Sharing Components (pFedNet), Section IV.
With y = y_t - η u the paper's problem for v and ∇ = (y_t - v) / η is, whatever η and y_t are,

    ∇ = argmin_u ½‖u - g‖² + γ‖Λu‖₁,    (Λu)_i = u_i - u_{i+1} for i < d,  (Λu)_d = u_d                           (CER)

a total variation with one more value u_{d+1} = 0 at the end. Two things follow from the last row of Λ:

* A large γ drives the update to 0, not to its mean: ∇ = 0 exactly where max_k |g_1 + … + g_k| ≤ γ. That peak of the
  cumulative sums is the scale of γ, and `relative` takes γ as a share of it.
* Neighbours are what lies side by side in memory, so each tensor is solved on its own, in row-major order.

`cer_update` is the exact minimiser in linear time (see `taut_string`). `cer_update_admm` is the paper's Algorithm 3 with
its threshold put right: the printed equation (4) thresholds at ρ where the proximal operator of ‖·‖₁ / ρ does at 1 / ρ,
so as printed it solves (CER) only for ρ = 1. Dividing the paper's Lagrangian by η / γ gives the form used here, with a
threshold of γ / ρ; this ρ is the paper's ρηγ and has no unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.lapack import dpttrf, dpttrs
from torch import Tensor

from common.numerics.proximal import check_threshold

Floats = NDArray[np.float64]
Solver = Literal["exact", "admm"]


@dataclass(frozen=True)
class CerAdmm:
    """What `cer_update_admm` came to.

    Attributes:
        u: float64 (d,), the last iterate. Its differences are small, not zero, where those of the minimiser are zero.
        iterations: Iterations made.
        primal: ‖Λu - r‖ at the end.
        dual: ρ‖Λᵀ(r - r_before)‖ at the end.
        converged: Whether both were within the tolerance.
    """

    u: Floats
    iterations: int
    primal: float
    dual: float
    converged: bool


def cer_update(g: NDArray[Any], gamma: float, *, relative: bool = False) -> NDArray[Any]:
    """Return the exact minimiser of (CER) in O(d) time; beside the result it holds one stretch of undecided values.

    Each constant piece is summed in float64 from its own values and rounded once. The result is zero if and only if
    max|cumsum(g)| ≤ γ, the sum taken in float64 from the left.

    Args:
        g: Finite float32 or float64 values (d,), d ≥ 0.
        gamma: γ ≥ 0; 0 returns g to the bit.
        relative: Take γ as `gamma` times max|cumsum(g)|: from 1 on the result is zero.

    Returns:
        A new array of the shape and dtype of g.

    Raises:
        ValueError: Values not finite or too large to be summed, a shape or dtype that does not fit, or a bad γ.
    """
    check_threshold(gamma, "γ")
    values = _float64(g)
    if not values.size:
        return g.copy()
    from common.numerics import taut_string  # numba and the compilation only where CER is used

    peak, where, absolute = taut_string.survey(values)
    if not math.isfinite(6.0 * absolute * values.size):
        raise ValueError("CER needs finite values whose sums stay finite in float64; check the update.")
    if gamma == 0:
        return g.copy()
    if relative:
        gamma = min(gamma, 1.0) * abs(peak)
    if abs(peak) <= gamma:
        return np.zeros_like(g)
    taut_string.taut_string(values, float(gamma))
    if not values.any():
        # γ is within rounding of the peak: one piece is left, from the pinned end to where the peak is
        values[:where] = (peak - math.copysign(gamma, peak)) / where
    return values.astype(g.dtype, copy=False)


def cer_update_admm(
    g: NDArray[Any], gamma: float, *, rho: float = 1.0, tolerance: float = 1e-6, max_iterations: int = 10_000
) -> CerAdmm:
    """Solve (CER) by ADMM: the paper's Algorithm 3 with the threshold γ / ρ and a tridiagonal solve, O(d) an iteration.

    u ← (I + ρ ΛᵀΛ)⁻¹ (g + ρ Λᵀ(r - w)),  r ← soft(Λu + w, γ / ρ),  w ← w + Λu - r. It stops where ‖Λu - r‖ is at most
    tolerance · ‖Λg‖ and ρ‖Λᵀ(r - r_before)‖ at most tolerance · ‖g‖. It is the reference and an option; the exact solver
    takes about the time of one iteration, while thousands are needed where pieces are long.

    Args:
        g: Finite float32 or float64 values (d,).
        gamma: γ ≥ 0.
        rho: ρ > 0, the penalty; it changes the path, not the solution.
        tolerance: > 0.
        max_iterations: ≥ 1.

    Raises:
        ValueError: As `cer_update`, or a parameter out of its range.
    """
    check_threshold(gamma, "γ")
    if not (math.isfinite(rho) and rho > 0 and tolerance > 0 and max_iterations >= 1):
        raise ValueError(
            "ADMM needs a finite ρ > 0, a tolerance > 0 and at least one iteration, got "
            f"{rho}, {tolerance} and {max_iterations}."
        )
    values = _float64(g)
    if not np.isfinite(values).all():
        raise ValueError("CER needs finite values; check the update.")
    if not values.any() or gamma == 0:
        return CerAdmm(values, 0, 0.0, 0.0, True)
    # I + ρ ΛᵀΛ and its LDLᵀ; LAPACK's wrapper wants an off-diagonal entry even where there is none
    diagonal = np.full(values.size, 1.0 + 2.0 * rho)
    diagonal[0] = 1.0 + rho
    factor = dpttrf(diagonal, np.full(max(1, values.size - 1), -rho))[:2]
    primal_limit = tolerance * float(np.linalg.norm(differences(values)))
    dual_limit = tolerance * float(np.linalg.norm(values))
    r, w, u = np.zeros_like(values), np.zeros_like(values), values
    iterations, primal, dual = 0, math.inf, math.inf
    while iterations < max_iterations and not (primal <= primal_limit and dual <= dual_limit):
        u = dpttrs(*factor, values + rho * _adjoint(r - w))[0]
        target = differences(u)
        w += target
        before, r = r, w - np.clip(w, -gamma / rho, gamma / rho)
        w -= r
        primal = float(np.linalg.norm(target - r))
        dual = rho * float(np.linalg.norm(_adjoint(r - before)))
        iterations += 1
    return CerAdmm(u, iterations, primal, dual, primal <= primal_limit and dual <= dual_limit)


def cer_tensors(
    tensors: Mapping[str, Tensor], gamma: float, *, relative: bool = False, solver: Solver = "exact"
) -> dict[str, Tensor]:
    """Apply CER to each tensor of an update on its own, in row-major order.

    Args:
        tensors: Finite floating-point tensors of any shape.
        gamma: γ ≥ 0, for every tensor.
        relative: γ as a share of each tensor's own max|cumsum(g)|.
        solver: "exact", or "admm" as `cer_update_admm` with its defaults, whose pieces are constant only nearly.

    Returns:
        New tensors in the shape, dtype and device of theirs, computed in float64 and rounded once; with γ = 0 to the bit.

    Raises:
        ValueError: As `cer_update`, or ADMM did not converge.
    """
    if solver not in ("exact", "admm"):
        raise ValueError(f'CER is solved by "exact" or "admm", got {solver!r}.')
    check_threshold(gamma, "γ")
    return {name: _one_tensor(tensor, gamma, relative, solver) for name, tensor in tensors.items()}


def peak_of_sums(g: NDArray[Any]) -> float:
    """Return max_k |g_1 + … + g_k|, summed in float64 from the left: the smallest γ whose CER update is zero.

    Args:
        g: float32 or float64 values (d,); 0 for d = 0.

    Raises:
        ValueError: A shape or dtype that does not fit, or sums that are not finite.
    """
    values = _float64(g)
    peak = float(np.abs(np.cumsum(values, out=values), out=values).max(initial=0.0))
    if not math.isfinite(peak):
        raise ValueError("CER needs finite values whose sums stay finite in float64; check the update.")
    return peak


def cer_objective(u: NDArray[Any], g: NDArray[Any], gamma: float) -> float:
    """Return ½‖u - g‖² + γ‖Λu‖₁ in float64, for values u and g (d,)."""
    u, g = _float64(u), _float64(g)
    return 0.5 * float(np.sum((u - g) ** 2)) + gamma * float(np.sum(np.abs(differences(u))))


def differences(u: Floats) -> Floats:
    """Return Λu: u_i - u_{i+1}, and u_d at the end; for u (d,)."""
    result = u.copy()
    result[:-1] -= u[1:]
    return result


def runs(u: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the piecewise-constant form of a vector: where each run starts, and its value.

    Values belong to one run where they are equal in their bits, so `from_runs` gives them back exactly, also -0.0.

    Args:
        u: Finite float32 or float64 values (d,).

    Returns:
        starts: int64 (m,), growing, the first one 0; none for d = 0.
        levels: Values (m,) in the dtype of u.

    Raises:
        ValueError: A shape or dtype that does not fit, or values not finite.
    """
    _check(u)
    if not np.isfinite(u).all():
        raise ValueError("Runs are made of finite values.")
    coded = np.ascontiguousarray(u).view(np.int32 if u.dtype == np.float32 else np.int64)
    starts = np.flatnonzero(coded[1:] != coded[:-1]) + 1
    starts = np.concatenate((np.zeros(min(1, u.size), dtype=np.int64), starts.astype(np.int64)))
    return starts, u[starts]


def from_runs(starts: NDArray[np.int64], levels: NDArray[Any], size: int) -> NDArray[Any]:
    """Return the vector that `runs` described.

    Args:
        starts: int64 (m,), strictly growing from 0 and below `size`.
        levels: Values (m,).
        size: d ≥ 0, the length of the vector; 0 exactly with no run.

    Raises:
        ValueError: Runs that do not describe a vector of that length.
    """
    if starts.ndim != 1 or starts.dtype != np.int64 or levels.shape != starts.shape:
        raise ValueError(
            f"Runs are int64 starts (m,) with levels (m,), got {starts.shape} of {starts.dtype} and {levels.shape}."
        )
    lengths = np.diff(starts, append=np.int64(size))
    if size < 0 or (starts[0] != 0 if starts.size else size != 0) or not (lengths > 0).all():
        raise ValueError(f"The starts of runs must grow from 0 and stay below the length {size}.")
    return np.repeat(levels, lengths)


def _one_tensor(tensor: Tensor, gamma: float, relative: bool, solver: Solver) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"CER is for floating-point tensors, got {tensor.dtype}; leave counters out.")
    if gamma == 0 and bool(torch.isfinite(tensor).all()):
        return tensor.detach().clone()
    wide = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float64
    g = tensor.detach().to("cpu", wide).flatten().numpy()
    if solver == "exact":
        u = cer_update(g, gamma, relative=relative)
    else:
        scale = peak_of_sums(g) if relative else 1.0
        solved = cer_update_admm(g, gamma * scale)
        if not solved.converged:
            raise ValueError(
                f"ADMM did not converge in {solved.iterations} iterations; take the exact solver, or a smaller γ."
            )
        u = solved.u
    return torch.from_numpy(u).reshape(tensor.shape).to(tensor.device, tensor.dtype)


def _adjoint(s: Floats) -> Floats:
    """Return Λᵀs: s_i - s_{i-1}, with s_0 = 0."""
    result = s.copy()
    result[1:] -= s[:-1]
    return result


def _check(g: NDArray[Any]) -> None:
    if g.ndim != 1 or g.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"CER takes float32 or float64 values (d,), got {g.shape} of {g.dtype}; flatten them."
        )


def _float64(g: NDArray[Any]) -> Floats:
    """Return a contiguous float64 copy."""
    _check(g)
    return np.array(g, dtype=np.float64, order="C")
