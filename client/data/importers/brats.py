"""BraTS 2017 to 2023 and FeTS: brain tumours in four MR channels, cut into sites.

    <any folders>/<case>/<case>_t1.nii.gz  _t1ce  _t2  _flair  _seg        BraTS 2017-2021, FeTS 2021-2022
    <any folders>/<case>/<case>-t1n.nii.gz  -t1c  -t2w  -t2f  -seg         BraTS 2023, FeTS 2023

FeTS names the institution of a case in its partitioning CSV (columns Partition_ID, Subject_ID): those are real sites.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.data.importers.archive import Source, open_source, require_source
from client.data.importers.kinds import KINDS, ImportOptions
from client.data.importers.layout import (
    About,
    Progress,
    SiteFolder,
    new_root,
    place,
    split_cases,
    write_nifti,
)
from client.data.importers.partition import (
    Partition,
    by_column,
    deal_random,
    neutral_groups,
    numbered_aliases,
    own_groups,
    parse_partition,
    read_case_table,
    site_count,
)
from client.data.importers.volumes import geometry, grid_settings, open_volume, volume_suffix, voxels
from common.dataset_json import SPLITS
from common.errors import ConfigError, DataError
from common.federation import Federation, write_federation

CHANNELS = ("T1", "T1ce", "T2", "FLAIR")
LABELS = ("background", "necrotic core", "oedema", "enhancing tumour")
BINARY_LABELS = ("background", "whole tumour")
# endings of a channel's file, newest naming last
_ENDINGS = (("_t1", "-t1n"), ("_t1ce", "-t1c"), ("_t2", "-t2w"), ("_flair", "-t2f"))
_MASKS = ("_seg", "-seg")
# Enhancing tumour is 4 up to 2022 and 3 from 2023 on; no file has both.
_CLASS = np.array([0, 1, 2, 3, 3], dtype=np.uint8)
# "BraTS-GLI-00001-000" and "-001" are two scans of one person
_TIMEPOINT = re.compile(r"(.+-\d{5})-\d{3}")


@dataclass(frozen=True)
class Scan:
    """One labelled case: its key (not written), four channels in the order of `CHANNELS`, mask, and subject."""

    key: str
    channels: tuple[Path, ...]
    mask: Path
    group: str


@dataclass(frozen=True)
class Sites:
    """Site of each case, the channel that each site lacks (None: none), and what is to be said."""

    alias: list[str]
    lacks: Mapping[str, int | None]
    note: str


def run(source: Path, out: Path, options: ImportOptions, progress: Progress) -> None:
    """Import a BraTS or FeTS tree.

    Args:
        source: Folder tree, or a tar archive of one.
        out: Data root to write.
        options: sites, partition, seed, table, binary, force.
        progress: Called per case.

    Raises:
        ConfigError: Options that do not fit together.
        DataError: No case found, a case without a channel, a label value that is none, or a cut that cannot be made.
    """
    partition = parse_partition(options.partition or "random", KINDS["brats"].partitions)
    count = site_count(partition, options.sites)
    table = read_case_table(options.table) if options.table else {}
    if partition.kind == "column" and not table:
        raise ConfigError(
            "--partition column:NAME needs --table, such as FeTS' partitioning CSV with column:Partition_ID."
        )
    binary = bool(options.binary)
    require_source(source)
    with new_root(out, "brats", force=options.force) as root, open_source(source, root, progress) as opened:
        scans = find_scans(opened.folder)
        sites = _sites(scans, partition, count, table, options.seed)
        done = 0
        for alias in sorted(set(sites.alias)):
            mine = [scan for scan, home in zip(scans, sites.alias, strict=True) if home == alias]
            site = SiteFolder(root, alias, _about(sites.lacks[alias], binary))
            for _ in _write_site(site, mine, sites.lacks[alias], opened, options.seed, binary):
                done += 1
                progress("cases", done, len(scans))
        write_federation(root, _federation(root, sites, binary))


def find_scans(folder: Path) -> list[Scan]:
    """Return the labelled cases of a tree, sorted by key; cases without a mask (validation sets) are left out.

    Raises:
        DataError: No case, a case without one of its channels, or a name that occurs twice.
    """
    scans: list[Scan] = []
    for mask in sorted(path for path in folder.rglob("*.nii*") if _is_mask(path)):
        stem = mask.name[: -len(volume_suffix(mask))]
        key = next(stem[: -len(ending)] for ending in _MASKS if stem.lower().endswith(ending))
        channels = tuple(_channel(mask.parent, key, index) for index in range(len(CHANNELS)))
        absent = [CHANNELS[index] for index, path in enumerate(channels) if path is None]
        if absent:
            raise DataError(
                f"Case {len(scans) + 1} of SOURCE lacks its channel {', '.join(absent)}. Expected files ending in "
                "_t1, _t1ce, _t2, _flair and _seg (or -t1n, -t1c, -t2w, -t2f and -seg) beside each other.",
                detail=str(mask),
            )
        match = _TIMEPOINT.fullmatch(key)
        found = tuple(path for path in channels if path is not None)
        scans.append(Scan(key, found, mask, match.group(1) if match else ""))
    if not scans:
        raise DataError(
            "SOURCE holds no case of BraTS or FeTS: no file ends in _seg.nii.gz or -seg.nii.gz. Give the folder of the "
            "training cases.",
            detail=str(folder),
        )
    if len({scan.key for scan in scans}) != len(scans):
        raise DataError(
            "SOURCE holds two cases of the same name. Give a folder that holds every case once.",
            detail=str(folder),
        )
    return sorted(scans, key=lambda scan: scan.key)


def class_map(values: np.ndarray, alias: str, *, binary: bool) -> np.ndarray:
    """Return BraTS label values as uint8 class numbers.

    Args:
        values: 0, 1, 2 and 4 (2017 to 2022) or 0, 1, 2 and 3 (2023), of any shape.
        alias: How the case is called in the sentence.
        binary: 1 for every tumour label.

    Raises:
        DataError: Another value.
    """
    whole = values.astype(np.int64)
    if values.size and (
        int(whole.min()) < 0 or int(whole.max()) >= len(_CLASS) or bool((whole != values).any())
    ):
        raise DataError(
            f"{alias}: the mask has values other than 0, 1, 2 and 4 (or 3). Expected BraTS labels.",
        )
    classes = _CLASS[whole]
    return np.minimum(classes, 1) if binary else classes


def _is_mask(path: Path) -> bool:
    if path.name.startswith("._") or not path.name.lower().endswith((".nii", ".nii.gz")):
        return False
    return path.name[: -len(volume_suffix(path))].lower().endswith(_MASKS)


def _channel(folder: Path, key: str, index: int) -> Path | None:
    names = [key + ending + suffix for ending in _ENDINGS[index] for suffix in (".nii.gz", ".nii")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _sites(
    scans: Sequence[Scan], partition: Partition, count: int, table: dict[str, dict[str, str]], seed: int
) -> Sites:
    groups = own_groups([scan.group for scan in scans])
    if partition.kind == "column":
        aliases = by_column([scan.key for scan in scans], table, partition.column)
        note = f"Sites are the values of column '{partition.column}' of a table of cases."
        return Sites(aliases, dict.fromkeys(aliases), note)
    if partition.kind == "random":
        names = numbered_aliases(count)
        note = "Sites are a random division of one data set: simulated, not hospitals, and alike by construction."
        return Sites(
            [names[home] for home in deal_random(groups, count, seed)], dict.fromkeys(names, None), note
        )
    names = [f"lack-{name.lower()}" for name in CHANNELS]
    note = (
        "Sites are a random division of one data set, each without one of the four channels: simulated, not hospitals. "
        "Input channel k of two sites may be different MR sequences; that is the point of the set-up."
    )
    homes = deal_random(groups, len(names), seed)
    return Sites([names[home] for home in homes], {name: index for index, name in enumerate(names)}, note)


def _about(lacks: int | None, binary: bool) -> About:
    kept = [name for index, name in enumerate(CHANNELS) if index != lacks]
    note = f"channels are {', '.join(kept)}; {CHANNELS[lacks]} is missing" if lacks is not None else ""
    return About(
        name="brats",
        description="Brain tumours (glioma) in multi-channel MR, skull-stripped and registered.",
        channels=_channel_names(lacks is not None),
        labels=BINARY_LABELS if binary else LABELS,
        size="3D",
        task="segmentation",
        reference="Menze et al. 2015; Bakas et al. 2017 (BraTS); Pati et al. 2022 (FeTS)",
        licence="terms of the challenge that it was downloaded from",
        note=note,
    )


def _channel_names(missing: bool) -> tuple[str, ...]:
    """Sites that lack a channel must agree on names all the same, so theirs are numbered."""
    return tuple(f"MR-{index}" for index in range(1, len(CHANNELS))) if missing else CHANNELS


def _write_site(
    site: SiteFolder, scans: Sequence[Scan], lacks: int | None, opened: Source, seed: int, binary: bool
) -> Iterator[None]:
    """Write a site; yields after each case."""
    groups = [scan.group for scan in scans]
    splits = split_cases(own_groups(groups), [0] * len(scans), seed=seed, alias=site.alias)
    rows = sorted(
        zip(scans, splits, neutral_groups(groups), strict=True), key=lambda row: SPLITS.index(row[1])
    )
    for number, (scan, split, group) in enumerate(rows, 1):
        kept = [
            (name, path)
            for index, (name, path) in enumerate(zip(CHANNELS, scan.channels, strict=True))
            if index != lacks
        ]
        endings = [f"_{name.lower()}{volume_suffix(path)}" for name, path in kept]
        images, mask_path = site.add(split, endings, ".nii.gz", group)
        alias = f"{site.alias}, case-{number:04d}"
        mask = open_volume(scan.mask, alias)
        classes = class_map(voxels(mask, alias), alias, binary=binary)
        if mask_path is not None:
            write_nifti(mask_path, classes, np.asarray(mask.affine, dtype=np.float64))
        for (_, path), image in zip(kept, images, strict=True):
            place(path, image, move=opened.scratch)
        yield
    site.finish()


def _federation(root: Path, sites: Sites, binary: bool) -> Federation:
    missing = any(lacks is not None for lacks in sites.lacks.values())
    # one channel of each case is enough: BraTS is registered
    first = sorted(path for path in root.glob("*/labelsTr/*"))
    found = [
        geometry(path, f"{path.parent.parent.name}, case {number}") for number, path in enumerate(first, 1)
    ]
    data: dict[str, Any] = {
        "task": "segmentation",
        "spatial_dims": 3,
        "channels": list(_channel_names(missing)),
        "labels": list(BINARY_LABELS if binary else LABELS),
        **grid_settings(found),
        "patches_per_case": 2,
        "foreground_ratio": 0.7,
        "normalise": "case-nonzero",
    }
    settings = {
        "data": data,
        "model": {"width": 16, "levels": 4},
        "train": {"local_epochs": 1, "batch_size": 2, "optimizer": "adam", "lr": 0.001},
        "rounds": {"rounds": 30},
    }
    title = f"Brain tumours (BraTS/FeTS), {len(set(sites.alias))} sites"
    return Federation("brats", title, sites.note, settings)
