"""Sketches of a site's data against slow counts."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from common.data_sketch import LARGEST, SIDE, check_sketch, data_sketch
from common.errors import ConfigError, PayloadError
from common.numerics.output_loss import OutputLoss
from common.numerics.rng import generator
from common.work import RoundContext


class Work:
    """What a sketch needs of a worker."""

    def __init__(self, model: nn.Module, batches, *, kind="softmax", ignore=None, site="a") -> None:
        self.model, self.batches = model, batches
        self.visits = sum(len(label) for _, label in batches)
        self.likelihood = OutputLoss(kind, ignore_index=ignore)
        self.ctx = RoundContext("run", 1, 3, 5, site)

    def samples(self, most: int):
        assert most == self.visits  # every training case stands behind a sketch
        yield from self.batches

    @contextmanager
    def inspecting(self):
        yield self.model


def volumes(seed=0, shape=(3, 2, 6, 9, 5), classes=3):
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(shape, generator=draw),
            torch.randint(classes, (shape[0], 1, *shape[2:]), generator=draw),
        )
        for _ in range(2)
    ]


def sketch(form, work, size=16, names=("weight", "bias")):
    return data_sketch(form, work, size=size, names=names).numpy()


def test_labels_are_the_shares_of_all_classes_without_what_is_ignored():
    batches = volumes()
    labels = np.concatenate([label.numpy().ravel() for _, label in batches])
    work = Work(nn.Conv3d(2, 4, 1), batches)  # a class that no voxel has counts too
    np.testing.assert_allclose(
        sketch("labels", work), np.bincount(labels, minlength=4) / len(labels), rtol=1e-6
    )
    work = Work(nn.Conv3d(2, 3, 1), batches, ignore=1)
    counts = np.bincount(labels[labels != 1], minlength=3)
    np.testing.assert_allclose(sketch("labels", work), counts / counts.sum(), rtol=1e-6)
    with pytest.raises(ValueError, match="label that counts"):
        sketch(
            "labels", Work(nn.Conv3d(2, 3, 1), [(batches[0][0], torch.ones(3, 1, 6, 9, 5).long())], ignore=1)
        )


def test_features_are_mean_and_deviation_of_every_channel():
    batches = volumes()
    values = np.concatenate([image.numpy().astype(np.float64) for image, _ in batches])
    expected = np.concatenate([values.mean(axis=(0, 2, 3, 4)), values.std(axis=(0, 2, 3, 4))])
    np.testing.assert_allclose(sketch("features", Work(nn.Conv3d(2, 3, 1), batches)), expected, rtol=1e-5)
    rows = [(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([0, 1]))]
    np.testing.assert_allclose(sketch("features", Work(nn.Linear(2, 2), rows)), [2, 2, 1, 0], atol=1e-7)


def test_a_picture_is_the_mean_of_all_at_few_values_an_axis():
    shape = (2, 1, 16, 24)
    images = [torch.rand(shape, generator=torch.Generator().manual_seed(number)) for number in range(2)]
    batches = [(image, torch.zeros(2, dtype=torch.long)) for image in images]
    mean = torch.cat(images).numpy().mean(axis=(0, 1))
    blocks = [[mean[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean() for j in range(SIDE)] for i in range(SIDE)]
    work = Work(nn.Conv2d(1, 2, 1), batches)
    np.testing.assert_allclose(sketch("image", work), np.ravel(blocks), rtol=1e-5)
    assert sketch("image", Work(nn.Conv3d(2, 3, 1), volumes())).shape == (2 * 6 * 8 * 5,)
    with pytest.raises(ConfigError, match="a table has none"):
        sketch("image", Work(nn.Linear(2, 2), [(torch.ones(2, 2), torch.zeros(2).long())]))


def test_a_gradient_is_folded_alike_at_every_site_and_keeps_distances():
    batches = volumes()
    torch.manual_seed(0)
    model = nn.Conv3d(2, 3, 1).double()
    work = Work(model, [(image.double(), label) for image, label in batches])
    loss = sum(work.likelihood.loss_sum(model(x), y) for x, y in work.batches)
    loss = loss / sum(y.numel() for _, y in work.batches)
    gradients = dict(zip(("weight", "bias"), torch.autograd.grad(loss, model.parameters()), strict=True))
    expected = np.zeros(16)
    for name, gradient in gradients.items():
        draw = generator("count-sketch", 5, name)
        place = torch.randint(16, (gradient.numel(),), generator=draw).tolist()
        sign = (torch.randint(2, (gradient.numel(),), generator=draw) * 2 - 1).tolist()
        for where, how, value in zip(place, sign, gradient.flatten().tolist(), strict=True):
            expected[where] += how * value
    np.testing.assert_allclose(sketch("gradient", work), expected, rtol=1e-5, atol=1e-8)
    # without collisions the fold is an isometry
    wide = sketch("gradient", work, size=4096)
    norm = torch.cat([value.flatten() for value in gradients.values()]).norm()
    assert np.linalg.norm(wide) == pytest.approx(float(norm), rel=1e-5)


def test_what_is_not_finite_or_no_sketch_is_refused():
    bad = [(torch.full((2, 2), torch.nan), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match="not finite"):
        sketch("features", Work(nn.Linear(2, 2), bad))
    good = {"labels": torch.tensor([0.5, 0.5])}
    assert check_sketch(good, "labels", 16, who="a") is good["labels"]
    for tensors in (
        {}, {"image": good["labels"]}, {**good, "more": good["labels"]}, {"labels": torch.ones(2, 2)},
        {"labels": torch.ones(2, dtype=torch.float64)}, {"labels": torch.ones(0)}, {"labels": torch.ones(LARGEST + 1)},
    ):  # fmt: skip
        with pytest.raises(PayloadError, match=r"^a: its sketch"):
            check_sketch(tensors, "labels", 16, who="a")
    for shares in ([-0.5, 1.5], [0.4, 0.4], [1.0]):
        with pytest.raises(PayloadError, match="which sum to 1"):
            check_sketch({"labels": torch.tensor(shares)}, "labels", 16, who="a")
    with pytest.raises(PayloadError, match="to be 16 values"):
        check_sketch({"gradient": torch.ones(15)}, "gradient", 16, who="a")
    beyond = [(volumes()[0][0], torch.full((3, 1, 6, 9, 5), 3))]
    with pytest.raises(ValueError, match="from 0 to 2"):
        sketch("labels", Work(nn.Conv3d(2, 3, 1), beyond))
