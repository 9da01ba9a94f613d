"""A tanh network for many simulated clients at once, with its derivatives written by hand.

The parameters of all clients are one tensor (M, p), so one epoch of every client is a handful of batched matrix
products. Beside the value u the network carries the gradient of u and its Laplacian through the layers ("channels"),
which is what a partial differential equation needs, and one backward pass gives either the gradient of a loss or the
rows of a Jacobian. `tests/common/test_experiment_fipa.py` holds all of it against autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass
class Tape:
    """What the backward pass needs of one forward pass.

    Attributes:
        inputs: Input of each layer, (M, C, N, n_in).
        before: Derivative and Laplacian channels of each hidden layer before tanh, (M, C-1, N, n_out); None for C = 1.
        output: (M, C, N): u alone (C = 1), or u, its d first derivatives and its Laplacian (C = d + 2).
    """

    inputs: list[Tensor]
    before: list[Tensor | None]
    output: Tensor


class TanhNetwork:
    """Fully connected, tanh on all layers but the last, one output; weights N(0, 1/fan_in), biases 0.

    Args:
        sizes: Widths from the input to the output, as (1, 20, 20, 20, 1).
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        if len(sizes) < 2 or sizes[-1] != 1:
            raise ValueError(f"A network is given by two or more widths, the last of them 1, got {sizes}.")
        self.sizes = sizes
        self.shapes = list(pairwise(sizes))
        self.size = sum(rows * columns + columns for rows, columns in self.shapes)

    def initial(self, source: torch.Generator) -> Tensor:
        """Draw the start, (p,) in float64."""
        parts = []
        for rows, columns in self.shapes:
            drawn = torch.randn(rows, columns, generator=source, dtype=torch.float64)
            parts += [(drawn / math.sqrt(rows)).flatten(), torch.zeros(columns, dtype=torch.float64)]
        return torch.cat(parts)

    def layers(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return views (W (M, n_in, n_out), b (M, n_out)) into theta (M, p)."""
        found, at = [], 0
        for rows, columns in self.shapes:
            weight = theta[:, at : at + rows * columns].unflatten(1, (rows, columns))
            at += rows * columns
            found.append((weight, theta[:, at : at + columns]))
            at += columns
        return found

    def forward(self, theta: Tensor, x: Tensor, *, laplacian: bool = False) -> Tape:
        """Run all clients.

        Args:
            theta: (M, p).
            x: Points, (M, N, d).
            laplacian: Carry the first derivatives and the Laplacian along.

        Returns:
            The tape; `tape.output` is (M, C, N).
        """
        channels = first_channels(x) if laplacian else x.unsqueeze(1)
        inputs: list[Tensor] = []
        before: list[Tensor | None] = []
        last = len(self.shapes) - 1
        for place, (weight, bias) in enumerate(self.layers(theta)):
            inputs.append(channels)
            clients, count, points, _ = channels.shape
            z = torch.bmm(channels.reshape(clients, count * points, -1), weight)
            z = z.view(clients, count, points, -1)
            z[:, 0] += bias.unsqueeze(1)
            if place == last:
                return Tape(inputs, before, z.squeeze(-1))
            channels, kept = _tanh(z)
            before.append(kept)
        raise AssertionError("unreachable: the last layer returns")

    def gradient(self, theta: Tensor, tape: Tape, seeds: Tensor) -> Tensor:
        """Return sum over points and channels of seeds * d output / d theta, (M, p); seeds is (M, C, N)."""
        parts: list[Tensor] = []
        for inputs, adjoint in self._backward(theta, tape, seeds):
            clients, count, points, _ = adjoint.shape
            flat = inputs.reshape(clients, count * points, -1)
            weight = torch.bmm(flat.transpose(1, 2), adjoint.reshape(clients, count * points, -1))
            parts = [weight.flatten(1), adjoint[:, 0].sum(1), *parts]
        return torch.cat(parts, 1)

    def jacobian(self, theta: Tensor, tape: Tape, seeds: Tensor) -> Tensor:
        """Return for every point sum over channels of seeds * d output / d theta: the rows (M, N, p)."""
        clients, count, points = seeds.shape
        # Kept with the points innermost: long inner loops make the outer products four times faster.
        columns = seeds.new_empty(clients, self.size, points)
        end = self.size
        for inputs, adjoint in self._backward(theta, tape, seeds):
            ahead = inputs.transpose(2, 3).contiguous()
            back = adjoint.transpose(2, 3).contiguous()
            n_in, n_out = ahead.shape[2], back.shape[2]
            columns[:, end - n_out : end] = back[:, 0]
            at = end - n_out - n_in * n_out
            into = columns[:, at : end - n_out].unflatten(1, (n_in, n_out))
            torch.mul(ahead[:, 0].unsqueeze(2), back[:, 0].unsqueeze(1), out=into)
            for c in range(1, count):
                into.addcmul_(ahead[:, c].unsqueeze(2), back[:, c].unsqueeze(1))
            end = at
        return columns.transpose(1, 2)

    def _backward(self, theta: Tensor, tape: Tape, seeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (input, adjoint of the layer's affine output) from the last layer to the first."""
        adjoint, found = seeds.unsqueeze(-1), []
        layers = self.layers(theta)
        for place in range(len(layers) - 1, -1, -1):
            found.append((tape.inputs[place], adjoint))
            if place:
                clients, count, points, _ = adjoint.shape
                back = torch.bmm(
                    adjoint.reshape(clients, count * points, -1), layers[place][0].transpose(1, 2)
                )
                adjoint = _tanh_back(
                    tape.inputs[place][:, 0], tape.before[place - 1], back.view(clients, count, points, -1)
                )
        return found


def first_channels(x: Tensor) -> Tensor:
    """Return x, the unit vectors dx/dx_k and a zero Laplacian as channels, (M, d+2, N, d)."""
    clients, points, d = x.shape
    found = x.new_zeros(clients, d + 2, points, d)
    found[:, 0] = x
    for k in range(d):
        found[:, 1 + k, :, k] = 1.0
    return found


def _tanh(z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Carry the channels through a = tanh z: da = s dz, lap a = s lap z + t sum dz^2, s = 1 - a^2, t = -2 a s."""
    if z.shape[1] == 1:
        return z.tanh_(), None
    out = torch.empty_like(z)
    a = torch.tanh(z[:, 0], out=out[:, 0])
    s = 1.0 - a * a
    torch.mul(z[:, 1:], s.unsqueeze(1), out=out[:, 1:])
    squares = z[:, 1:-1].square().sum(1)
    out[:, -1] -= 2.0 * a * s * squares
    return out, z[:, 1:]


def _tanh_back(a: Tensor, kept: Tensor | None, adjoint: Tensor) -> Tensor:
    """Pull the adjoints of (a, da, lap a) back to (z, dz, lap z); a is (M, N, n), adjoint (M, C, N, n)."""
    s = 1.0 - a * a
    if kept is None:
        return adjoint * s.unsqueeze(1)
    t = -2.0 * a * s  # tanh''
    third = s * (6.0 * a * a - 2.0)  # tanh'''
    dz, lap_z = kept[:, :-1], kept[:, -1]
    of_lap = adjoint[:, -1]
    found = adjoint * s.unsqueeze(1)
    found[:, 0] += t * ((adjoint[:, 1:-1] * dz).sum(1) + lap_z * of_lap) + third * dz.square().sum(1) * of_lap
    found[:, 1:-1] += (2.0 * t * of_lap).unsqueeze(1) * dz
    return found


def local_adam(
    theta: Tensor,
    gradient: Callable[[Tensor], Tensor],
    steps: Tensor | int,
    *,
    lr: float = 1e-4,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Tensor:
    """Run full-batch Adam on every client from fresh moments (the optimiser is new in every round).

    Args:
        theta: Start of all clients, (M, p); not changed.
        gradient: (M, p) -> (M, p), the gradient of each client's own loss.
        steps: Epochs, one number for all or (M,) whole numbers; a client that is done stays where it is.
        lr: Step size.
        beta1: Decay of the mean.
        beta2: Decay of the mean square.
        eps: Added to the root of the mean square.

    Returns:
        The clients' parameters after training, (M, p).
    """
    theta = theta.clone()
    each = torch.as_tensor(steps).expand(theta.shape[0])
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    all_alike = bool((each == each[0]).all())
    for step in range(1, int(each.max()) + 1):
        g = gradient(theta)
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        scale = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
        move = mean / scale * (-lr / (1 - beta1**step))
        theta += move if all_alike else move * (each >= step).unsqueeze(1)
    return theta
