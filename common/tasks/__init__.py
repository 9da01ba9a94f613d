"""A task is a loss, a way to predict, and figures: segmentation, classification, tabular.

    task = get_task(config.data, config.train)
    loss = task.loss(network(image), label)
    sums = task.measure(task.infer(network, image), label, spacing)
    figures = divide(sums)

Figures travel as numerators and denominators, so that those of several cases, or of several sites, are added first
and divided last.
"""

from __future__ import annotations

from common.config import DataConfig, TrainConfig
from common.errors import ConfigError
from common.tasks.sums import Sums, add_sums, divide
from common.tasks.task import Meter, Task

__all__ = ["Meter", "Sums", "Task", "add_sums", "divide", "get_task"]


def get_task(data: DataConfig, train: TrainConfig) -> Task:
    """Return the task of a run.

    Raises:
        ConfigError: Class weights that do not fit the classes.
    """
    weights = train.class_weights
    if weights is not None and (len(weights) != len(data.labels) or min(weights, default=0) <= 0):
        raise ConfigError(
            f"train.class_weights needs one number above 0 for each of the {len(data.labels)} classes, "
            f"got {list(weights)}."
        )
    # imported here because MONAI and scikit-learn take seconds, and the coordinator needs only the sums
    if data.task == "segmentation":
        from common.tasks.segmentation import Segmentation

        return Segmentation(data, train)
    from common.tasks.classification import Classification

    return Classification(data, train, primary="auc" if data.task == "tabular" else "balanced_accuracy")
