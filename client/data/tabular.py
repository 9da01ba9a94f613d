"""Clinical tables: a CSV file of numeric features and one integer class, read strictly.

Missing cells are filled, and features standardised, from the site's own training rows; those statistics stay
here.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.config import brief
from common.errors import DataError, nearest

_LISTED = 50  # columns in a hint
MISSING_WORDS = frozenset({"", "nan", "na", "n/a", "?", "none", "null"})


@dataclass(frozen=True)
class TableSpec:
    """Where a site's table lies and what its columns mean.

    Attributes:
        path: The CSV file.
        features: Columns that go into the network, in order.
        target: Column of the class index.
        split_column: Column that says training, validation or test; None draws the split.
        group_column: Column whose equal values stay on one side of a split; None makes every row its own.
        missing_values: By feature, numbers that mean "not measured".
    """

    path: Path
    features: tuple[str, ...]
    target: str
    split_column: str | None = None
    group_column: str | None = None
    missing_values: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class BadCell:
    """A cell that is neither a number nor missing, by 0-based row and column name; its text is not kept."""

    row: int
    column: str


@dataclass(frozen=True)
class Table:
    """A table as read.

    Attributes:
        values: float64 (rows, features), NaN where missing.
        targets: Class of each row; None where the cell is empty.
        splits: Text of the split column by row, or None.
        groups: Text of the group column by row, or None.
        bad: Cells that are no numbers (NaN in `values`, None in `targets`).
    """

    values: NDArray[np.float64]
    targets: tuple[int | None, ...]
    splits: tuple[str, ...] | None
    groups: tuple[str, ...] | None
    bad: tuple[BadCell, ...]


def read_table(spec: TableSpec, site: str) -> Table:
    """Read a site's table; cells that are no numbers are collected, so that a check sees them all.

    Raises:
        DataError: Unreadable file, missing or repeated columns, rows of another length, or no rows.
    """
    header, rows = _read_rows(spec, site)
    place = {name: index for index, name in enumerate(header)}
    _refuse_unknown_columns(spec, header, site)
    bad: list[BadCell] = []
    values = np.full((len(rows), len(spec.features)), np.nan)
    for column, name in enumerate(spec.features):
        cells = [row[place[name]] for row in rows]
        values[:, column] = _numbers(cells, name, spec.missing_values.get(name, ()), bad)
    targets = _classes([row[place[spec.target]] for row in rows], spec.target, bad)

    def texts(name: str | None) -> tuple[str, ...] | None:
        return tuple(row[place[name]].strip() for row in rows) if name else None

    return Table(values, targets, texts(spec.split_column), texts(spec.group_column), tuple(bad))


def refuse_bad_cells(table: Table, site: str) -> None:
    """Raise for the first cell that is no number.

    Raises:
        DataError: Naming row alias and column, never the cell's text.
    """
    if table.bad:
        first = table.bad[0]
        raise DataError(
            f"{site}, {row_alias(first.row)}: column '{first.column}' holds a text where a number belongs "
            f"({len(table.bad)} such cells in the table). Correct them, or leave them empty for missing.",
            site=site,
        )


def row_alias(row: int) -> str:
    """Return the alias of a 0-based table row or list position: "case-0001" is the first."""
    return f"case-{row + 1:04d}"


@dataclass(frozen=True)
class Standardiser:
    """A site's own fill values and scale, from its training rows. It never leaves the site.

    Attributes:
        fill: Value put in place of a missing one, before scaling; NaN for a feature without any training
            value.
        mean, scale: Standardisation of a feature; scale is positive.
    """

    fill: NDArray[np.float64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return filled, standardised float32 values of the same shape; every one is finite.

        A feature that the site never measured in training is 0 throughout: without a scale its values mean
            nothing.
        """
        filled = np.where(np.isnan(values), self.fill, values)
        result = (filled - self.mean) / self.scale
        return np.where(np.isnan(result), 0.0, result).astype(np.float32)


