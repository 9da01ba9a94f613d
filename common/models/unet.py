"""MONAI's U-Net with residual units: the default for segmentation, and the cheapest one.

The first convolution already halves the grid, so most of the work is done at an eighth of the voxels: this is what
makes it usable without a GPU. `dynunet` and `segresnet` work at full resolution.

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

RESIDUAL_UNITS = 1


def build(model: ModelConfig, data: DataConfig) -> nn.Module:
    """Build the network: channels width, 2·width, ... over `levels` levels.

    Raises:
        ConfigError: A patch that cannot be halved at every level.
    """
    check_halvings("unet", model, data)
    classes = len(data.labels)
    return UNet(
        spatial_dims=data.spatial_dims,
        in_channels=len(data.channels),
        out_channels=classes,
        channels=[model.width * 2**level for level in range(model.levels)],
        strides=[2] * (model.levels - 1),
        num_res_units=RESIDUAL_UNITS,
        # the last block normalises the class channels, too
        norm=norm_spec(model, model.width, classes),
        dropout=model.dropout,
    )


def groups(network: nn.Module) -> Groups:
    """Return the groups: the head is the last block, which brings the features to the classes at full resolution."""
    encoder: list[str] = []
    place, block = "model", network.get_submodule("model")
    while isinstance(block, nn.Sequential) and len(block) == 3 and isinstance(block[1], SkipConnection):
        encoder.append(f"{place}.0")
        place, block = f"{place}.1.submodule", block[1].submodule
    encoder.append(place)  # the bottom
    return make_groups(network, head=("model.2",), encoder=tuple(encoder))
