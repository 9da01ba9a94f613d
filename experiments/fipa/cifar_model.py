"""The two small CNNs of FIPA's CIFAR-10 experiment, their local training, and their Gauss-Newton matrix in factors.

Parameters are one flat vector in the order conv1, conv2, fc1, fc2 (no biases). Features are flattened row, column,
channel. The clients are trained one after another with channels-last memory: measured on one core for CNN-8k, the steps
of a round took 0.75 s so, and 1.5 s with one convolution grouped over the clients in the default memory layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.fipa.cifar_data import CLASSES, SIDE, Images, augment, to_float


@dataclass(frozen=True)
class Network:
    """conv 3x3 - pool - conv 3x3 - pool - fc - fc; ReLU; "same" padding; 2x2 max pooling.

    Attributes:
        first: Channels of the first convolution.
        second: Channels of the second convolution.
        hidden: Width of the hidden fully connected layer.
    """

    first: int
    second: int
    hidden: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the four weights."""
        features = self.second * (SIDE // 4) ** 2
        return (
            (self.first, 3, 3, 3),
            (self.second, self.first, 3, 3),
            (self.hidden, features),
            (CLASSES, self.hidden),
        )

    @property
    def size(self) -> int:
        """Number of parameters p."""
        return sum(math.prod(shape) for shape in self.shapes)

    def split(self, theta: Tensor) -> list[Tensor]:
        """Return the four weights as views into theta (..., p)."""
        parts = theta.split([math.prod(shape) for shape in self.shapes], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def initial(self, source: torch.Generator) -> Tensor:
        """Draw a start (p,): normal, variance 1/fan_in, cut at two standard deviations (LeCun's rule)."""
        parts = []
        for shape in self.shapes:
            weight = torch.empty(shape)
            # 0.8796...: standard deviation of a standard normal cut at +-2.
            scale = 1.0 / (math.sqrt(math.prod(shape[1:])) * 0.87962566)
            torch.nn.init.trunc_normal_(weight, 0.0, scale, -2 * scale, 2 * scale, generator=source)
            parts.append(weight.flatten())
        return torch.cat(parts)

    def logits(self, weights: list[Tensor], x: Tensor) -> Tensor:
        """Return (n, 10) for images x (n, 3, 32, 32)."""
        # ReLU after pooling equals ReLU before it and touches a quarter of the values.
        h = F.relu(F.max_pool2d(F.conv2d(x, weights[0], padding=1), 2))
        h = F.relu(F.max_pool2d(F.conv2d(h, weights[1], padding=1), 2))
        features = h.permute(0, 2, 3, 1).flatten(1)
        return F.linear(F.relu(F.linear(features, weights[2])), weights[3])


NETWORKS = {"cnn-8k": Network(4, 8, 16), "cnn-23k": Network(6, 12, 32)}


def train(
    network: Network,
    theta: Tensor,
    data: Images,
    rate: float,
    source: torch.Generator,
    *,
    epochs: int = 5,
    batch: int = 50,
    decay: float = 1e-3,
) -> Tensor:
    """Plain SGD on one client's data with augmentation; returns the trained parameters (p,).

    Args:
        network: The network.
        theta: Start (p,), left as it is.
        data: The client's images.
        rate: Learning rate.
        source: Draws the order of the samples, the crops and the flips.
        epochs: Passes over the data.
        batch: Samples a step.
        decay: Weight decay, added to the gradient.
    """
    weights = [part.clone().requires_grad_() for part in network.split(theta)]
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=source)
        images, labels = to_float(augment(data.pixels[order], source)), data.labels[order]
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(network.logits(weights, x), y), weights)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.sub_(rate * (gradient + decay * weight))
    return torch.cat([weight.detach().flatten() for weight in weights])


@torch.no_grad()
def accuracy(network: Network, theta: Tensor, data: Images, chunk: int = 500) -> float:
    """Return the share of right answers, 0 to 1."""
    weights = network.split(theta)
    hits = 0
    for pixels, labels in zip(data.pixels.split(chunk), data.labels.split(chunk), strict=True):
        hits += int((network.logits(weights, to_float(pixels)).argmax(1) == labels).sum())
    return hits / len(data.labels)


