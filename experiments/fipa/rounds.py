"""Rounds of FIPA, FedAvg and centralised Gauss-Newton on a simulated federation, timed on one thread.

Conventions, the same for every experiment here:

- F_m(theta) = 1/2 ||r_m(theta)||^2 with the row scaling inside r_m (sqrt(1/N_m), and for boundary rows
  sqrt(lambda/N_bc)), so H_m = A_m^T A_m with A_m = d r_m / d theta is the Gauss-Newton matrix of exactly the loss that
  is trained (eq. 4, 8, 9 with the means of eq. 4). The reference sums instead of averaging.
- Seconds are processor seconds of this one thread for all clients together and the server, without evaluation and
  drawing: the clients of a real federation would work at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from common.numerics.adaptive import adaptive_rank, adaptive_steps
from common.numerics.gram import combine, gram, solve
from common.numerics.subspace import dense_eigenpairs, subspace_iteration
from experiments.fipa.mlp import local_adam

FLOOR = 1e-13  # relative eigenvalue below which a direction is round-off of A^T A


class Problem(Protocol):
    """A least-squares problem split over M clients with as many rows R each."""

    @property
    def weights(self) -> Tensor:
        """Return N_m / N, (M,)."""

    def gradient(self, theta: Tensor) -> Tensor:
        """Return every client's own gradient of F_m at its own theta: (M, p) -> (M, p)."""

    def linearise(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return (A (M, R, p), r (M, R)) at one theta (p,)."""

    def error(self, theta: Tensor) -> float:
        """Return the error of theta (p,) that the figure shows, on points that no client holds."""


@dataclass(frozen=True)
class Settings:
    """One curve of a figure.

    Attributes:
        method: `fipa`; `fedavg`; `gn` (centralised Gauss-Newton, the limit of exact local solves).
        epochs: Local full-batch Adam steps per round.
        rounds: Rounds at most.
        seconds: Processor seconds at most; None for no such limit.
        lr: Adam's step size.
        gamma: Server step: 1 in the paper, 0.5 or 0.3 in its code.
        rank: Eigenpairs per client; None for all above round-off.
        rcond: Eigenvalues of the merged H below rcond times the largest are dropped (1e-5 in the reference).
        adaptive: Rank and epochs per client and round by the adaptive rules; `epochs` is then the cap.
        sums: Scale the adaptive rules' gradients and eigenvalues by N_m, as the reference's sum form does.
    """

    method: Literal["fipa", "fedavg", "gn"]
    epochs: int = 20
    rounds: int = 100
    seconds: float | None = None
    lr: float = 1e-4
    gamma: float = 0.5
    rank: int | None = None
    rcond: float = 1e-5
    adaptive: bool = False
    sums: int = 1


@dataclass
class Curve:
    """What one run showed: entry k of every list is the state after k rounds."""

    settings: Settings
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    ranks: list[list[int]] = field(default_factory=list)
    steps: list[list[int]] = field(default_factory=list)
    theta: Tensor = field(default_factory=lambda: torch.empty(0))

    def thinned(self, most: int = 48) -> dict[str, object]:
        """Return a small JSON form: at most `most` points, spread evenly over the rounds, the last one included."""
        last = len(self.errors) - 1
        shown = sorted({round(i * last / (most - 1)) for i in range(most)}) if last else [0]
        found: dict[str, object] = {
            "settings": asdict(self.settings),
            "rounds": shown,
            "seconds": [round(self.seconds[i], 3) for i in shown],
            "errors": [float(f"{self.errors[i]:.4g}") for i in shown],
            "best": float(f"{min(self.errors):.4g}"),
            "final": float(f"{self.errors[-1]:.4g}"),
        }
        if self.ranks:
            found["ranks"] = [self.ranks[min(i, last - 1)] for i in shown]
            found["steps"] = [self.steps[min(i, last - 1)] for i in shown]
        return found

    def at_seconds(self, seconds: float) -> float:
        """Return the error of the last round that had ended by then."""
        return [error for error, when in zip(self.errors, self.seconds, strict=True) if when <= seconds][-1]


@dataclass(frozen=True)
class Sketch:
    """One client's eigenpairs: rows U (r, p), descending eigenvalues lam (r,), basis for the next warm start."""

    U: Tensor
    lam: Tensor
    basis: Tensor | None = None


class Rows:
    """H = A^T A as an operator, through A alone."""

    def __init__(self, a: Tensor) -> None:
        self.a = a
        self.size = a.shape[1]

    def matmat(self, V: Tensor) -> Tensor:
        """Return the rows H v, (L, p)."""
        return (V @ self.a.T) @ self.a


def sketch(a: Tensor, rank: int | None, basis: Tensor | None = None) -> Sketch:
    """Return the top eigenpairs of A^T A.

    A rank: subspace iteration (eq. 10-12), started from the last round's basis. No rank: all pairs above round-off,
    exactly, from A A^T = E D E^T (rows x rows) and u = D^(-1/2) E^T A.

    Args:
        a: (R, p).
        rank: Pairs to keep; None for all above round-off.
        basis: The last round's basis.
    """
    if rank is None:
        pairs = dense_eigenpairs(a @ a.T, a.shape[0])
        large = pairs.lam > FLOOR * pairs.lam[0]
        lam = pairs.lam[large]
        return Sketch((pairs.U[large] @ a) / lam.sqrt().unsqueeze(1), lam)
    # H moves little between rounds and its spectrum falls fast: one product from the last basis; more from a cold start.
    pairs, basis = subspace_iteration(
        Rows(a), rank, oversampling=10, iterations=1 if basis is not None else 4, start=basis, dtype=a.dtype
    )
    large = pairs.lam > FLOOR * pairs.lam[0]
    return Sketch(pairs.U[large], pairs.lam[large], basis)


def merge(sketches: list[Sketch], weights: Tensor, targets: list[Tensor], rcond: float) -> Tensor:
    """Return H^+ sum_m w_m U_m^T lam_m a_m with H = sum_m w_m U_m^T lam_m U_m (eq. 6), (p,).

    Args:
        sketches: One per client.
        weights: N_m / N, (M,).
        targets: a_m = U_m Delta_m, (r_m,) each.
        rcond: Relative cut of the pseudo-inverse.
    """
    V = torch.cat([one.U for one in sketches])
    sigma = torch.cat([weight * one.lam for weight, one in zip(weights, sketches, strict=True)])
    whole = slice(0, V.shape[1])
    G, _ = gram(lambda: [(whole, V)], None)
    coefficients = solve(G, sigma, torch.cat(targets), beta=0.0, rcond=rcond)
    return torch.cat([part for _, part in combine(lambda: [(whole, V)], coefficients)])


def fipa_round(
    problem: Problem, theta: Tensor, settings: Settings, k: int, kept: list[Tensor | None]
) -> tuple[Tensor, list[int], list[int]]:
    """Return (Delta theta, ranks, epochs) of one round; `kept` holds the clients' warm starts and is renewed."""
    a, residual = problem.linearise(theta)
    sketches = [sketch(a[m], settings.rank, kept[m]) for m in range(len(a))]
    kept[:] = [one.basis for one in sketches]
    gradients = torch.einsum("mr,mrp->mp", residual, a)
    if settings.method == "gn":
        targets = [-(one.U @ g) / one.lam for one, g in zip(sketches, gradients, strict=True)]
        return settings.gamma * merge(sketches, problem.weights, targets, settings.rcond), [], []
    epochs = [settings.epochs] * len(a)
    if settings.adaptive:
        sketches, epochs = _adapt(sketches, gradients, settings, k)
    trained = local_adam(theta.expand(len(a), -1), problem.gradient, torch.tensor(epochs), lr=settings.lr)
    targets = [one.U @ (after - theta) for one, after in zip(sketches, trained, strict=True)]
    change = settings.gamma * merge(sketches, problem.weights, targets, settings.rcond)
    return change, [len(one.lam) for one in sketches], epochs


def _adapt(
    sketches: list[Sketch], gradients: Tensor, settings: Settings, k: int
) -> tuple[list[Sketch], list[int]]:
    total = float(gradients.sum(0).norm()) * settings.sums
    cut, epochs = [], []
    for one, gradient in zip(sketches, gradients, strict=True):
        own, lam = float(gradient.norm()) * settings.sums, one.lam * settings.sums
        rank = adaptive_rank(lam, k, own, total)
        cut.append(Sketch(one.U[:rank], one.lam[:rank], one.basis))
        epochs.append(adaptive_steps(k, own, float(lam[rank - 1]), settings.lr, cap=settings.epochs))
    return cut, epochs


def run(
    problem: Problem, theta: Tensor, settings: Settings, *, tick: Callable[[int, float], None] | None = None
) -> Curve:
    """Run one method from theta (p,) until the rounds or the seconds are used up.

    Args:
        problem: The split problem.
        theta: Start, the same for every method of a figure.
        settings: The method.
        tick: Told the round and the error after each round.

    Returns:
        The curve with round 0 (the start) in front. It ends early where the error is no longer finite.
    """
    curve = Curve(settings, [0.0], [problem.error(theta)], theta=theta)
    kept: list[Tensor | None] = [None] * len(problem.weights)
    spent = 0.0
    for k in range(1, settings.rounds + 1):
        begun = time.process_time()
        if settings.method == "fedavg":
            trained = local_adam(
                theta.expand(len(problem.weights), -1), problem.gradient, settings.epochs, lr=settings.lr
            )
            theta = theta + problem.weights @ (trained - theta)
        else:
            change, ranks, steps = fipa_round(problem, theta, settings, k, kept)
            theta = theta + change
            if settings.adaptive:
                curve.ranks.append(ranks)
                curve.steps.append(steps)
        spent += time.process_time() - begun
        error = problem.error(theta)
        curve.seconds.append(spent)
        curve.errors.append(error)
        if tick is not None:
            tick(k, error)
        if not error < float("inf") or (settings.seconds is not None and spent >= settings.seconds):
            break
    curve.theta = theta
    return curve
