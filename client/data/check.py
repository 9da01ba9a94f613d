"""The check of a site's data before a run: every case is read once, and no finding stops the others.

What it returns for others (`summary`, `to_json`) holds aliases, counts and ranges; paths stay in
`Problem.detail`, for the hospital's own terminal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from client.data.datalist import Datalist, TableSpec, read_datalist, table_spec
from client.data.facts import CaseFacts, TableFacts, examine_case, examine_table, rounded
from client.data.inspection import Problem
from client.data.tabular import read_table
from common.config import DataConfig
from common.dataset_json import SPLITS, read_dataset_json
from common.errors import DataError, MismatchError
from common.site_summary import PERCENTILES, SiteSummary, mismatches

CHECK_SCHEMA = 1
MISMATCH = "mismatch"
# A spacing beyond this ratio to the site's median is worth a look: another protocol, or a header in the wrong
# unit.
_OUTLIER = 2.0

Progress = Callable[[int, int], None]


@dataclass
class SiteCheck:
    """A site's check.

    Attributes:
        site: Alias.
        datalist: The cases, or None where `dataset.json` or what it lists cannot be used at all.
        problems: Findings in the order of the cases, the site's own last.
        facts: Figures of the readable cases.
        table: Figures of the table, for task tabular.
    """

    site: str
    datalist: Datalist | None = None
    problems: list[Problem] = field(default_factory=list)
    facts: list[CaseFacts] = field(default_factory=list)
    table: TableFacts | None = None

    @property
    def errors(self) -> int:
        """Return how many findings are errors."""
        return sum(problem.level == "error" for problem in self.problems)

    @property
    def ok(self) -> bool:
        """Tell whether the site can run."""
        return self.errors == 0

    def raise_errors(self) -> None:
        """Raise for the errors found, if any.

        Raises:
            DataError: What is wrong with the data: the first error, and how many there are of which kind.
            MismatchError: The data is sound but does not fit the run.
        """
        wrong = [problem for problem in self.problems if problem.level == "error"]
        data = [problem for problem in wrong if problem.code != MISMATCH]
        if data:
            kinds = ", ".join(f"{code} {count}" for code, count in Counter(p.code for p in data).items())
            more = (
                f" {len(data)} errors in all ({kinds}); `wardround site check` lists them."
                if len(data) > 1
                else ""
            )
            place = f"{self.site}, {data[0].case}" if data[0].case else self.site
            detail = "\n".join(f"{p.case or p.field}: {p.sentence} {p.detail}".rstrip() for p in data[:50])
            raise DataError(f"{place}: {data[0].sentence}.{more}", detail=detail, site=self.site)
        if wrong:
            said = "; ".join(problem.sentence for problem in wrong)
            raise MismatchError(f"{self.site}: its data does not fit the run: {said}.", site=self.site)

    def summary(self) -> SiteSummary:
        """Return what the site may tell about its data.

        Raises:
            DataError: The data folder could not be used at all, so there is nothing to sum up.
        """
        if self.datalist is None:
            raise DataError(f"{self.site}: {self.problems[0].sentence}.", site=self.site)
        found: dict[str, Any] = self.datalist.outline().model_dump()
        found["problems"] = dict(sorted(Counter(problem.code for problem in self.problems).items()))
        found["errors"] = self.errors
        found.update(_class_figures(self.datalist.labels, self.class_counts()))
        if self.table is not None:
            found["missing_share"] = {
                name: rounded(share) for name, share in self.table.missing_share.items()
            }
            found["intensity"] = {
                name: {
                    key: (rounded(value), rounded(value))
                    for key, value in zip(PERCENTILES, values, strict=True)
                }
                for name, values in self.table.percentiles.items()
                if values
            }
        elif self.facts:
            found.update(_geometry_figures(self.facts))
            found["intensity"] = _intensity_ranges(self.datalist.channels, self.facts)
        return SiteSummary.model_validate(found)

    def class_counts(self, split: str | None = None) -> tuple[int, ...]:
        """Return voxels (or cases, or rows) of each class, in one split or all."""
        if self.datalist is None:
            return ()
        if self.table is not None and split is None:
            return self.table.classes
        classes = len(self.datalist.labels)
        if self.datalist.task == "segmentation":
            counted = [fact.classes for fact in self.facts if fact.classes and split in (None, fact.split)]
            return tuple(sum(counts[index] for counts in counted) for index in range(classes))
        wanted = SPLITS if split is None else (split,)
        seen = Counter(case.label for name in wanted for case in self.datalist.cases[name])
        return tuple(seen[index] for index in range(classes))

    def to_mapping(self) -> dict[str, Any]:
        """Return everything but what may name a patient: no path, no group, no content hash."""
        return {
            "v": CHECK_SCHEMA,
            "site": self.site,
            "ok": self.ok,
            "summary": self.summary().model_dump(mode="json") if self.datalist else None,
            "problems": [
                {"level": p.level, "code": p.code, "case": p.case, "field": p.field, "sentence": p.sentence}
                for p in self.problems
            ],
            "cases": [fact.to_mapping() for fact in self.facts],
        }

    def to_json(self) -> str:
        """Return `to_mapping` as JSON."""
        return json.dumps(self.to_mapping(), indent=2, ensure_ascii=False) + "\n"


def check_site(
    folder: Path, site: str, config: DataConfig | None = None, *, progress: Progress | None = None
) -> SiteCheck:
    """Check a site's data folder.

    Args:
        folder: The folder that holds `dataset.json`.
        site: The site's alias.
        config: A run's data settings to hold the site against; None checks the site against its own
            description.
        progress: Called with (cases done, cases in all) after each case.

    Returns:
        The check; it never raises for what is wrong with the data.
    """
    result = SiteCheck(site)
    try:
        spec, labels = _table_of(folder, site)
        if spec is not None:
            table = read_table(spec, site)
            result.table, found = examine_table(table, spec, labels)
            result.problems += found
            if table.bad:
                return result  # the cells are listed; the split below would stop at the first
        result.datalist = read_datalist(folder, site)
    except DataError as error:
        if result.ok:  # else the reason is listed already, cell by cell
            sentence = error.message.removeprefix(f"{site}: ").removeprefix(f"{site}, ").removesuffix(".")
            result.problems.append(
                Problem("error", "description", "", "dataset.json", sentence, error.detail)
            )
        return result
    datalist = result.datalist
    listed = [(split, case) for split in SPLITS for case in datalist.cases[split] if case.image]
    cases = sorted(listed, key=lambda pair: pair[1].index)
    for done, (split, case) in enumerate(cases, 1):
        facts, problems = examine_case(case, split, datalist, config)
        result.problems += problems
        if facts is not None:
            result.facts.append(facts)
        if progress is not None:
            progress(done, len(cases))
    result.problems += _duplicates(result.facts)
    result.problems += _site_problems(result, datalist, config)
    if config is not None:
        for item in mismatches(result.summary(), config):
            result.problems.append(Problem("error", MISMATCH, "", item.field, item.sentence))
    return result


def _table_of(folder: Path, site: str) -> tuple[TableSpec | None, int]:
    dataset = read_dataset_json(folder, site)
    spec = table_spec(folder, site, dataset) if dataset.table is not None else None
    return spec, len(dataset.label_names)


def _duplicates(facts: list[CaseFacts]) -> Iterator[Problem]:
    first: dict[bytes, CaseFacts] = {}
    for fact in facts:
        other = first.setdefault(fact.digest, fact)
        if other is fact:
            continue
        if other.split == fact.split:
            sentence = f"its image is the same as that of {other.alias}; unlist one of them"
            yield Problem("warning", "duplicate", fact.alias, "image", sentence)
        else:
            sentence = (
                f"its image is the same as that of {other.alias}, and one is in {other.split}, the other in "
                f"{fact.split}: the result would be too good; unlist one of them"
            )
            yield Problem("error", "leak", fact.alias, "image", sentence)


def _site_problems(check: SiteCheck, datalist: Datalist, config: DataConfig | None) -> Iterator[Problem]:
    for split in SPLITS[1:]:
        if not datalist.cases[split]:
            sentence = f"no labelled {split} case; the site's figures will lack them"
            yield Problem("warning", f"no-{split}", "", split, sentence)
    totals = check.class_counts()
    for name, count in zip(datalist.labels, totals, strict=True):
        if not count and any(totals):
            sentence = f"class '{name}' occurs in no case of this site"
            yield Problem("warning", "empty-class", "", name, sentence)
    empty = sum(1 for fact in check.facts if fact.classes and not any(fact.classes[1:]))
    if empty and datalist.task == "segmentation":
        sentence = f"{empty} of {len(check.facts)} cases have a mask without any labelled voxel"
        yield Problem("warning", "empty-mask", "", "label", sentence)
    codes = Counter(fact.orientation for fact in check.facts)
    if len(codes) > 1 and (config is None or config.orientation is None):
        shown = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
        sentence = (
            f"the volumes are stored in several orientations ({shown}); set data.orientation, such as RAS"
        )
        yield Problem("warning", "orientation", "", "image", sentence)
    if check.facts:
        yield from _spacing_outliers(check.facts)


def _spacing_outliers(facts: list[CaseFacts]) -> Iterator[Problem]:
    usual = np.median([fact.spacing for fact in facts], axis=0)
    for fact in facts:
        ratios = np.asarray(fact.spacing) / usual
        if ratios.max() > _OUTLIER or ratios.min() < 1 / _OUTLIER:
            got = " x ".join(f"{value:g}" for value in fact.spacing)
            sentence = (
                f"the spacing is {got} mm, the site's median {' x '.join(f'{value:g}' for value in usual)}"
            )
            yield Problem(
                "warning", "spacing-outlier", fact.alias, "image", sentence + "; look at the header"
            )


def _class_figures(labels: tuple[str, ...], counts: tuple[int, ...]) -> dict[str, Any]:
    total = sum(counts)
    if not total:
        return {}
    named = list(zip(labels, counts, strict=True))
    return {
        "class_share": {name: rounded(count / total) for name, count in named},
        "empty_classes": tuple(name for name, count in named if not count),
    }


def _geometry_figures(facts: list[CaseFacts]) -> dict[str, Any]:
    spacing = np.array([fact.spacing for fact in facts])
    size = np.array([fact.size for fact in facts])
    codes = Counter(fact.orientation for fact in facts if fact.orientation)
    return {
        "spacing_min": tuple(rounded(value) for value in spacing.min(axis=0)),
        "spacing_max": tuple(rounded(value) for value in spacing.max(axis=0)),
        "size_min": tuple(int(value) for value in size.min(axis=0)),
        "size_max": tuple(int(value) for value in size.max(axis=0)),
        "orientations": dict(sorted(codes.items())),
    }


def _intensity_ranges(channels: tuple[str, ...], facts: list[CaseFacts]) -> dict[str, Any]:
    ranges: dict[str, Any] = {}
    for index, name in enumerate(channels):
        rows = [fact.percentiles[index] for fact in facts if index < len(fact.percentiles)]
        measured = np.array([row for row in rows if row])
        if measured.size:
            low, high = measured.min(axis=0), measured.max(axis=0)
            ranges[name] = {
                key: (rounded(low[place]), rounded(high[place])) for place, key in enumerate(PERCENTILES)
            }
    return ranges
