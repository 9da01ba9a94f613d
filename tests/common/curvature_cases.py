"""Small networks, data and a slow dense oracle for the tests of curvature."""

import torch
from torch import nn
from torch.nn import functional

from common.config import DataConfig, ModelConfig
from common.models import build_model
from common.numerics.curvature import OutputLoss

F64 = torch.float64
KINDS = ("softmax", "bernoulli", "mse")
WEIGHTS = torch.tensor([0.5, 2.0, 0.0], dtype=F64)
SIZES = (3, 1, 4)  # unequal batches


def close(got, want):
    assert got.shape == want.shape
    scale = want.abs().max().clamp_min(1e-30)
    assert float((got - want).abs().max() / scale) < 1e-10


def random(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def target_for(kind, outputs, seed, ignore=None):
    made = torch.Generator().manual_seed(seed)
    if kind == "softmax":
        target = torch.randint(outputs[1], (outputs[0], *outputs[2:]), generator=made)
    elif kind == "bernoulli":
        target = torch.randint(2, outputs, generator=made)
    else:
        return torch.randn(outputs, generator=made, dtype=F64)
    if ignore is not None:
        target[torch.rand(target.shape, generator=made) < 0.3] = ignore
    return target


def perceptron(seed=0):
    made = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=made, dtype=F64))
    return network


def tiny_unet():
    data = DataConfig(spatial_dims=2, channels=("a",), labels=("x", "y", "z"), patch=(8, 8))
    return build_model(ModelConfig(name="unet", width=2, levels=2), data, seed=0).double().eval()


def batches_for(network, loss, shape):
    made = []
    for number, size in enumerate(SIZES):
        inputs = random(size, *shape, seed=number)
        with torch.no_grad():
            outputs = network(inputs)
        made.append((inputs, target_for(loss.kind, outputs.shape, number, loss.ignore_index)))
    return made


def one_loss(loss, outputs, target):
    """Σ w ℓ and Σ w from torch's own losses, output by output."""
    if loss.kind == "softmax":
        ignore = -100 if loss.ignore_index is None else loss.ignore_index
        weights = (
            torch.ones(outputs.shape[1], dtype=F64) if loss.class_weights is None else loss.class_weights
        )
        total = functional.cross_entropy(
            outputs, target, weight=weights, ignore_index=ignore, reduction="sum"
        )
        return total, float(sum(weights[label] for label in target.reshape(-1) if label != ignore))
    if loss.kind == "mse":
        return 0.5 * functional.mse_loss(outputs, target, reduction="sum"), outputs.numel() / outputs.shape[1]
    known = target != loss.ignore_index if loss.ignore_index is not None else torch.ones_like(target).bool()
    total = functional.binary_cross_entropy_with_logits(
        outputs[known], target[known].double(), reduction="sum"
    )
    return total, float(known.any(dim=1).sum())


def dense_oracle(function, theta, loss, batches):
    """H from the whole Jacobian and the loss's whole Hessian by autograd; the objective's gradient beside it."""
    H, gradient, total = torch.zeros(len(theta), len(theta), dtype=F64), torch.zeros_like(theta), 0.0
    for inputs, target in batches:
        outputs = function(theta, inputs).detach()
        J = torch.autograd.functional.jacobian(lambda t, x=inputs: function(t, x), theta).reshape(
            -1, len(theta)
        )

        def value(flat, shape=outputs.shape, target=target):
            return one_loss(loss, flat.reshape(shape), target)[0]

        flat = outputs.reshape(-1)
        H += J.T @ torch.autograd.functional.hessian(value, flat) @ J
        gradient += J.T @ torch.autograd.functional.jacobian(value, flat)
        total += one_loss(loss, outputs, target)[1]
    return H / total, gradient / total


LOSSES = [
    OutputLoss("softmax"),
    OutputLoss("softmax", WEIGHTS),
    OutputLoss("softmax", ignore_index=-1),
    OutputLoss("softmax", WEIGHTS, ignore_index=1),
    OutputLoss("bernoulli"),
    OutputLoss("bernoulli", ignore_index=-1),
    OutputLoss("mse"),
]


def name_of(loss):
    return f"{loss.kind}{'-weights' * (loss.class_weights is not None)}{'-ignore' * (loss.ignore_index is not None)}"
