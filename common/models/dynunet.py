"""MONAI's DynUNet, the network of nnU-Net: convolutions at full resolution; stronger and slower than `unet`.

Reference: Isensee, Jaeger, Kohl, Petersen, Maier-Hein: nnU-Net: a self-configuring method for deep learning-based
biomedical image segmentation, Nature Methods 2021. Without deep supervision; kernels and strides are the same on
all axes.
"""

from __future__ import annotations

from typing import Any

from monai.networks.nets import DynUNet as MonaiDynUNet
from torch import Tensor, nn

from common.config import DataConfig, ModelConfig
from common.errors import ConfigError
from common.method import Groups
from common.models.family import check_halvings
from common.models.grouping import make_groups
from common.models.norms import norm_spec

MOST_CHANNELS = {2: 512, 3: 320}  # as in nnU-Net
FEWEST_LEVELS = 3


class DynUNet(MonaiDynUNet):
    """DynUNet whose state dict names every tensor once.

    MONAI registers each block a second time in a chain of skip layers, so that its state dict, and with it every
    message of a federation, would be twice as long as the network. The same blocks are called here in the same order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.skip_layers

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K, *S) of images (N, C, *S)."""
        skips = [self.input_block(x)]
        for block in self.downsamples:
            skips.append(block(skips[-1]))
        features = self.bottleneck(skips[-1])
        for block in self.upsamples:
            features = block(features, skips.pop())
        logits: Tensor = self.output_block(features)
        return logits


def build(model: ModelConfig, data: DataConfig) -> nn.Module:
    """Build the network: channels width, 2·width, ... over `levels` levels, bounded as in nnU-Net.

    Raises:
        ConfigError: Fewer than three levels, or a patch that cannot be halved at every level.
    """
    if model.levels < FEWEST_LEVELS:
        raise ConfigError(
            f"Model 'dynunet' needs at least {FEWEST_LEVELS} levels, got {model.levels}. Change model.levels."
        )
    check_halvings("dynunet", model, data)
    filters = [min(model.width * 2**level, MOST_CHANNELS[data.spatial_dims]) for level in range(model.levels)]
    return DynUNet(
        spatial_dims=data.spatial_dims,
        in_channels=len(data.channels),
        out_channels=len(data.labels),
        kernel_size=[3] * model.levels,
        strides=[1] + [2] * (model.levels - 1),
        upsample_kernel_size=[2] * (model.levels - 1),
        filters=filters,
        dropout=model.dropout or None,
        norm_name=norm_spec(model, *filters),
    )


def groups(network: nn.Module) -> Groups:
    """Return the groups: the head is the last 1x1 convolution."""
    return make_groups(network, head=("output_block",), encoder=("input_block", "downsamples", "bottleneck"))
