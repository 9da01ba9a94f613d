"""Segmentation: Dice and cross-entropy as loss; Dice, IoU and HD95 as figures.

Conventions:

* Two classes are two logits with a softmax, as any number of classes; class 0 is background.
* Loss: Dice loss over the foreground classes, taken over the batch as a whole, plus cross-entropy over all classes.
  The background's Dice is near 1 from the start and would only dilute the others; over the whole batch, because a
  patch often lacks a class. Class weights apply to both parts.
* A figure of a class counts a case if the class is in the truth or in the prediction. In one of the two alone, Dice
  and IoU are 0 and HD95 is the diagonal of the image, the worst distance there is: a model that misses a structure
  must not be spared the distance.
* "dice", "iou" and "hd95" are means over the case's foreground classes that count, then over cases.
* HD95 is in millimetres (in pixels where pictures state no spacing), in the network's grid.
"""

from __future__ import annotations

import math
import warnings
from typing import cast

import torch
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from torch import Tensor

from common.config import DataConfig, TrainConfig
from common.numerics.curvature import OutputLoss
from common.tasks.sums import Sums, add_sums
from common.tasks.task import Predictor, Task

OVERLAP = 0.25
WINDOWS_AT_ONCE = 4
# Voxels above which the stitched logits are kept on the CPU: with 4 classes this is a gigabyte.
CPU_VOXELS = 1 << 26
PERCENTILE = 95.0


class Segmentation(Task):
    """Task "segmentation".

    Args:
        data: Classes and patch.
        train: Class weights.
    """

    primary = "dice"

    def __init__(self, data: DataConfig, train: TrainConfig) -> None:
        self._classes = data.labels
        weights = None if train.class_weights is None else torch.tensor(train.class_weights)
        self.likelihood = OutputLoss("softmax", weights)
        self._loss = DiceCELoss(
            softmax=True,
            to_onehot_y=True,
            include_background=False,
            batch=True,
            weight=weights,
        )
        self._inferer = SlidingWindowInferer(
            roi_size=data.patch,
            sw_batch_size=WINDOWS_AT_ONCE,
            overlap=OVERLAP,
            mode="gaussian",
            cpu_thresh=CPU_VOXELS,
        )

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Return foreground Dice loss plus cross-entropy; see `Task.loss`."""
        # float32: the sums over a batch's voxels leave the range of half precision
        value: Tensor = self._loss.to(output.device)(output.float(), label)
        return value

    def infer(self, network: Predictor, image: Tensor) -> Tensor:
        """Return logits by a sliding window of the patch size with Gaussian weights; see `Task.infer`."""
        return cast(Tensor, self._inferer(image, network))

    def measure(
        self, output: Tensor, label: Tensor, spacing: tuple[float, ...] = (), *, hd95: bool = False
    ) -> Sums:
        """Return Dice, IoU and, if asked, HD95, by class and as means, and the loss; see `Task.measure`."""
        prediction = output.argmax(dim=1, keepdim=True)
        sums: Sums = {}
        for number in range(len(output)):
            case = slice(number, number + 1)
            sums = add_sums(sums, self._case(prediction[case], label[case], spacing, hd95=hd95))
            sums = add_sums(sums, {"loss": (float(self.loss(output[case], label[case])), 1.0)})
        return sums

    def _case(self, prediction: Tensor, label: Tensor, spacing: tuple[float, ...], *, hd95: bool) -> Sums:
        """Return the figures of one case; prediction and label are (1, 1, *S)."""
        found: dict[str, dict[str, float]] = {"dice": {}, "iou": {}}
        if hd95:
            found["hd95"] = {}
        # class by class: one-hot volumes of all classes at once would take as much memory as the logits
        for value, name in enumerate(self._classes[1:], start=1):
            predicted, true = prediction == value, label == value
            if not (predicted.any() or true.any()):
                continue
            found["dice"][name] = float(compute_dice(predicted, true, ignore_empty=False))
            found["iou"][name] = float(compute_iou(predicted, true, ignore_empty=False))
            if hd95:
                found["hd95"][name] = surface_distance(predicted, true, spacing)
        sums: Sums = {}
        for figure, values in found.items():
            count = len(values)
            sums[figure] = (sum(values.values()) / count, 1.0) if count else (0.0, 0.0)
            sums |= {f"{figure}/{name}": (value, 1.0) for name, value in values.items()}
        return sums


def surface_distance(predicted: Tensor, true: Tensor, spacing: tuple[float, ...]) -> float:
    """Return the symmetric 95th percentile surface distance of two masks, not both empty.

    Args:
        predicted: bool (1, 1, *S).
        true: bool (1, 1, *S).
        spacing: Millimetres by axis; 1 where empty.

    Returns:
        Millimetres; the image's diagonal where one of the masks is empty.
    """
    size = predicted.shape[2:]
    steps = spacing or (1.0,) * len(size)
    if not (predicted.any() and true.any()):
        return math.hypot(*((length - 1) * step for length, step in zip(size, steps, strict=True)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own call of an argument that it deprecated
        # on the CPU, where it works on the surface's voxels alone, and is the same with and without a GPU
        return float(
            compute_hausdorff_distance(
                predicted.cpu(),
                true.cpu(),
                include_background=True,
                percentile=PERCENTILE,
                spacing=list(steps),
            )
        )
