"""What a network's settings do: normalisation honoured or refused, sizes checked, nothing sent twice."""

import copy

import pytest
import torch
from monai.networks.nets import DynUNet as MonaiDynUNet
from torch import nn

from common.config import DataConfig, ModelConfig
from common.errors import ConfigError
from common.models import MODELS, build_model, parameter_groups
from common.models.densenet import SMALLEST, coarsest

NORMS = {
    "instance": nn.InstanceNorm2d,
    "batch": nn.BatchNorm2d,
    "group": nn.GroupNorm,
}
IMAGES = [name for name, family in MODELS.items() if family.tasks[0] != "tabular"]


def build(name, *, patch=(32, 32), channels=("a",), labels=("x", "y", "z"), **model):
    task = MODELS[name].tasks[0] if name in MODELS else "segmentation"
    data = DataConfig(
        task=task,
        spatial_dims=0 if task == "tabular" else len(patch),
        channels=channels,
        labels=labels,
        patch=() if task == "tabular" else patch,
    )
    return build_model(ModelConfig(**{"name": name, "width": 8, **model}), data, seed=0)


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        pytest.param(
            norm, name, marks=[pytest.mark.slow] if name == "densenet121" and norm != "batch" else []
        )
        for norm in ("instance", "batch", "group", "none")
        for name in IMAGES
    ],
)
def test_the_normalisation_asked_for_is_the_only_one(name, norm):
    network = build(name, norm=norm, patch=(64, 64))
    found = {type(module) for module in network.modules() if isinstance(module, tuple(NORMS.values()))}
    assert found == ({NORMS[norm]} if norm in NORMS else set())
    keys = parameter_groups(network)["norm"]
    affine = [key for key in keys if key.endswith(("weight", "bias"))]
    assert bool(affine) == (norm != "none")  # with scales and shifts, so that FedBN has something to keep
    assert set(affine) <= set(dict(network.named_parameters()))
    assert any(key.endswith("running_mean") for key in keys) == (norm == "batch")


@pytest.mark.parametrize(("name", "norm"), [("unet", "InstanceNorm2d"), ("densenet121", "BatchNorm2d")])
def test_auto_normalises_by_the_task(name, norm):
    assert norm in {type(module).__name__ for module in build(name, norm="auto").modules()}


@pytest.mark.parametrize("width", [6, 7, 16])
@pytest.mark.parametrize("name", ["unet", "segresnet", "dynunet"])
def test_group_normalisation_finds_groups_for_any_width(name, width):
    output = build(name, norm="group", width=width)(torch.randn(1, 1, 32, 32))
    assert output.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "densenet121" else [])
        for name in MODELS
        if name != "logistic"
    ],
)
def test_dropout_is_there_when_asked_for(name):
    image = torch.randn(2, 1) if name == "mlp" else torch.randn(2, 1, 32, 32)
    with torch.random.fork_rng():
        for share, differs in ((0.0, False), (0.4, True)):
            network = build(name, dropout=share, norm="group").train()
            assert torch.equal(network(image), network(image)) != differs


def test_dynunet_computes_what_monai_computes_and_names_every_tensor_once():
    ours = build("dynunet", levels=4)
    theirs = MonaiDynUNet(
        2,
        1,
        3,
        [3] * 4,
        [1, 2, 2, 2],
        [2] * 3,
        filters=[8, 16, 32, 64],
        norm_name=("instance", {"affine": True}),
    )
    state = theirs.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith("skip_layers.")}
    assert kept.keys() == ours.state_dict().keys()
    assert len(state) > 1.9 * len(kept)
    ours.load_state_dict(kept)
    image = torch.randn(2, 1, 32, 32)
    assert torch.equal(ours(image), theirs(image))


def test_groups_survive_a_copy_and_are_refused_for_a_foreign_network():
    network = build("segresnet")
    assert parameter_groups(copy.deepcopy(network)) == parameter_groups(network)
    with pytest.raises(ConfigError, match=r"Linear.*unet"):
        parameter_groups(nn.Linear(2, 2))


def test_the_unet_of_the_default_settings_is_small():
    network = build("unet", width=16, levels=3, patch=(32, 32, 32), labels=("no", "CSF", "GM", "WM"))
    assert sum(value.numel() for value in network.parameters()) == 114_872
    assert not parameter_groups(network)["buffers"]


@pytest.mark.parametrize(
    "size", [SMALLEST, 33, *(pytest.param(size, marks=pytest.mark.slow) for size in (32, 63, 64, 96))]
)
def test_densenet_knows_its_coarsest_grid(size):
    network = build("densenet121", norm="group", patch=(size, 64))
    with torch.no_grad():
        features = network.features(torch.zeros(1, 1, size, 64))
    assert features.shape[2:] == (coarsest(size), coarsest(64))


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("unet", {"patch": (30, 32), "levels": 3}, "multiples of 4"),
        ("unet", {"patch": (4, 4), "levels": 3, "norm": "instance"}, "single voxel"),
        ("segresnet", {"patch": (4, 4), "levels": 3, "norm": "batch"}, "single voxel"),
        ("dynunet", {"levels": 2}, "at least 3 levels"),
        ("densenet121", {"patch": (28, 64)}, "at least 29"),
        ("densenet121", {"patch": (32, 32), "norm": "instance"}, "single voxel"),
        ("logistic", {"dropout": 0.1}, "mlp"),
        ("mlp", {}, ""),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused_with_the_way_out(name, keys, said):
    if not said:
        assert build(name, **keys) is not None
        return
    with pytest.raises(ConfigError, match=said):
        build(name, **keys)


def test_a_patch_that_is_just_large_enough_is_not_refused():
    for name, patch, norm in (("unet", (4, 8), "instance"), ("densenet121", (32, 64), "instance")):
        network = build(name, patch=patch, norm=norm).train()
        assert torch.isfinite(network(torch.randn(1, 1, *patch))).all()
    assert build("unet", patch=(4, 4), norm="group")(torch.randn(1, 1, 4, 4)).shape == (1, 3, 4, 4)
