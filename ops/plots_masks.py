"""Pictures of the sites' masks: which values stay at the hospitals, where in the network, and how far they agree.

Shares are drawn as strength of one colour, so that lightness alone tells them apart, and written into the cells while
these are few enough to be read.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from ops import words
from ops.plots import Chart, Key, drawing, dress, light, site_line, svg_text
from ops.story import Masks, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL = "k0"
MOST_ROWS = 40  # of the heat map; the largest tensors
MOST_NUMBERED = 12  # columns up to which cells carry numbers
WIDTH = 10.0  # inches; the page's whole width
_STRONG = 0.7  # of the colour: from here on words in a cell are light
_LONGEST_NAME = 34
_LONGEST_ALIAS = 16


def mask_charts(story: Story) -> list[Chart]:
    """Return the charts of the masks, the widest one last; none where no masks were told."""
    found = story.masks
    if not found:
        return []
    last = max(found)
    return [
        densities(story),
        overlaps(found[last], last),
        holders(found[last], last),
        layers(found[last], last),
    ]


def densities(story: Story) -> Chart:
    """The share of sensitive parameters by round, a line per site."""
    title = "Share of sensitive parameters, by round"
    caption = "Sensitive parameters stay at the hospital; the others are averaged."
    with drawing() as (figure, (panel,)):
        highest = 0.0
        for alias in story.sites:
            series = {
                number: masks.density[masks.sites.index(alias)]
                for number, masks in story.masks.items()
                if alias in masks.sites
            }
            site_line(panel, story, alias, series)
            highest = max([highest, *series.values()])
        dress(panel, "", "round", integers=True)
        panel.set_ylim(0.0, min(1.0, 1.15 * highest) or 1.0)
        panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        panel.set_ylabel("sensitive")
        svg = svg_text(figure, "densities")
    return Chart(title, caption, svg, f"{title}, a line per site", sites=True)


def overlaps(masks: Masks, number: int) -> Chart:
    """How far every two sites find the same parameters sensitive, beside chance."""
    title = f"Overlap of the sensitive parameters, round {number}"
    caption = (
        "Shared by two hospitals among those sensitive at either (Jaccard index); below, in brackets, what random masks "
        "would have: of the same densities, and of the same densities in every tensor."
    )
    count = len(masks.sites)
    with drawing(size=(6.4, 1.0 + (0.55 if count <= 6 else 0.36) * count)) as (figure, (panel,)):
        for row, column in ((row, column) for row in range(count) for column in range(count)):
            value = masks.overlap[row][column]
            if row == column or value is None:
                continue
            lines = [f"{value:.2f}"]
            expected = [matrix[row][column] for matrix in (masks.chance, masks.chance_by_tensor)]
            if count <= 6 and None not in expected:
                lines.append("(" + ", ".join(f"{share:.2f}" for share in expected) + ")")
            _cell(panel, row, column, value, "\n".join(lines) if count <= MOST_NUMBERED else "", size=9.5)
        _axes(panel, [_short(alias) for alias in masks.sites], masks.sites)
        svg = svg_text(figure, "overlap")
    return Chart(
        title,
        f"{caption} {_pairs(masks)}".strip(),
        svg,
        f"{title}: a row and a column per site. {_pairs(masks)}",
    )


def _pairs(masks: Masks) -> str:
    """Return the means over all pairs of sites in words; empty where there is no pair."""
    pairs = list(combinations(range(len(masks.sites)), 2))
    means = []
    for matrix in (masks.overlap, masks.chance, masks.chance_by_tensor):
        known = [value for row, column in pairs if (value := matrix[row][column]) is not None]
        if not known:
            return ""
        means.append(f"{statistics.fmean(known):.2f}")
    return f"Mean over {words.plural(len(pairs), 'pair')}: {means[0]} ({means[1]}, {means[2]})."


def holders(masks: Masks, number: int) -> Chart:
    """How many sites find a parameter sensitive, beside independent masks."""
    title = f"How many hospitals keep a parameter, round {number}"
    caption = "Share of the parameters that so many hospitals find sensitive; 0 is shared by all."
    total = sum(masks.holders) or 1
    shares = [100 * count / total for count in masks.holders]
    expected = [100 * share for share in independent(masks.density)]
    places = range(len(shares))
    with drawing() as (figure, (panel,)):
        panel.bar(places, shares, 0.72, color=light(CELL), linewidth=0)
        panel.plot(
            places, expected, color=light("wait"), marker="D", markersize=5, linestyle="none", zorder=4
        )
        if len(shares) <= MOST_NUMBERED:
            for place, (share, chance) in enumerate(zip(shares, expected, strict=True)):
                panel.annotate(
                    f"{share:.1f}", (place, max(share, chance)), (0, 6), textcoords="offset points", ha="center", fontsize=8
                )  # fmt: skip
        dress(panel, "", "hospitals", integers=True)
        panel.set_ylim(0, 1.15 * max([*shares, *expected, 1.0]))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        svg = svg_text(figure, "holders")
    keys = [Key("found", CELL), Key("if the hospitals' masks were independent", "wait")]
    return Chart(title, caption, svg, f"{title}: a bar per number of hospitals", keys)


def independent(density: Sequence[float]) -> list[float]:
    """Return the probability that 0, 1, ..., S of independent masks of these densities hold a parameter."""
    found = [1.0]
    for share in density:
        found = [
            stays * (1 - share) + grows * share
            for stays, grows in zip([*found, 0.0], [0.0, *found], strict=True)
        ]
    return found


def layers(masks: Masks, number: int) -> Chart:
    """The density by tensor and site."""
    title = f"Where the sensitive parameters are, round {number}"
    largest = sorted(range(len(masks.tensors)), key=lambda place: -masks.sizes[place])[:MOST_ROWS]
    rows = sorted(largest)
    darkest = max(max(values[place] for place in rows) for values in masks.by_tensor)
    left = len(masks.tensors) - len(rows) + masks.tensors_left_out
    caption = (
        "Sensitive share of each tensor in %, from the network's input down to its output; number of values beside its name."
        f" The strongest colour is {100 * darkest:.3g} %."
        + (f" {words.plural(left, 'smaller tensor')} left out." if left else "")
        + (
            f" {words.plural(masks.sites_left_out, 'more hospital')} left out."
            if masks.sites_left_out
            else ""
        )
    )
    names = [f"{_tail(masks.tensors[place])} · {words.count(masks.sizes[place])}" for place in rows]
    with drawing(size=(WIDTH, 0.9 + 0.23 * len(rows))) as (figure, (panel,)):
        for column, values in enumerate(masks.by_tensor):
            for row, place in enumerate(rows):
                share = values[place]
                text = _percent(share) if len(masks.sites) <= MOST_NUMBERED else ""
                _cell(panel, row, column, share / darkest if darkest else 0.0, text)
        _axes(panel, names, masks.sites)
        svg = svg_text(figure, "layers")
    return Chart(title, caption, svg, f"{title}: a row per tensor, a column per site")


def _cell(panel: Axes, row: int, column: int, strength: float, text: str, size: float = 8.0) -> None:
    """Draw one cell, its colour as strong as told (0 to 1), with words that stay readable on it."""
    from matplotlib.patches import Rectangle

    shown = 0.05 + 0.95 * strength
    panel.add_patch(
        Rectangle(
            (column - 0.48, row - 0.46), 0.96, 0.92, facecolor=light(CELL), alpha=round(shown, 3), linewidth=0
        )
    )
    if text:
        colour = light("paper" if shown > _STRONG else "ink")
        panel.text(column, row, text, ha="center", va="center", fontsize=size, color=colour, linespacing=1.25)


def _axes(panel: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Name rows and columns, the columns above, and take everything else away."""
    panel.set_xlim(-0.5, len(columns) - 0.5)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.xaxis.tick_top()
    turned = 90 if len(columns) > MOST_NUMBERED else 30 if len(columns) > 8 else 0
    panel.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=turned)
    panel.set_yticks(range(len(rows)), rows)
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _percent(share: float) -> str:
    value = 100 * share
    return (
        "0" if value == 0 else "<0.1" if value < 0.05 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
    )


def _short(alias: str) -> str:
    return alias if len(alias) <= _LONGEST_ALIAS else alias[: _LONGEST_ALIAS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _tail(name: str) -> str:
    """Return a tensor's name; of a long one its end, which tells more than its beginning."""
    return name if len(name) <= _LONGEST_NAME else "\N{HORIZONTAL ELLIPSIS}" + name[1 - _LONGEST_NAME :]
