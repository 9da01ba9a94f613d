"""MONAI's DenseNet in small sizes: for little pictures and for work without a GPU.

Reference: Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, CVPR 2017. As in the paper's
networks the growth rate k is half the channels of the first convolution (`model.width`), bottlenecks have 4k channels and
transitions halve them. `model.levels` dense blocks of `LAYERS` layers each.
"""

from __future__ import annotations

from monai.networks.nets import DenseNet
from torch import nn

from common.config import DataConfig, ModelConfig
from common.errors import ConfigError
from common.method import Groups
from common.models import densenet
from common.models.family import check_coarsest
from common.models.norms import norm_spec

LAYERS = 4
BOTTLENECK = 4


def channels(model: ModelConfig) -> list[int]:
    """Return every channel count that is normalised somewhere in the network.

    Args:
        model: Its width and levels.
    """
    growth = growth_rate(model)
    count = model.width
    found = [count, BOTTLENECK * growth]
    for _ in range(model.levels):
        found += [count + layer * growth for layer in range(1, LAYERS + 1)]
        count = found[-1] // 2
        found.append(count)
    return found[:-1]  # no transition after the last block


def growth_rate(model: ModelConfig) -> int:
    """Return k, the channels that a layer adds."""
    return max(1, model.width // 2)


def build(model: ModelConfig, data: DataConfig) -> nn.Module:
    """Build the network.

    Raises:
        ConfigError: A patch that is too small for its halvings, or for the normalisation.
    """
    grid = [densenet.coarsest(size, poolings=model.levels - 1) for size in data.patch]
    if not all(grid):
        raise ConfigError(
            f"Model 'densenet' with {model.levels} levels halves an image {model.levels + 1} times, got a patch of "
            f"{list(data.patch)}. Change data.patch or model.levels."
        )
    check_coarsest("densenet", model, data, grid, refused=("instance",))
    return DenseNet(
        spatial_dims=data.spatial_dims,
        in_channels=len(data.channels),
        out_channels=len(data.labels),
        init_features=model.width,
        growth_rate=growth_rate(model),
        block_config=(LAYERS,) * model.levels,
        bn_size=BOTTLENECK,
        norm=norm_spec(model, *channels(model)),
        dropout_prob=model.dropout,
    )


def groups(network: nn.Module) -> Groups:
    """Return the groups: the head is the last linear layer."""
    return densenet.groups(network)
