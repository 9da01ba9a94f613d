"""What the masks of one round look like side by side: how dense, where, and how far the sites agree.

Per site p / 8 bytes: the masks are kept as packed bits until the round's figures are told. All counts are exact.

    density        |A| / p, and the same by tensor
    overlap        Jaccard index |A ∩ B| / |A ∪ B| of two sites' sensitive parameters
    chance         the same for random masks: I / (|A| + |B| − I) with the mean intersection I = |A| |B| / p
    chance by tensor   with I = Σ_l |A_l| |B_l| / p_l: random within each tensor, so that it knows which tensors are dense
    holders        number of parameters that 0, 1, ..., S sites find sensitive
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MOST_SITES = 32  # whose masks are kept: S² numbers and S · p / 8 bytes; below 256, as counts are bytes
MOST_TENSORS = 200  # by site; an event shall stay one short line
CHUNK = 1 << 17  # bytes of packed bits that are spread out at a time
DIGITS = 4
MASKS = "sensitivity-masks"

Bits = NDArray[np.uint8]
Array = NDArray[np.float64]


class MaskFigures:
    """The masks of a round, for its figures.

    Args:
        sizes: Values of each tensor that may be sensitive, in the network's order.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = {name: int(size) for name, size in sizes.items() if size}
        self._bits: dict[
            str, Bits
        ] = {}  # by site all tensors one after the other, each from a byte of its own
        self._left_out = 0

    def add(self, site: str, masks: Mapping[str, Tensor]) -> None:
        """Take in one site's masks.

        Args:
            site: Alias.
            masks: bool tensors by name, True for sensitive; a tensor that is not there has none.

        Raises:
            ValueError: A tensor that may not be sensitive, or one of another size.
        """
        for name, mask in masks.items():
            if mask.numel() != self._sizes.get(name, 0):
                raise ValueError(
                    f"The mask of '{name}' has {mask.numel()} values, expected {self._sizes.get(name, 0)}; "
                    "give the masks of the round's own network."
                )
        if len(self._bits) == MOST_SITES:
            self._left_out += 1
            return
        parts = [
            np.packbits(masks[name].detach().cpu().reshape(-1).numpy())
            if name in masks
            else np.zeros(-(-size // 8), np.uint8)
            for name, size in self._sizes.items()
        ]
        self._bits[site] = np.concatenate([np.zeros(0, np.uint8), *parts])

    def told(self) -> dict[str, Any]:
        """Return the figures as JSON values; empty where no mask came.

        Shares have `DIGITS` digits. Where more than `MOST_TENSORS` tensors are, the largest are told, in the network's
        order; the sums are over all of them. Two masks without any sensitive parameter have no overlap (None), and a mask
        has none with itself that chance would explain.
        """
        if not self._bits or not self._sizes:
            return {}
        sizes = np.array(list(self._sizes.values()), np.float64)
        whole = int(sizes.sum())
        starts = np.cumsum([0, *(-(-size // 8) for size in self._sizes.values())])[:-1]
        counts = np.stack(
            [np.add.reduceat(np.bitwise_count(bits).astype(np.int64), starts) for bits in self._bits.values()]
        )
        places = sorted(np.argsort(-sizes, kind="stable")[:MOST_TENSORS].tolist())
        names = list(self._sizes)
        totals = counts.sum(axis=1)
        by_tensor = (counts / sizes) @ counts.T
        return {
            "kind": MASKS,
            "parameters": whole,
            "sites": list(self._bits),
            "density": _rounded(totals / whole),
            "tensors": [names[place] for place in places],
            "sizes": [self._sizes[names[place]] for place in places],
            "by_tensor": [_rounded(row) for row in (counts / sizes)[:, places]],
            "overlap": _jaccard(self._shared(), totals, itself=True),
            "chance": _jaccard(np.outer(totals, totals) / whole, totals, itself=False),
            "chance_by_tensor": _jaccard(by_tensor, totals, itself=False),
            "holders": self._holders(),
            "tensors_left_out": len(names) - len(places),
            "sites_left_out": self._left_out,
        }

    def _shared(self) -> Array:
        """Return the parameters that every two sites both find sensitive (sites, sites)."""
        masks = list(self._bits.values())
        shared = np.zeros((len(masks), len(masks)))
        for row, first in enumerate(masks):
            for column, second in enumerate(masks[: row + 1]):
                both = int(np.bitwise_count(first & second).sum(dtype=np.int64))
                shared[row, column] = shared[column, row] = both
        return shared

    def _holders(self) -> list[int]:
        """Return how many parameters 0, 1, ..., S sites find sensitive."""
        masks = list(self._bits.values())
        total = np.zeros(len(masks) + 1, np.int64)
        for start in range(0, len(masks[0]), CHUNK):
            seen = np.zeros(8 * len(masks[0][start : start + CHUNK]), np.uint8)
            for bits in masks:
                seen += np.unpackbits(bits[start : start + CHUNK])
            total += np.bincount(seen, minlength=len(total))
        total[0] -= sum(
            -size % 8 for size in self._sizes.values()
        )  # the bits that fill up a tensor's last byte
        return [int(count) for count in total]


def _jaccard(shared: Array, totals: NDArray[np.int64], *, itself: bool) -> list[list[float | None]]:
    """Return I / (|A| + |B| − I) of every two sites; None where both are empty, and of a site with itself if so told."""
    union = totals[:, None] + totals[None, :] - shared
    found = np.round(shared / np.where(union > 0, union, 1.0), DIGITS)
    there = union > 0
    if not itself:
        np.fill_diagonal(there, False)
    return [
        [float(value) if known else None for value, known in zip(*rows, strict=True)]
        for rows in zip(found, there, strict=True)
    ]


def _rounded(shares: Array) -> list[float]:
    return [float(share) for share in np.round(shares, DIGITS)]
