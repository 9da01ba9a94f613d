"""Reading the CSV files that come with data sets."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError, nearest


def read_rows(path: Path, columns: Sequence[str], what: str = "") -> list[dict[str, str]]:
    """Read a CSV file with a header line; cells are stripped, missing ones are "".

    Args:
        path: The file, UTF-8.
        columns: Columns that must be there.
        what: How the file is called in a sentence; its kind, not its path.

    Raises:
        DataError: Unreadable, without rows, or without one of the columns.
    """
    name = what or "cases.csv"
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restkey="")
            header = [str(column).strip() for column in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{_capital(name)} cannot be read; expected a comma-separated file in UTF-8 with a header line.",
            detail=f"{path}: {error}",
        ) from error
    if not rows:
        raise DataError(f"{_capital(name)} has no rows under a header line.", detail=str(path))
    for column in columns:
        if column not in header:
            raise DataError(
                f"{_capital(name)} has no column '{column}'. {nearest(column, header)}", detail=str(path)
            )
    return rows


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
