"""Every network: groups partition its parameters, shapes come out right, a seed gives the same weights."""

import pytest
import torch

from common.config import DataConfig, ModelConfig
from common.errors import ConfigError
from common.models import MODELS, build_model, parameter_groups, template

SEGMENTATION = [name for name, family in MODELS.items() if "segmentation" in family.tasks]


def setting(name, dims=None, norm="auto"):
    task = MODELS[name].tasks[0]
    dims = 0 if task == "tabular" else dims or 2
    data = DataConfig(
        task=task, spatial_dims=dims, channels=("a", "b"), labels=("x", "y", "z"), patch=(32,) * dims
    )
    return ModelConfig(name=name, width=8, levels=3, norm=norm), data


CASES = [
    pytest.param(name, dims, marks=[pytest.mark.slow] if (name, dims) == ("densenet121", 3) else [])
    for name in MODELS
    for dims in ((2, 3) if "tabular" not in MODELS[name].tasks else (0,))
]
# the small DenseNet shows the same of the family in the fast suite
EACH = [
    pytest.param(name, marks=[pytest.mark.slow] if name == "densenet121" else [], id=name) for name in MODELS
]


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_groups_partition_the_parameters_and_name_every_buffer(name, dims):
    network = build_model(*setting(name, dims), seed=1)
    groups = parameter_groups(network)
    parameters = {key for key, _ in network.named_parameters()}
    assert set(groups["extractor"]) | set(groups["head"]) == parameters
    assert not set(groups["extractor"]) & set(groups["head"])
    assert groups["head"]
    assert set(groups["buffers"]) == network.state_dict().keys() - parameters
    assert set(groups["norm"]) <= network.state_dict().keys()
    if name in SEGMENTATION:
        assert set(groups["encoder"]) | set(groups["decoder"]) | set(groups["head"]) == parameters
        assert not set(groups["encoder"]) & set(groups["decoder"])
        assert groups["encoder"]
        assert groups["decoder"]


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_outputs_have_one_logit_per_class(name, dims):
    network = build_model(*setting(name, dims), seed=1).eval()
    image = torch.randn(2, 2, *(32,) * dims)
    with torch.no_grad():
        output = network(image)
    assert output.shape == ((2, 3, *(32,) * dims) if name in SEGMENTATION else (2, 3))


@pytest.mark.parametrize("name", EACH)
def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(name):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again, other = (build_model(*setting(name), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    if name != "logistic":
        assert any(not torch.equal(first[key], other[key]) for key in first)
    meta = template(build_model(*setting(name), seed=1))
    assert {key: (value.shape, value.dtype) for key, value in meta.items()} == {
        key: (value.shape, value.dtype) for key, value in first.items()
    }


def test_batch_normalisation_has_buffers_in_the_norm_group():
    groups = parameter_groups(build_model(*setting("unet", 3, "batch"), seed=0))
    assert groups["buffers"]
    assert set(groups["buffers"]) <= set(groups["norm"])
    assert not parameter_groups(build_model(*setting("unet", 3, "instance"), seed=0))["buffers"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "unett"}, "Did you mean 'unet'"),
        ({"name": "densenet121"}, "segmentation"),
        ({"name": "unet", "levels": 6}, "patch"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(change, said):
    _, data = setting("unet", 3)
    with pytest.raises(ConfigError, match=said):
        build_model(ModelConfig(**{"width": 8, **change}), data, seed=0)
