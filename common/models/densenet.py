"""MONAI's DenseNet-121: the default for classified images, 2D and 3D.

Reference: Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, CVPR 2017. Its sizes are
fixed; `model.width` and `model.levels` have no effect.
"""

from __future__ import annotations

from monai.networks.nets import DenseNet121
from torch import nn

from common.config import DataConfig, ModelConfig
from common.errors import ConfigError
from common.method import Groups
from common.models.family import check_coarsest
from common.models.grouping import make_groups
from common.models.norms import norm_spec

GROWTH = 32  # divides all of its channel counts
SMALLEST = 29


def coarsest(size: int, poolings: int = 3) -> int:
    """Return what a patch size is after a strided convolution, a padded pooling and the transitions' poolings."""
    for _ in range(2):
        size = (size + 1) // 2
    for _ in range(poolings):
        size //= 2
    return size


def build(model: ModelConfig, data: DataConfig) -> nn.Module:
    """Build the network.

    Raises:
        ConfigError: A patch that is too small for its five halvings, or for the normalisation.
    """
    grid = [coarsest(size) for size in data.patch]
    if not all(grid):
        raise ConfigError(
            f"Model 'densenet121' halves an image five times and needs sizes of at least {SMALLEST}, "
            f"got {list(data.patch)}. Change data.patch."
        )
    check_coarsest("densenet121", model, data, grid, refused=("instance",))
    return DenseNet121(
        spatial_dims=data.spatial_dims,
        in_channels=len(data.channels),
        out_channels=len(data.labels),
        norm=norm_spec(model, GROWTH, most_groups=GROWTH),
        dropout_prob=model.dropout,
    )


def groups(network: nn.Module) -> Groups:
    """Return the groups: the head is the last linear layer."""
    return make_groups(network, head=("class_layers.out",))
