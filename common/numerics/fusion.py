"""pFedNet's step of the personal parts: the parts of similar sites are drawn together, and fuse.

Reference: Zhao et al.: Medical Federated Model with Mixture of Personalized and Sharing Components (pFedNet), equation
(3) and Section V-B. With Z (N, d₂) one site a row (the paper's Z transposed), the graph's edges E and the gradients ∇:

    min_Z (1/N) <∇, Z> + 1/(2η) ‖Z - Z_t‖² + λ Σ_{(i,j) ∈ E} ‖z_i - z_j‖_p,    p in {1, 2, ∞}                     (3)

Completing the square leaves 1/(2η) ‖Z - A‖² with A = Z_t - (η/N) ∇, solved by ADMM with scaled dual Y = Ω/ρ:

    Z ← (I + ηρ QQᵀ)⁻¹ (A + ηρ Q (W - Y))                                                                         (7)
    W ← prox of (λ/ρ)‖·‖_p, edge by edge, at QᵀZ + Y                               (8, put right; see `proximal`)
    Y ← Y + QᵀZ - W                                                                                               (9)

(The published code steps from the current Z instead of Z_t inside this loop, so it applies the gradient once an
iteration; (7) does not.) What is returned is A - ηρ QY. It is within one dual residual of Z, keeps the mean of each
connected component as it is, and since every edge's dual is feasible after (8), its distance from the minimiser is at
most √(2η · gap): the gap is returned.

The norm of an edge is taken over a group of parameters. Groups do not interact: (3) is then a separate problem for each,
with its own stopping, which is how `fuse_tensors` solves it. With p = 1 every parameter is its own group, whatever
is asked for, so a long vector may be solved in pieces. With p = 2 and ∞ it may be only where the pieces are the groups.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from common.numerics.graphs import Graph, incidence
from common.numerics.proximal import Norm, check_threshold, prox_norm


@dataclass(frozen=True)
class Fused:
    """What a fusion step came to.

    Attributes:
        Z: float64 (N, d).
        iterations: ADMM iterations; 0 where there was nothing to iterate.
        primal: ‖QᵀZ - W‖_F at the end.
        dual: ρ‖Q(W - W_before)‖_F at the end.
        gap: Duality gap of Z: its distance to the minimiser is at most √(2η · gap).
        converged: Whether both residuals were within the tolerance.
    """

    Z: Tensor
    iterations: int
    primal: float
    dual: float
    gap: float
    converged: bool


class Fusion:
    """The step (3) for one graph, step size and penalty; the inverse of I + ηρ QQᵀ (N × N) is computed once."""

    def __init__(
        self,
        graph: Graph,
        *,
        eta: float,
        p: Norm = 2,
        rho: float | None = None,
        tolerance: float = 1e-8,
        max_iterations: int = 10_000,
    ) -> None:
        """Prepare the step.

        Args:
            graph: Similarity graph of the N sites.
            eta: Step size η > 0.
            p: Norm of the differences: 1, 2 or "inf".
            rho: ADMM's penalty ρ > 0; it changes the path, not the solution. By default 1 / (η √(μ_min μ_max)), with the
                smallest and largest eigenvalue of the Laplacian that are not 0.
            tolerance: > 0. It stops where ‖QᵀZ - W‖ ≤ tolerance · ‖QᵀA‖ and the dual residual is at most
                tolerance · ‖A - mean of the sites‖ / η.
            max_iterations: ≥ 1.

        Raises:
            ValueError: A parameter out of its range.
        """
        for name, value in (("η", eta), ("ρ", rho), ("the tolerance", tolerance)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"A finite value above 0 is needed for {name}, got {value}.")
        if p not in get_args(Norm):
            raise ValueError(f'The norm is 1, 2 or "inf", got {p!r}.')
        if max_iterations < 1:
            raise ValueError(f"ADMM needs at least one iteration, got {max_iterations}.")
        self.graph, self.eta, self.p = graph, eta, p
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self._Q = incidence(graph)
        # QQᵀ = V diag(μ) Vᵀ is small: its eigenvalues give both the default of ρ and the inverse
        mu, V = torch.linalg.eigh(self._Q @ self._Q.T)
        inner = mu[mu > 1e-9 * graph.nodes]  # the smallest that is not 0 is above 1 / N² by far
        self.rho = rho or (1.0 / (eta * math.sqrt(float(inner[0] * inner[-1]))) if len(inner) else 1.0 / eta)
        self._inverse = (V / (1.0 + eta * self.rho * mu.clamp(min=0))) @ V.T

    def step(self, Z_t: Tensor, gradient: Tensor, lam: float) -> Fused:
        """Solve (3) with one norm over all d parameters of a site.

        Args:
            Z_t: Finite values (N, d), one site a row.
            gradient: ∇ in the shape of Z_t; for an update Δ of local training that is -Δ / (learning rate), at the
                caller's choice. The paper's 1/N is applied here.
            lam: λ ≥ 0; 0 steps every site on its own, exactly.

        Returns:
            The new personal parts in float64, and how the solver ended.

        Raises:
            ValueError: Shapes that do not fit the graph, values not finite, or a bad λ.
        """
        check_threshold(lam, "λ")
        if Z_t.ndim != 2 or len(Z_t) != self.graph.nodes or gradient.shape != Z_t.shape:
            raise ValueError(
                f"The personal parts and gradients of {self.graph.nodes} sites are rows (N, d), got "
                f"{tuple(Z_t.shape)} and {tuple(gradient.shape)}."
            )
        A = Z_t.to(torch.float64) - (self.eta / len(Z_t)) * gradient.to(torch.float64)
        if not torch.isfinite(A).all():
            raise ValueError("A fusion step needs finite parts and gradients.")
        spread, centred = float(torch.linalg.norm(self._Q.T @ A)), float(torch.linalg.norm(A - A.mean(dim=0)))
        if lam == 0 or spread == 0:
            return Fused(A, 0, 0.0, 0.0, 0.0, True)
        return self._iterate(A, lam, self.tolerance * spread, self.tolerance * centred / self.eta)

    def objective(self, Z: Tensor, Z_t: Tensor, gradient: Tensor, lam: float) -> float:
        """Return the value of (3) at Z, in float64; arguments as `step`."""
        Z, Z_t = Z.to(torch.float64), Z_t.to(torch.float64)
        linear = float((gradient.to(torch.float64) * Z).sum()) / len(Z)
        return (
            linear + float((Z - Z_t).square().sum()) / (2 * self.eta) + lam * self._edge_norms(self._Q.T @ Z)
        )

    def _iterate(self, A: Tensor, lam: float, primal_limit: float, dual_limit: float) -> Fused:
        Q, weight = self._Q, self.eta * self.rho
        W = Q.T @ A
        Y, base = torch.zeros_like(W), self._inverse @ A
        spreading = weight * (self._inverse @ Q)
        iterations, primal, dual = 0, math.inf, math.inf
        while iterations < self.max_iterations and not (primal <= primal_limit and dual <= dual_limit):
            differences = Q.T @ (base + spreading @ (W - Y))
            Y += differences
            before, W = W, prox_norm(Y, lam / self.rho, self.p, dim=1)
            Y -= W
            primal = float(torch.linalg.norm(differences - W))
            dual = self.rho * float(torch.linalg.norm(Q @ (W - before)))
            iterations += 1
        Z = A - weight * (Q @ Y)
        # D(Ω) = <QΩ, A> - η/2 ‖QΩ‖², and Z = A - ηQΩ: what is left of P(Z) - D(Ω) with Ω = ρY
        differences = Q.T @ Z
        gap = lam * self._edge_norms(differences) - self.rho * float((Y * differences).sum())
        converged = primal <= primal_limit and dual <= dual_limit
        return Fused(Z, iterations, primal, dual, max(0.0, gap), converged)

    def _edge_norms(self, differences: Tensor) -> float:
        order = math.inf if self.p == "inf" else self.p
        return float(torch.linalg.vector_norm(differences, ord=order, dim=1).sum())


def fuse_tensors(
    fusion: Fusion,
    Z_t: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    lam: float,
    *,
    groups: Mapping[str, Hashable] | None = None,
) -> tuple[dict[str, Tensor], dict[Hashable, Fused]]:
    """Solve (3) for named tensors; the norm of an edge is taken over each group of tensors.

    Args:
        fusion: The prepared step.
        Z_t: Finite floating-point tensors (N, …), sites on the first axis.
        gradient: ∇ with the same names and shapes.
        lam: λ ≥ 0.
        groups: For every tensor the group it belongs to; tensors of one group share one norm. None: all are one group,
            the paper's formulation. A group of its own for each tensor lets parts of a model fuse one by one; then this
            may be called for a few tensors at a time with the same result, with p = 1 in any case to the tolerance.

    Returns:
        The new tensors in the shapes and dtypes of Z_t, and for each group how the solver ended, with its flat Z.

    Raises:
        ValueError: Names or shapes that do not agree, or as `Fusion.step`.
    """
    if Z_t.keys() != gradient.keys() or (groups is not None and groups.keys() != Z_t.keys()):
        raise ValueError("The parts, their gradients and their groups must carry the same names.")
    members: dict[Hashable, list[str]] = {}
    for name, part in Z_t.items():
        if part.ndim < 1 or len(part) != fusion.graph.nodes or gradient[name].shape != part.shape:
            raise ValueError(
                f"Parts and gradients are (N, …) with N = {fusion.graph.nodes} sites, got {tuple(part.shape)} and "
                f"{tuple(gradient[name].shape)}."
            )
        if not part.is_floating_point():
            raise ValueError(f"Only floating-point parts can be fused, got {part.dtype}; leave counters out.")
        members.setdefault(None if groups is None else groups[name], []).append(name)
    result, ends = {}, {}
    for group, names in members.items():
        widths = [Z_t[name][0].numel() for name in names]
        wide = _side_by_side(Z_t, names, widths), _side_by_side(gradient, names, widths)
        ends[group] = fusion.step(*wide, lam)
        for name, block in zip(names, ends[group].Z.split(widths, dim=1), strict=True):
            result[name] = block.reshape(Z_t[name].shape).to(Z_t[name].dtype)
    return {name: result[name] for name in Z_t}, ends


def _side_by_side(parts: Mapping[str, Tensor], names: list[str], widths: list[int]) -> Tensor:
    rows = [parts[name].reshape(len(parts[name]), width) for name, width in zip(names, widths, strict=True)]
    return torch.cat(rows, dim=1)
