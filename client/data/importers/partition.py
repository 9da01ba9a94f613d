"""Making sites out of one data set: by a table's column, by the images' intensity, or at random.

random               cases (subjects, where known) are shuffled with the seed and dealt to N sites of equal size
intensity            cases are sorted by the logarithm of a robust image maximum and cut into N runs at the widest
                     gaps that leave every site a minimal size; site 1 is the darkest
column:NAME          one site per value of a column of a CSV file
missing-channel      (brats) one site per channel; each lacks one
label-ratio:A,B,...  (luna, cifar) one site per number: negatives per positive there
delta:D              (cifar) five sites: two with D negatives per positive, an even one, two with D positives per negative
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.data.importers.kinds import FORMS
from client.data.importers.tables import read_rows
from common.errors import ConfigError, DataError, nearest

DEFAULT_SITES = 3
MAX_SITES = 999
# Columns that may hold a case's key, in the order in which they are looked for; else the first column.
KEY_COLUMNS = ("id", "case", "subject_id", "seriesuid", "name")
GROUP_COLUMN = "group"


@dataclass(frozen=True)
class Partition:
    """How sites are made.

    Attributes:
        kind: A key of `FORMS`.
        column: Column name, for kind "column".
        ratios: Negatives per positive by site, for kinds "label-ratio" and "delta".
    """

    kind: str
    column: str = ""
    ratios: tuple[float, ...] = ()


def parse_partition(text: str, allowed: Sequence[str]) -> Partition:
    """Read the text of `--partition`.

    Args:
        text: One of the forms above.
        allowed: The kinds that an importer knows.

    Raises:
        ConfigError: An unknown form, one that this importer does not know, or a bad argument.
    """
    kind, _, argument = text.partition(":")
    kind = kind.strip().lower().replace("_", "-")
    forms = ", ".join(FORMS[name] for name in allowed)
    if kind not in allowed:
        hint = (
            nearest(kind, [FORMS[name] for name in allowed]) if kind not in FORMS else f"Known here: {forms}."
        )
        raise ConfigError(f"--partition '{text}' cannot be used here. {hint}")
    if kind == "column":
        if not argument.strip():
            raise ConfigError("--partition column needs the column's name: --partition column:NAME.")
        return Partition(kind, column=argument.strip())
    if kind == "label-ratio":
        return Partition(kind, ratios=_ratios(argument))
    if kind == "delta":
        return Partition(kind, ratios=_delta(argument))
    if argument:
        raise ConfigError(f"--partition {kind} takes no argument, got '{argument}'. Known here: {forms}.")
    return Partition(kind)


def site_count(partition: Partition, sites: int | None) -> int:
    """Return how many sites `random` and `intensity` make.

    Raises:
        ConfigError: A number out of range, or one given where the partition itself says how many.
    """
    if partition.kind in ("random", "intensity"):
        count = DEFAULT_SITES if sites is None else sites
        if not 1 <= count <= MAX_SITES:
            raise ConfigError(f"--sites must be 1 to {MAX_SITES}, got {count}.")
        return count
    if sites is not None:
        raise ConfigError(
            f"--sites does not go with --partition {partition.kind}, which says itself how many sites there are. "
            "Leave --sites out."
        )
    return 0


def numbered_aliases(count: int, word: str = "site") -> list[str]:
    """Return "site-1", "site-2", ..., padded so that they sort in order."""
    return [f"{word}-{index + 1:0{len(str(count))}d}" for index in range(count)]


def deal_random(groups: Sequence[str], sites: int, seed: int) -> list[int]:
    """Return each case's site: groups are shuffled and each goes to the site with the fewest cases.

    Args:
        groups: Group key of each case; a group is never divided.
        sites: Number of sites.
        seed: Same seed, same sites.
    """
    sizes = Counter(groups)
    names = sorted(sizes)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 104729]))
    filled = [0] * sites
    home: dict[str, int] = {}
    for place in rng.permutation(len(names)):
        name = names[int(place)]
        home[name] = filled.index(min(filled))
        filled[home[name]] += sizes[name]
    return [home[group] for group in groups]


def cut_regimes(values: Sequence[float], sites: int, smallest: int) -> tuple[list[int], list[float]]:
    """Cut values into runs at the widest gaps of their logarithms.

    Of all ways to cut the sorted values into `sites` runs of at least `smallest`, the one with the largest sum of
    gaps (in log10) is taken: the regimes that the data itself shows, found exactly and without a seed.

    Args:
        values: Positive.
        sites: Number of runs.
        smallest: Minimal size of a run.

    Returns:
        The run of each value (0 is the lowest), and the cut points (geometric middle of each gap).

    Raises:
        DataError: A value that is not positive, or too few values.
    """
    array = np.asarray(values, dtype=np.float64)
    if not bool((array > 0).all()):
        raise DataError(
            f"{int((array <= 0).sum())} images have no positive values, so they have no intensity regime "
            "(as CT in Hounsfield units). Use --partition random or column:NAME."
        )
    count = len(array)
    if count < sites * smallest:
        raise DataError(
            f"{count} subjects are too few for {sites} sites of at least {smallest}. Give fewer --sites."
        )
    order = np.argsort(array, kind="stable")
    logs = np.log10(array[order])
    ends = _best_cuts(np.diff(logs), sites, smallest)
    runs = np.empty(count, dtype=np.int64)
    runs[order] = np.searchsorted(np.array(ends), np.arange(count), side="right")
    return [int(run) for run in runs], [float(10 ** ((logs[end - 1] + logs[end]) / 2)) for end in ends]


def read_case_table(path: Path) -> dict[str, dict[str, str]]:
    """Read a CSV file with one row per case: key to row.

    The key column is one of `KEY_COLUMNS` (whatever the case of its letters), else the first column.

    Raises:
        DataError: Unreadable, empty, or a key that occurs twice.
    """
    rows = read_rows(path, (), "the table of cases")
    columns = list(rows[0])
    lower = {name.lower(): name for name in reversed(columns)}
    key = next((lower[name] for name in KEY_COLUMNS if name in lower), columns[0])
    table = {row[key]: row for row in rows}
    if len(table) != len(rows):
        raise DataError(
            f"The table of cases lists {len(rows) - len(table)} cases twice (column '{key}'). "
            "List every case once.",
            detail=str(path),
        )
    return table


def by_column(keys: Sequence[str], table: Mapping[str, Mapping[str, str]], column: str) -> list[str]:
    """Return each case's site alias from a column of a table.

    Raises:
        DataError: No such column, cases that the table does not have, or empty cells.
    """
    known = next(iter(table.values()))
    if column not in known:
        raise DataError(f"The table of cases has no column '{column}'. {nearest(column, known)}")
    absent = [key for key in keys if key not in table]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(keys)} cases are not in the table of cases. Expected one row per case, keyed by "
            "the name of its image file or folder.",
            detail="\n".join(absent[:20]),
        )
    values = [table[key][column] for key in keys]
    if not all(values):
        raise DataError(
            f"Column '{column}' of the table of cases is empty for {values.count('')} cases. Fill it in."
        )
    return _aliases(values)


def neutral_groups(groups: Sequence[str]) -> list[str]:
    """Return neutral keys of subjects: "subject-0001" in order of first appearance; "" stays "".

    A subject with one case gets "" too: it needs no key.
    """
    sizes = Counter(groups)
    names: dict[str, str] = {}
    for group in groups:
        if group and sizes[group] > 1:
            names.setdefault(group, f"subject-{len(names) + 1:04d}")
    return [names.get(group, "") for group in groups]


def own_groups(groups: Sequence[str]) -> list[str]:
    """Return the groups with every "" replaced by a key of its own."""
    return [group or f"\0{index}" for index, group in enumerate(groups)]


def alias_of(text: str) -> str:
    """Return a text as a site alias: lower-case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64]


