"""The diagonal of a network's Fisher information, from true gradients of single samples.

    F_j = 1/n Σ_i g_ij² ,      g_i = ∂(−log p(y_i | x_i, θ)) / ∂θ

The square is taken sample by sample: the square of a batch's mean gradient is something else, and smaller by up to the
batch size. Two variants (Kunstner, Balles, Hennig: Limitations of the Empirical Fisher Approximation for Natural
Gradient Descent, NeurIPS 2019):

    empirical    y_i are the true labels
    sampled      y_i are drawn from the model's own p(y | x_i, θ), which estimates the Fisher information itself

* Sample. For segmentation a sample is a patch, and its log-likelihood is the mean over its voxels, not the sum: the
  scale of a patch of V voxels is so 1/V² of the sum's, the same for patches of all sizes in a gradient that all voxels
  share.
* Accuracy. Squares are added up in float64: a float32 value squared is exact in it, and n terms lose at most n units in
  its last place. Compensated float32 sums would take the same memory for less.
* Ways. All samples of a micro-batch at once (vmap), or one after the other (loop): the same values up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from common.numerics.linear_head import Batches, check_evaluation
from common.numerics.output_loss import LossKind

Variant = Literal["empirical", "sampled"]
Way = Literal["auto", "vmap", "loop"]
LossPerSample = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Tensor, Tensor, torch.Generator], Tensor]
Values = dict[str, Tensor]

MEMORY_BYTES = 1 << 30
COPIES = 2  # of a sample's gradient at once: itself, and what it is made of
BLOCK_VALUES = 1 << 16  # of all samples of a micro-batch, squared in float64 at once: 512 KiB
CUDA_BLOCK_VALUES = 1 << 24
# Bytes of a sample's gradient from which, on a CPU, a loop is faster if the values kept for the way back are fewer. Below,
# what a loop costs per call counts; beyond, what vmap costs per gradient. Measured on U-Nets of 10 000 to 18 million
# parameters, one thread.
LARGE_GRADIENT = 1 << 22


@dataclass(frozen=True)
class Likelihood:
    """−log p(target | output) by sample, the mean over the sample's positions; see common/numerics/output_loss.py.

    softmax takes class numbers (N,), (N, *S) or (N, 1, *S); bernoulli and mse (a Gaussian of unit variance) take values
    of the outputs' shape (N, C, *S), and their C outputs are added up.

    Attributes:
        kind: Which distribution.
        ignore_index: Target value that is left out of the mean; a sample without any other counts as 0.

    Raises:
        ValueError: An unknown kind, or an ignored value for mse.
    """

    kind: LossKind = "softmax"
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(LossKind):
            raise ValueError(
                f"The likelihood must be one of {', '.join(get_args(LossKind))}, got '{self.kind}'."
            )
        if self.kind == "mse" and self.ignore_index is not None:
            raise ValueError("The mse likelihood has no target value to ignore; leave ignore_index out.")

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the losses (N,) of outputs (N, C, *S); NaN for a sample with a label out of range.

        Raises:
            ValueError: Targets of another shape.
        """
        shape = (len(output), 1, *output.shape[2:])
        fitting = [shape, (shape[0], *shape[2:])] if self.kind == "softmax" else [tuple(output.shape)]
        if tuple(target.shape) not in fitting:
            raise ValueError(
                f"The {self.kind} likelihood of outputs {tuple(output.shape)} needs targets {fitting[-1]}, got "
                f"{tuple(target.shape)}."
            )
        known = torch.ones_like(target, dtype=torch.bool)
        if self.ignore_index is not None:
            known = target != self.ignore_index
        if self.kind == "softmax":
            labels, known = target.long().reshape(shape), known.reshape(shape)
            bad = known & ((labels < 0) | (labels >= output.shape[1]))
            labels = labels.clamp(0, output.shape[1] - 1)
            # nothing here may depend on values: vmap allows no branch, and CUDA no index out of range
            each = -functional.log_softmax(output, dim=1).gather(1, labels) * torch.where(bad, torch.nan, 1.0)
        elif self.kind == "bernoulli":
            values = torch.where(known, target, 0).to(output.dtype)
            bad = (values < 0) | (values > 1)
            each = functional.binary_cross_entropy_with_logits(output, values, reduction="none")
            each = each * torch.where(bad, torch.nan, 1.0)
        else:
            each = 0.5 * (output - target.to(output.dtype)).square()
        total = torch.where(known, each, 0.0).flatten(1).sum(dim=1)
        return total / known.any(dim=1, keepdim=True).flatten(1).sum(dim=1).clamp(min=1)

    def draw(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Return labels drawn from p(y | output), like the target; ignored ones stay ignored.

        Args:
            output: Outputs (N, C, *S).
            target: The true labels; only their shape and dtype, and where they are ignored, matter.
            generator: Its device makes the numbers: a CPU generator gives the same ones on every device.
        """
        shape: Sequence[int] = output.shape
        if self.kind == "softmax":
            shape = (len(output), *output.shape[2:])
        place = output.device
        if self.kind == "mse":
            noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
            return (output.to(torch.float64) + noise.to(place)).to(target.dtype)
        chance = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).to(
            place
        )
        if self.kind == "softmax":
            parts = functional.softmax(output.to(torch.float64), dim=1).unbind(dim=1)
            below, drawn = torch.zeros_like(chance), torch.zeros_like(chance, dtype=torch.int64)
            for part in parts[:-1]:  # not cumsum, which is not deterministic on CUDA
                below += part
                drawn += below <= chance
            drawn = drawn.reshape(target.shape).to(target.dtype)
        else:
            drawn = (chance < output.to(torch.float64).sigmoid()).to(target.dtype)
        return drawn if self.ignore_index is None else torch.where(target == self.ignore_index, target, drawn)


def diagonal_fisher(
    network: nn.Module,
    names: Sequence[str],
    batches: Batches,
    loss_per_sample: LossPerSample,
    *,
    variant: Variant = "empirical",
    draw: Draw | None = None,
    generator: torch.Generator | None = None,
    memory_bytes: int = MEMORY_BYTES,
    way: Way = "auto",
    on_batch: Callable[[], None] | None = None,
) -> Values:
    """Return the diagonal Fisher information of some parameters over some samples, in one pass.

    Args:
        network: Network in evaluation mode, at the point of interest; it and its gradients stay as they are.
        names: Parameters of one dtype on one device, each once.
        batches: One pass over (inputs (N, …), targets (N, …)); batches may differ in size and shape.
        loss_per_sample: (outputs (N, …), targets (N, …)) -> losses (N,), each of its own sample alone, such as a
            `Likelihood`. It is called with N = 1.
        variant: "empirical" or "sampled"; see the file's head.
        draw: For "sampled": (outputs, targets, generator) -> labels like the targets, such as `Likelihood.draw`.
        generator: For "sampled": where the labels come from. Samples draw one after the other, so the labels do not
            depend on the sizes of batches.
        memory_bytes: About what a micro-batch may take beside the network and the result.
        way: "vmap", "loop", or "auto", the one that is faster on the device. "vmap" becomes "loop" where the network
            has an operation that cannot be vectorised.
        on_batch: Called after each batch: a place to report progress, or to raise in order to stop.

    Returns:
        float64 tensors by name, in the parameters' shapes and on their device, all at least 0.

    Raises:
        ValueError: Names that do not fit, a network in training mode, or with a normalisation over the batch, settings
            that do not fit each other, no sample, or a gradient that is not finite.
    """
    chosen = _chosen(network, names)
    _check(variant, draw, generator, memory_bytes, way)
    gradients = _Gradients(network, chosen, loss_per_sample, way, memory_bytes)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in chosen.items()}
    count = 0
    for inputs, target in batches():
        inputs, target = gradients.placed(inputs, target)
        for part in gradients.parts(inputs, target):
            targets = target[part]
            if draw is not None and generator is not None:
                targets = _drawn(gradients.outputs(inputs[part]), targets, draw, generator)
            gradients.add_squares_(total, inputs[part], targets)
        count += len(inputs)
        if on_batch is not None:
            on_batch()
    return _mean(total, count)


def _check(
    variant: Variant, draw: Draw | None, generator: torch.Generator | None, memory_bytes: int, way: Way
) -> None:
    """Refuse settings that are unknown or do not fit each other."""
    if variant not in get_args(Variant) or way not in get_args(Way):
        raise ValueError(f"Unknown variant '{variant}' or way '{way}'; see diagonal_fisher.")
    if (variant == "sampled") != (draw is not None and generator is not None):
        raise ValueError("Labels drawn from the model need 'draw' and 'generator'; true labels go without.")
    if memory_bytes < 1:
        raise ValueError(f"A micro-batch needs memory of at least 1 byte, got {memory_bytes}.")


def _mean(total: Values, count: int) -> Values:
    """Divide totals by the number of samples, in place, and check them."""
    if not count:
        raise ValueError("Fisher information needs at least one sample, got none.")
    for name, value in total.items():
        if not torch.isfinite(value.div_(count)).all():
            raise ValueError(
                f"The Fisher information of '{name}' is not finite. Check that labels are in range and that training has "
                "not diverged."
            )
    return total


class _Gradients:
    """Squared gradients of single samples.

    Args:
        network: In evaluation mode.
        chosen: Its parameters to differentiate by, detached.
        loss_per_sample: As of `diagonal_fisher`.
        way: As of `diagonal_fisher`.
        memory_bytes: As of `diagonal_fisher`.
    """

    def __init__(
        self, network: nn.Module, chosen: Values, loss_per_sample: LossPerSample, way: Way, memory_bytes: int
    ) -> None:
        self._network, self._chosen, self._loss = network, chosen, loss_per_sample
        self._fixed = {
            name: value.detach() for name, value in network.named_parameters() if name not in chosen
        }
        self._like = next(iter(chosen.values()))
        self._way, self._memory = way, memory_bytes
        self._widths: dict[tuple[torch.Size, torch.Size], int] = {}

    def placed(self, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch on the parameters' device, inputs in their dtype."""
        if len(inputs) != len(target):
            raise ValueError(f"A batch needs as many targets as inputs, got {len(target)} and {len(inputs)}.")
        dtype = self._like.dtype if inputs.is_floating_point() else inputs.dtype
        return inputs.detach().to(self._like.device, dtype), target.detach().to(self._like.device)

    def parts(self, inputs: Tensor, target: Tensor) -> list[slice]:
        """Return the micro-batches of a batch."""
        if not len(inputs):
            return []
        shape = (inputs.shape[1:], target.shape[1:])
        if shape not in self._widths:
            self._widths[shape] = self._width(inputs[:1], target[:1])
        width = self._widths[shape]
        return [slice(start, min(start + width, len(inputs))) for start in range(0, len(inputs), width)]

    def outputs(self, inputs: Tensor) -> Tensor:
        """Return the network's outputs, without a graph."""
        with torch.no_grad():
            return self._call(self._chosen, inputs)

    def add_squares_(self, total: Values, inputs: Tensor, target: Tensor) -> None:
        """Add the squared gradients of some samples to the totals."""
        if self._way == "vmap" or (self._way == "auto" and len(inputs) > 1):
            try:
                gradients = self._all(inputs, target)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError):
                # torch has no narrower error for an operation without a batching rule; whatever else is wrong shows
                # again below
                self._way = "loop"
            else:
                for name, gradient in gradients.items():
                    _add_squares_(total[name], gradient)
                return
        for sample in range(len(inputs)):
            for name, gradient in self._one(inputs[sample : sample + 1], target[sample : sample + 1]).items():
                _add_squares_(total[name], gradient.unsqueeze(0))

    def _call(self, values: Values, inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self._network, {**self._fixed, **values}, (inputs,))
        return outputs

    def _all(self, inputs: Tensor, target: Tensor) -> Values:
        """Return the gradients of all samples at once: (N, *shape) by name."""

        def loss(values: Values, one: Tensor, its: Tensor) -> Tensor:
            return self._loss(self._call(values, one.unsqueeze(0)), its.unsqueeze(0)).sum()

        with torch.no_grad():
            found: Values = vmap(grad(loss), in_dims=(None, 0, 0))(self._chosen, inputs, target)
        return found

    def _one(self, inputs: Tensor, target: Tensor) -> Values:
        """Return the gradients of one sample; 0 for parameters that it does not depend on."""
        with torch.enable_grad():
            values = {name: value.detach().requires_grad_() for name, value in self._chosen.items()}
            loss = self._loss(self._call(values, inputs), target).sum()
        if not loss.requires_grad:
            return {}
        found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
        return {name: value for name, value in zip(values, found, strict=True) if value is not None}

    def _width(self, inputs: Tensor, target: Tensor) -> int:
        """Return how many samples go at once, from one of them; 1 also where a loop is faster.

        Counted from shapes and not measured, so that the same input gives the same bytes.
        """
        if self._way == "loop":
            return 1
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.enable_grad(), saved_tensors_hooks(count, lambda tensor: tensor):
            values = {name: value.detach().requires_grad_() for name, value in self._chosen.items()}
            self._loss(self._call(values, inputs), target)
        gradient = sum(value.numel() * value.element_size() for value in self._chosen.values())
        slow = gradient > max(LARGE_GRADIENT, kept - gradient) and self._like.device.type == "cpu"
        if self._way == "auto" and slow:
            return 1
        # what is kept for the way back has gradients as large on it
        return max(1, self._memory // (2 * kept + COPIES * gradient))


def _chosen(network: nn.Module, names: Sequence[str]) -> Values:
    """Return the chosen parameters, detached, after checking them and the network."""
    check_evaluation(network)
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"The outputs of {type(module).__name__} '{name}', which has no running statistics, depend on the rest of "
                "the batch, so no sample has a gradient of its own. Use another normalisation."
            )
    parameters = dict(network.named_parameters())
    unknown = [name for name in names if name not in parameters]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"Expected names of the network's parameters, each once, got {len(names)}, {len(unknown)} of them unknown."
        )
    chosen = {name: parameters[name].detach() for name in names}
    if len({(value.dtype, value.device) for value in chosen.values()}) > 1:
        raise ValueError(
            "The parameters must all be of one dtype and on one device. Choose fewer, or convert."
        )
    return chosen


def _add_squares_(total: Tensor, gradients: Tensor) -> None:
    """Add the squares of gradients (N, *shape) to a float64 total (shape), block by block.

    In blocks that stay in a CPU's cache this takes a fifth of the time.
    """
    flat, sums = gradients.flatten(1), total.view(-1)
    width = max(1, (BLOCK_VALUES if total.device.type == "cpu" else CUDA_BLOCK_VALUES) // len(flat))
    for start in range(0, len(sums), width):
        block = slice(start, start + width)
        squares = flat[:, block].to(torch.float64).square()
        sums[block] += squares.sum(dim=0) if len(squares) > 1 else squares[0]


def _drawn(outputs: Tensor, target: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
    """Return labels drawn sample by sample."""
    parts = [
        draw(outputs[sample : sample + 1], target[sample : sample + 1], generator)
        for sample in range(len(outputs))
    ]
    return torch.cat(parts)
