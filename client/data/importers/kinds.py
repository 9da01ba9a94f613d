"""The kinds of data that can be imported: one line each, with the options that they know. Imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from common.errors import ConfigError, nearest

if TYPE_CHECKING:
    from client.data.importers.layout import Progress

    Importer = Callable[[Path, Path, "ImportOptions", Progress], None]


@dataclass(frozen=True)
class ImportOptions:
    """What an import may be told; None where nothing was said.

    Attributes:
        sites: Number of simulated sites.
        partition: How sites are made; see `client/data/importers/partition.py`.
        seed: Every random choice derives from it.
        table: CSV file with a row per case.
        binary: Merge all tumour labels into one (brats).
        negatives_per_positive: Drawn negatives for each positive candidate (luna).
        dims: 2 or 3: slices or cubes around candidates (luna).
        patch_mm: Edge of a patch (luna).
        classes: The two classes, negative first: "1,9" (cifar).
        images: Training and validation images of a site (cifar).
        force: Replace OUT if wardround wrote it.
    """

    sites: int | None = None
    partition: str | None = None
    seed: int = 0
    table: Path | None = None
    binary: bool | None = None
    negatives_per_positive: float | None = None
    dims: int | None = None
    patch_mm: int | None = None
    classes: str | None = None
    images: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Kind:
    """One importer.

    Attributes:
        name: As typed.
        title: One line for people.
        source: What SOURCE must be.
        module: Module with `run(source, out, options, progress)`.
        partitions: Partition kinds that it knows; empty where the data has its own sites. The first is the default.
        options: Names of the other `ImportOptions` that it knows.
    """

    name: str
    title: str
    source: str
    module: str
    partitions: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def load(self) -> Importer:
        """Import the module and return its `run`."""
        return cast("Importer", importlib.import_module(self.module).run)


# How `--partition` is written, by its kind.
FORMS = {
    "random": "random",
    "intensity": "intensity",
    "column": "column:NAME",
    "missing-channel": "missing-channel",
    "label-ratio": "label-ratio:1,2,4",
    "delta": "delta:4",
}
_PACKAGE = "client.data.importers"
KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "msd",
            "a task of the Medical Segmentation Decathlon",
            "TaskNN_Name.tar, or the unpacked folder with dataset.json",
            f"{_PACKAGE}.msd",
            ("random", "intensity", "column"),
            ("sites", "table"),
        ),
        Kind(
            "vessels",
            "retinal vessels in fundus photographs, four real sites",
            "folder with one SITE.tar (or folder) per site and cases.csv",
            f"{_PACKAGE}.vessels",
        ),
        Kind(
            "heart",
            "UCI heart disease: clinical tables of four real hospitals",
            "the CSV file with a column 'site', or its folder",
            f"{_PACKAGE}.heart",
        ),
        Kind(
            "brats",
            "BraTS 2017-2023 and FeTS: brain tumours in four MR channels",
            "folder tree with <case>/<case>_t1, _t1ce, _t2, _flair and _seg.nii.gz (or the 2023 names)",
            f"{_PACKAGE}.brats",
            ("random", "column", "missing-channel"),
            ("sites", "table", "binary"),
        ),
        Kind(
            "luna",
            "LUNA16: lung nodule or not, patches around candidates",
            "folder with candidates.csv (or candidates_V2.csv) and subset*/*.mhd",
            f"{_PACKAGE}.luna",
            ("random", "label-ratio"),
            ("sites", "table", "negatives_per_positive", "dims", "patch_mm"),
        ),
        Kind(
            "cifar",
            "two classes of CIFAR-10 JPEG copies, unevenly spread over simulated sites",
            "the .npz file with train_jpeg, train_offset, train_label and the same for test, or its folder",
            f"{_PACKAGE}.cifar",
            ("delta", "label-ratio"),
            ("classes", "images"),
        ),
    )
}
# options that belong to every kind
_COMMON = ("seed", "force")


def get_kind(name: str) -> Kind:
    """Return a kind by name.

    Raises:
        ConfigError: Unknown; with the nearest known one.
    """
    kind = KINDS.get(name.lower())
    if kind is None:
        raise ConfigError(f"Kind '{name}' is unknown. {nearest(name, KINDS)}")
    return kind


def check_options(kind: Kind, options: ImportOptions) -> None:
    """Refuse options that a kind does not know: silence would look like obedience.

    Raises:
        ConfigError: Naming the option and the kinds that know it; or a number out of its range.
    """
    known = {*kind.options, *_COMMON, *(("partition",) if kind.partitions else ())}
    for name, value in vars(options).items():
        if value is not None and name not in known:
            owners = [
                other.name
                for other in KINDS.values()
                if name in other.options or (name == "partition" and other.partitions)
            ]
            flag = name.replace("_", "-")
            why = (
                "its sites are its own"
                if name in ("partition", "sites")
                else f"it is for {', '.join(owners)}"
            )
            raise ConfigError(f"--{flag} does not go with '{kind.name}': {why}. Leave it out.")
    if not 0 <= options.seed < 2**32:
        raise ConfigError(f"--seed must be 0 to {2**32 - 1}, got {options.seed}.")
