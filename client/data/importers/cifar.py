"""Two classes of CIFAR-10, spread unevenly over simulated sites: the label imbalance of pFedNet's experiments.

Source: an .npz file with JPEG copies in CIFAR-10's official order; for both parts, "train" and "test":

    PART_jpeg    (bytes,)   uint8   all JPEG files behind each other
    PART_offset  (n + 1,)   integer image i is PART_jpeg[offset[i]:offset[i + 1]]
    PART_label   (n,)       uint8   class 0 to 9

A site's ratio δ of negatives to positives holds in its training, validation and test images alike; all sites are of one
size, so that the weight of a site in a mean says nothing of its ratio.

Reference: pFedNet (section VI) measures imbalance by δ = n_negative / n_positive and prints no sizes. Its code for tables
deals two sites each way, and sites of different sizes. Here sizes are equal, and `delta:D` gives two sites D : 1, one
1 : 1, two 1 : D.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from client.data.importers.kinds import KINDS, ImportOptions
from client.data.importers.layout import About, Progress, SiteFolder, new_root
from client.data.importers.partition import Partition, numbered_aliases, parse_partition
from common.errors import ConfigError, DataError
from common.federation import Federation, write_federation

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHANNELS = ("red", "green", "blue")
CLASSES = "1,9"  # automobile, truck: alike enough that it takes more than a colour
IMAGES = 400
SIDE = 32
# of a site's images; the test images, half as many again, come from the official test part
VALIDATION = 0.2
TEST = 0.5
PARTS = {"training": "train", "validation": "train", "test": "test"}
NOTE = (
    "Sites are simulated: images of CIFAR-10 dealt by class, no hospitals and no medicine; it shows what uneven labels do to "
    "a method. The images are lossy JPEG copies, so no accuracy is comparable with published ones. Terms of the copies are "
    "not known: do not pass them on."
)


@dataclass(frozen=True)
class Pictures:
    """One part of the source: the encoded images, where each begins and ends, and their classes."""

    data: NDArray[np.uint8]
    offset: NDArray[np.int64]
    label: NDArray[np.int64]

    def encoded(self, index: int) -> bytes:
        """Return image `index` as it lies in the file."""
        return self.data[self.offset[index] : self.offset[index + 1]].tobytes()


@dataclass(frozen=True)
class Chosen:
    """An image of a site: its split, its place in the part of the source, and its class (0 negative, 1 positive)."""

    split: str
    index: int
    label: int


def run(source: Path, out: Path, options: ImportOptions, progress: Progress) -> None:
    """Import two classes of CIFAR-10.

    Args:
        source: The .npz file, or the folder that holds it.
        out: Data root to write.
        options: partition, classes, images, seed, force.
        progress: Called per image.

    Raises:
        ConfigError: Options out of range, or more images than there are.
        DataError: No such file, other arrays than above, or a damaged image.
    """
    partition = parse_partition(options.partition or "delta:4", KINDS["cifar"].partitions)
    pair = parse_classes(CLASSES if options.classes is None else options.classes)
    images = IMAGES if options.images is None else options.images
    tables = [quotas(images, ratio) for ratio in partition.ratios]
    parts = read_parts(_find(source))
    plans = deal(parts, pair, tables, options.seed)
    with new_root(out, "cifar", force=options.force) as root:
        done, total = 0, sum(map(len, plans))
        for alias, plan in zip(numbered_aliases(len(plans)), plans, strict=True):
            site = SiteFolder(root, alias, _about(pair, plan))
            for _ in _write_site(site, plan, parts):
                done += 1
                progress("images", done, total)
        write_federation(root, _federation(partition, pair))


def parse_classes(text: str) -> tuple[int, int]:
    """Read `--classes`: two different class numbers, the negative one first.

    Raises:
        ConfigError: Anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or len(set(parts)) != 2 or not set(parts) <= set("0123456789"):
        raise ConfigError(
            "--classes needs two different class numbers of CIFAR-10, the negative class first, such as 1,9: "
            + ", ".join(f"{number} {name}" for number, name in enumerate(NAMES))
            + "."
        )
    return int(parts[0]), int(parts[1])


