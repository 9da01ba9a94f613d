"""What every task offers: a loss, a prediction, and figures of one evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from common.numerics.curvature import OutputLoss
from common.tasks.sums import Sums, add_sums

Predictor = Callable[[Tensor], Tensor]


class Task(ABC):
    """Loss and figures of a run's task. Holds settings only; the same object serves every model.

    Attributes:
        primary: Name of the main figure, larger is better.
        likelihood: The cross-entropy in the loss, as a loss of the logits: what Fisher information is about.
    """

    primary: str
    likelihood: OutputLoss

    @abstractmethod
    def loss(self, output: Tensor, label: Tensor) -> Tensor:
        """Return the training loss of a batch, a float32 scalar.

        Args:
            output: Logits (N, K, *S) or (N, K).
            label: int64 (N, 1, *S) or (N,), on the same device.
        """

    @abstractmethod
    def infer(self, network: Predictor, image: Tensor) -> Tensor:
        """Return the logits of whole images, of any size.

        Args:
            network: Anything that maps a batch of patches to logits.
            image: float32 (N, C, *S) or (N, F).
        """

    @abstractmethod
    def measure(
        self, output: Tensor, label: Tensor, spacing: tuple[float, ...] = (), *, hd95: bool = False
    ) -> Sums:
        """Return the additive figures of some cases.

        Args:
            output: Logits (N, K, *S) or (N, K).
            label: int64 (N, 1, *S) or (N,), on the same device.
            spacing: Millimetres by axis; 1 where empty.
            hd95: Also compute the surface distance, which is slow.
        """

    def meter(self, *, hd95: bool = False) -> Meter:
        """Return an empty meter for one evaluation of one model on one split."""
        return Meter(self, hd95=hd95)


class Meter:
    """Takes in an evaluation case by case and gives its figures at the end.

    Args:
        task: Whose `measure` is summed.
        hd95: Also compute the surface distance.
    """

    def __init__(self, task: Task, *, hd95: bool = False) -> None:
        self._task = task
        self._hd95 = hd95
        self._sums: Sums = {}

    def add(self, output: Tensor, label: Tensor, spacing: tuple[float, ...] = ()) -> None:
        """Take in some cases; arguments as of `Task.measure`."""
        self._sums = add_sums(self._sums, self._task.measure(output, label, spacing, hd95=self._hd95))

    def finish(self) -> Sums:
        """Return the sums over all cases taken in."""
        return dict(self._sums)
