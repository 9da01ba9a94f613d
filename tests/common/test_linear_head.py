"""The closed form of a linear head against the operator of the same parameters; which layers are taken for one."""

import pytest
import torch
from torch import nn

from common.config import DataConfig, ModelConfig
from common.models import build_model
from common.numerics.curvature import (
    GGN,
    LinearHeadGGN,
    OutputLoss,
    flat_function,
    linear_head,
    linear_head_features,
)
from tests.common.curvature_cases import F64, LOSSES, SIZES, batches_for, close, name_of, perceptron, random


def convolutional():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double().eval()
    made = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=made, dtype=F64))
    return network


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
@pytest.mark.parametrize(
    ("network", "shape"), [(perceptron(), (4,)), (convolutional(), (1, 3, 5))], ids=["linear", "1x1"]
)
@pytest.mark.parametrize(
    ("names", "block"), [(["2.weight", "2.bias"], 40), (["2.weight"], 1 << 22)], ids=["blocks", "no-bias"]
)
def test_the_closed_form_is_the_operator(loss, network, shape, names, block, monkeypatch):
    monkeypatch.setattr("common.numerics.linear_head.BLOCK_VALUES", block)
    batches = batches_for(network, loss, shape)
    if loss.kind == "softmax" and len(shape) > 1:
        batches = [(inputs, target.unsqueeze(1)) for inputs, target in batches]
    head = linear_head(network, names, loss, lambda: batches)
    theta, function = flat_function(network, names)
    operator = GGN(function, theta, loss, lambda: batches)
    V = random(6, len(theta), seed=2)
    assert isinstance(head, LinearHeadGGN)
    assert head.size == operator.size
    assert torch.equal(head.theta, theta)
    close(head.matmat(V), operator.matmat(V))
    close(head.quadratic(V), operator.quadratic(V))
    close(head.gradient(), operator.gradient())
    close(head.dense(), operator.dense())
    assert torch.equal(head.dense(), head.dense().T)


def test_the_closed_form_takes_features_as_they_are_and_refuses_others():
    loss, features, outputs = OutputLoss("softmax"), random(6, 4), random(6, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    head = LinearHeadGGN(features, outputs, labels, loss, bias=True)
    assert head.size == 15
    assert head.theta.isnan().all()
    assert head.matmat(random(2, 15, dtype=torch.float32)).dtype == torch.float32
    with pytest.raises(ValueError, match="same positions"):
        LinearHeadGGN(features[:5], outputs, labels, loss, bias=True)
    with pytest.raises(ValueError, match="12 parameter values"):
        LinearHeadGGN(features, outputs, labels, loss, bias=False, theta=random(15))
    with pytest.raises(ValueError, match="positive weight"):
        LinearHeadGGN(features, outputs, labels * 0, OutputLoss("softmax", ignore_index=0), bias=True)
    for call in (head.matmat, head.quadratic):
        with pytest.raises(ValueError, match="rows"):
            call(random(2, 12))


def test_the_heads_of_real_networks_are_found():
    for model, task, dims in (
        ("densenet121", "classification", 2),
        ("mlp", "tabular", 0),
        ("logistic", "tabular", 0),
    ):
        data = DataConfig(
            task=task, spatial_dims=dims, channels=("a",), labels=("x", "y"), patch=(32,) * dims
        )
        network = build_model(ModelConfig(name=model), data, seed=0).double().eval()
        names = [name for name, _ in network.named_parameters()][-2:]
        inputs = random(2, 1, *(32,) * dims)
        head = linear_head(
            network, names, OutputLoss("softmax"), lambda x=inputs: [(x, torch.tensor([0, 1]))]
        )
        theta, function = flat_function(network, names)
        operator = GGN(function, theta, OutputLoss("softmax"), lambda x=inputs: [(x, torch.tensor([0, 1]))])
        assert head is not None
        V = random(2, len(theta))
        close(head.matmat(V), operator.matmat(V))


class Twice(nn.Module):
    """Applies its layer to its own output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


class Again(Twice):
    """Uses its layer once more, for nothing that is returned."""

    def forward(self, x):
        outputs = self.layer(x)
        self.layer(outputs)
        return outputs


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.first(x).tanh())


class Odd(nn.Linear):
    """A linear layer that is none."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize(
    ("network", "name", "inputs"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), "0", (4, 3)),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "0", (4, 3)),
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "1", (4, 3)),
        (nn.Sequential(nn.Linear(3, 3)), "5", (4, 3)),
        (Twice(), "layer", (4, 3)),
        (Again(), "layer", (4, 3)),
        (Tied(), "last", (4, 3)),
        (nn.Sequential(Odd(3, 3)), "0", (4, 3)),
        (nn.Sequential(nn.Linear(3, 3)), "0", (4, 2, 3)),
        (nn.Sequential(nn.Conv2d(1, 3, 3)), "0", (2, 1, 4, 4)),
        (nn.Sequential(nn.Conv2d(1, 3, 1, padding=1)), "0", (2, 1, 4, 4)),
        (nn.Sequential(nn.Conv2d(1, 3, 1, padding="same")), "0", (2, 1, 4, 4)),
        (nn.Sequential(nn.Conv2d(1, 3, 1, stride=2)), "0", (2, 1, 4, 4)),
        (nn.Sequential(nn.Conv2d(3, 3, 1, groups=3)), "0", (2, 3, 4, 4)),
        (nn.Sequential(nn.ConvTranspose2d(3, 3, 1)), "0", (2, 3, 4, 4)),
    ],
)
def test_what_is_no_linear_head_is_not_taken_for_one(network, name, inputs):
    inputs = random(*inputs, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"head|output"):
        linear_head_features(network.eval(), name, inputs)
    names = [f"{name}.weight", f"{name}.bias"]
    target = torch.zeros(len(inputs), *inputs.shape[2:], dtype=torch.int64)
    assert linear_head(network, names, OutputLoss("softmax"), lambda: [(inputs, target)]) is None
    for module in network.modules():
        assert not module._forward_hooks


