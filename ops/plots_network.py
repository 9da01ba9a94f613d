"""Pictures of the network between hospitals: who is joined with whom, and how far the joined ones are apart.

A hospital keeps its colour and marker of the other pictures. What a line or a mark means is told by its shape as well as by
its colour.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ops import words
from ops.plots import MARKERS, SITE_COLOURS, Chart, Key, drawing, dress, light, site_colour, svg_text
from ops.story import Network, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SITES, MOST_LINES = 32, 200  # drawn; more could not be told apart
MOST_LEVEL = 12  # sites up to which names stand level; those of more are turned outwards
SIZE = (6.4, 4.6)  # inches
_LONGEST_ALIAS = 18
_EDGE, _BEFORE, _AFTER, _FAILED = "k1", "wait", "k0", "miss"


def network_charts(story: Story) -> list[Chart]:
    """Return the charts of the network; none where no network was told."""
    if not story.networks:
        return []
    return [circle(story), fusion(story)]


def circle(story: Story) -> Chart:
    """The hospitals on a circle, with a line between those that were joined in the last round that told its edges."""
    told = {number: item for number, item in story.networks.items() if item.edges is not None}
    if not told:
        number, last = max(story.networks.items())
        many = (
            f"{words.count(last.count)} pairs were joined in round {number}, too many to be told one by one."
        )
        return Chart("Which hospitals are joined", "", "", many)
    number = max(told)
    title = f"Which hospitals are joined, round {number}"
    edges = told[number].edges or []
    present = story.rounds[number].contributed
    everyone = list(dict.fromkeys([*story.sites, *(alias for edge in edges for alias in edge)]))
    shown = everyone[:MOST_SITES]
    drawn = [edge for edge in edges if set(edge) <= set(shown)][:MOST_LINES]
    with drawing(size=SIZE) as (figure, (panel,)):
        _circle(panel, story, shown, drawn, present)
        svg = svg_text(figure, "network")
    took = len({*present, *(alias for edge in edges for alias in edge)} if present else everyone)
    pairs = words.plural(took * (took - 1) // 2, "pair")
    caption = (
        f"A line joins two hospitals whose own parts of the model are drawn together: {len(edges)} of {pairs}"
    )
    left = [
        words.plural(count, name)
        for count, name in ((len(everyone) - len(shown), "hospital"), (len(edges) - len(drawn), "line"))
        if count
    ]
    caption += f"; {' and '.join(left)} left out." if left else "."
    absent = present and any(alias not in present for alias in shown)
    keys = [Key("pale: took no part in this round", "grid")] if absent else []
    return Chart(title, caption, svg, f"{title}: {_listed(drawn)}", keys, sites=True)


def fusion(story: Story) -> Chart:
    """How far joined hospitals are apart before and after the fusion step, and the λ that was used, by round."""
    title = "How far joined hospitals are apart, by round"
    caption = (
        "Mean distance of two joined hospitals' own parts, as they were sent and as they were sent back."
    )
    networks = story.networks
    failed = [number for number, item in networks.items() if not item.converged]
    if not any(value is not None for item in networks.values() for value in (item.before, item.after)):
        return Chart(
            title, caption, "", "No distance was told: nobody was joined.", _failures(networks, failed)
        )
    with drawing(size=SIZE) as (figure, _):
        figure.clear()  # two panels, one above the other, in place of one
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        before = _line(top, {n: item.before for n, item in networks.items()}, _BEFORE, "--")
        after = _line(top, {n: item.after for n, item in networks.items()}, _AFTER, "-")
        dress(top, "", "", integers=True)
        top.set_ylabel("distance")
        top.set_ylim(0, 1.2 * max(before, after) or 1.0)
        for number in failed:
            top.axvline(number, color=light(_FAILED), linewidth=0.8, linestyle=":", zorder=1)
        top.plot(
            failed, [0.95] * len(failed), color=light(_FAILED), marker="X", markersize=7, linestyle="none",
            transform=top.get_xaxis_transform(), zorder=5,
        )  # fmt: skip
        highest = _line(bottom, {n: item.lam for n, item in networks.items()}, "ink", "-")
        dress(bottom, "", "round", integers=True)
        bottom.set_ylabel("λ used")
        bottom.set_ylim(0, 1.2 * highest or 1.0)
        svg = svg_text(figure, "fusion")
    keys = [Key("as sent", _BEFORE, line=True), Key("after the fusion step", _AFTER)]
    keys += _failures(networks, failed)
    return Chart(title, caption, svg, f"{title}, before and after the fusion step; below, the λ used", keys)


def _failures(networks: dict[int, Network], failed: list[int]) -> list[Key]:
    """Return the key of the rounds whose solver stopped before its tolerance; none where there are none."""
    if not failed:
        return []
    most = max(networks[number].iterations for number in failed)
    where = f"round{'s' if len(failed) > 1 else ''} {words.ranges(failed)}"
    return [Key(f"✕ the solver did not converge: {where} (up to {words.plural(most, 'iteration')})", _FAILED)]


def _circle(
    panel: Axes, story: Story, shown: list[str], edges: list[tuple[str, str]], present: list[str]
) -> None:
    """Draw sites on a circle from the top clockwise, with their names outside, and the lines between them."""
    turns = {alias: math.pi * (0.5 - 2 * place / len(shown)) for place, alias in enumerate(shown)}
    spots = {alias: (math.cos(turn), math.sin(turn)) for alias, turn in turns.items()}
    width = 1.8 if len(edges) <= 30 else 1.0
    for first, second in edges:
        (x0, y0), (x1, y1) = spots[first], spots[second]
        panel.plot([x0, x1], [y0, y1], color=light(_EDGE), linewidth=width, alpha=0.8, zorder=1)
    known = list(story.sites)
    for alias, (x, y) in spots.items():
        # An edge's end that is no site of the run is drawn all the same, without a colour of its own.
        tier = known.index(alias) // len(SITE_COLOURS) if alias in story.sites else 0
        colour = light(site_colour(story, alias) if alias in story.sites else "soft")
        away = bool(present) and alias not in present
        panel.plot(
            x, y, marker=MARKERS[tier % len(MARKERS)], markersize=11 if len(shown) <= MOST_LEVEL else 8,
            color=light("grid") if away else colour, markeredgecolor=colour, zorder=3,
        )  # fmt: skip
        _name(panel, alias, turns[alias], level=len(shown) <= MOST_LEVEL, away=away)
    panel.set_xlim(-1.15, 1.15)
    panel.set_ylim(-1.15, 1.15)
    panel.set_aspect("equal")
    panel.set_axis_off()


def _name(panel: Axes, alias: str, turn: float, *, level: bool, away: bool) -> None:
    """Write a site's name outside the circle."""
    x, y = 1.12 * math.cos(turn), 1.12 * math.sin(turn)
    right = math.cos(turn) > -1e-9
    middle = level and abs(math.cos(turn)) < 0.1
    angle = 0.0 if level else math.degrees(turn) + (0 if right else 180)
    panel.text(
        x, y, _short(alias), color=light("soft" if away else "ink"), fontsize=9 if level else 7.5, rotation=angle,
        rotation_mode="anchor", ha="center" if middle else "left" if right else "right",
        va="center" if not middle else "bottom" if y > 0 else "top",
    )  # fmt: skip


def _line(panel: Axes, found: dict[int, float | None], colour: str, dash: str) -> float:
    """Draw one line and return its highest value, 0 without any; a round without a value leaves a gap."""
    values = {number: value for number, value in found.items() if value is not None}
    if not values:
        return 0.0
    rounds = range(min(values), max(values) + 1)
    panel.plot(
        list(rounds), [values.get(number, math.nan) for number in rounds], color=light(colour), linestyle=dash,
        linewidth=1.8, marker="o" if dash == "-" else "D", markersize=3.4 if len(rounds) <= 60 else 0,
    )  # fmt: skip
    return max(values.values())


def _listed(edges: list[tuple[str, str]]) -> str:
    """Return the lines in words, for those who cannot see them."""
    return "; ".join(f"{first} and {second}" for first, second in edges) or "no two"


def _short(alias: str) -> str:
    return alias if len(alias) <= _LONGEST_ALIAS else alias[: _LONGEST_ALIAS - 1] + "\N{HORIZONTAL ELLIPSIS}"
