"""MONAI's U-Net: the default for segmentation, and the cheapest one.

The first convolution already halves the grid, so all but the last layer works at an eighth of the voxels (a quarter in
2D): this is what makes it usable without a GPU. `dynunet` and `segresnet` work at full resolution. Without residual
units, which took three times as long here for the same Dice.

Reference: Kerfoot, Clough, Oksuz, Lee, King, Schnabel: Left-Ventricle Quantification Using Residual U-Net, STACOM 2018.
"""

from __future__ import annotations

from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets import UNet
from torch import nn

from common.config import DataConfig, ModelConfig
from common.method import Groups
from common.models.family import check_halvings
from common.models.grouping import make_groups
from common.models.norms import norm_spec


def build(model: ModelConfig, data: DataConfig) -> nn.Module:
    """Build the network: channels width, 2·width, ... over `levels` levels.

    Raises:
        ConfigError: A patch that cannot be halved at every level.
    """
    check_halvings("unet", model, data)
    return UNet(
        spatial_dims=data.spatial_dims,
        in_channels=len(data.channels),
        out_channels=len(data.labels),
        channels=[model.width * 2**level for level in range(model.levels)],
        strides=[2] * (model.levels - 1),
        num_res_units=0,
        norm=norm_spec(model, model.width),
        dropout=model.dropout,
    )


def groups(network: nn.Module) -> Groups:
    """Return the groups: the head is the last transposed convolution, which gives the classes at full resolution."""
    encoder: list[str] = []
    place, block = "model", network.get_submodule("model")
    while isinstance(block, nn.Sequential) and len(block) == 3 and isinstance(block[1], SkipConnection):
        encoder.append(f"{place}.0")
        place, block = f"{place}.1.submodule", block[1].submodule
    encoder.append(place)  # the bottom
    return make_groups(network, head=("model.2",), encoder=tuple(encoder))