def quotas(images: int, ratio: float) -> dict[str, tuple[int, int]]:
    """Return how many negatives and positives a site has in each split.

    Args:
        images: Training and validation images together; test images come on top, half as many.
        ratio: Negatives per positive, above 0.

    Returns:
        By split: (negatives, positives), which add up to the same for every ratio.

    Raises:
        ConfigError: A split without one of the classes, or a number out of range.
    """
    if not 10 <= images <= 100_000:
        raise ConfigError(f"--images must be 10 to 100000, got {images}.")
    validation = round(images * VALIDATION)
    sizes = {"training": images - validation, "validation": validation, "test": round(images * TEST)}
    found = {
        split: (size - round(size / (1 + ratio)), round(size / (1 + ratio))) for split, size in sizes.items()
    }
    short = [split for split, counts in found.items() if not min(counts)]
    if short:
        raise ConfigError(
            f"With {images} images and {ratio:g} negatives per positive a site's {short[0]} images are all of one class; "
            "both are needed. Give more --images, or a ratio nearer to 1."
        )
    return found


def read_parts(path: Path) -> dict[str, Pictures]:
    """Read both parts of the source and check that the arrays fit each other.

    Raises:
        DataError: No .npz file, an array that is missing, or one of another shape or kind.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {part: _checked(part, stored) for part in sorted(set(PARTS.values()))}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            "SOURCE is no .npz file with train_jpeg, train_offset, train_label and the same for test "
            "(docs/importers.md describes them). Give the file with the JPEG copies of CIFAR-10.",
            detail=f"{path}: {error}",
        ) from error


def deal(
    parts: dict[str, Pictures], pair: tuple[int, int], tables: Sequence[dict[str, tuple[int, int]]], seed: int
) -> list[list[Chosen]]:
    """Choose every site's images, no image twice; an image that occurs twice in the source counts once.

    Args:
        parts: The source.
        pair: Negative and positive class.
        tables: What `quotas` says, by site.
        seed: Same seed, same images.

    Returns:
        By site, in the order of the splits and mixed within each.

    Raises:
        ConfigError: More images than the source has.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7919]))
    pools = _pools(parts, pair)
    for (part, label), pool in pools.items():
        wanted = sum(table[split][label] for table in tables for split in table if PARTS[split] == part)
        if wanted > len(pool):
            raise ConfigError(
                f"The sites need {wanted} {'training' if part == 'train' else 'test'} images of class "
                f"'{NAMES[pair[label]]}', SOURCE has {len(pool)}. Give fewer --images."
            )
        pool[:] = [pool[place] for place in rng.permutation(len(pool))]
    plans = []
    for table in tables:
        plan: list[Chosen] = []
        for split, counts in table.items():
            drawn = [
                Chosen(split, pools[PARTS[split], label].pop(), label)
                for label, count in enumerate(counts)
                for _ in range(count)
            ]
            plan += [drawn[place] for place in rng.permutation(len(drawn))]
        plans.append(plan)
    return plans


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError("SOURCE is not there. Give the .npz file of the CIFAR-10 copies.", detail=str(source))
    found = sorted(source.glob("*.npz"))
    if len(found) != 1:
        raise DataError(
            f"SOURCE holds {len(found)} .npz files, expected one with the CIFAR-10 copies. Give the file itself.",
            detail=str(source),
        )
    return found[0]


