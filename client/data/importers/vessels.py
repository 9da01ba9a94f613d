"""Retinal vessels: fundus photographs with manual vessel masks of four real sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.data.importers.archive import Source, open_source
from client.data.importers.kinds import ImportOptions
from client.data.importers.layout import (
    About,
    Progress,
    SiteFolder,
    new_root,
    no_progress,
    place,
    split_cases,
)
from client.data.importers.partition import alias_of, neutral_groups
from client.data.importers.tables import read_rows
from common.dataset_json import SPLITS
from common.errors import DataError
from common.federation import Federation, write_federation

LABELS = ("background", "vessel")
CHANNELS = ("red", "green", "blue")
IMAGE, MASK = "_image.png", "_vessel1.png"
NOTE = (
    "Four real sites with their own cameras and patients. Two observers of one site agree with each other at a Dice of 0.74 "
    "(STARE) and 0.78 (CHASE_DB1): that is the human ceiling. CHASE_DB1 is CC BY 4.0, STARE publicly available; no terms "
    "are known for AV-WIDE and VEVIO, so do not pass them on."
)
_NOTES = {
    "stare": ("real site; many of the eyes with disease", "publicly available"),
    "chase-db1": ("real site; children, both eyes of a child are on one side of the split", "CC BY 4.0"),
    "av-wide": ("real site; wide-field photographs", "no terms known: do not redistribute"),
    "vevio": ("real site; frames of video indirect ophthalmoscopy", "no terms known: do not redistribute"),
}


@dataclass(frozen=True)
class Eye:
    """One photograph: its name in the site's folder, and whose eye it is."""

    name: str
    group: str


def run(source: Path, out: Path, options: ImportOptions, progress: Progress) -> None:
    """Import the vessel sites: one per value of column `site` of cases.csv.

    Args:
        source: Folder with cases.csv and, per site, SITE.tar or a folder SITE.
        out: Data root to write.
        options: seed, force.
        progress: Called per photograph.

    Raises:
        DataError: No cases.csv, a site without its archive, or a photograph without its mask.
    """
    sites = _listed(source)
    total = sum(len(eyes) for eyes in sites.values())
    with new_root(out, "vessels", force=options.force) as root:
        done = 0
        for name, eyes in sorted(sites.items()):
            done = _write_site(root, source, name, eyes, options.seed, progress, done, total)
        write_federation(root, _federation(len(sites)))


def _listed(source: Path) -> dict[str, list[Eye]]:
    table = source / "cases.csv"
    if not table.is_file():
        raise DataError(
            "SOURCE has no cases.csv; expected a folder with cases.csv (columns site, id, group) and one SITE.tar or "
            "folder per site.",
            detail=str(source),
        )
    sites: dict[str, list[Eye]] = {}
    for row in read_rows(table, ("site", "id", "group")):
        sites.setdefault(row["site"], []).append(Eye(row["id"], row["group"] or row["id"]))
    aliases = [alias_of(name) for name in sites]
    if len(set(aliases)) != len(aliases) or "" in aliases:
        raise DataError("Column 'site' of cases.csv does not give distinct site names of letters and digits.")
    return sites


def _write_site(
    root: Path,
    source: Path,
    name: str,
    eyes: Sequence[Eye],
    seed: int,
    progress: Progress,
    done: int,
    total: int,
) -> int:
    alias = alias_of(name)
    note, licence = _NOTES.get(alias, ("real site", ""))
    about = About(
        name="retinal-vessels",
        description="Fundus photographs with a manual mask of the vessels (first observer).",
        channels=CHANNELS,
        labels=LABELS,
        size="2D",
        task="segmentation",
        licence=licence,
        note=note,
    )
    site = SiteFolder(root, alias, about)
    groups = [eye.group for eye in eyes]
    splits = split_cases(groups, [0] * len(eyes), seed=seed, alias=alias)
    rows = sorted(
        zip(eyes, splits, neutral_groups(groups), strict=True), key=lambda row: SPLITS.index(row[1])
    )
    with open_source(_archive(source, name, alias), root, no_progress) as opened:
        for eye, split, group in rows:
            (image,), mask = site.add(split, [".png"], ".png", group)
            place(_file(opened, name, eye.name + IMAGE, alias), image, move=opened.scratch)
            if mask is not None:
                place(_file(opened, name, eye.name + MASK, alias), mask, move=opened.scratch)
            done += 1
            progress("photographs", done, total)
    site.finish()
    return done


def _archive(source: Path, name: str, alias: str) -> Path:
    for path in (source / name, source / f"{name}.tar"):
        if path.exists() and path.resolve().is_relative_to(source.resolve()):
            return path
    raise DataError(
        f"{alias}: cases.csv lists it, but SOURCE has neither its .tar nor its folder. Add it, or take its rows out.",
        detail=str(source / name),
        site=alias,
    )


def _file(opened: Source, site: str, name: str, alias: str) -> Path:
    for folder in (opened.folder, opened.folder / site):
        path = folder / name
        if path.is_file() and path.resolve().is_relative_to(opened.folder.resolve()):
            return path
    raise DataError(
        f"{alias}: a photograph or mask that cases.csv lists is not there. Expected ID_image.png and ID_vessel1.png.",
        detail=f"{opened.folder}: {name}",
        site=alias,
    )


def _federation(sites: int) -> Federation:
    settings = {
        "data": {
            "task": "segmentation",
            "spatial_dims": 2,
            "channels": list(CHANNELS),
            "labels": list(LABELS),
            "patch": [96, 96],
            "patches_per_case": 8,
            "foreground_ratio": 0.7,
            "normalise": "range",
        },
        "model": {"width": 16, "levels": 3},
        "train": {"local_epochs": 2, "batch_size": 8, "optimizer": "adam", "lr": 0.001},
        "rounds": {"rounds": 20},
    }
    return Federation("retinal-vessels", f"Retinal vessels, {sites} real sites", NOTE, settings)