def _aliases(values: Sequence[str]) -> list[str]:
    distinct = sorted(set(values))
    numeric = all(value.isdigit() for value in distinct)
    width = max(len(value) for value in distinct)
    names = {v: f"site-{int(v):0{width}d}" if numeric else alias_of(v) for v in distinct}
    if not all(names.values()) or len(set(names.values())) != len(distinct):
        raise DataError(
            "The column's values do not give distinct site names of letters and digits. Rename the sites in the table."
        )
    return [names[value] for value in values]


def _ratios(argument: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in argument.split(",") if part.strip())
    except ValueError:
        ratios = ()
    if not ratios or not all(0 < ratio < 1000 for ratio in ratios):
        raise ConfigError(
            "--partition label-ratio needs one positive number per site, negatives per positive: label-ratio:1,2,4."
        )
    return ratios


def _delta(argument: str) -> tuple[float, ...]:
    try:
        delta = float(argument)
    except ValueError:
        delta = 0.0
    if not 1 <= delta < 1000:
        raise ConfigError(
            "--partition delta needs a number from 1 (all sites even) to 999, as negatives per positive: delta:4."
        )
    return (delta, delta, 1.0, 1 / delta, 1 / delta)


def _best_cuts(gaps: np.ndarray, sites: int, smallest: int) -> list[int]:
    """Return the starts of runs 1..sites-1 that maximise the summed gaps, each run at least `smallest` long."""
    count = len(gaps) + 1
    # best[i]: largest sum with the current number of runs covering exactly the first i values
    best = np.full(count + 1, -np.inf)
    best[smallest:] = 0.0
    choices = []
    for _ in range(1, sites):
        cut = np.full(count + 1, -np.inf)
        cut[1:count] = best[1:count] + gaps  # the last run starts at this index
        chosen = np.zeros(count + 1, dtype=np.int64)
        extended = np.full(count + 1, -np.inf)
        top, place = -np.inf, 0
        for end in range(smallest, count + 1):
            start = end - smallest
            if cut[start] > top:
                top, place = cut[start], start
            extended[end], chosen[end] = top, place
        best = extended
        choices.append(chosen)
    ends = []
    end = count
    for chosen in reversed(choices):
        end = int(chosen[end])
        ends.append(end)
    return ends[::-1]
