"""From a data folder to cases: which files belong to whom, in which split, under which alias.

Nothing is opened but `dataset.json` and, for a table, its CSV file; every listed file must be there. From
here on a case is known by its alias alone: "case-0001" is the first one listed, whatever its file is called.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from client.data.split import split_by_group
from client.data.tabular import Table, TableSpec, read_table, refuse_bad_cells, row_alias
from common.config import TaskName
from common.dataset_json import SPLITS, CaseEntry, DatasetJson, SplitFractions, read_dataset_json
from common.errors import DataError
from common.site_summary import SiteSummary

__all__ = ["SPLITS", "Case", "Datalist", "TableSpec", "read_datalist", "table_spec"]


@dataclass(frozen=True)
class Case:
    """One labelled case.

    Attributes:
        alias: "case-0001", numbered in the list's order over the whole file; never made from a file name.
        image: One file for all channels, or one per channel; empty for a table row.
        label: Mask file (segmentation), class index, or None for a table row without a class.
        group: Cases of one group stay on one side of a split; never shown, it may name a patient.
        index: 0-based place in the list, or row of the table; random choices for the case derive from it.
    """

    alias: str
    image: tuple[Path, ...]
    label: Path | int | None
    group: str
    index: int = 0


@dataclass(frozen=True)
class Datalist:
    """A site's cases.

    Attributes:
        site: The site's alias.
        folder: The data folder.
        task: What the labels are for.
        spatial_dims: 3 volumes, 2 pictures, 0 tables.
        channels: Channel names in order, or the table's features.
        labels: Class names; index = label value.
        cases: Labelled cases by split; all of `SPLITS` are there.
        unlabelled: Listed test cases (or rows) without a label; they are left out.
        table: The table, for task tabular.
    """

    site: str
    folder: Path
    task: TaskName
    spatial_dims: int
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    cases: dict[str, tuple[Case, ...]]
    unlabelled: int
    table: TableSpec | None

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of labelled cases by split."""
        return {split: len(self.cases[split]) for split in SPLITS}

    def outline(self) -> SiteSummary:
        """Return the summary that needs no voxel: names and counts."""
        return SiteSummary(
            site=self.site,
            task=self.task,
            spatial_dims=self.spatial_dims,  # type: ignore[arg-type]  # pydantic checks the literal
            channels=self.channels,
            labels=self.labels,
            cases=self.counts,
            unlabelled=self.unlabelled,
        )


def read_datalist(folder: Path, site: str, *, seed: int = 0) -> Datalist:
    """Read a site's data folder.

    Args:
        folder: The folder that holds `dataset.json`.
        site: The site's alias, for the sentences.
        seed: Seed of the split where the file gives neither lists nor a seed.

    Raises:
        DataError: A missing or invalid `dataset.json`; a path outside the folder; a missing file; a case
            listed twice; a group on both sides of a split; a class outside the set; no training case.
    """
    dataset = read_dataset_json(folder, site)
    if dataset.table is not None:
        return _read_tabular(folder, site, dataset, seed)
    entries = dataset.entries(site)
    task = dataset.infer_task(entries)
    if task == "tabular":
        raise DataError(
            f"{site}: task tabular needs the key 'table' in dataset.json. Name the CSV file.", site=site
        )
    reader = _EntryReader(folder, site, task, len(dataset.label_names))
    listed: list[tuple[str, Case]] = []
    unlabelled = 0
    for index, (split, entry) in enumerate(entries):
        if entry.label is None and split == "test":
            unlabelled += 1
        else:
            listed.append((split, reader.case(index, entry)))
    reader.refuse_missing()
    reader.refuse_repeats([case for _, case in listed])
    strata = [case.label if isinstance(case.label, int) else 0 for _, case in listed]
    splits = _splits(
        dataset, [split for split, _ in listed], [case.group for _, case in listed], strata, seed
    )
    cases = _by_split([case for _, case in listed], splits, site)
    dims = dataset.infer_dims(entries)
    return Datalist(
        site, folder, task, dims, dataset.channel_names, dataset.label_names, cases, unlabelled, None
    )


@dataclass(frozen=True)
class _EntryReader:
    """Turns list entries into cases."""

    folder: Path
    site: str
    task: TaskName
    classes: int
    missing: list[tuple[str, str, Path]] = field(default_factory=list)

    def case(self, index: int, entry: CaseEntry) -> Case:
        alias = row_alias(index)
        image = tuple(self.file(alias, name, "image") for name in entry.files)
        group = f"own:{index}" if entry.group is None else f"group:{entry.group}"
        return Case(alias, image, self._label(alias, entry.label), group, index)

    def _label(self, alias: str, label: str | int | None) -> Path | int:
        expected = (
            "the path of a mask" if self.task == "segmentation" else f"a class from 0 to {self.classes - 1}"
        )
        if self.task == "segmentation" and isinstance(label, str):
            return self.file(alias, label, "label")
        if self.task == "classification" and isinstance(label, int) and 0 <= label < self.classes:
            return label
        got = "none" if label is None else f"the number {label}" if isinstance(label, int) else "a text"
        raise self._error(alias, f"the label must be {expected}, got {got}. Correct dataset.json")

    def file(self, alias: str, name: str, what: str) -> Path:
        pure = PurePosixPath(name)
        # a drive letter or backslash is refused on every system: the folder must mean the same everywhere
        foreign = "\\" in name or PureWindowsPath(name).drive
        if pure.is_absolute() or ".." in pure.parts or foreign or name.startswith("~"):
            raise self._error(
                alias,
                f"the {what}'s path leads out of the data folder. Use a path relative to dataset.json, "
                "with forward slashes and without '..'",
                name,
            )
        path = self.folder / pure
        if not path.exists():
            self.missing.append((alias, what, path))
            return path
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise self._error(
                alias,
                f"the {what} is a link that leads out of the data folder. Put the data itself there",
                str(path),
            )
        return path

    def _error(self, alias: str, sentence: str, detail: str = "") -> DataError:
        return DataError(f"{self.site}, {alias}: {sentence}.", detail=detail, site=self.site)

    def refuse_missing(self) -> None:
        """Refuse what is listed and not there: all of it at once, so that it is put right in one go."""
        if self.missing:
            alias, what, _ = self.missing[0]
            count = len(self.missing)
            sentence = f"the {what} that dataset.json lists is not there ({count} missing in all)"
            paths = "\n".join(str(path) for *_, path in self.missing[:50])
            raise self._error(alias, f"{sentence}. Put them there, or unlist them", paths)

    def refuse_repeats(self, cases: list[Case]) -> None:
        """Refuse a file that two cases list, in whatever split: it would be trained on and tested on."""
        owner: dict[Path, str] = {}
        for case in cases:
            for path in case.image:
                real = path.resolve()
                if real in owner:
                    raise self._error(
                        case.alias,
                        f"its image is already listed by {owner[real]}. List every image once",
                        str(path),
                    )
                owner[real] = case.alias


