"""What a site tells of its data so that similar sites can be found: one short vector, once a run.

Four forms, from the smallest disclosure on. The hospital's policy names those that may leave (`policy.sketches`):

    labels     share of each class among the labels of its samples (voxels, pictures or rows)
    features   mean and standard deviation of every channel, or of every feature of a table
    image      the mean of its pictures, brought to a few values an axis
    gradient   the gradient of the run's first model with respect to its personal parameters, folded into `size` values by
               a count sketch (Charikar, Chen, Farach-Colton: Finding Frequent Items in Data Streams, ICALP 2002), which keeps
               inner products and distances in expectation. All sites fold alike: the folding is drawn from the run's seed.

The paper (pFedNet, III-A) sketches pictures by the covariance of their mean-centred sum, a matrix of pixels by pixels, and tables
by label ratios. A covariance of pixels says a lot more of single patients than any form here, so it is not offered.

A sketch is over an epoch's samples, so that all training cases stand behind it: the hospital's `min_cases` then holds for it,
and the coordinator cannot ask for one over a single patient. Patches of volumes are centred on labels as often as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError, PayloadError
from common.frames import shown
from common.numerics.rng import generator
from common.payload import Tensors
from common.work import SiteWork

Form = Literal["labels", "features", "image", "gradient"]
SIDE = 8  # values an axis of the mean picture
LARGEST = 1 << 16


def data_sketch(form: Form, work: SiteWork, *, size: int, names: Sequence[str]) -> Tensor:
    """Return a site's sketch.

    Args:
        form: Which.
        work: The site's, its network at the run's first weights.
        size: Values of a gradient's sketch.
        names: Parameters whose gradient is sketched.

    Returns:
        float32 (f,), finite, on the CPU.

    Raises:
        ConfigError: A mean picture of a table.
        ValueError: Values that are not finite.
    """
    batches = work.samples(work.visits)
    if form == "labels":
        found = label_shares(work, batches)
    elif form == "features":
        found = moments(image for image, _ in batches)
    elif form == "image":
        found = mean_picture(image for image, _ in batches)
    else:
        found = folded_gradient(work, batches, size, names)
    sketch = found.to("cpu", torch.float32)
    if not torch.isfinite(sketch).all():
        raise ValueError(f"The site's sketch '{form}' is not finite; look at the values of its data.")
    return sketch


def label_shares(work: SiteWork, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the share of each class, float64 (C,), over all labels that count."""
    counts: Tensor | None = None
    ignored = work.likelihood.ignore_index
    for image, label in batches:
        if counts is None:
            with work.inspecting() as network, torch.no_grad():
                classes = max(2, network(image[:1]).shape[1])
            counts = torch.zeros(classes, dtype=torch.float64)
        values = label.reshape(-1).to("cpu", torch.int64)
        if ignored is not None:
            values = values[values != ignored]
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < len(counts):
            raise ValueError(
                f"A sketch of labels needs class numbers from 0 to {len(counts) - 1}; found others."
            )
        counts += torch.bincount(values, minlength=len(counts))
    if counts is None or not counts.sum():
        raise ValueError("A sketch of labels needs at least one label that counts.")
    return counts / counts.sum()


def moments(images: Iterable[Tensor]) -> Tensor:
    """Return mean and population standard deviation of every channel or feature, float64 (2 C,)."""
    sums: Tensor | None = None
    count = 0
    for batch in images:
        rows = batch.to("cpu", torch.float64).movedim(1, -1).reshape(-1, batch.shape[1])
        terms = torch.stack([rows.sum(dim=0), rows.square().sum(dim=0)])
        sums = terms if sums is None else sums + terms
        count += len(rows)
    if sums is None:
        raise ValueError("A sketch of features needs at least one sample.")
    mean, square = sums / count
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt()])


def mean_picture(images: Iterable[Tensor]) -> Tensor:
    """Return the mean of all pictures at `SIDE` values an axis, float64 (C · SIDE^d,).

    Raises:
        ConfigError: Rows of a table.
    """
    total: Tensor | None = None
    count = 0
    for batch in images:
        if batch.ndim < 4:
            raise ConfigError(
                "pfednet.sketch 'image' is for pictures and volumes; a table has none. Use labels, features or gradient."
            )
        sides = [min(SIDE, length) for length in batch.shape[2:]]
        small = functional.interpolate(batch.to(torch.float32), size=sides, mode="area")
        term = small.to("cpu", torch.float64).sum(dim=0)
        total = term if total is None else total + term
        count += len(batch)
    if total is None:
        raise ValueError("A sketch of pictures needs at least one sample.")
    return (total / count).flatten()


def folded_gradient(
    work: SiteWork, batches: Iterator[tuple[Tensor, Tensor]], size: int, names: Sequence[str]
) -> Tensor:
    """Return the count sketch of the mean gradient of the task's cross-entropy, float64 (size,)."""
    with work.inspecting() as network:
        chosen = {name: value for name, value in network.named_parameters() if name in set(names)}
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in chosen.items()}
        weight = 0.0
        for image, label in batches:
            output = network(image)
            loss = work.likelihood.loss_sum(output, label)
            gradients = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
            for name, gradient in zip(chosen, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient
            weight += work.likelihood.weight_sum(label, output)
    if not weight:
        raise ValueError("A sketch of gradients needs at least one label that counts.")
    folded = torch.zeros(size, dtype=torch.float64)
    for name, gradient in total.items():
        draw = generator("count-sketch", work.ctx.seed, name)
        place = torch.randint(size, (gradient.numel(),), generator=draw)
        sign = torch.randint(2, (gradient.numel(),), generator=draw) * 2 - 1
        folded.index_add_(0, place, sign * gradient.cpu().flatten())
    return folded / weight


def check_sketch(tensors: Tensors, form: Form, size: int, *, who: str) -> Tensor:
    """Return what a site sent as its sketch.

    Args:
        tensors: What came; finite.
        form: What was asked for.
        size: Values of a gradient's sketch.
        who: Alias of the sender.

    Raises:
        PayloadError: It is none, of another form, or has values that its form cannot have.
    """
    if list(tensors) != [form]:
        names = [shown(name) for name in sorted(tensors)[:3]]
        raise PayloadError(f"{who}: its sketch is to be one tensor '{form}', got {names}.", site=who)
    sketch = tensors[form]
    if sketch.ndim != 1 or sketch.dtype != torch.float32 or not 0 < sketch.numel() <= LARGEST:
        raise PayloadError(
            f"{who}: its sketch '{form}' is {sketch.dtype} of shape {tuple(sketch.shape)}; expected is a float32 vector of "
            f"at most {LARGEST} values.", site=who,
        )  # fmt: skip
    shares = form == "labels" and (bool((sketch < 0).any()) or abs(float(sketch.sum()) - 1.0) > 1e-3)
    if shares or (form == "gradient" and len(sketch) != size) or (form == "labels" and len(sketch) < 2):
        expected = (
            f"{size} values" if form == "gradient" else "the shares of two classes or more, which sum to 1"
        )
        raise PayloadError(f"{who}: its sketch '{form}' is to be {expected}, and is not.", site=who)
    return sketch
