"""MONAI's SegResNet: residual blocks at full resolution; stronger and several times slower than `unet`.

Reference: Myronenko: 3D MRI brain tumor segmentation using autoencoder regularization, BrainLes 2018 (without the
autoencoder branch). Upsampling is by transposed convolution, because the interpolation that MONAI takes by default has
no deterministic gradient on CUDA.
"""

from __future__ import annotations

from monai.networks.nets import SegResNet
from torch import nn

from common.config import DataConfig, ModelConfig
from common.method import Groups
from common.models.family import check_halvings
from common.models.grouping import make_groups
from common.models.norms import norm_spec

BLOCKS = (1, 2, 2, 4, 4, 4)


def build(model: ModelConfig, data: DataConfig) -> nn.Module:
    """Build the network: channels width, 2·width, ... over `levels` levels.

    Raises:
        ConfigError: A patch that cannot be halved at every level.
    """
    check_halvings("segresnet", model, data)
    return SegResNet(
        spatial_dims=data.spatial_dims,
        in_channels=len(data.channels),
        out_channels=len(data.labels),
        init_filters=model.width,
        norm=norm_spec(model, model.width),
        dropout_prob=model.dropout or None,
        blocks_down=BLOCKS[: model.levels],
        blocks_up=(1,) * (model.levels - 1),
        upsample_mode="deconv",
    )


def groups(network: nn.Module) -> Groups:
    """Return the groups: the head is the last 1x1 convolution; the normalisation before it counts as decoder."""
    return make_groups(network, head=("conv_final.2",), encoder=("convInit", "down_layers"))
