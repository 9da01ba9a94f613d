"""A multilayer perceptron for tables: linear layers, ReLU, dropout."""

from __future__ import annotations

from torch import Tensor, nn

from common.config import DataConfig, ModelConfig
from common.method import Groups
from common.models.grouping import make_groups


class MultilayerPerceptron(nn.Module):
    """Linear layers with ReLU and dropout between them.

    Args:
        features: Columns of the table.
        hidden: Sizes of the hidden layers.
        classes: Number of logits.
        dropout: Share of hidden values set to 0 in training.
    """

    def __init__(self, features: int, hidden: tuple[int, ...], classes: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(features, size), nn.ReLU(), nn.Dropout(dropout)]
            features = size
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) of rows (N, F)."""
        logits: Tensor = self.out(self.body(x))
        return logits


def build(model: ModelConfig, data: DataConfig) -> nn.Module:
    """Build the network from `model.hidden` and `model.dropout`. Width, levels and norm have no effect."""
    return MultilayerPerceptron(len(data.channels), model.hidden, len(data.labels), model.dropout)


def groups(network: nn.Module) -> Groups:
    """Return the groups: the head is the last linear layer."""
    return make_groups(network, head=("out",))
