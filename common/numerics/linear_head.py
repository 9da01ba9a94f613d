"""The generalised Gauss-Newton matrix of a network's last layer, in closed form.

For outputs z = W h + b the Jacobian of a position is Iₖ ⊗ (h, 1), so with the features h of all positions at hand

    H v = (Σ w (S t) hᵀ, Σ w S t) / Σ w,     t = W_v h + b_v,     v = (W_v, b_v),

which is two matrix products for all columns together and no pass through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from common.numerics.output_loss import OutputLoss

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]

HEADS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BLOCK_VALUES = 1 << 22  # tangents that are held at once, over all columns and classes
MOST_FEATURES = (
    1 << 27
)  # feature values that are kept, 512 MiB in float32; there are as many as voxels times channels


class LinearHeadGGN:
    """H = Σ w Jᵀ S J / Σ w of the weight and bias of z = W h + b, from features kept in memory.

    Args:
        features: h of all positions (n, d).
        outputs: z of all positions (n, C), of the same dtype and device.
        targets: (n,) class numbers for softmax, (n, C) otherwise.
        loss: Loss of the outputs.
        bias: Whether the parameters are W (C, d) and then b (C,), flattened, or W alone.
        theta: Their values (p,), for those who ask; NaN where not given, H does not depend on them.

    Attributes:
        size: p, the number of parameters.
        theta: Their values (p,).

    Raises:
        ValueError: Shapes that do not fit, or no position of positive weight.
    """

    def __init__(
        self,
        features: Tensor,
        outputs: Tensor,
        targets: Tensor,
        loss: OutputLoss,
        *,
        bias: bool,
        theta: Tensor | None = None,
    ) -> None:
        if features.ndim != 2 or outputs.ndim != 2 or len(features) != len(outputs):
            raise ValueError(
                "A linear head needs features (n, d) and outputs (n, C) of the same positions, got "
                f"{tuple(features.shape)} and {tuple(outputs.shape)}."
            )
        self.size = outputs.shape[1] * (features.shape[1] + bias)
        self.theta = features.new_full((self.size,), torch.nan) if theta is None else theta
        if self.theta.shape != (self.size,):
            raise ValueError(f"Expected {self.size} parameter values, got {tuple(self.theta.shape)}.")
        self._features, self._outputs, self._targets = features.detach(), outputs.detach(), targets
        self._loss, self._bias = loss, bias
        self._total = positive_weight(loss.weight_sum(targets, self._outputs))

    def matmat(self, V: Tensor) -> Tensor:
        """Return the rows H v.

        Args:
            V: Rows v (L, p).

        Returns:
            (L, p) in the dtype of V.

        Raises:
            ValueError: Rows of another size.
        """
        check_rows(V, self.size)
        weights, biases = self._split(V)
        out_weights, out_biases = (
            torch.zeros_like(weights, dtype=V.dtype),
            torch.zeros_like(biases, dtype=V.dtype),
        )
        for features, _, curved in self._tangents(weights, biases):
            flat = curved.transpose(1, 2).reshape(-1, len(features))  # (L·C, n)
            out_weights += (flat @ features).to(V.dtype)
            out_biases += flat.sum(dim=1).to(V.dtype)
        return self._join(out_weights, out_biases, len(V)) / self._total

    def quadratic(self, V: Tensor) -> Tensor:
        """Return V H Vᵀ (L, L), symmetric, in the dtype of V; arguments as of `matmat`.

        Raises:
            ValueError: Rows of another size.
        """
        check_rows(V, self.size)
        product = V.new_zeros(len(V), len(V))
        for _, tangents, curved in self._tangents(*self._split(V)):
            product += (tangents.flatten(1) @ curved.flatten(1).T).to(V.dtype)
        return (product + product.T) / (2 * self._total)

    def gradient(self) -> Tensor:
        """Return the gradient of Σ w ℓ / Σ w (p,)."""
        outer = self._loss.gradient(self._outputs, self._targets)
        return self._join(outer.T @ self._features, outer.sum(dim=0), 1)[0] / self._total

    def dense(self) -> Tensor:
        """Return H (p, p); for small p."""
        return self.quadratic(torch.eye(self.size, dtype=self._features.dtype, device=self._features.device))

    def _split(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (L·C, d) and the biases (L·C,) of rows, in the features' dtype."""
        rows, (classes, width) = V.to(self._features), (self._outputs.shape[1], self._features.shape[1])
        weights = rows[:, : classes * width].reshape(-1, width)
        biases = rows[:, classes * width :].reshape(-1) if self._bias else rows.new_zeros(len(weights))
        return weights, biases

    def _join(self, weights: Tensor, biases: Tensor, rows: int) -> Tensor:
        """Return rows (L, p) from what `_split` gives."""
        flat = weights.reshape(rows, -1)
        return torch.cat([flat, biases.reshape(rows, -1)], dim=1) if self._bias else flat

    def _tangents(self, weights: Tensor, biases: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield features (n, d), tangents t and w S t (L, n, C) of the positions, block by block."""
        classes = self._outputs.shape[1]
        width = max(1, BLOCK_VALUES // max(len(weights), self._features.shape[1]))
        for start in range(0, len(self._features), width):
            block = slice(start, start + width)
            features, outputs, targets = self._features[block], self._outputs[block], self._targets[block]
            flat = features @ weights.T + biases
            tangents = flat.reshape(len(features), -1, classes).transpose(0, 1)
            yield features, tangents, self._loss.hessian_product(outputs, targets, tangents)


def linear_head(
    network: nn.Module,
    names: Sequence[str],
    loss: OutputLoss,
    batches: Batches,
    on_batch: Callable[[], None] | None = None,
    *,
    most: int = MOST_FEATURES,
) -> LinearHeadGGN | None:
    """Return the closed form where the named parameters are a network's linear head, or None where it does not apply.

    It applies to the weight, or the weight and the bias in this order, of an `nn.Linear` or of a convolution with
    kernel 1 whose output is what the network returns. One pass is made over the data.

    Args:
        network: Network in evaluation mode.
        names: Its parameters, in the order in which they are flattened.
        loss: Loss of the outputs.
        batches: One pass over (input, target).
        on_batch: Called after each batch.
        most: Feature values (positions times features) above which None is returned.

    Raises:
        ValueError: No batch, no position of positive weight, targets that do not fit, or a network in training mode.
    """
    module_name = names[0].rpartition(".")[0] if names else ""
    prefix = f"{module_name}." if module_name else ""
    if list(names) not in ([f"{prefix}weight"], [f"{prefix}weight", f"{prefix}bias"]):
        return None
    try:
        head = _head(network, module_name)
    except ValueError:
        return None
    parameters = dict(network.named_parameters())
    if names[-1] not in parameters:
        return None
    check_evaluation(network)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    values = 0
    for inputs, target in batches():
        found = _capture(network, head, inputs.to(head.weight.device, head.weight.dtype))
        if found is None:
            return None
        features, outputs = found
        values += features.numel()
        if values > most:
            return None
        target = target.to(outputs.device)
        loss.weight_sum(target, outputs)  # refuses a target that does not fit, which flattening might hide
        flat = (
            _positions(target)
            if target.shape == outputs.shape and loss.kind != "softmax"
            else target.reshape(-1)
        )
        kept.append((_positions(features), _positions(outputs), flat))
        if on_batch is not None:
            on_batch()
    if not kept:
        raise ValueError("A curvature needs at least one batch, got none.")
    theta = torch.cat([parameters[name].detach().reshape(-1) for name in names])
    features, outputs, targets = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return LinearHeadGGN(features, outputs, targets, loss, bias=len(names) == 2, theta=theta)


def linear_head_features(network: nn.Module, module_name: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what goes into and comes out of a network's linear head.

    Args:
        network: Network in evaluation mode.
        module_name: Name of its head, an `nn.Linear` or a convolution with kernel 1; "" is the network itself.
        inputs: A batch for the network.

    Returns:
        Features (N, d, *S) and outputs (N, C, *S), which are the network's outputs.

    Raises:
        ValueError: Another kind of module, or one whose output is not the network's.
    """
    found = _capture(network, _head(network, module_name), inputs)
    if found is None:
        raise ValueError(
            f"Module '{module_name}' does not give the network's output, or runs more than once."
        )
    return found


def check_evaluation(network: nn.Module) -> None:
    """Refuse a network whose outputs are random or depend on the rest of the batch.

    Raises:
        ValueError: A dropout or a batch normalisation in training mode.
    """
    for name, module in network.named_modules():
        batch = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if module.training and (batch or isinstance(module, nn.modules.dropout._DropoutNd)):
            raise ValueError(
                f"A curvature needs a network in evaluation mode, but its {type(module).__name__} '{name}' is in "
                "training mode. Call network.eval() first."
            )


def check_rows(V: Tensor, size: int) -> None:
    """Refuse anything but rows of `size` floating-point numbers.

    Raises:
        ValueError: With both shapes.
    """
    if V.ndim != 2 or V.shape[1] != size or not V.is_floating_point():
        raise ValueError(f"Expected floating-point rows (L, {size}), got {V.dtype} {tuple(V.shape)}.")


def positive_weight(total: float) -> float:
    """Return Σ w, which everything is divided by.

    Raises:
        ValueError: It is 0: no batch, or all positions ignored.
    """
    if not total > 0:
        raise ValueError("No position has a positive weight: there is no data, or all labels are ignored.")
    return total


def _head(network: nn.Module, name: str) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """Return a linear layer whose parameters nothing else uses, or raise ValueError."""
    module = dict(network.named_modules()).get(name)
    if type(module) not in HEADS:  # a subclass may compute something else
        raise ValueError(
            f"The head must be a linear layer or a convolution with kernel 1, got '{name}', a {type(module).__name__}."
        )
    assert isinstance(module, HEADS)
    if not isinstance(module, nn.Linear):
        ones = {*module.kernel_size, *module.stride, module.groups}
        if ones != {1} or any(module.padding) or isinstance(module.padding, str):
            raise ValueError(f"The head '{name}' must be a plain convolution with kernel 1.")
    own = {id(parameter) for parameter in module.parameters()}
    uses = sum(id(parameter) in own for _, parameter in network.named_parameters(remove_duplicate=False))
    if uses != len(own):
        raise ValueError(f"The head '{name}' shares its parameters with another layer.")
    return module


def _capture(network: nn.Module, head: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the head's input and output; None where its output is not the network's, position by position."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        seen.append((given[0].detach().clone(), result.detach().clone()))  # what follows may work in place

    handle = head.register_forward_hook(keep)
    try:
        with torch.no_grad():
            result = network(inputs)
    finally:
        handle.remove()
    if len(seen) != 1 or not isinstance(result, Tensor) or not torch.equal(seen[0][1], result):
        return None
    features, outputs = seen[0]
    if isinstance(head, nn.Linear) and features.ndim != 2:
        return None  # a linear layer acts on the last axis, a position's outputs are on the second
    return features, outputs


def _positions(tensor: Tensor) -> Tensor:
    """Return (n, C) of (N, C, *S)."""
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])