def test_a_head_is_named_by_its_weight_and_then_its_bias():
    network, loss = perceptron(), OutputLoss("softmax")
    batches = batches_for(network, loss, (4,))
    for names in (
        [],
        ["2.bias"],
        ["2.bias", "2.weight"],
        ["0.weight", "2.bias"],
        ["0.weight", "2.weight", "2.bias"],
    ):
        assert linear_head(network, names, loss, lambda: batches) is None
    single = nn.Linear(4, 3).double()
    assert linear_head(single, ["weight", "bias"], loss, lambda: batches) is not None
    assert (
        linear_head(nn.Linear(4, 3, bias=False).double(), ["weight", "bias"], loss, lambda: batches) is None
    )
    calls = []
    assert linear_head(network, ["2.weight"], loss, lambda: batches, lambda: calls.append(1)) is not None
    assert len(calls) == len(batches)


def test_too_many_features_are_not_kept_and_bad_data_is_refused():
    network, loss = perceptron(), OutputLoss("softmax")
    batches = batches_for(network, loss, (4,))
    names = ["2.weight", "2.bias"]
    values = sum(SIZES) * 5
    assert linear_head(network, names, loss, lambda: batches, most=values) is not None
    assert linear_head(network, names, loss, lambda: batches, most=values - 1) is None
    with pytest.raises(ValueError, match="at least one batch"):
        linear_head(network, names, loss, list)
    with pytest.raises(ValueError, match="whole class numbers"):
        linear_head(network, names, loss, lambda: [(random(2, 4), torch.zeros(1, 3, dtype=torch.int64))])
    noisy = nn.Sequential(nn.Dropout(), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="evaluation mode"):
        linear_head(noisy, ["1.weight", "1.bias"], loss, lambda: batches)


def test_features_and_outputs_come_as_the_head_sees_them():
    network = convolutional()
    inputs = random(2, 1, 3, 5)
    features, outputs = linear_head_features(network, "2", inputs)
    with torch.no_grad():
        assert torch.equal(features, network[:2](inputs))
        assert torch.equal(outputs, network(inputs))
    assert not features.requires_grad