def fit_standardiser(
    training: NDArray[np.float64], *, missing: Literal["median", "zero"] = "median", standardise: bool = True
) -> Standardiser:
    """Compute fill values and scale from the training rows' measured values.

    Args:
        training: (rows, features), NaN where missing.
        missing: "median" fills with the median; "zero" makes missing values 0 after standardisation.
        standardise: False keeps the features as they are (fill with the median, or 0).
    """
    features = training.shape[1]
    fill, mean, scale = np.full(features, np.nan), np.full(features, np.nan), np.ones(features)
    for column in range(features):
        measured = training[:, column][~np.isnan(training[:, column])]
        if not measured.size:
            continue
        spread = float(measured.std())
        mean[column] = float(measured.mean()) if standardise else 0.0
        # a constant feature carries nothing: its values become 0, and a rounding-error spread must not blow
        # them up
        constant = spread <= 1e-12 * max(1.0, abs(float(measured.mean())))
        scale[column] = spread if standardise and not constant else 1.0
        fill[column] = float(np.median(measured)) if missing == "median" else mean[column]
    return Standardiser(fill, mean, scale)


def _refuse_unknown_columns(spec: TableSpec, header: list[str], site: str) -> None:
    """Refuse columns that are not there; the sentence never quotes the header.

    Of a file without a header line, the "names" are the first patient's row.
    """
    wanted = [*spec.features, spec.target, *(name for name in (spec.split_column, spec.group_column) if name)]
    for name in wanted:
        if name not in header:
            which = f"the declared column '{brief(name)}'" if name in spec.features else "a declared column"
            raise DataError(
                f"{site}: the table lacks {which}; it has {len(header)} columns. Correct dataset.json, or give "
                "the table a line of headings; `wardround site check` at the site says more.",
                detail=f"{spec.path}: no column '{brief(name)}'. {_hint(name, header)}",
                site=site,
            )
    for name in spec.missing_values:
        if name not in spec.features:
            raise DataError(
                f"{site}: 'missing_values' of dataset.json names a column that is no feature. Correct it; "
                "`wardround site check` at the site says which.",
                detail=f"'{brief(name)}'. {_hint(name, spec.features)}",
                site=site,
            )


def _hint(name: str, known: Sequence[str]) -> str:
    """Return the nearest of the known names and the first of them, as the hospital's own terminal may show them."""
    more = f" {len(known)} in all." if len(known) > _LISTED else ""
    return nearest(brief(name), dict.fromkeys(map(brief, known[:_LISTED]))) + more


def _read_rows(spec: TableSpec, site: str) -> tuple[list[str], list[list[str]]]:
    try:
        with spec.path.open(newline="", encoding="utf-8-sig") as stream:
            lines = [row for row in csv.reader(stream, strict=True) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{site}: the table cannot be read; expected a comma-separated file in UTF-8 with a header line.",
            detail=f"{spec.path}: {error}",
            site=site,
        ) from error
    if not lines:
        raise DataError(
            f"{site}: the table is empty. Expected a header line and rows.", detail=str(spec.path), site=site
        )
    header = [name.strip() for name in lines[0]]
    if len(header) == 1 and ";" in header[0]:
        raise DataError(
            f"{site}: the table is separated by semicolons. Save it with commas and decimal points.",
            detail=str(spec.path),
            site=site,
        )
    if len(set(header)) != len(header):
        raise DataError(
            f"{site}: two columns of the table have the same name. Rename one.",
            detail=str(spec.path),
            site=site,
        )
    rows = lines[1:]
    if not rows:
        raise DataError(f"{site}: the table has a header line and no rows.", detail=str(spec.path), site=site)
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise DataError(
                f"{site}, {row_alias(number)}: the row has {len(row)} cells, expected {len(header)}. "
                "Quote cells that hold a comma.",
                detail=str(spec.path),
                site=site,
            )
    return header, rows


def _numbers(
    cells: list[str], column: str, missing: tuple[float, ...], bad: list[BadCell]
) -> NDArray[np.float64]:
    result = np.full(len(cells), np.nan)
    for row, cell in enumerate(cells):
        text = cell.strip()
        if text.lower() in MISSING_WORDS:
            continue
        try:
            value = float(text)
        except ValueError:
            bad.append(BadCell(row, column))
            continue
        if not np.isfinite(value):
            bad.append(BadCell(row, column))
        elif value not in missing:
            result[row] = value
    return result


def _classes(cells: list[str], column: str, bad: list[BadCell]) -> tuple[int | None, ...]:
    values = _numbers(cells, column, (), bad)
    classes: list[int | None] = []
    for row, value in enumerate(values):
        whole = not np.isnan(value) and float(value).is_integer()
        if not whole and not np.isnan(value):
            bad.append(BadCell(row, column))
        classes.append(int(value) if whole else None)
    return tuple(classes)
