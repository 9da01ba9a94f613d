"""Losses of outputs: values, gradients and Hessians against torch's own losses and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.numerics.output_loss import OutputLoss
from tests.common.curvature_cases import (
    F64,
    KINDS,
    LOSSES,
    WEIGHTS,
    close,
    name_of,
    one_loss,
    random,
    target_for,
)


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 2, 3)])
def test_a_loss_its_gradient_and_its_hessian_are_torchs(loss, shape):
    outputs = random(*shape, seed=1).mul_(3).requires_grad_()
    target = target_for(loss.kind, shape, 2, loss.ignore_index)
    value, weight = one_loss(loss, outputs, target)
    close(loss.loss_sum(outputs, target).detach(), value.detach())
    assert loss.weight_sum(target, outputs.detach()) == pytest.approx(weight, rel=1e-14)
    close(loss.gradient(outputs.detach(), target), torch.autograd.grad(value, outputs)[0])
    tangents = random(4, *shape, seed=3)
    wanted = [
        torch.autograd.functional.hvp(lambda z: one_loss(loss, z, target)[0], outputs.detach(), t)[1]
        for t in tangents
    ]
    close(loss.hessian_product(outputs.detach(), target, tangents), torch.stack(wanted))
    close(loss.hessian_product(outputs.detach(), target, tangents[2]), wanted[2])


def test_a_channel_axis_in_the_labels_changes_nothing():
    outputs, labels = random(2, 3, 4, 4), target_for("softmax", (2, 3, 4, 4), 1)
    loss = OutputLoss("softmax", WEIGHTS)
    assert torch.equal(loss.gradient(outputs, labels), loss.gradient(outputs, labels.unsqueeze(1)))
    # one single voxel, where an axis of size 1 could be taken for another
    assert torch.equal(
        loss.gradient(outputs[..., :1, :1], labels[:, :1, :1]),
        loss.gradient(outputs[..., :1, :1], labels[:, None, :1, :1]),
    )


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), scale=st.sampled_from([0.1, 3.0, 50.0]))
@settings(max_examples=25, deadline=None)
def test_the_hessian_is_symmetric_and_positive_semidefinite(seed, kind, scale):
    loss = OutputLoss(kind, WEIGHTS if kind == "softmax" else None)
    outputs, target = random(3, 3, 2, seed=seed) * scale, target_for(kind, (3, 3, 2), seed)
    s, t = random(2, 3, 3, 2, seed=seed + 1)
    Hs, Ht = loss.hessian_product(outputs, target, torch.stack([s, t]))
    assert float((s * Hs).sum()) >= -1e-12
    assert float((t * Hs).sum()) == pytest.approx(float((s * Ht).sum()), abs=1e-12)


def test_sure_outputs_give_finite_numbers_and_the_bernoulli_hessian_keeps_its_digits():
    outputs = torch.tensor([[800.0, -800.0, 40.0]], dtype=F64)
    for kind, target in (("softmax", torch.tensor([1])), ("bernoulli", torch.tensor([[0, 1, 1]]))):
        loss = OutputLoss(kind)
        made = (loss.loss_sum(outputs, target), loss.gradient(outputs, target))
        curved = loss.hessian_product(outputs, target, torch.ones_like(outputs))
        assert all(torch.isfinite(tensor).all() for tensor in (*made, curved))
    assert float(curved[0, 2]) == pytest.approx(math.exp(-40), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("loss", "output", "target", "says"),
    [
        (OutputLoss("softmax"), (2, 3), torch.tensor([0, 3]), "0 to 2"),
        (OutputLoss("softmax"), (2, 3), torch.tensor([0, -1]), "ignore_index"),
        (OutputLoss("softmax"), (2, 3), torch.zeros(2), "whole class numbers"),
        (OutputLoss("softmax"), (2, 3), torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
        (OutputLoss("softmax"), (2, 3, 4), torch.zeros(2, 2, dtype=torch.int64), r"\(2, 2\)"),
        (OutputLoss("softmax", WEIGHTS[:2]), (2, 3), torch.tensor([0, 1]), "3 class weights"),
        (OutputLoss("mse"), (2, 3), torch.zeros(2), "same shape"),
        (OutputLoss("bernoulli"), (2, 1), torch.full((2, 1), 2), "between 0 and 1"),
    ],
)
def test_targets_that_do_not_fit_are_refused(loss, output, target, says):
    outputs = torch.zeros(output, dtype=F64)
    for call in (loss.loss_sum, loss.gradient, lambda o, t: loss.hessian_product(o, t, o)):
        with pytest.raises(ValueError, match=says):
            call(outputs, target)
    with pytest.raises(ValueError, match=says):
        loss.weight_sum(target, outputs)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("hinge", {}, "must be one of"),
        ("mse", {"class_weights": WEIGHTS}, "belong to the softmax"),
        ("bernoulli", {"class_weights": WEIGHTS}, "belong to the softmax"),
        ("mse", {"ignore_index": 0}, "leave ignore_index out"),
        ("softmax", {"class_weights": -WEIGHTS}, "at least 0"),
        ("softmax", {"class_weights": WEIGHTS / 0}, "finite"),
        ("softmax", {"class_weights": WEIGHTS[None]}, "one finite number"),
    ],
)
def test_settings_without_a_meaning_are_refused(kind, settings, says):
    with pytest.raises(ValueError, match=says):
        OutputLoss(kind, **settings)


def test_tangents_of_another_shape_are_refused():
    outputs, target = random(2, 3), torch.tensor([0, 1])
    for tangent in (random(3), random(2, 2), random(1, 1, 2, 3)):
        with pytest.raises(ValueError, match="Tangents"):
            OutputLoss("softmax").hessian_product(outputs, target, tangent)
