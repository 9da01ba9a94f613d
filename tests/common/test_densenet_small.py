"""The small DenseNet: what its settings build, and what it refuses."""

import pytest
import torch

from common.config import DataConfig, ModelConfig
from common.errors import ConfigError
from common.models import build_model, find_family, parameter_groups
from common.models.densenet import coarsest
from common.models.densenet_small import BOTTLENECK, LAYERS, channels, growth_rate
from common.models.grouping import NORM_LAYERS


def data(size=32, dims=2):
    return DataConfig(
        task="classification", spatial_dims=dims, channels=("r", "g", "b"), labels=("x", "y"), patch=(size,) * dims
    )  # fmt: skip


def build(size=32, dims=2, **model):
    return build_model(ModelConfig(**{"name": "densenet", **model}), data(size, dims), seed=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("width", "levels"), [(1, 2), (7, 3), (16, 3), (12, 4)])
def test_every_normalised_count_of_channels_is_known(width, levels, dims):
    network = build(64, dims, width=width, levels=levels, norm="group")
    found = {module.num_channels for module in network.modules() if isinstance(module, NORM_LAYERS)}
    model = ModelConfig(name="densenet", width=width, levels=levels)
    assert found == set(channels(model))
    layers = [name for name, _ in network.named_modules() if "denselayer" in name.rpartition(".")[2]]
    assert len(layers) == levels * LAYERS
    assert BOTTLENECK * growth_rate(model) in found
    assert all(count % network.features.norm0.num_groups == 0 for count in found)


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("size", [29, 32, 33, 63])
def test_the_coarsest_grid_is_known_and_a_smaller_patch_is_refused(size, levels):
    network = build(size, width=2, levels=levels, norm="group")
    grid = coarsest(size, poolings=levels - 1)
    with torch.no_grad():
        assert network.features(torch.zeros(1, 3, size, size)).shape[2:] == (grid, grid)
    smallest = next(edge for edge in range(1, size + 1) if coarsest(edge, poolings=levels - 1))
    assert build(smallest, width=2, levels=levels)(torch.zeros(2, 3, smallest, smallest)).shape == (2, 2)
    with pytest.raises(ConfigError, match=f"{levels} levels halves an image {levels + 1} times"):
        build(smallest - 1, width=2, levels=levels)
    with pytest.raises(ConfigError, match="single voxel"):
        build(smallest, width=2, levels=levels, norm="instance")


def test_it_is_small_its_head_is_the_last_layer_and_auto_is_still_the_large_one():
    network = build()
    groups = parameter_groups(network)
    assert sum(value.numel() for value in network.parameters()) == 48_114
    assert groups["head"] == ("class_layers.out.weight", "class_layers.out.bias")
    assert len(groups["buffers"]) == 3 * sum(isinstance(module, NORM_LAYERS) for module in network.modules())
    assert find_family("auto", data()).name == "densenet121"