class FactoredGGN:
    """H = 1/n sum J^T S J with softmax S = diag(p) - p p^T, exact, from factors instead of the rows of S^{1/2} J.

    S = R^T R with R = diag(sqrt p)(I - 1 p^T). A row of R J is an outer product for each fully connected layer
    (delta x features), which makes a product about ten times cheaper than with dense rows; only the few convolution
    weights are kept as dense rows. Images are not augmented.

    Args:
        network: The network.
        theta: Parameters (p,), float32 or float64.
        x: Images (n, 3, 32, 32) of the same dtype.
        chunk: Samples whose rows are computed at once (bounds the memory).
    """

    def __init__(self, network: Network, theta: Tensor, x: Tensor, chunk: int = 50) -> None:
        self.network, self.size, self.n = network, network.size, len(x)
        with torch.no_grad():
            parts = [self._rows(network.split(theta), part) for part in x.split(chunk)]
        scale = 1.0 / math.sqrt(self.n)
        joined = [torch.cat(column) for column in zip(*parts, strict=True)]
        self.root, self.delta, self.convolution = (factor * scale for factor in joined[:3])
        self.hidden, self.features = joined[3:]

    def _rows(self, weights: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        """Return R (n, 10, 10), delta (n, 10, hidden), conv rows (n, 10, p_conv), hidden (n, h), features (n, d)."""
        net, n = self.network, len(x)
        pool1, at1 = F.max_pool2d(F.conv2d(x, weights[0], padding=1), 2, return_indices=True)
        h1 = F.relu(pool1)
        pool2, at2 = F.max_pool2d(F.conv2d(h1, weights[1], padding=1), 2, return_indices=True)
        features = F.relu(pool2).permute(0, 2, 3, 1).flatten(1)
        hidden = F.relu(F.linear(features, weights[2]))
        p = F.softmax(F.linear(hidden, weights[3]), 1)
        root = p.sqrt()[:, :, None] * (torch.eye(CLASSES, dtype=x.dtype) - p[:, None, :])
        delta = (root @ weights[3]) * (hidden > 0)[:, None, :]

        quarter = SIDE // 4
        back = (delta @ weights[2]).unflatten(2, (quarter, quarter, net.second)).permute(0, 1, 4, 2, 3)
        dz2 = self._unpool(back, pool2, at2)
        rows2 = dz2.flatten(3).flatten(1, 2) @ F.unfold(h1, 3, padding=1).mT
        back = F.conv_transpose2d(dz2.flatten(0, 1), weights[1], padding=1).unflatten(0, (n, CLASSES))
        dz1 = self._unpool(back, pool1, at1)
        rows1 = dz1.flatten(3).flatten(1, 2) @ F.unfold(x, 3, padding=1).mT
        rows = torch.cat([rows.reshape(n, CLASSES, -1) for rows in (rows1, rows2)], 2)
        return root, delta, rows, hidden, features

    @staticmethod
    def _unpool(back: Tensor, pooled: Tensor, at: Tensor) -> Tensor:
        """Bring (n, 10, c, h, w) through ReLU and max pooling to (n, 10, c, 2h, 2w)."""
        masked = back * (pooled > 0)[:, None]
        n, rows, channels, height, width = masked.shape
        wide = masked.new_zeros(n, rows, channels, 4 * height * width)
        index = at.flatten(2)[:, None].expand(n, rows, channels, height * width)
        wide.scatter_(3, index, masked.flatten(3))
        return wide.unflatten(3, (2 * height, 2 * width))

    def matmat(self, V: Tensor) -> Tensor:
        """Return the rows H v (L, p) for the rows v of V (L, p)."""
        L, net = len(V), self.network
        at = [0, *torch.tensor([math.prod(s) for s in net.shapes]).cumsum(0).tolist()]
        v1 = V[:, at[2] : at[3]].reshape(L * net.hidden, -1)
        v2 = V[:, at[3] :].reshape(L * CLASSES, -1)
        rows = self.convolution.flatten(0, 1)
        T = (rows @ V[:, : at[2]].mT).view(self.n, CLASSES, L)
        T = T + self.delta @ (self.features @ v1.mT).view(self.n, L, -1).mT
        T = T + self.root @ (self.hidden @ v2.mT).view(self.n, L, -1).mT
        out = torch.empty_like(V)
        out[:, : at[2]] = T.flatten(0, 1).mT @ rows
        out[:, at[2] : at[3]] = ((T.mT @ self.delta).flatten(1).mT @ self.features).view(L, -1)
        out[:, at[3] :] = ((T.mT @ self.root).flatten(1).mT @ self.hidden).view(L, -1)
        return out

    def trace(self) -> float:
        """Return tr H, exact (sums in float64)."""
        convolution = self.convolution.double().square().sum()
        delta = self.delta.double().square().sum((1, 2)) @ self.features.double().square().sum(1)
        root = self.root.double().square().sum((1, 2)) @ self.hidden.double().square().sum(1)
        return float(convolution + delta + root)
