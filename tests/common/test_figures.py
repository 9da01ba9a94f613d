"""Losses and figures against slow oracles written without MONAI, in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from common.config import DataConfig, TrainConfig
from common.errors import ConfigError
from common.tasks import add_sums, divide, get_task

LABELS = ("background", "one", "two")


def segmentation(**train):
    return get_task(DataConfig(labels=LABELS, patch=(8, 8, 8)), TrainConfig(**train))


def volumes(seed, shape=(12, 10, 9)):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    masks = []
    for _ in range(2):
        mask = np.zeros(shape, dtype=np.int64)
        for value in (1, 2):
            centre = np.array(shape)[:, None, None, None] * rng.uniform(0.3, 0.7, (3, 1, 1, 1))
            mask[((grid - centre) ** 2).sum(0) < rng.uniform(4, 12)] = value
        masks.append(mask)
    return masks


def logits_of(mask):
    return torch.nn.functional.one_hot(torch.from_numpy(mask), 3).movedim(-1, 0)[None].float() * 8


def surface(mask, spacing):
    edge = mask & ~binary_erosion(mask, border_value=0)
    return np.argwhere(edge) * np.array(spacing)


def slow_hd95(a, b, spacing):
    distances = cdist(surface(a, spacing), surface(b, spacing))
    return max(np.percentile(distances.min(0), 95), np.percentile(distances.min(1), 95))


@pytest.mark.parametrize("seed", range(4))
def test_overlap_and_distance_against_voxel_counting(seed):
    found, truth = volumes(seed)
    spacing = (1.0, 2.0, 0.5)
    figures = divide(
        segmentation().measure(logits_of(found), torch.from_numpy(truth)[None, None], spacing, hd95=True)
    )
    dices = []
    for value, name in ((1, "one"), (2, "two")):
        a, b = found == value, truth == value
        dice = 2 * (a & b).sum() / (a.sum() + b.sum())
        dices.append(dice)
        assert figures[f"dice/{name}"] == pytest.approx(dice, abs=1e-6)
        assert figures[f"iou/{name}"] == pytest.approx((a & b).sum() / (a | b).sum(), abs=1e-6)
        if a.any() and b.any():
            assert figures[f"hd95/{name}"] == pytest.approx(slow_hd95(a, b, spacing), rel=1e-4)
    assert figures["dice"] == pytest.approx(np.mean(dices), abs=1e-6)


def test_a_class_absent_from_truth_and_prediction_does_not_count_and_a_missed_one_does():
    truth = np.zeros((6, 6, 6), dtype=np.int64)
    truth[2:4, 2:4, 2:4] = 1
    sums = segmentation().measure(
        logits_of(truth), torch.from_numpy(truth)[None, None], (1.0,) * 3, hd95=True
    )
    figures = divide(sums)
    assert figures["dice/one"] == 1
    assert figures["hd95/one"] == 0
    assert not any(name.endswith("/two") for name in figures)
    assert figures["dice"] == 1
    missed = divide(
        segmentation().measure(
            logits_of(np.zeros_like(truth)), torch.from_numpy(truth)[None, None], (), hd95=True
        )
    )
    assert missed["dice/one"] == 0
    assert missed["hd95/one"] == pytest.approx(math.sqrt(3) * 5)


def test_the_loss_is_foreground_dice_over_the_batch_plus_cross_entropy():
    torch.manual_seed(0)
    output = torch.randn(2, 3, 5, 5, 5, dtype=torch.float64)
    label = torch.randint(0, 3, (2, 1, 5, 5, 5))
    p = output.softmax(1)
    y = torch.nn.functional.one_hot(label[:, 0], 3).movedim(-1, 1).double()
    axes = (0, 2, 3, 4)
    dice = (2 * (p * y).sum(axes) + 1e-5) / ((p + y).sum(axes) + 1e-5)
    entropy = -(y * output.log_softmax(1)).sum(1).mean()
    expected = (1 - dice[1:]).mean() + entropy
    assert float(segmentation().loss(output, label)) == pytest.approx(float(expected), abs=1e-5)


def test_sums_add_up_over_sites_and_divide_last():
    task = segmentation()
    parts, labels = [], []
    for seed in range(3):
        found, truth = volumes(seed)
        parts.append(logits_of(found))
        labels.append(torch.from_numpy(truth)[None, None])
    whole = task.measure(torch.cat(parts), torch.cat(labels), ())
    added = {}
    for part, label in zip(parts, labels, strict=True):
        added = add_sums(added, task.measure(part, label, ()))
    assert divide(whole) == pytest.approx(divide(added), abs=1e-6)
    assert divide({"a": (0.0, 0.0), "b": (1.0, 4.0)}) == {"b": 0.25}


def slow_auc(truth, score):
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth == 1] for b in score[truth == 0]]
    return np.mean(pairs)


def test_classification_figures_against_counting():
    rng = np.random.default_rng(5)
    truth = rng.integers(0, 2, 40)
    output = torch.from_numpy(rng.normal(size=(40, 2)))
    data = DataConfig(task="tabular", spatial_dims=0, channels=("a",), labels=("no", "yes"), patch=())
    meter = get_task(data, TrainConfig()).meter()
    for start in range(0, 40, 7):
        meter.add(output[start : start + 7], torch.from_numpy(truth[start : start + 7]))
    figures = divide(meter.finish())
    found = output.argmax(1).numpy()
    score = output.softmax(1)[:, 1].numpy()
    recalls = [(found[truth == value] == value).mean() for value in (0, 1)]
    assert figures["accuracy"] == pytest.approx((found == truth).mean())
    assert figures["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert figures["auc"] == pytest.approx(slow_auc(truth, score))


def test_one_class_has_no_auc():
    data = DataConfig(task="tabular", spatial_dims=0, channels=("a",), labels=("no", "yes"), patch=())
    meter = get_task(data, TrainConfig()).meter()
    meter.add(torch.randn(5, 2), torch.ones(5, dtype=torch.int64))
    assert "auc" not in divide(meter.finish())


def test_class_weights_must_match_the_classes():
    with pytest.raises(ConfigError, match="3"):
        segmentation(class_weights=(1.0, 2.0))