def _checked(part: str, stored: Any) -> Pictures:
    data, offset, label = (stored[f"{part}_{name}"] for name in ("jpeg", "offset", "label"))
    for array in (data, offset, label):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{part}: expected integer arrays of one axis, got {array.dtype} {array.shape}")
    if data.dtype != np.uint8 or len(offset) != len(label) + 1:
        raise ValueError(f"{part}: {data.dtype} data, {len(offset)} offsets for {len(label)} labels")
    offset, label = offset.astype(np.int64), label.astype(np.int64)
    if offset[0] < 0 or offset[-1] > len(data) or bool((np.diff(offset) < 1).any()):
        raise ValueError(f"{part}: the offsets do not rise within the data")
    if len(label) and (label.min() < 0 or label.max() >= len(NAMES)):
        raise ValueError(f"{part}: a label outside 0 to {len(NAMES) - 1}")
    return Pictures(data, offset, label)


def _pools(parts: dict[str, Pictures], pair: tuple[int, int]) -> dict[tuple[str, int], list[int]]:
    """Return the places of the usable images by part and class."""
    seen: set[bytes] = set()
    pools: dict[tuple[str, int], list[int]] = {}
    for part in ("train", "test"):
        pictures = parts[part]
        for label, number in enumerate(pair):
            pool = pools.setdefault((part, label), [])
            for index in np.flatnonzero(pictures.label == number):
                digest = hashlib.sha256(pictures.encoded(int(index))).digest()
                if digest not in seen:
                    seen.add(digest)
                    pool.append(int(index))
    return pools


def _write_site(site: SiteFolder, plan: Sequence[Chosen], parts: dict[str, Pictures]) -> Iterator[None]:
    """Write a site; yields after each image."""
    for number, item in enumerate(plan, 1):
        (path,), _ = site.add(item.split, [".png"], item.label)
        encoded = parts[PARTS[item.split]].encoded(item.index)
        try:
            with Image.open(io.BytesIO(encoded), formats=["JPEG"]) as picture:
                if picture.size != (SIDE, SIDE):
                    raise ValueError(f"size {picture.size}")
                picture.convert("RGB").save(path, format="PNG")
        except (UnidentifiedImageError, ValueError, OSError) as error:
            raise DataError(
                f"{site.alias}: image {number} of the site is no JPEG image of {SIDE} x {SIDE} pixels. SOURCE is damaged.",
                detail=f"{item}: {error}",
                site=site.alias,
            ) from error
        yield
    site.finish()


def _about(pair: tuple[int, int], plan: Sequence[Chosen]) -> About:
    positives = sum(item.label for item in plan)
    names = [NAMES[number] for number in pair]
    return About(
        name="cifar10-pair",
        description=f"Colour pictures of {SIDE} x {SIDE} pixels: {names[0]} or {names[1]}.",
        channels=CHANNELS,
        labels=(names[0], names[1]),
        size="2D",
        task="classification",
        reference="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images (CIFAR-10)",
        licence="not known; do not redistribute",
        note=f"simulated site: {len(plan) - positives} {names[0]}, {positives} {names[1]}; lossy JPEG copies",
    )


def _federation(partition: Partition, pair: tuple[int, int]) -> Federation:
    names = [NAMES[number] for number in pair]
    settings = {
        "data": {
            "task": "classification",
            "spatial_dims": 2,
            "channels": list(CHANNELS),
            "labels": names,
            "patch": [SIDE, SIDE],
            "normalise": "range",
            "augment": False,  # as dear as the training itself at this size
        },
        "model": {"name": "densenet", "width": 16, "levels": 3},
        "train": {"local_epochs": 2, "batch_size": 32, "optimizer": "sgd", "lr": 0.01, "momentum": 0.9},
        "rounds": {"rounds": 30},
    }
    skew = ", ".join(f"{ratio:.3g}" for ratio in partition.ratios)
    note = f"{NOTE} {names[0].capitalize()} per {names[1]} are {skew} by site."
    title = f"CIFAR-10, {names[0]} or {names[1]}, {len(partition.ratios)} simulated sites"
    return Federation("cifar10-pair", title, note, settings)
