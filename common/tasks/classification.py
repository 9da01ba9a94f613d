"""Classification of images and of table rows: cross-entropy as loss; accuracy, recalls and AUC as figures.

Conventions:

* "recall/CLASS" are counts and add up exactly over sites.
* "balanced_accuracy" is the mean recall over the classes a site has; "auc" is the area under the ROC curve (with more
  than two classes the mean of one-against-the-rest over the classes that have both kinds of cases). Both need all
  scores of a site at once, so they are computed there and weighted by its number of cases where sites are added.
* A site whose cases are all of one class has no AUC.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from common.config import DataConfig, TrainConfig
from common.numerics.curvature import OutputLoss
from common.tasks.sums import Sums
from common.tasks.task import Meter, Predictor, Task

Array = NDArray[np.float64]


class Classification(Task):
    """Tasks "classification" and "tabular".

    Args:
        data: Classes.
        train: Class weights.
        primary: Main figure.
    """

    def __init__(self, data: DataConfig, train: TrainConfig, *, primary: str) -> None:
        self.primary = primary
        self.classes = data.labels
        self._weights = None if train.class_weights is None else torch.tensor(train.class_weights)
        self.likelihood = OutputLoss("softmax", self._weights)

    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Return the (weighted) mean cross-entropy; see `Task.loss`."""
        weights = None if self._weights is None else self._weights.to(output.device)
        return functional.cross_entropy(output.float(), label, weight=weights)

    def infer(self, network: Predictor, image: Tensor) -> Tensor:
        """Return the network's logits; see `Task.infer`."""
        return network(image)

    def measure(
        self, output: Tensor, label: Tensor, spacing: tuple[float, ...] = (), *, hd95: bool = False
    ) -> Sums:
        """Return accuracy, recall by class and loss; see `Task.measure`. Spacing and hd95 mean nothing here."""
        right = output.argmax(dim=1) == label
        sums: Sums = {"accuracy": (float(right.sum()), float(len(label)))}
        for value, name in enumerate(self.classes):
            of_class = label == value
            sums[f"recall/{name}"] = (float((right & of_class).sum()), float(of_class.sum()))
        # numerator and denominator of the weighted mean, so that batches of any size add up
        weights = torch.ones(len(self.classes)) if self._weights is None else self._weights
        total = float(weights.to(label.device)[label].sum(dtype=torch.float64))
        sums["loss"] = (float(self.loss(output, label)) * total, total)
        return sums

    def meter(self, *, hd95: bool = False) -> Meter:
        """Return a meter that also computes balanced accuracy and AUC."""
        return ScoreMeter(self)


class ScoreMeter(Meter):
    """Meter that keeps all scores of the evaluation, for the figures that are not sums over cases.

    Args:
        task: The task.
    """

    def __init__(self, task: Classification) -> None:
        super().__init__(task)
        self._classes = task.classes
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, output: Tensor, label: Tensor, spacing: tuple[float, ...] = ()) -> None:
        """Take in some cases; arguments as of `Task.measure`."""
        super().add(output, label, spacing)
        self._scores.append(output.double().softmax(dim=1).cpu())
        self._labels.append(label.cpu())

    def finish(self) -> Sums:
        """Return the sums, with balanced accuracy and AUC weighted by the number of cases."""
        sums = super().finish()
        if not self._labels:
            return sums
        labels = torch.cat(self._labels).numpy()
        scores: Array = torch.cat(self._scores).numpy()
        count = float(len(labels))
        recalls = [sums[f"recall/{name}"] for name in self._classes]
        present = [right / cases for right, cases in recalls if cases]
        sums["balanced_accuracy"] = (sum(present) / len(present) * count, count)
        area = area_under_curve(scores, labels)
        if area is not None:
            sums["auc"] = (area * count, count)
        return sums


def area_under_curve(scores: Array, labels: NDArray[np.int64]) -> float | None:
    """Return the area under the ROC curve, or None where all cases are of one class.

    Args:
        scores: Probabilities (n, K).
        labels: Class numbers (n,).
    """
    classes = range(scores.shape[1]) if scores.shape[1] > 2 else [1]
    areas = [
        float(roc_auc_score(labels == value, scores[:, value]))
        for value in classes
        if 0 < int((labels == value).sum()) < len(labels)
    ]
    return sum(areas) / len(areas) if areas else None
