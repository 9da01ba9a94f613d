"""LUNA16: is a candidate a lung nodule? Patches around candidates, for classification.

Each candidate's surroundings are sampled at 1 mm from its CT, cut to the lung window, and written as one small volume
(or slice). All positives are taken; negatives, which are some 500 times as many, are drawn with the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.data.importers.ct import Scan, read_scan
from client.data.importers.kinds import KINDS, ImportOptions
from client.data.importers.layout import (
    About,
    Progress,
    SiteFolder,
    new_root,
    site_seed,
    split_cases,
    write_nifti,
)
from client.data.importers.partition import (
    Partition,
    deal_random,
    numbered_aliases,
    parse_partition,
    site_count,
)
from client.data.importers.tables import read_rows
from common.dataset_json import SPLITS
from common.errors import ConfigError, DataError
from common.federation import Federation, write_federation

LABELS = ("no nodule", "nodule")
WINDOW = (-1000.0, 400.0)  # Hounsfield units: air to bone
PATCH_MM = 32
NEGATIVES_PER_POSITIVE = 2.0
TABLES = ("candidates_V2.csv", "candidates.csv")
_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "class")


@dataclass(frozen=True)
class Candidate:
    """One candidate: its series (not written), place in mm (LPS, as the CSV has it), and class."""

    series: str
    place: tuple[float, float, float]
    positive: bool


@dataclass(frozen=True)
class Listed:
    """A chosen candidate with its split and the neutral key of its series."""

    candidate: Candidate
    split: str
    group: str


def run(source: Path, out: Path, options: ImportOptions, progress: Progress) -> None:
    """Import LUNA16 candidates.

    Args:
        source: Folder with the candidates' CSV and the subset folders; only series that are there are used.
        out: Data root to write.
        options: sites, partition, seed, table (another candidates' CSV), negatives_per_positive, dims, patch_mm, force.
        progress: Called per series.

    Raises:
        ConfigError: Options that do not fit together or are out of range.
        DataError: No table, no series, too few positives, or a damaged CT.
    """
    partition = parse_partition(options.partition or "random", KINDS["luna"].partitions)
    count = site_count(partition, options.sites) or len(partition.ratios)
    dims, edge = _shape(options)
    ratios = _ratios(partition, options, count)
    volumes = find_series(source)
    candidates = [item for item in read_candidates(source, options.table) if item.series in volumes]
    if not candidates:
        raise DataError(
            "No candidate of the table belongs to a CT in SOURCE. Give the folder that holds the subset folders."
        )
    series = sorted({item.series for item in candidates})
    homes = dict(zip(series, deal_random(series, count, options.seed), strict=True))
    with new_root(out, "luna", force=options.force) as root:
        names = numbered_aliases(count)
        plans = {
            name: _choose([c for c in candidates if homes[c.series] == index], ratio, name, options.seed)
            for index, (name, ratio) in enumerate(zip(names, ratios, strict=True))
        }
        total = sum(len({item.candidate.series for item in plan}) for plan in plans.values())
        done = 0
        for name, plan in plans.items():
            site = SiteFolder(root, name, _about(plan, dims, edge))
            for _ in _write_site(site, plan, volumes, dims, edge):
                done += 1
                progress("CT series", done, total)
        write_federation(root, _federation(partition, count, dims, edge))


def find_series(source: Path) -> dict[str, Path]:
    """Return the .mhd files under a folder by series UID, which is their name.

    Raises:
        DataError: There is none.
    """
    found = {path.stem: path for path in sorted(source.rglob("*.mhd")) if not path.name.startswith("._")}
    if not found:
        raise DataError(
            "SOURCE holds no CT of LUNA16: no .mhd file. Unpack the subset archives and give their folder.",
            detail=str(source),
        )
    return found


def read_candidates(source: Path, table: Path | None) -> list[Candidate]:
    """Read the candidates' CSV: the given one, or the newest known one in the source.

    Raises:
        DataError: None there, missing columns, or a row that is no candidate.
    """
    path = table or next((p for name in TABLES for p in sorted(source.rglob(name))), None)
    if path is None:
        raise DataError(
            f"SOURCE holds none of {', '.join(TABLES)}. Put it there, or give it with --table.",
            detail=str(source),
        )
    result = []
    for number, row in enumerate(read_rows(path, _COLUMNS, "the table of candidates"), 1):
        try:
            x, y, z = (float(row[name]) for name in _COLUMNS[1:4])
        except ValueError as error:
            raise DataError(
                f"Row {number} of the table of candidates has no coordinates in coordX, coordY and coordZ.",
                detail=str(path),
            ) from error
        if row["class"] not in ("0", "1"):
            raise DataError(
                f"Row {number} of the table of candidates has a class other than 0 and 1.", detail=str(path)
            )
        result.append(Candidate(row["seriesuid"], (x, y, z), row["class"] == "1"))
    return result


def patch_of(scan: Scan, place: Sequence[float], dims: int, edge: int) -> np.ndarray:
    """Return a candidate's surroundings at 1 mm, int16 Hounsfield units within `WINDOW`, RAS.

    Args:
        scan: The CT.
        place: Centre in mm, LPS.
        dims: 3 for a cube, 2 for its middle axial slice.
        edge: Voxels (and mm) by axis.

    Returns:
        (edge, edge, edge) or (edge, edge); what lies outside the CT is air.
    """
    steps = np.arange(edge) - (edge - 1) / 2
    axes = [steps, steps, steps if dims == 3 else np.zeros(1)]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"))
    # the patch's axes follow RAS, the CT's millimetres are LPS
    points = np.array(place)[:, None, None, None] + offsets * np.array([-1, -1, 1])[:, None, None, None]
    values = np.clip(scan.sample(points, outside=WINDOW[0]), *WINDOW)
    return np.round(values).astype(np.int16)[..., 0] if dims == 2 else np.round(values).astype(np.int16)


def _shape(options: ImportOptions) -> tuple[int, int]:
    dims = 3 if options.dims is None else options.dims
    edge = PATCH_MM if options.patch_mm is None else options.patch_mm
    if dims not in (2, 3):
        raise ConfigError(f"--dims must be 2 or 3, got {dims}.")
    if not 8 <= edge <= 128:
        raise ConfigError(f"--patch-mm must be 8 to 128, got {edge}.")
    return dims, edge


def _ratios(partition: Partition, options: ImportOptions, count: int) -> tuple[float, ...]:
    if partition.kind == "label-ratio":
        if options.negatives_per_positive is not None:
            raise ConfigError(
                "--negatives-per-positive does not go with --partition label-ratio, which sets it per site. Leave it out."
            )
        return partition.ratios
    ratio = (
        NEGATIVES_PER_POSITIVE if options.negatives_per_positive is None else options.negatives_per_positive
    )
    if not 0 < ratio < 1000:
        raise ConfigError(f"--negatives-per-positive must be above 0 and below 1000, got {ratio:g}.")
    return (ratio,) * count


def _choose(candidates: Sequence[Candidate], ratio: float, alias: str, seed: int) -> list[Listed]:
    """Choose a site's candidates and split them by series.

    The ratio holds: where the site has too few negatives, positives are left out, too.
    """
    rng = np.random.default_rng(np.random.SeedSequence([site_seed(seed, alias), 1]))
    positives = [item for item in candidates if item.positive]
    negatives = [item for item in candidates if not item.positive]
    wanted = round(len(positives) * ratio)
    if wanted > len(negatives):
        wanted = len(negatives)
        positives = _draw(positives, round(wanted / ratio), rng)
    chosen = positives + _draw(negatives, wanted, rng)
    if not positives or not wanted:
        raise DataError(
            f"{alias}: {len(positives)} positive and {wanted} negative candidates; both classes are needed. Give more CTs, "
            "or fewer sites.",
            site=alias,
        )
    chosen.sort(key=lambda item: (item.series, item.place))
    series = [item.series for item in chosen]
    # a series counts as positive if any of its candidates is, so that every split gets nodules
    rich = {item.series for item in chosen if item.positive}
    splits = split_cases(series, [int(name in rich) for name in series], seed=seed, alias=alias)
    order = sorted(range(len(chosen)), key=lambda n: SPLITS.index(splits[n]))
    keys: dict[str, str] = {}
    for number in order:
        keys.setdefault(series[number], f"series-{len(keys) + 1:04d}")
    return [Listed(chosen[n], splits[n], keys[series[n]]) for n in order]


def _draw(items: list[Candidate], count: int, rng: np.random.Generator) -> list[Candidate]:
    places = np.sort(rng.permutation(len(items))[:count])
    return [items[int(place)] for place in places]


def _about(plan: Sequence[Listed], dims: int, edge: int) -> About:
    positives = sum(item.candidate.positive for item in plan)
    return About(
        name="luna16",
        description=f"Candidates in chest CT, {edge} mm around each at 1 mm, Hounsfield units {WINDOW[0]:g} to {WINDOW[1]:g}.",
        channels=("CT",),
        labels=LABELS,
        size=f"{dims}D",
        task="classification",
        reference="Setio et al. 2017 (LUNA16); Armato et al. 2011 (LIDC-IDRI)",
        licence="CC BY 4.0 (LUNA16), CC BY 3.0 (LIDC-IDRI)",
        note=f"simulated site: {positives} nodules, {len(plan) - positives} others",
    )


def _write_site(
    site: SiteFolder, plan: Sequence[Listed], volumes: Mapping[str, Path], dims: int, edge: int
) -> Iterator[None]:
    """Write a site; yields after each series. Candidates of a series follow each other, so a CT is read once."""
    affine = np.eye(4)
    affine[:dims, 3] = -(edge - 1) / 2
    scan, current = None, ""
    for item in plan:
        candidate = item.candidate
        if scan is None or candidate.series != current:
            if scan is not None:
                yield
            scan, current = (
                read_scan(volumes[candidate.series], f"{site.alias}, {item.group}"),
                candidate.series,
            )
        (path,), _ = site.add(item.split, [".nii.gz"], int(candidate.positive), item.group)
        write_nifti(path, patch_of(scan, candidate.place, dims, edge), affine)
    yield
    site.finish()


def _federation(partition: Partition, count: int, dims: int, edge: int) -> Federation:
    data: dict[str, Any] = {
        "task": "classification",
        "spatial_dims": dims,
        "channels": ["CT"],
        "labels": list(LABELS),
        "patch": [edge] * dims,
        "normalise": "case",
    }
    settings = {
        "data": data,
        "model": {"width": 16, "levels": 3},
        "train": {"local_epochs": 1, "batch_size": 16, "optimizer": "adam", "lr": 0.001},
        "rounds": {"rounds": 30},
    }
    skew = (
        f" Negatives per positive are {', '.join(f'{ratio:g}' for ratio in partition.ratios)} by site."
        if partition.ratios
        else ""
    )
    note = (
        "Sites are a random division of LUNA16 by CT series: simulated, not hospitals. One person may have two series."
        + skew
    )
    return Federation("luna16", f"Lung nodules (LUNA16), {count} sites", note, settings)
