"""What a site tells about its data in its first answer, and how that is held against a run's configuration.

A summary holds counts, ranges over the whole site and declared names: no case, no file name, no header value.
Both ends
use `mismatches`: the site before it loads anything, the coordinator before round 1. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field

from common.config import DataConfig, Strict, TaskName
from common.errors import MismatchError

PERCENTILES = ("p01", "p50", "p99")


class SiteSummary(Strict):
    """A site's data in figures. Fields that need the voxels are empty until a check has read them.

    Attributes:
        site: Alias.
        task: What the labels are for.
        spatial_dims: 3 volumes, 2 pictures, 0 tables.
        channels: Channel names in order, or the table's features.
        labels: Class names; index = label value.
        cases: Labelled cases by split.
        unlabelled: Cases listed without a label, which are not used.
        spacing_min, spacing_max: Voxel spacing in mm by axis over the readable cases.
        size_min, size_max: Voxels by axis over the readable cases.
        orientations: Cases by axis codes (volumes).
        intensity: By channel and percentile ("p01", "p50", "p99"), the least and greatest value over the
            cases.
        class_share: Share of voxels (or of cases, or rows) by class; sums to 1 where anything was counted.
        empty_classes: Classes that no case of the site holds.
        missing_share: Share of empty cells by feature (tables).
        problems: Problems found, by code.
        errors: How many of them are errors.
    """

    site: str
    task: TaskName
    spatial_dims: Literal[0, 2, 3]
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    cases: dict[str, int]
    unlabelled: int = Field(default=0, ge=0)
    spacing_min: tuple[float, ...] = ()
    spacing_max: tuple[float, ...] = ()
    size_min: tuple[int, ...] = ()
    size_max: tuple[int, ...] = ()
    orientations: dict[str, int] = Field(default_factory=dict)
    intensity: dict[str, dict[str, tuple[float, float]]] = Field(default_factory=dict)
    class_share: dict[str, float] = Field(default_factory=dict)
    empty_classes: tuple[str, ...] = ()
    missing_share: dict[str, float] = Field(default_factory=dict)
    problems: dict[str, int] = Field(default_factory=dict)
    errors: int = Field(default=0, ge=0)

    def counts_only(self) -> Self:
        """Return what a site says that tells no more than it must: names, counts and problems."""
        kept = {
            "site",
            "task",
            "spatial_dims",
            "channels",
            "labels",
            "cases",
            "unlabelled",
            "problems",
            "errors",
        }
        return type(self)(**{name: getattr(self, name) for name in kept})


@dataclass(frozen=True)
class Mismatch:
    """One thing in which a site does not fit a run.

    Attributes:
        field: Name of the setting.
        expected: What the run wants, in words.
        got: What the site has, in words.
    """

    field: str
    expected: str
    got: str

    @property
    def sentence(self) -> str:
        """Return it as a clause for people."""
        return f"{self.field}: expected {self.expected}, got {self.got}"


def mismatches(summary: SiteSummary, config: DataConfig) -> list[Mismatch]:
    """Return everything in which a site does not fit a run's data configuration; empty if it fits.

    Spacing is compared only where the run names a target and a tolerance, and the site's range is known.
    """
    found = []
    if summary.task != config.task:
        found.append(Mismatch("task", config.task, summary.task))
    if summary.spatial_dims != config.spatial_dims:
        found.append(Mismatch("spatial_dims", str(config.spatial_dims), str(summary.spatial_dims)))
    if summary.channels != config.channels:
        found.append(Mismatch("channels", _names(config.channels), _names(summary.channels)))
    if summary.labels != config.labels:
        found.append(Mismatch("labels", _names(config.labels), _names(summary.labels)))
    if not summary.cases.get("training"):
        found.append(Mismatch("training cases", "at least 1", "0"))
    return found + _spacing(summary, config)


def require_fit(summary: SiteSummary, config: DataConfig) -> None:
    """Refuse a site that does not fit.

    Raises:
        MismatchError: Naming every difference.
    """
    found = mismatches(summary, config)
    if found:
        raise MismatchError(
            f"{summary.site} does not fit the run: {'; '.join(item.sentence for item in found)}. "
            "Correct the site's dataset.json or the run's data settings.",
            site=summary.site,
        )


def spacing_is_off(spacing: tuple[float, ...], config: DataConfig) -> bool:
    """Tell whether a spacing lies outside the run's tolerance around its target (never without both)."""
    if config.spacing is None or config.spacing_tolerance <= 0:
        return False
    limit = 1.0 + config.spacing_tolerance
    pairs = zip(spacing, config.spacing, strict=True)
    return any(not 1.0 / limit - 1e-6 <= got / want <= limit + 1e-6 for got, want in pairs)


def _spacing(summary: SiteSummary, config: DataConfig) -> list[Mismatch]:
    if config.spacing is None or len(summary.spacing_min) != len(config.spacing):
        return []
    if not (spacing_is_off(summary.spacing_min, config) or spacing_is_off(summary.spacing_max, config)):
        return []
    expected = f"{_numbers(config.spacing)} mm within a ratio of {1 + config.spacing_tolerance:g}"
    return [
        Mismatch(
            "spacing", expected, f"{_numbers(summary.spacing_min)} to {_numbers(summary.spacing_max)} mm"
        )
    ]


def _names(names: tuple[str, ...]) -> str:
    return "(" + ", ".join(names) + ")"


def _numbers(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:g}" for value in values)
