"""CIFAR-10 from JPEG copies: decoding, the balanced Dirichlet split, augmentation by index gathers.

The images are lossy copies, so no accuracy on them is comparable to published CIFAR-10 figures.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.numerics.rng import derive_seed

CLASSES = 10
SIDE = 32
PAD = 4  # pixels of edge padding before the random crop
# Means and standard deviations of the channels, as the reference uses them.
MEAN = (0.491, 0.482, 0.447)
STD = (0.247, 0.243, 0.262)


@dataclass(frozen=True)
class Images:
    """Images and labels.

    Attributes:
        pixels: (n, 32, 32) int32; the four bytes of a pixel are R, G, B, 0, so one gather moves all three channels.
        labels: (n,) int64 in 0..9.
    """

    pixels: Tensor
    labels: Tensor

    def pick(self, index: NDArray[np.int64]) -> Images:
        """Return the images of the given positions, in that order."""
        chosen = torch.from_numpy(index)
        return Images(self.pixels[chosen], self.labels[chosen])


def pack(rgb: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Images:
    """Bring (n, 32, 32, 3) uint8 images and (n,) labels into the packed form.

    Raises:
        ValueError: Other shapes.
    """
    if rgb.ndim != 4 or rgb.shape[1:] != (SIDE, SIDE, 3) or labels.shape != rgb.shape[:1]:
        raise ValueError(
            f"Expected images (n, {SIDE}, {SIDE}, 3) and labels (n,), got {rgb.shape} and {labels.shape}."
        )
    four = np.zeros((*rgb.shape[:3], 4), dtype=np.uint8)
    four[..., :3] = rgb
    packed = torch.from_numpy(four).view(torch.int32).squeeze(-1)
    return Images(packed, torch.from_numpy(labels.astype(np.int64)))


def to_float(pixels: Tensor) -> Tensor:
    """Return normalised float32 images (n, 3, 32, 32), stored channels last, of packed pixels (n, 32, 32)."""
    four = pixels.contiguous().view(torch.uint8).unflatten(-1, (SIDE, 4))[..., :3]
    scaled = four.float().div_(255.0)
    return scaled.sub_(torch.tensor(MEAN)).div_(torch.tensor(STD)).permute(0, 3, 1, 2)


def augment(pixels: Tensor, source: torch.Generator) -> Tensor:
    """Random crop after edge padding by 4, then a horizontal flip with probability 1/2; packed in and out.

    Args:
        pixels: (n, 32, 32) packed.
        source: Where offsets (0..8 on both axes) and flips are drawn.
    """
    n = len(pixels)
    offset = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=source) - PAD
    # Padding with the edge is the same as clamping the index.
    index = (torch.arange(SIDE) + offset).clamp_(0, SIDE - 1)
    rows, columns = index[0], index[1]
    flip = torch.randint(0, 2, (n, 1), generator=source).bool()
    columns = torch.where(flip, columns.flip(1), columns)
    flat = rows[:, :, None] * SIDE + columns[:, None, :]
    return pixels.flatten(1).gather(1, flat.flatten(1)).view(n, SIDE, SIDE)


def dirichlet_split(
    labels: NDArray[np.int64], clients: int, alpha: float, seed: int
) -> list[NDArray[np.int64]]:
    """Balanced Dirichlet split: every client gets the same number of samples, no sample goes to two clients.

    Client after client draws p ~ Dir(alpha 1) and takes n/clients of the samples that are left, without replacement,
    each weighted by the share of its class. Exponential keys -log(u)/w make that one sort. A client whose classes are
    used up is filled from what is left, so all clients keep the same size (the reference lets such a client shrink).

    Args:
        labels: (n,), n a multiple of `clients`.
        clients: Number of clients.
        alpha: Concentration > 0; small is very uneven.
        seed: Seed of the split.

    Returns:
        One array of n/clients positions for each client.

    Raises:
        ValueError: The samples cannot be shared out evenly.
    """
    if clients < 1 or len(labels) % clients:
        raise ValueError(f"{len(labels)} samples cannot be shared out evenly to {clients} clients.")
    source = np.random.default_rng(derive_seed("dirichlet", seed))
    each = len(labels) // clients
    left = np.arange(len(labels))
    found = []
    for _ in range(clients):
        # Shares below the smallest number keep an order by chance instead of becoming 0 / 0.
        share = np.maximum(source.dirichlet(np.full(CLASSES, alpha)), 1e-300)
        log_keys = np.log(source.exponential(size=len(left))) - np.log(share[labels[left]])
        order = np.argsort(log_keys, kind="stable")
        found.append(np.sort(left[order[:each]]))
        left = np.sort(left[order[each:]])
    return found


def select_clients(clients: int, groups: int, source: torch.Generator) -> list[int]:
    """Choose one client of each residue class id mod groups, as the reference does (not a uniform draw)."""
    members = [range(group, clients, groups) for group in range(groups)]
    return [ids[int(torch.randint(len(ids), (1,), generator=source))] for ids in members]


def _decode(archive: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    with np.load(archive, allow_pickle=False) as stored:
        data, offset, labels = stored[f"{part}_jpeg"], stored[f"{part}_offset"], stored[f"{part}_label"]
    rgb = np.empty((len(labels), SIDE, SIDE, 3), dtype=np.uint8)
    for i in range(len(labels)):
        image = Image.open(io.BytesIO(data[offset[i] : offset[i + 1]].tobytes()))
        rgb[i] = np.asarray(image.convert("RGB"))
    return rgb, labels


def load(data: Path, cache: Path) -> tuple[Images, Images]:
    """Return the training and test images; the JPEGs are decoded once into `cache`.

    Args:
        data: Folder that holds cifar10/cifar10_jpeg60k.npz.
        cache: Folder for the decoded arrays.
    """
    parts = []
    for part in ("train", "test"):
        kept = cache / f"cifar10_{part}.npz"
        if not kept.exists():
            cache.mkdir(parents=True, exist_ok=True)
            rgb, labels = _decode(data / "cifar10" / "cifar10_jpeg60k.npz", part)
            temporary = cache / f"cifar10_{part}.tmp.npz"
            np.savez(temporary, rgb=rgb, labels=labels)
            os.replace(temporary, kept)
        with np.load(kept, allow_pickle=False) as stored:
            parts.append(pack(stored["rgb"], stored["labels"]))
    return parts[0], parts[1]
