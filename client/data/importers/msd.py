"""Medical Segmentation Decathlon: any task, cut into sites.

A task comes from one or few centres and names none, so sites are simulated; the note in federation.json says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

from client.data.importers.archive import Source, open_source, require_source
from client.data.importers.kinds import KINDS, ImportOptions
from client.data.importers.layout import About, Progress, SiteFolder, new_root, place, split_cases
from client.data.importers.partition import (
    GROUP_COLUMN,
    Partition,
    by_column,
    cut_regimes,
    deal_random,
    neutral_groups,
    numbered_aliases,
    own_groups,
    parse_partition,
    read_case_table,
    site_count,
)
from client.data.importers.volumes import geometry, grid_settings, robust_maximum, stem_of, volume_suffix
from common.dataset_json import SPLITS, DatasetJson, read_dataset_json
from common.errors import ConfigError, DataError
from common.federation import Federation, write_federation

# At least so many cases in a site made by intensity: each split gets some.
SMALLEST_REGIME = 10
_WHOM = "the source"


@dataclass(frozen=True)
class Labelled:
    """One labelled case of the source.

    Attributes:
        key: Name of the image file without its ending: the key in tables. It is not written.
        image: Image file.
        label: Mask file.
        group: Subject key from the table, or "".
    """

    key: str
    image: Path
    label: Path
    group: str = ""


@dataclass(frozen=True)
class Sites:
    """Which case goes where.

    Attributes:
        alias: Site of each case.
        notes: What is to be said of each site.
        note: What is to be said of the whole.
    """

    alias: list[str]
    notes: dict[str, str]
    note: str


def run(source: Path, out: Path, options: ImportOptions, progress: Progress) -> None:
    """Import a Decathlon task.

    Args:
        source: Tar archive or folder.
        out: Data root to write.
        options: sites, partition, seed, table, force.
        progress: Called per file and case.

    Raises:
        ConfigError: Options that do not fit together.
        DataError: A source that is no Decathlon task, or that cannot be cut as asked.
    """
    partition = parse_partition(options.partition or "random", KINDS["msd"].partitions)
    count = site_count(partition, options.sites)
    table = read_case_table(options.table) if options.table else {}
    if partition.kind == "column" and not table:
        raise ConfigError("--partition column:NAME needs --table with a row per case.")
    require_source(source)
    with new_root(out, "msd", force=options.force) as root, open_source(source, root, progress) as opened:
        folder = find_task(opened.folder)
        dataset = read_dataset_json(folder, _WHOM)
        cases = labelled(folder, dataset)
        cases = [replace(case, group=table.get(case.key, {}).get(GROUP_COLUMN, "")) for case in cases]
        sites = _sites(cases, partition, count, table, options.seed, progress)
        channels = dataset.channel_names
        for alias in sorted(set(sites.alias)):
            mine = [case for case, home in zip(cases, sites.alias, strict=True) if home == alias]
            about = _about(dataset, channels, sites.notes.get(alias, ""))
            _write_site(SiteFolder(root, alias, about), mine, opened, options.seed)
        write_federation(
            root, _federation(root, dataset, channels, sites.note, len(set(sites.alias)), progress)
        )


def find_task(folder: Path) -> Path:
    """Return the folder with dataset.json: the given one, or the only one in it.

    Raises:
        DataError: There is none, or more than one.
    """
    if (folder / "dataset.json").is_file():
        return folder
    found = sorted(path.parent for path in folder.glob("*/dataset.json"))
    if len(found) != 1:
        raise DataError(
            f"SOURCE is no task of the Medical Segmentation Decathlon: expected one dataset.json in it, got {len(found)}. "
            "Give TaskNN_Name.tar or its folder.",
            detail=str(folder),
        )
    return found[0]


def labelled(folder: Path, dataset: DatasetJson) -> list[Labelled]:
    """Return the labelled cases, sorted by key; unlabelled test images are left out.

    Raises:
        DataError: No labelled case, a path that leads out of the folder, a missing file, or a table.
    """
    cases = []
    for number, (_, entry) in enumerate(dataset.entries(_WHOM), 1):
        if entry.label is None:
            continue
        if not isinstance(entry.label, str) or len(entry.files) != 1:
            raise DataError(
                f"Case {number} of SOURCE is not one image with one mask, as the Decathlon has them. "
                "A folder in another form needs no import: give it to `wardround site check`."
            )
        image, mask = (_inside(folder, name, number) for name in (entry.files[0], entry.label))
        cases.append(Labelled(stem_of(image), image, mask))
    if not cases:
        raise DataError("SOURCE lists no labelled case. Give the Decathlon task with its labelsTr.")
    if len({case.key for case in cases}) != len(cases):
        raise DataError("SOURCE lists two images of the same name. List every image once.")
    return sorted(cases, key=lambda case: case.key)


def _inside(folder: Path, name: str, number: int) -> Path:
    pure = PurePosixPath(name)
    path = folder / pure
    if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"Case {number} of SOURCE names a file outside its folder. Do not trust this source.", detail=name
        )
    if not path.is_file():
        raise DataError(
            f"Case {number} of SOURCE names a file that is not there. Unpack or download it completely.",
            detail=str(path),
        )
    volume_suffix(path)
    return path


def _sites(
    cases: Sequence[Labelled],
    partition: Partition,
    count: int,
    table: dict[str, dict[str, str]],
    seed: int,
    progress: Progress,
) -> Sites:
    groups = own_groups([case.group for case in cases])
    if partition.kind == "column":
        aliases = by_column([case.key for case in cases], table, partition.column)
        return Sites(aliases, {}, f"Sites are the values of column '{partition.column}' of a table of cases.")
    names = numbered_aliases(count)
    if partition.kind == "random":
        homes = deal_random(groups, count, seed)
        note = "Sites are a random division of one data set: simulated, not hospitals, and alike by construction."
        return Sites([names[home] for home in homes], {}, note)
    return _by_intensity(cases, groups, names, progress)


def _by_intensity(
    cases: Sequence[Labelled], groups: Sequence[str], names: Sequence[str], progress: Progress
) -> Sites:
    values = []
    for number, case in enumerate(cases, 1):
        values.append(robust_maximum(case.image, f"source case {number}"))
        progress("intensities", number, len(cases))
    # one value per subject, so that nobody's images lie at two sites
    of_group: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        of_group.setdefault(group, []).append(value)
    runs, cuts = cut_regimes(
        [median(own) for own in of_group.values()], len(names), _smallest(len(of_group), len(names))
    )
    home = dict(zip(of_group, runs, strict=True))
    aliases = [names[home[group]] for group in groups]
    notes = {}
    for name in names:
        own = [value for value, alias in zip(values, aliases, strict=True) if alias == name]
        notes[name] = f"simulated site: raw intensity (99th percentile) {min(own):.4g} to {max(own):.4g}"
    said = ", ".join(f"{cut:.4g}" for cut in cuts)
    note = (
        f"Sites are intensity regimes of one data set (99th percentile cut at {said}): simulated, not hospitals. "
        "No scanner or centre is known to lie behind them."
    )
    return Sites(aliases, notes, note)


def _smallest(subjects: int, sites: int) -> int:
    """Return the least size of a regime: ten, or less where there is not enough for that."""
    return max(len(SPLITS), min(SMALLEST_REGIME, subjects // (2 * sites)))


def _about(dataset: DatasetJson, channels: tuple[str, ...], note: str) -> About:
    return About(
        name=dataset.name,
        description=dataset.description,
        channels=channels,
        labels=dataset.label_names,
        size=dataset.tensorImageSize or "3D",
        task="segmentation",
        reference=dataset.reference,
        licence=dataset.licence or dataset.license,
        note=note,
    )


def _write_site(site: SiteFolder, cases: Sequence[Labelled], opened: Source, seed: int) -> None:
    groups = [case.group for case in cases]
    splits = split_cases(own_groups(groups), [0] * len(cases), seed=seed, alias=site.alias)
    rows = sorted(
        zip(cases, splits, neutral_groups(groups), strict=True), key=lambda row: SPLITS.index(row[1])
    )
    for case, split, group in rows:
        (image,), mask = site.add(split, [volume_suffix(case.image)], volume_suffix(case.label), group)
        place(case.image, image, move=opened.scratch)
        if mask is not None:
            place(case.label, mask, move=opened.scratch)
    site.finish()


def _federation(
    root: Path, dataset: DatasetJson, channels: tuple[str, ...], note: str, sites: int, progress: Progress
) -> Federation:
    images = sorted(root.glob("*/imagesTr/*"))
    found = []
    for number, image in enumerate(images, 1):
        found.append(geometry(image, f"{image.parent.parent.name}, {stem_of(image)}"))
        progress("headers", number, len(images))
    data: dict[str, Any] = {
        "task": "segmentation",
        "spatial_dims": 3,
        "channels": list(channels),
        "labels": list(dataset.label_names),
        **grid_settings(found),
        "patches_per_case": 2,
        "foreground_ratio": 0.7,
        "normalise": "case",
    }
    settings = {
        "data": data,
        "model": {"width": 16, "levels": 3 if min(data["patch"]) < 32 else 4},
        "train": {"local_epochs": 1, "batch_size": 4, "optimizer": "adam", "lr": 0.001},
        "rounds": {"rounds": 20},
    }
    people = (
        ""
        if _has_groups(root)
        else " The source has no subject key: images of one person may lie in several splits."
    )
    title = f"{dataset.name or 'Decathlon task'} (Medical Segmentation Decathlon), {sites} sites"
    return Federation(dataset.name.lower() or "msd", title, note + people, settings)


def _has_groups(root: Path) -> bool:
    documents = (json.loads(path.read_text(encoding="utf-8")) for path in root.glob("*/dataset.json"))
    return any("group" in entry for document in documents for entry in document["training"])
