"""Losses of a network's outputs, with their gradients and Hessians with respect to these outputs.

A position is one sample of outputs (N, C), or one voxel of outputs (N, C, *S); its C outputs are z, its weight w:

    kind        ℓ of a position                      ∂ℓ/∂z        S = ∂²ℓ/∂z²
    softmax     −log softmax(z)[label]               π − onehot   Diag(π) − π πᵀ          π = softmax(z)
    bernoulli   Σ_c log(1 + exp z_c) − y_c z_c       σ(z) − y     Diag(σ(z) (1 − σ(z)))
    mse         ½ ‖z − y‖²                           z − y        I

The objective is Σ w ℓ / Σ w over the positions of all batches, which for softmax is what torch's `cross_entropy` gives
with `weight` and `ignore_index`. All three are canonical links, so S is also the Fisher information of the outputs
(Martens: New Insights and Perspectives on the Natural Gradient Method, JMLR 2020, section 9.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

LossKind = Literal["mse", "softmax", "bernoulli"]


@dataclass(frozen=True, eq=False)
class OutputLoss:
    """A loss of outputs (N, C, *S); see the file's head.

    Targets are class numbers (N,), (N, *S) or (N, 1, *S) for softmax, values of the outputs' shape otherwise.

    Attributes:
        kind: Which loss.
        class_weights: softmax only: w by class (C,), finite and at least 0; None: 1 for all.
        ignore_index: Target value that is left out: for softmax its position has weight 0; for bernoulli that one
            output is left out, and a position all of whose outputs are left out has weight 0.

    Raises:
        ValueError: An unknown kind, or a setting that the kind has no use for.
    """

    kind: LossKind
    class_weights: Tensor | None = None
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(LossKind):
            raise ValueError(f"The loss must be one of {', '.join(get_args(LossKind))}, got '{self.kind}'.")
        if self.class_weights is not None:
            if self.kind != "softmax":
                raise ValueError(f"Class weights belong to the softmax loss; leave them out for {self.kind}.")
            good = self.class_weights.ndim == 1 and bool(torch.isfinite(self.class_weights).all())
            if not good or bool((self.class_weights < 0).any()):
                raise ValueError("Class weights must be one finite number of at least 0 per class.")
        if self.ignore_index is not None and self.kind == "mse":
            raise ValueError("The mse loss has no target value to ignore; leave ignore_index out.")

    def loss_sum(self, output: Tensor, target: Tensor) -> Tensor:
        """Return Σ w ℓ, a scalar in the dtype of the outputs that autograd can differentiate.

        Args:
            output: Outputs (N, C, *S).
            target: Targets; see the class.

        Raises:
            ValueError: Targets that do not fit the outputs.
        """
        if self.kind == "softmax":
            labels, weights = self._labels(output, target)
            picked = functional.log_softmax(output, dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
            return -(weights * picked).sum()
        values, known = self._values(output, target)
        if self.kind == "mse":
            return 0.5 * (output - values).square().sum()
        each = functional.binary_cross_entropy_with_logits(output, values, reduction="none")
        return (each * known).sum()

    def weight_sum(self, target: Tensor, output: Tensor) -> float:
        """Return Σ w of a batch; arguments as of `loss_sum`.

        Raises:
            ValueError: Targets that do not fit the outputs.
        """
        if self.kind == "softmax":
            _, weights = self._labels(output, target)
            return float(weights.sum(dtype=torch.float64))
        _, known = self._values(output, target)
        return float(known.any(dim=1).sum())

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ∂(Σ w ℓ)/∂z in the outputs' shape; arguments as of `loss_sum`.

        Raises:
            ValueError: Targets that do not fit the outputs.
        """
        if self.kind == "softmax":
            labels, weights = self._labels(output, target)
            index = labels.unsqueeze(1)
            gradient = functional.softmax(output, dim=1)
            gradient = gradient.scatter_add(1, index, gradient.new_full(index.shape, -1.0))
            return gradient * weights.unsqueeze(1)
        values, known = self._values(output, target)
        return output - values if self.kind == "mse" else (output.sigmoid() - values) * known

    def hessian_product(self, output: Tensor, target: Tensor, tangent: Tensor) -> Tensor:
        """Return w S t at every position.

        Args:
            output: Outputs (N, C, *S).
            target: Targets; see the class.
            tangent: t, of the outputs' shape, or (L, N, C, *S) for L of them.

        Returns:
            Tensor of the tangent's shape.

        Raises:
            ValueError: Targets or tangents that do not fit the outputs.
        """
        if tangent.shape[-output.ndim :] != output.shape or tangent.ndim > output.ndim + 1:
            raise ValueError(
                f"Tangents must have the outputs' shape {tuple(output.shape)}, with at most one axis before it, "
                f"got {tuple(tangent.shape)}."
            )
        if self.kind == "softmax":
            _, weights = self._labels(output, target)
            chance = functional.softmax(output, dim=1)
            mean = (chance * tangent).sum(dim=1 - output.ndim, keepdim=True)
            return chance * weights.unsqueeze(1) * (tangent - mean)
        _, known = self._values(output, target)
        if self.kind == "mse":
            return tangent.clone()
        chance = output.sigmoid()
        return tangent * (
            chance * output.neg().sigmoid() * known
        )  # 1 - σ(z) would lose the digits of a sure one

    def _labels(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels (N, *S), 0 where ignored, and their weights in the outputs' dtype."""
        places = (len(output), *output.shape[2:]) if output.ndim > 1 else None
        labels = target.squeeze(1) if target.ndim == output.ndim and target.ndim > 1 else target
        if places is None or labels.shape != places or labels.is_floating_point():
            raise ValueError(
                f"Softmax outputs {tuple(output.shape)} (N, C, *S) need whole class numbers (N, *S) or (N, 1, *S), "
                f"got {target.dtype} {tuple(target.shape)}."
            )
        labels, classes = labels.long(), output.shape[1]
        ignored = torch.zeros_like(labels, dtype=torch.bool)
        if self.ignore_index is not None:
            ignored = labels == self.ignore_index
            labels = labels.masked_fill(ignored, 0)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"Labels must be 0 to {classes - 1} for {classes} outputs, got {int(labels.min())} to "
                f"{int(labels.max())}. Check the labels, or set ignore_index."
            )
        if self.class_weights is None:
            return labels, (~ignored).to(output.dtype)
        if len(self.class_weights) != classes:
            raise ValueError(
                f"Expected {classes} class weights, one per output, got {len(self.class_weights)}."
            )
        weights = self.class_weights.to(output.device, output.dtype)[labels]
        return labels, weights.masked_fill(ignored, 0.0)

    def _values(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return targets in the outputs' dtype, 0 where ignored, and which ones are known."""
        if output.ndim < 2 or target.shape != output.shape:
            raise ValueError(
                f"The {self.kind} loss needs outputs (N, C, *S) and targets of the same shape, "
                f"got {tuple(output.shape)} and {tuple(target.shape)}."
            )
        known = torch.ones_like(output, dtype=torch.bool)
        if self.ignore_index is not None:
            known = target != self.ignore_index
        values = target.to(output.dtype).masked_fill(~known, 0.0)
        if (
            self.kind == "bernoulli"
            and values.numel()
            and not 0 <= float(values.min()) <= float(values.max()) <= 1
        ):
            raise ValueError("Targets of the bernoulli loss must be between 0 and 1, or ignore_index.")
        return values, known
