"""What a check measures on one case or one table; nothing in it says whose case it is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.data.datalist import Case, Datalist, TableSpec
from client.data.formats import Volume, read_image
from client.data.inspection import Problem, class_indices, image_problems, label_problems, oriented
from client.data.tabular import Table, row_alias
from common.config import DataConfig
from common.errors import DataError
from common.site_summary import PERCENTILES

_QUANTILES = (0.01, 0.5, 0.99)
_SAMPLE = 1 << 20  # values that percentiles are taken from; a whole volume would be sorted for nothing


@dataclass(frozen=True)
class CaseFacts:
    """One readable case in figures.

    Attributes:
        alias: Case alias.
        split: Its split.
        format: File format.
        size: Voxels by axis, in the run's orientation where one is given.
        spacing: Millimetres by axis, likewise.
        orientation: The file's own axis codes, "" for pictures.
        dtype: Decoded dtype of the image.
        percentiles: By channel, the values at `PERCENTILES`.
        classes: Voxels of each class (segmentation; empty if the mask is unusable), or 1 at the case's class.
        digest: Hash of the voxel values, to find the same image twice; it never leaves the check.
    """

    alias: str
    split: str
    format: str
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    orientation: str
    dtype: str
    percentiles: tuple[tuple[float, ...], ...]
    classes: tuple[int, ...]
    digest: bytes = field(repr=False)

    def to_mapping(self) -> dict[str, Any]:
        """Return it for JSON, without the digest."""
        named = [dict(zip(PERCENTILES, map(rounded, values), strict=True)) for values in self.percentiles]
        return {
            "case": self.alias,
            "split": self.split,
            "format": self.format,
            "size": list(self.size),
            "spacing": [rounded(value) for value in self.spacing],
            "orientation": self.orientation,
            "dtype": self.dtype,
            "intensity": named,
            "classes": list(self.classes),
        }


@dataclass(frozen=True)
class TableFacts:
    """A table in figures.

    Attributes:
        missing_share: Share of missing cells by feature.
        percentiles: By feature, the measured values at `PERCENTILES`; () where none was measured.
        classes: Rows of each class.
    """

    missing_share: dict[str, float]
    percentiles: dict[str, tuple[float, ...]]
    classes: tuple[int, ...]


def examine_case(
    case: Case, split: str, datalist: Datalist, config: DataConfig | None
) -> tuple[CaseFacts | None, list[Problem]]:
    """Read one case; return its figures (None where it is unreadable) and what is wrong with it."""
    problems: list[Problem] = []
    image = _read(case, case.image, datalist, len(datalist.channels), "image", problems)
    if image is None:
        return None, problems
    problems += _with_detail(image_problems(image, case.alias, datalist.channels, config), str(case.image[0]))
    classes = _case_classes(case, image, datalist, problems)
    orientation = config.orientation if config else None
    facts = CaseFacts(
        case.alias,
        split,
        image.format.value,
        tuple(int(size) for size in oriented(image, image.size, orientation)),
        oriented(image, image.spacing, orientation),
        image.orientation,
        image.dtype,
        tuple(_percentiles(channel) for channel in image.data),
        classes,
        _digest(image.data),
    )
    return facts, problems


def examine_table(table: Table, spec: TableSpec, classes: int) -> tuple[TableFacts, list[Problem]]:
    """Return what a table measures and what is wrong with its cells."""
    columns = dict(zip(spec.features, table.values.T, strict=True))
    bad = Counter(cell.column for cell in table.bad)
    problems = [
        Problem(
            "error",
            "cell",
            row_alias(next(cell.row for cell in table.bad if cell.column == column)),
            column,
            f"column '{column}' has {count} cells that are no numbers, this row's first; "
            "correct them, or leave them empty for missing",
        )
        for column, count in bad.items()
    ]
    for name, values in columns.items():
        measured = values[~np.isnan(values)]
        if not measured.size:
            sentence = f"feature '{name}' is missing in every row; the network sees 0 there"
            problems.append(Problem("warning", "feature-missing", "", name, sentence))
        elif measured.min() == measured.max():
            sentence = f"feature '{name}' has one value in every row; it tells nothing at this site"
            problems.append(Problem("warning", "constant", "", name, sentence))
    problems += _row_problems(table, classes)
    facts = TableFacts(
        {name: float(np.isnan(values).mean()) for name, values in columns.items()},
        {name: _quantiles(values[~np.isnan(values)]) for name, values in columns.items()},
        tuple(sum(target == index for target in table.targets) for index in range(classes)),
    )
    return facts, problems


def rounded(value: float) -> float:
    """Return a value with five significant digits: enough for a range, too little to tell a case by."""
    return float(f"{value:.5g}") if np.isfinite(value) else 0.0


def _row_problems(table: Table, classes: int) -> Iterator[Problem]:
    first: dict[bytes, int] = {}
    for row, target in enumerate(table.targets):
        if target is not None and not 0 <= target < classes:
            sentence = f"the target is {target}, expected a class from 0 to {classes - 1}"
            yield Problem("error", "label-values", row_alias(row), "target", sentence)
        key = table.values[row].tobytes() + str(target).encode()
        if key in first:
            sentence = f"the row is the same as {row_alias(first[key])} in every feature and the target"
            yield Problem("warning", "duplicate", row_alias(row), "row", sentence)
        first.setdefault(key, row)


def _case_classes(case: Case, image: Volume, datalist: Datalist, problems: list[Problem]) -> tuple[int, ...]:
    count = len(datalist.labels)
    if isinstance(case.label, int):
        return tuple(int(index == case.label) for index in range(count))
    if case.label is None:
        return ()
    label = _read(case, (case.label,), datalist, 1, "label", problems)
    if label is None:
        return ()
    found = list(_with_detail(label_problems(label, image, case.alias, count), str(case.label)))
    problems += found
    if any(problem.code.startswith("label") for problem in found):
        return ()
    counts = torch.bincount(class_indices(label, count).reshape(-1).to(torch.int64), minlength=count)
    return tuple(int(value) for value in counts)


def _read(
    case: Case, paths: tuple[Any, ...], datalist: Datalist, channels: int, what: str, problems: list[Problem]
) -> Volume | None:
    try:
        return read_image(
            paths,
            site=datalist.site,
            alias=case.alias,
            dims=datalist.spatial_dims,
            channels=channels,
            what=what,
        )
    except DataError as error:
        sentence = error.message.removeprefix(f"{datalist.site}, {case.alias}: ").removesuffix(".")
        problems.append(Problem("error", "unreadable", case.alias, what, sentence, error.detail))
        return None


def _with_detail(problems: Iterator[Problem], path: str) -> Iterator[Problem]:
    for found in problems:
        yield Problem(found.level, found.code, found.case, found.field, found.sentence, path)


def _percentiles(channel: Tensor) -> tuple[float, ...]:
    flat = channel.reshape(-1)
    step = -(-flat.numel() // _SAMPLE) | 1  # odd, so that it does not walk along one plane of a power of two
    values = flat[::step].to(torch.float64).numpy()
    return _quantiles(values[np.isfinite(values)])


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    if not values.size:
        return ()
    return tuple(float(value) for value in np.quantile(values, _QUANTILES))


def _digest(data: Tensor) -> bytes:
    """Hash the values, so that the same image counts as the same in another format or dtype."""
    hasher = hashlib.sha256(str(tuple(data.shape)).encode())
    for channel in data:
        hasher.update(channel.to(torch.float32).contiguous().numpy().data)
    return hasher.digest()
