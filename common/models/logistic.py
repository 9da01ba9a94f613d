"""Logistic regression: the default for tables. One linear layer; the head is all of it."""

from __future__ import annotations

from torch import Tensor, nn

from common.config import DataConfig, ModelConfig
from common.errors import ConfigError
from common.method import Groups
from common.models.grouping import make_groups


class Logistic(nn.Module):
    """Multinomial logistic regression.

    Args:
        features: Columns of the table.
        classes: Classes; two classes have two logits, as everywhere.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) of rows (N, F)."""
        logits: Tensor = self.linear(x)
        return logits


def build(model: ModelConfig, data: DataConfig) -> nn.Module:
    """Build the network. Width, levels, norm and hidden have no effect.

    Raises:
        ConfigError: Dropout, which it has no layer for.
    """
    if model.dropout:
        raise ConfigError(
            f"Model 'logistic' has no dropout, got {model.dropout}. Set model.dropout to 0, or choose model 'mlp'."
        )
    return Logistic(len(data.channels), len(data.labels))


def groups(network: nn.Module) -> Groups:
    """Return the groups: the extractor is empty."""
    return make_groups(network, head=("linear",))
