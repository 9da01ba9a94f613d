"""Tasks beyond their figures: weights, windows, several classes, half precision, and sums as an algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

from common.config import DataConfig, TrainConfig
from common.tasks import add_sums, divide, get_task

NUMBER = st.integers(0, 1000).map(float)
SUMS = st.dictionaries(st.sampled_from(["dice", "iou", "loss"]), st.tuples(NUMBER, NUMBER))


def segmentation(patch=(8, 8), labels=("background", "one", "two"), **train):
    return get_task(DataConfig(labels=labels, patch=patch, spatial_dims=len(patch)), TrainConfig(**train))


def tabular(labels=("a", "b", "c"), **train):
    data = DataConfig(task="tabular", spatial_dims=0, channels=("x",), labels=labels, patch=())
    return get_task(data, TrainConfig(**train))


def drawn(seed, count, classes):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, classes))), torch.from_numpy(
        rng.integers(0, classes, count)
    )


def test_the_main_figure_is_named_and_delivered():
    picture = DataConfig(task="classification", spatial_dims=2, labels=("a", "b", "c"), patch=(8, 8))
    output, label = drawn(0, 30, 3)
    for task, name in ((tabular(), "auc"), (get_task(picture, TrainConfig()), "balanced_accuracy")):
        meter = task.meter()
        meter.add(output, label)
        assert task.primary == name
        assert name in divide(meter.finish())
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    mask[..., 1] = 1
    assert segmentation().primary in divide(segmentation().measure(torch.randn(1, 3, 4, 4), mask))


def test_class_weights_weigh_both_parts_of_the_segmentation_loss():
    torch.manual_seed(0)
    output = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 1, 4, 5))
    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    p, y = output.softmax(1), nn.functional.one_hot(label[:, 0], 3).movedim(-1, 1).double()
    axes = (0, 2, 3)
    dice = 1 - (2 * (p * y).sum(axes) + 1e-5) / ((p + y).sum(axes) + 1e-5)
    share = weights[label]
    entropy = -((y * output.log_softmax(1)).sum(1, keepdim=True) * share).sum() / share.sum()
    expected = (dice[1:] * weights[1:]).mean() + entropy
    got = segmentation(class_weights=(0.5, 1.0, 3.0)).loss(output, label)
    assert float(got) == pytest.approx(float(expected), abs=1e-5)


def test_two_classes_are_a_softmax_over_two_logits():
    task = segmentation(labels=("background", "vessel"))
    label = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    label[..., 2:] = 1
    sure = torch.cat([(1 - label) * 20.0, label * 20.0], dim=1)
    assert float(task.loss(sure, label)) == pytest.approx(0, abs=1e-4)
    # an even guess: cross-entropy log 2, Dice of p=1/2 against half of the pixels is 1/2
    assert float(task.loss(torch.zeros(1, 2, 4, 4), label)) == pytest.approx(np.log(2) + 0.5, abs=1e-4)


def test_the_loss_of_half_precision_logits_is_taken_in_float32():
    label = torch.zeros(1, 1, 512, 512, dtype=torch.int64)  # its sums leave float16's range
    label[..., :256] = 1
    output = torch.randn(1, 3, 512, 512)
    task = segmentation()
    loss = task.loss(output.half(), label)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(task.loss(output, label)), rel=1e-3)


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (20, 13)])
def test_windows_give_back_what_a_local_network_gives_whole(size):
    image = torch.randn(1, 1, *size)
    network = nn.Conv2d(1, 3, 1)  # sees one pixel at a time, so windows change nothing
    task = segmentation()
    found = task.infer(network, image)
    assert found.shape == (1, 3, *size)
    assert torch.allclose(found, network(image), atol=1e-5)
    assert torch.equal(found, task.infer(network, image))


def test_windows_have_the_size_of_the_patch():
    seen = set()

    def network(windows):
        seen.add(tuple(windows.shape[2:]))
        return windows.repeat(1, 3, 1, 1)

    segmentation(patch=(8, 4)).infer(network, torch.randn(1, 1, 21, 3))
    assert seen == {(8, 4)}


def test_weighted_cross_entropy_adds_up_over_batches_of_any_size():
    output, label = drawn(3, 23, 3)
    task = tabular(class_weights=(1.0, 2.0, 5.0))
    expected = float(task.loss(output, label))
    sums = {}
    for start in range(0, 23, 5):
        sums = add_sums(sums, task.measure(output[start : start + 5], label[start : start + 5]))
    assert divide(sums)["loss"] == pytest.approx(expected, rel=1e-6)


def test_auc_of_several_classes_is_the_mean_of_one_against_the_rest():
    output, label = drawn(1, 60, 3)
    meter = tabular().meter()
    meter.add(output, label)
    expected = roc_auc_score(label.numpy(), output.softmax(1).numpy(), multi_class="ovr", average="macro")
    assert divide(meter.finish())["auc"] == pytest.approx(expected)


def test_auc_and_balanced_accuracy_leave_out_a_class_that_a_site_has_not():
    output, label = drawn(2, 40, 3)
    label = label.clamp(max=1)
    meter = tabular().meter()
    meter.add(output, label)
    figures = divide(meter.finish())
    found = output.argmax(1)
    scores = output.softmax(1).numpy()
    aucs = [roc_auc_score(label.numpy() == value, scores[:, value]) for value in (0, 1)]
    recalls = [float((found[label == value] == value).double().mean()) for value in (0, 1)]
    assert figures["auc"] == pytest.approx(np.mean(aucs))
    assert figures["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert "recall/c" not in figures


def test_an_evaluation_without_a_case_has_no_figure():
    assert tabular().meter().finish() == {}
    assert segmentation().meter(hd95=True).finish() == {}


def test_a_case_without_foreground_counts_for_nothing_but_the_loss():
    empty = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 0] = 5
    assert divide(segmentation().measure(logits, empty, hd95=True)).keys() == {"loss"}


def test_a_distance_is_in_millimetres_and_only_when_asked_for():
    truth, found = (torch.zeros(1, 1, 10, 10, dtype=torch.int64) for _ in range(2))
    truth[..., 2, 3], found[..., 2, 7] = 1, 1
    logits = nn.functional.one_hot(found[:, 0], 3).movedim(-1, 1).float()
    task = segmentation()
    assert divide(task.measure(logits, truth, (9.0, 0.5), hd95=True))["hd95/one"] == pytest.approx(2.0)
    assert divide(task.measure(logits, truth, (), hd95=True))["hd95"] == pytest.approx(4.0)
    assert not any("hd95" in name for name in task.measure(logits, truth, (9.0, 0.5)))


@settings(max_examples=40, deadline=None)
@given(SUMS, SUMS, SUMS)
def test_sums_add_in_any_order_and_touch_nothing(a, b, c):
    before = dict(a)
    assert add_sums(add_sums(a, b), c) == add_sums(a, add_sums(b, c))
    assert add_sums(a, b) == add_sums(b, a)
    assert add_sums(a, {}) == a == before
    assert divide(add_sums(a, a)) == divide(a)