def _splits(
    dataset: DatasetJson, listed: list[str], groups: list[str], strata: list[int], seed: int
) -> list[str]:
    """Return every case's split: as listed, and out of the training list where a list is absent.

    If one of validation and test is listed, the other is drawn only where "split" asks for it: a list that
    somebody made on purpose is not cut without being told to.
    """
    absent = [split for split in SPLITS[1:] if split not in listed]
    if not absent or (len(absent) == 1 and dataset.split is None):
        return listed
    wanted = dataset.split or SplitFractions.model_validate({})
    fractions = {split: getattr(wanted, split) for split in absent}
    training = [index for index, split in enumerate(listed) if split == "training"]
    drawn = split_by_group(
        [groups[index] for index in training],
        [strata[index] for index in training],
        fractions,
        seed=seed if wanted.seed is None else wanted.seed,
    )
    result = list(listed)
    for index, split in zip(training, drawn, strict=True):
        result[index] = split
    return result


def _by_split(cases: list[Case], splits: list[str], site: str) -> dict[str, tuple[Case, ...]]:
    home: dict[str, tuple[str, str]] = {}
    for case, split in zip(cases, splits, strict=True):
        other, alias = home.setdefault(case.group, (split, case.alias))
        if other != split:
            raise DataError(
                f"{site}, {case.alias}: it is in {split}, but {alias} of the same group is in {other}. "
                "Keep a group on one side of the split.",
                site=site,
            )
    result = {name: tuple(c for c, s in zip(cases, splits, strict=True) if s == name) for name in SPLITS}
    if not result["training"]:
        raise DataError(f"{site}: no labelled training case is listed; at least one is needed.", site=site)
    return result


def _read_tabular(folder: Path, site: str, dataset: DatasetJson, seed: int) -> Datalist:
    if dataset.task not in (None, "tabular") or dataset.training or dataset.validation or dataset.test:
        raise DataError(
            f"{site}: dataset.json has a table and also cases or another task. Keep one of them.", site=site
        )
    spec = table_spec(folder, site, dataset)
    table = read_table(spec, site)
    refuse_bad_cells(table, site)
    rows = [row for row, target in enumerate(table.targets) if target is not None]
    cases = [_row_case(table, row, len(dataset.label_names), site) for row in rows]
    groups = [case.group for case in cases]
    strata = [int(case.label) for case in cases if isinstance(case.label, int)]
    listed = _row_splits(table, rows, dataset.split_column or "", site)
    splits = listed if table.splits is not None else _splits(dataset, listed, groups, strata, seed)
    by_split = _by_split(cases, splits, site)
    unlabelled = len(table.targets) - len(rows)
    return Datalist(
        site, folder, "tabular", 0, dataset.features, dataset.label_names, by_split, unlabelled, spec
    )


def table_spec(folder: Path, site: str, dataset: DatasetJson) -> TableSpec:
    """Return where a site's table lies and what its columns mean.

    Raises:
        DataError: The table's path leads out of the folder, or nothing is there.
    """
    reader = _EntryReader(folder, site, "tabular", len(dataset.label_names))
    path = reader.file("table", dataset.table or "", "table")
    reader.refuse_missing()
    return TableSpec(
        path,
        dataset.features,
        dataset.target,
        dataset.split_column,
        dataset.group_column,
        dataset.missing_values,
    )


def _row_case(table: Table, row: int, classes: int, site: str) -> Case:
    target = table.targets[row]
    if target is None or not 0 <= target < classes:
        raise DataError(
            f"{site}, {row_alias(row)}: the target must be a class from 0 to {classes - 1}, got {target}. "
            "Correct the table, or 'labels' of dataset.json.",
            site=site,
        )
    group = f"group:{table.groups[row]}" if table.groups is not None and table.groups[row] else f"own:{row}"
    return Case(row_alias(row), (), target, group, row)


def _row_splits(table: Table, rows: list[int], column: str, site: str) -> list[str]:
    if table.splits is None:
        return ["training"] * len(rows)
    for row in rows:
        if table.splits[row] not in SPLITS:
            counts = Counter(table.splits[index] in SPLITS for index in rows)
            raise DataError(
                f"{site}, {row_alias(row)}: column '{column}' must say training, validation or test "
                f"({counts[False]} rows say something else). Correct the table.",
                site=site,
            )
    return [table.splits[row] for row in rows]
