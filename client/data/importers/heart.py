"""UCI heart disease: clinical tables of four real hospitals, thirteen features, disease or not."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from client.data.importers.kinds import ImportOptions
from client.data.importers.layout import About, Progress, SiteFolder, new_root, split_cases
from client.data.importers.partition import alias_of
from client.data.importers.tables import read_rows
from common.errors import DataError
from common.federation import Federation, write_federation

FEATURES = (
    "age",
    "sex",
    "cp",
    "trestbps",
    "chol",
    "fbs",
    "restecg",
    "thalach",
    "exang",
    "oldpeak",
    "slope",
    "ca",
    "thal",
)
LABELS = ("no disease", "disease")
# Serum cholesterol and resting blood pressure of 0 mean "not measured".
MISSING = {"chol": [0], "trestbps": [0]}
SITE, TARGET, SPLIT = "site", "target", "split"
NOTE = (
    "Four real hospitals (Cleveland, Hungary, Switzerland, Veterans Affairs Long Beach; Detrano et al. 1989). They differ "
    "in who was examined: disease in a third to nearly all of the patients; slope, ca and thal are mostly missing outside "
    "Cleveland, chol throughout Switzerland."
)


def run(source: Path, out: Path, options: ImportOptions, progress: Progress) -> None:
    """Import the heart table: one site per value of its column `site`.

    Args:
        source: The CSV file, or the folder that holds it.
        out: Data root to write.
        options: seed, force.
        progress: Called per site.

    Raises:
        DataError: No such file, missing columns, or a target that is neither 0 nor 1.
    """
    rows = _read(_find(source))
    by_site: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_site.setdefault(alias_of(row[SITE]), []).append(row)
    if "" in by_site:
        raise DataError(f"Column 'site' is empty in {len(by_site[''])} rows. Name every row's hospital.")
    with new_root(out, "heart", force=options.force) as root:
        for number, alias in enumerate(sorted(by_site), 1):
            _write_site(root, alias, by_site[alias], options.seed)
            progress("sites", number, len(by_site))
        write_federation(root, _federation(len(by_site)))


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError("SOURCE is not there. Give the CSV file of the UCI heart data.", detail=str(source))
    found = sorted(source.glob("*.csv"))
    if len(found) != 1:
        raise DataError(
            f"SOURCE holds {len(found)} CSV files, expected one with the columns of the UCI heart data. Give the file itself.",
            detail=str(source),
        )
    return found[0]


def _read(path: Path) -> list[dict[str, str]]:
    rows = read_rows(path, (SITE, *FEATURES, TARGET), "the table of the UCI heart data")
    wrong = [number for number, row in enumerate(rows, 1) if row[TARGET] not in ("0", "1")]
    if wrong:
        raise DataError(
            f"Column 'target' must be 0 or 1 in every row; it is not in {len(wrong)} of {len(rows)} rows.",
            detail=str(path),
        )
    return rows


def _write_site(root: Path, alias: str, rows: Sequence[dict[str, str]], seed: int) -> None:
    strata = [int(row[TARGET]) for row in rows]
    splits = split_cases([str(number) for number in range(len(rows))], strata, seed=seed, alias=alias)
    about = About(
        name="uci-heart",
        description="Clinical findings and whether a coronary artery is narrowed by more than half.",
        channels=(),
        labels=LABELS,
        size=None,
        task="tabular",
        reference="Detrano et al. 1989, International application of a new probability algorithm",
        licence="CC BY 4.0",
        note=f"real hospital; disease in {100 * sum(strata) / len(rows):.0f} % of {len(rows)} patients",
    )
    folder = SiteFolder(root, alias, about)
    folder.finish(
        table="table.csv",
        features=list(FEATURES),
        target=TARGET,
        split_column=SPLIT,
        missing_values=MISSING,
    )
    with (folder.folder / "table.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*FEATURES, TARGET, SPLIT])
        for row, split in zip(rows, splits, strict=True):
            writer.writerow([*(row[name] for name in FEATURES), row[TARGET], split])


def _federation(sites: int) -> Federation:
    settings = {
        "data": {
            "task": "tabular",
            "spatial_dims": 0,
            "channels": list(FEATURES),
            "labels": list(LABELS),
            "missing": "median",
        },
        "model": {"name": "logistic"},
        "train": {
            "local_epochs": 2,
            "batch_size": 16,
            "optimizer": "adam",
            "lr": 0.003,
            "weight_decay": 0.001,
        },
        "rounds": {"rounds": 20},
    }
    return Federation("uci-heart", f"UCI heart disease, {sites} real hospitals", NOTE, settings)
