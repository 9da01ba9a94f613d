"""Physics-informed least squares with the domain cut along x_1: -lap u + G(u) = f with u = g on the boundary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.numerics.rng import generator
from experiments.fipa.mlp import TanhNetwork, Tape


@dataclass(frozen=True)
class Equation:
    """-lap u + G(u) = f on [0, 1]^d with a known solution.

    Attributes:
        exact: u at points (..., d).
        right: f at points (..., d).
        reaction: G at values u.
        slope: G' at values u.
        d: Dimension.
    """

    exact: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]
    reaction: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    d: int = 1


def _sine(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[..., 0])


def _double_sine(x: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * x[..., 0])


def _parabola(x: Tensor) -> Tensor:
    return x[..., 0] * (1 - x[..., 0])


def _cubic(x: Tensor) -> Tensor:
    return x[..., 0] ** 2 * (1 - x[..., 0])


PI2 = math.pi**2
EQUATIONS: dict[str, Equation] = {
    "allen-cahn": Equation(
        _sine,
        lambda x: PI2 * _sine(x) + _sine(x) ** 3 - _sine(x),
        lambda u: u**3 - u,
        lambda u: 3 * u**2 - 1,
    ),
    "bratu": Equation(
        _parabola,
        lambda x: 2 - torch.exp(_parabola(x)),
        lambda u: -torch.exp(u),
        lambda u: -torch.exp(u),
    ),
    "fisher": Equation(
        _cubic,
        lambda x: 6 * x[..., 0] - 2 + _cubic(x) * (1 - _cubic(x)),
        lambda u: u * (1 - u),
        lambda u: 1 - 2 * u,
    ),
    "reaction-diffusion": Equation(
        _double_sine,
        lambda x: 4 * PI2 * _double_sine(x) + _double_sine(x) ** 2,
        lambda u: u**2,
        lambda u: 2 * u,
    ),
}


def poisson(d: int, target: str) -> Equation:
    """Return -lap u = f with u the product (printed in the paper) or the sum (in its code) of sin(pi x_i)."""
    if target == "sum":
        return Equation(
            lambda x: torch.sin(math.pi * x).sum(-1),
            lambda x: PI2 * torch.sin(math.pi * x).sum(-1),
            torch.zeros_like,
            torch.zeros_like,
            d,
        )
    if target != "product":
        raise ValueError(f"A Poisson target is 'product' or 'sum', got {target!r}.")
    return Equation(
        lambda x: torch.sin(math.pi * x).prod(-1),
        lambda x: d * PI2 * torch.sin(math.pi * x).prod(-1),
        torch.zeros_like,
        torch.zeros_like,
        d,
    )


class Pinn:
    """F_m = 1/(2 N_int) sum (-lap u + G(u) - f)^2 + lambda/(2 N_bc) sum (u - g)^2 (eq. 7 with means).

    The rows are scaled with sqrt(1/N_int) and sqrt(lambda/N_bc), so A^T A is the Gauss-Newton matrix of that loss. The
    reference trains the means but takes H from sums (eq. 9), which weighs the boundary N_int/N_bc times less in H.

    Args:
        network: The network.
        equation: The equation.
        inside: Interior points, (M, N_int, d).
        edge: Boundary points, (M, N_bc, d).
        penalty: lambda; called beta in eq. 7.
        test: Test points, (T, d).
        sums: Take H as the reference does (A rows 1 and sqrt(lambda)); the trained loss stays the means.
    """

    def __init__(
        self,
        network: TanhNetwork,
        equation: Equation,
        inside: Tensor,
        edge: Tensor,
        penalty: float,
        test: Tensor,
        *,
        sums: bool = False,
    ) -> None:
        self.network, self.equation, self.test = network, equation, test
        self.inside, self.edge = inside, edge
        self.right, self.wall, self.truth = (
            equation.right(inside),
            equation.exact(edge),
            equation.exact(test),
        )
        self.inner_weight, self.edge_weight = 1 / inside.shape[1], penalty / edge.shape[1]
        self.inner_row, self.edge_row = (
            (1.0, math.sqrt(penalty)) if sums else (math.sqrt(self.inner_weight), math.sqrt(self.edge_weight))
        )
        self.weights = torch.full((len(inside),), 1 / len(inside), dtype=torch.float64)

    def residuals(self, theta: Tensor) -> tuple[Tape, Tensor, Tape, Tensor]:
        """Return the tapes and unscaled residuals inside (M, N_int) and on the boundary (M, N_bc)."""
        inner = self.network.forward(theta, self.inside, laplacian=True)
        outer = self.network.forward(theta, self.edge)
        u, laplacian = inner.output[:, 0], inner.output[:, -1]
        return (
            inner,
            self.equation.reaction(u) - laplacian - self.right,
            outer,
            outer.output[:, 0] - self.wall,
        )

    def seeds(self, inner: Tape, weight: Tensor | float) -> Tensor:
        """Return weight * d residual / d channels inside, (M, d+2, N_int): G'(u) for u, -1 for the Laplacian."""
        found = torch.zeros_like(inner.output)
        found[:, 0] = self.equation.slope(inner.output[:, 0]) * weight
        found[:, -1] = -weight
        return found

    def gradient(self, theta: Tensor) -> Tensor:
        """Return the gradients of the clients' losses, (M, p)."""
        inner, inside, outer, edge = self.residuals(theta)
        found = self.network.gradient(theta, inner, self.seeds(inner, inside * self.inner_weight))
        return found + self.network.gradient(theta, outer, (edge * self.edge_weight).unsqueeze(1))

    def linearise(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled Jacobian (M, N_int + N_bc, p), interior rows first (eq. 8), and the scaled residual."""
        each = theta.expand(len(self.inside), -1)
        inner, inside, outer, edge = self.residuals(each)
        rows = self.network.jacobian(each, inner, self.seeds(inner, self.inner_row))
        walls = self.network.jacobian(each, outer, torch.full_like(outer.output, self.edge_row))
        return torch.cat([rows, walls], 1), torch.cat([inside * self.inner_row, edge * self.edge_row], 1)

    def predict(self, theta: Tensor) -> Tensor:
        """Return u at the test points, (T,)."""
        return self.network.forward(theta.unsqueeze(0), self.test.unsqueeze(0)).output[0, 0]

    def error(self, theta: Tensor) -> float:
        """Return ||u - exact|| / ||exact|| over the test points."""
        return float((self.predict(theta) - self.truth).norm() / self.truth.norm())


def boundary(
    low: float, high: float, d: int, points: int, source: torch.Generator, *, left: bool, right: bool
) -> Tensor:
    """Draw `points` points on every face of [0, 1]^d that the strip low <= x_1 <= high touches.

    In one dimension a face is one point, held `points` times as in the reference: no mean changes, its sums do.
    """
    faces = []
    for axis in range(d):
        for side, touches in ((0.0, left or axis > 0), (1.0, right or axis > 0)):
            if not touches:
                continue
            drawn = torch.rand(points, d, generator=source, dtype=torch.float64)
            drawn[:, 0] = low + (high - low) * drawn[:, 0]
            drawn[:, axis] = side
            faces.append(drawn)
    return torch.cat(faces)


def two_strips(
    equation: Equation, interior: int, face: int, penalty: float, seed: int, *, sums: bool = False
) -> Pinn:
    """Return the problem of two clients, [0, 1/2] and [1/2, 1] in x_1, on a network of three layers of 32.

    Args:
        equation: The equation.
        interior: Uniform random points inside per client.
        face: Points per touched boundary face and client.
        penalty: lambda.
        seed: Of the points.
        sums: See `Pinn`.
    """
    d = equation.d
    inside, edge = [], []
    for m, (low, high) in enumerate(((0.0, 0.5), (0.5, 1.0))):
        source = generator("pde", seed, m)
        drawn = torch.rand(interior, d, generator=source, dtype=torch.float64)
        drawn[:, 0] = low + (high - low) * drawn[:, 0]
        inside.append(drawn)
        edge.append(boundary(low, high, d, face, source, left=m == 0, right=m == 1))
    if d == 1:
        test = torch.linspace(0, 1, 1024, dtype=torch.float64).unsqueeze(1)
    else:
        test = torch.rand(4000, d, generator=generator("pde-test", seed), dtype=torch.float64)
    network = TanhNetwork((d, 32, 32, 32, 1))
    return Pinn(network, equation, torch.stack(inside), torch.stack(edge), penalty, test, sums=sums)
