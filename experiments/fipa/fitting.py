"""Least-squares function fitting with the domain cut between the clients: the targets and the splits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from common.numerics.rng import generator
from experiments.fipa.mlp import TanhNetwork

# Edges of the clients' intervals, as the reference cuts them: two and four even, eight uneven; the uneven cuts into
# two and four are ours (the paper's text speaks of uneven splits, the code has one).
SPLITS_1D: dict[str, tuple[float, ...]] = {
    "2": (0.0, 0.5, 1.0),
    "4": (0.0, 0.25, 0.5, 0.75, 1.0),
    "8-uneven": (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.85, 0.9, 1.0),
    "2-uneven": (0.0, 0.2, 1.0),
    "4-uneven": (0.0, 0.1, 0.45, 0.6, 1.0),
}

# Height, centre and widths of the six bumps, as the reference's code fixes them; the paper prints isotropic ones.
BUMPS = (
    (1.40, 0.18, 0.28, 0.06, 0.05),
    (0.90, 0.50, 0.28, 0.10, 0.06),
    (0.95, 0.82, 0.28, 0.11, 0.07),
    (0.75, 0.18, 0.72, 0.07, 0.06),
    (0.70, 0.50, 0.82, 0.07, 0.07),
    (0.80, 0.82, 0.74, 0.10, 0.07),
)


def sine(x: Tensor, n: int) -> Tensor:
    """Return sin(n pi x) for x (..., 1)."""
    return torch.sin(n * math.pi * x[..., 0])


def gaussian_mixture(x: Tensor) -> Tensor:
    """Return the sum of the six bumps at x (..., 2)."""
    found = torch.zeros_like(x[..., 0])
    for height, mx, my, sx, sy in BUMPS:
        found += height * torch.exp(
            -((x[..., 0] - mx) ** 2) / (2 * sx**2) - (x[..., 1] - my) ** 2 / (2 * sy**2)
        )
    return found


@dataclass(frozen=True)
class Fit:
    """F_m = 1/(2 N) sum (u(x) - y)^2 on client m's points; every client holds N points, so N_m/N_all = 1/M.

    Attributes:
        network: The network.
        x: Points, (M, N, d).
        y: Values, (M, N).
        test_x: Test points, (T, d).
        test_y: Values there, (T,).
        weights: N_m over all, (M,).
    """

    network: TanhNetwork
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    weights: Tensor

    def gradient(self, theta: Tensor) -> Tensor:
        """Return the gradients of the clients' losses, (M, p)."""
        tape = self.network.forward(theta, self.x)
        seeds = (tape.output[:, 0] - self.y) / self.y.shape[1]
        return self.network.gradient(theta, tape, seeds.unsqueeze(1))

    def linearise(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled Jacobian (M, N, p) and residual (M, N) at theta (p,)."""
        scale = self.y.shape[1] ** -0.5
        each = theta.expand(self.x.shape[0], -1)
        tape = self.network.forward(each, self.x)
        seeds = torch.full_like(tape.output, scale)
        return self.network.jacobian(each, tape, seeds), (tape.output[:, 0] - self.y) * scale

    def predict(self, theta: Tensor) -> Tensor:
        """Return u at the test points, (T,)."""
        return self.network.forward(theta.unsqueeze(0), self.test_x.unsqueeze(0)).output[0, 0]

    def error(self, theta: Tensor) -> float:
        """Return the mean squared error on the test points (no factor 1/2, as in the paper)."""
        return float((self.predict(theta) - self.test_y).square().mean())


def one_dimensional(n: int, split: str, seed: int, points: int = 400) -> Fit:
    """Return the fit of sin(n pi x) with uniform random points in each client's interval, test grid of 1024."""
    edges = SPLITS_1D[split]
    x = torch.stack(
        [
            low
            + (high - low) * torch.rand(points, 1, generator=generator("fit", seed, m), dtype=torch.float64)
            for m, (low, high) in enumerate(pairwise(edges))
        ]
    )
    grid = torch.linspace(0, 1, 1024, dtype=torch.float64).unsqueeze(1)
    clients = len(edges) - 1
    even = torch.full((clients,), 1 / clients, dtype=torch.float64)
    return Fit(TanhNetwork((1, 20, 20, 20, 1)), x, sine(x, n), grid, sine(grid, n), even)


def two_dimensional(seed: int, points: int = 1000) -> Fit:
    """Return the fit of the Gaussian mixture on 3 x 3 clients, test grid of 128 x 128."""
    parts = []
    for m in range(9):
        corner = torch.tensor([m % 3 / 3, m // 3 / 3], dtype=torch.float64)
        parts.append(
            corner + torch.rand(points, 2, generator=generator("fit", seed, m), dtype=torch.float64) / 3
        )
    x = torch.stack(parts)
    axis = torch.linspace(0, 1, 128, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    even = torch.full((9,), 1 / 9, dtype=torch.float64)
    return Fit(
        TanhNetwork((2, 20, 20, 20, 20, 1)), x, gaussian_mixture(x), grid, gaussian_mixture(grid), even
    )
