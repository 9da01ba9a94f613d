"""Batches as training needs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def without_single(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield batches, a last one of a single sample joined to the one before it.

    A classifier's batch normalisation has no statistics over one sample.
    """
    held: dict[str, Tensor] | None = None
    for batch in batches:
        if held is not None and len(batch["label"]) == 1:
            batch, held = {key: torch.cat([held[key], batch[key]]) for key in batch}, None
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield held
