"""The generalised Gauss-Newton matrix of a network, without ever forming it.

    H = Σ w Jᵀ S J / Σ w,     J = ∂f/∂θ of a position's outputs,     w and S as in common/numerics/output_loss.py

For the losses there it is the Fisher information matrix at θ. References: Schraudolph: Fast Curvature Matrix-Vector
Products for Second-Order Gradient Descent, Neural Computation 2002; Martens: New Insights and Perspectives on the Natural
Gradient Method, JMLR 2020.

A batch is loaded once per call, for all columns. J v comes from forward-mode differentiation of several columns at once,
which share what does not depend on them; Jᵀ u from one graph per batch. For the default U-Net on one core a column of H V
costs 1.4 gradients of the same batch, and one of V H Vᵀ 0.9. A network with an operation that has no forward-mode
derivative is differentiated twice backwards instead, which gives the same numbers for 2.4 gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, jvp, vmap

from common.numerics.linear_head import (
    Batches,
    LinearHeadGGN,
    check_evaluation,
    check_rows,
    linear_head,
    linear_head_features,
    positive_weight,
)
from common.numerics.output_loss import LossKind, OutputLoss

__all__ = [
    "GGN",
    "Batches",
    "LinearHeadGGN",
    "LossKind",
    "OutputLoss",
    "flat_function",
    "linear_head",
    "linear_head_features",
]

Function = Callable[[Tensor, Tensor], Tensor]

COLUMNS = 8  # at once; more gain little and take memory
TANGENT_BYTES = 1 << 30  # about as much as the intermediate values of the columns at once may take


def flat_function(network: nn.Module, names: Sequence[str]) -> tuple[Tensor, Function]:
    """Return a network as a function of some of its parameters, flattened into a vector.

    Buffers and the other parameters are copied and stay what they are now, whatever becomes of the network.

    Args:
        network: Network in evaluation mode.
        names: Parameters, in the order in which they are flattened; no name twice.

    Returns:
        Their values now, a copy θ (p,), and f(θ, x) -> outputs.

    Raises:
        ValueError: No name, an unknown one or one given twice, parameters of several dtypes or devices, or a layer in
            training mode whose outputs would be random or depend on the rest of the batch.
    """
    check_evaluation(network)
    parameters = dict(network.named_parameters())
    unknown = [name for name in names if name not in parameters]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            "Expected names of the network's parameters, each once, got "
            + (
                f"{len(unknown)} that it has not, such as '{unknown[0]}'."
                if unknown
                else f"{len(names)}, one twice or none."
            )
        )
    chosen = [parameters[name].detach() for name in names]
    if len({(tensor.dtype, tensor.device) for tensor in chosen}) > 1:
        raise ValueError(
            "The parameters must all be of one dtype and on one device. Choose fewer, or convert them."
        )
    fixed = {
        name: tensor.detach().clone()
        for name, tensor in (*parameters.items(), *network.named_buffers())
        if name not in set(names)
    }
    shapes, sizes = [tensor.shape for tensor in chosen], [tensor.numel() for tensor in chosen]

    def function(theta: Tensor, inputs: Tensor) -> Tensor:
        parts = zip(names, theta.split(sizes), shapes, strict=True)
        outputs: Tensor = functional_call(
            network, {**fixed, **{name: part.view(shape) for name, part, shape in parts}}, (inputs,)
        )
        return outputs

    return torch.cat([tensor.reshape(-1) for tensor in chosen]), function


class GGN:
    """H = Σ w Jᵀ S J / Σ w at θ, as an operator on rows.

    The same inputs give the same bytes, on CUDA where torch's kernels for the network are deterministic.

    Args:
        function: f(θ, x) -> outputs (N, C, *S), as of `flat_function`.
        theta: θ (p,), float32 or float64; what is computed is computed in its dtype and on its device.
        loss: Loss of the outputs.
        batches: One pass over (input, target), the same every time; batches may differ in size and shape.
        on_batch: Called after each batch: a place to report progress, or to raise in order to stop.

    Attributes:
        size: p.
        theta: θ.

    Raises:
        ValueError: θ is not a vector.
    """

    def __init__(
        self,
        function: Function,
        theta: Tensor,
        loss: OutputLoss,
        batches: Batches,
        on_batch: Callable[[], None] | None = None,
    ) -> None:
        if theta.ndim != 1 or not theta.is_floating_point():
            raise ValueError(f"θ must be a floating-point vector, got {theta.dtype} {tuple(theta.shape)}.")
        self.size = len(theta)
        self.theta = theta.detach()
        self._function, self._loss, self._batches, self._on_batch = function, loss, batches, on_batch
        self._forward = True  # until an operation without a forward-mode derivative is met
        self._columns: dict[tuple[int, ...], int] = {}

    def matmat(self, V: Tensor) -> Tensor:
        """Return the rows H v, in one pass over the data.

        Args:
            V: Rows v (L, p).

        Returns:
            (L, p) in the dtype of V, in which batches are also added up.

        Raises:
            ValueError: Rows of another size, targets that do not fit, or no position of positive weight.
        """
        check_rows(V, self.size)
        product, total = torch.zeros_like(V), 0.0
        for inputs, target in self._pass():
            total += self._add_product(product, V, inputs, target)
        return product / positive_weight(total)

    def quadratic(self, V: Tensor) -> Tensor:
        """Return V H Vᵀ (L, L), symmetric, in the dtype of V, from J v alone; arguments as of `matmat`.

        Raises:
            ValueError: As of `matmat`.
        """
        check_rows(V, self.size)
        product, total = V.new_zeros(len(V), len(V)), 0.0
        for inputs, target in self._pass():
            total += self._add_quadratic(product, V, inputs, target)
        return (product + product.T) / (2 * positive_weight(total))

    def gradient(self) -> Tensor:
        """Return the gradient of Σ w ℓ / Σ w at θ (p,), in one pass over the data.

        Raises:
            ValueError: Targets that do not fit, or no position of positive weight.
        """
        gradient, total = torch.zeros_like(self.theta), 0.0
        for inputs, target in self._pass():
            theta, outputs = self._graph(inputs)
            fixed = outputs.detach()
            total += self._loss.weight_sum(target, fixed)
            (pulled,) = torch.autograd.grad(outputs, theta, self._loss.gradient(fixed, target))
            gradient += pulled
        return gradient / positive_weight(total)

    def dense(self) -> Tensor:
        """Return H (p, p) in the dtype of θ, in one pass over the data; for small p.

        Raises:
            ValueError: As of `matmat`.
        """
        return self.quadratic(torch.eye(self.size, dtype=self.theta.dtype, device=self.theta.device))

    # one batch's graph is gone before the next is made: each lives in a call of its own

    def _add_product(self, product: Tensor, V: Tensor, inputs: Tensor, target: Tensor) -> float:
        """Add a batch's Σ w Jᵀ S J v to every row (L, p) and return its Σ w."""
        theta, outputs = self._graph(inputs)
        fixed = outputs.detach()
        for chunk, tangents in self._tangents(V, inputs, theta, outputs):
            curved = self._loss.hessian_product(fixed, target, tangents)
            for row, column in zip(range(*chunk.indices(len(V))), curved, strict=True):
                (pulled,) = torch.autograd.grad(outputs, theta, column, retain_graph=True)
                product[row] += pulled.to(V)
        return self._loss.weight_sum(target, fixed)

    def _add_quadratic(self, product: Tensor, V: Tensor, inputs: Tensor, target: Tensor) -> float:
        """Add a batch's V (Σ w Jᵀ S J) Vᵀ to (L, L) and return its Σ w."""
        theta, outputs = self._graph(inputs)
        fixed = outputs.detach()
        parts = [tangents for _, tangents in self._tangents(V, inputs, theta, outputs)]
        if parts:
            every = torch.cat(parts)
            for sample in range(len(fixed)):  # one by one: in the dtype of V all of them may be large
                one = slice(sample, sample + 1)
                curved = self._loss.hessian_product(fixed[one], target[one], every[:, one])
                product += every[:, sample].flatten(1).to(V) @ curved.flatten(1).to(V).T
        return self._loss.weight_sum(target, fixed)

    def _pass(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches on the device of θ, inputs in its dtype."""
        for inputs, target in self._batches():
            device = self.theta.device
            dtype = self.theta.dtype if inputs.is_floating_point() else inputs.dtype
            yield inputs.to(device, dtype), target.to(device)
            if self._on_batch is not None:
                self._on_batch()

    def _graph(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return a leaf θ and the outputs that hang on it, for Jᵀ u."""
        with torch.enable_grad():
            theta = self.theta.clone().requires_grad_()
            return theta, self._function(theta, inputs)

    def _tangents(
        self, V: Tensor, inputs: Tensor, theta: Tensor, outputs: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the rows with their J v (k, N, C, *S)."""
        start = 0
        if self._forward:
            width = self._columns_at_once(inputs)
            while start < len(V):
                chunk = slice(start, start + width)
                try:
                    tangents = self._forward_mode(V[chunk].to(self.theta), inputs)
                except torch.OutOfMemoryError:
                    raise
                except (NotImplementedError, RuntimeError):
                    # torch has no narrower error for an operation without a forward-mode or a batching rule;
                    # whatever else is wrong shows again below
                    self._forward = False
                    break
                yield chunk, tangents
                start += width
        if start < len(V):
            yield from self._twice_backwards(V, start, theta, outputs)

    def _forward_mode(self, rows: Tensor, inputs: Tensor) -> Tensor:
        def along(row: Tensor) -> Tensor:
            tangent: Tensor = jvp(lambda theta: self._function(theta, inputs), (self.theta,), (row,))[1]
            return tangent

        with torch.no_grad():
            return vmap(along)(rows)

    @staticmethod
    def _twice_backwards(
        V: Tensor, start: int, theta: Tensor, outputs: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield J v as the derivative of u ↦ Jᵀ u, which is linear, along v."""
        with torch.enable_grad():
            dual = torch.zeros_like(outputs, requires_grad=True)
            (pulled,) = torch.autograd.grad(outputs, theta, dual, create_graph=True)
        for row in range(start, len(V)):
            (tangent,) = torch.autograd.grad(pulled, dual, V[row].to(theta), retain_graph=True)
            yield slice(row, row + 1), tangent.unsqueeze(0)

    def _columns_at_once(self, inputs: Tensor) -> int:
        """Return how many columns go at once: fewer where a network's intermediate values are large.

        Counted from shapes, so that the same inputs are always cut in the same way, and with them the same bytes come out.
        """
        shape = tuple(inputs.shape)
        if shape not in self._columns:
            size = 0

            def count(tensor: Tensor) -> None:
                nonlocal size
                size += tensor.numel() * tensor.element_size()

            def never(_: None) -> Tensor:
                raise RuntimeError("This graph is not for use.")

            # what a backward pass would need is counted and not kept
            with torch.enable_grad(), saved_tensors_hooks(count, never):
                self._function(self.theta.clone().requires_grad_(), inputs)
            self._columns[shape] = max(1, min(COLUMNS, TANGENT_BYTES // max(size, 1)))
        return self._columns[shape]
