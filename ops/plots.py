"""The report's curves, as SVG text that takes its colours from the page.

Colours are drawn as the light theme's values and replaced by CSS variables, so one picture serves light, dark and
print. A site has the same colour and marker in every picture (Okabe-Ito, safe for colour-blind readers); phases and
kinds have a scale of their own, ordered by lightness. Same story, same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ops import words
from ops.story import DOWN, UP, Round, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# CSS variable -> (light, dark). The light values are what matplotlib draws and must differ from each other.
COLOURS = {
    "ink": ("#1b2733", "#e6edf3"),
    "soft": ("#5c6b7a", "#9fb0c0"),
    "grid": ("#dfe5eb", "#2c3946"),
    "s0": ("#0072b2", "#4aa8e0"),
    "s1": ("#d55e00", "#f08a3c"),
    "s2": ("#009e73", "#2fc79c"),
    "s3": ("#cc79a7", "#e29cc4"),
    "s4": ("#e69f00", "#f2b93b"),
    "s5": ("#56b4e9", "#8fd0f5"),
    "k0": ("#27496d", "#6f9fd1"),
    "k1": ("#6d8fb3", "#a9c5e2"),
    "k2": ("#a9bdd2", "#56708a"),
    "k3": ("#8c7aa9", "#b3a2d0"),
    "k4": ("#c9b8a0", "#8d7f6b"),
    "wait": ("#d9a441", "#d9a441"),
    "miss": ("#a3231a", "#ff7a66"),
    "paper": ("#fffffe", "#101820"),
}
SITE_COLOURS = [f"s{index}" for index in range(6)]
STACK_COLOURS = [f"k{index}" for index in range(5)]
MARKERS = "os^DvP"
SHAPES = ("", "ring", "square")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
PHASE_ORDER = (
    "train",
    "personal",
    "sketch",
    "sensitivity",
    "evaluate",
    "load",
    "save",
    "draw",
    "encode",
    "decode",
    "send",
)
LEAST_SHARE = 0.01
WIDTH, HEIGHT = 6.4, 2.9


@dataclass(frozen=True)
class Key:
    """One entry of a legend: words, CSS variable, and whether it is a line."""

    label: str
    colour: str
    line: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture with its words.

    Attributes:
        title: What it shows.
        caption: How to read it.
        svg: The picture; empty where there is nothing to show.
        legend: Its keys, except sites, which the page shows once.
        description: What a screen reader says instead of the picture.
        sites: Its lines are sites.
    """

    title: str
    caption: str
    svg: str
    description: str
    legend: list[Key] = field(default_factory=list)
    sites: bool = False


def light(name: str) -> str:
    """Return a colour's light value."""
    return COLOURS[name][0]


def site_colour(story: Story, alias: str) -> str:
    """Return the CSS variable of a site's colour, by its place among the sites."""
    return SITE_COLOURS[list(story.sites).index(alias) % len(SITE_COLOURS)]


def site_mark(story: Story, alias: str) -> tuple[str, str]:
    """Return (CSS variable, CSS class) of a site's mark: after the colours are used up, the shape tells sites apart."""
    return site_colour(story, alias), SHAPES[
        list(story.sites).index(alias) // len(SITE_COLOURS) % len(SHAPES)
    ]


def charts(story: Story) -> list[Chart]:
    """Return the report's charts; one without data has an empty picture."""
    return [scores(story), losses(story), seconds(story), traffic(story)]


def scores(story: Story) -> Chart:
    """The main figure by round, one panel per model, one line per site."""
    title = words.figure_title(story.primary or "main figure")
    models = [kind for kind in story.models_seen if any(story.series(alias, kind) for alias in story.sites)][
        :3
    ]
    chart_title = f"{title} on validation cases, by round"
    caption = "Measured by each site on its own validation cases. Round 0 is the initial model."
    if not models:
        return Chart(chart_title, caption, "", "No figures were told.")
    with drawing(len(models), share_y=True) as (figure, axes):
        lowest, highest = 1.0, 0.0
        for panel, model in zip(axes, models, strict=True):
            for alias in story.sites:
                series = story.series(alias, model)
                site_line(panel, story, alias, series)
                lowest, highest = min([lowest, *series.values()]), max([highest, *series.values()])
            dress(panel, words.MODELS.get(model, model).capitalize(), "round", integers=True)
        axes[0].set_ylabel(title)
        if words.bounded(story.primary):
            room = max(0.06 * (highest - lowest), 0.01)
            axes[0].set_ylim(max(0.0, lowest - room), min(1.0, highest + room))
        svg = svg_text(figure, "scores")
    return Chart(chart_title, caption, svg, f"{chart_title}, a line per site", sites=True)


def losses(story: Story) -> Chart:
    """Training loss by round: a line per site, and the mean that the coordinator computed."""
    title = "Training loss, by round"
    caption = "Mean loss of a site's local steps; the mean over sites is weighted by training cases."
    series = {
        alias: {
            item.number: place.loss
            for item in story.training
            if (place := item.sites.get(alias)) is not None and place.loss is not None
        }
        for alias in story.sites
    }
    mean = {item.number: item.loss for item in story.training if item.loss is not None}
    if not mean and not any(series.values()):
        return Chart(title, caption, "", "No training loss was told.")
    with drawing() as (figure, (panel,)):
        for alias, values in series.items():
            site_line(panel, story, alias, values)
        if len(story.sites) > 1 and mean:
            panel.plot(
                list(mean), list(mean.values()), color=light("ink"), linewidth=2.2, linestyle=(0, (4, 1.5)), zorder=4
            )  # fmt: skip
        dress(panel, "", "round", integers=True)
        panel.set_ylabel("loss")
        svg = svg_text(figure, "loss")
    legend = [Key("mean over sites", "ink", line=True)] if len(story.sites) > 1 and mean else []
    return Chart(title, caption, svg, f"{title}, a line per site and their mean", legend, sites=True)


def seconds(story: Story) -> Chart:
    """Wall seconds of each round: the slowest site's phases, and what the round took beyond."""
    title = "Seconds per round"
    caption = (
        "The phases of the slowest site, which the others wait for, and what the round took beyond its own work: "
        "transport, scheduling, waiting."
    )
    rounds = [item for item in story.cycles if item.slowest_site is not None]
    if not rounds:
        return Chart(title, caption, "", "No times were told.")
    phases = _phases(rounds)
    layers = {words.PHASES.get(name, name): values for name, values in phases.items()}
    over = [max(item.overhead or 0.0, 0.0) for item in rounds]
    with drawing() as (figure, (panel,)):
        keys = _stack(panel, [_name(item) for item in rounds], layers)
        if any(item.overhead is not None for item in rounds):
            bottom = [sum(values[index] for values in layers.values()) for index in range(len(rounds))]
            panel.bar(
                range(len(rounds)), over, _width(len(rounds)), bottom=bottom, color=light("wait"), linewidth=0
            )
            keys.append(Key("Framework and transport", "wait"))
        dress(panel, "", "round")
        panel.set_ylabel("seconds")
        svg = svg_text(figure, "seconds")
    return Chart(title, caption, svg, f"{title}, stacked by phase", keys)


def traffic(story: Story) -> Chart:
    """Bytes of all sites' messages per round by kind: up above the line, down below."""
    title = "Bytes per round"
    caption = "All sites together: sent by the sites above the line, sent to them below. TLS and Flower not included."
    rounds = [item for item in story.cycles if item.kinds(UP) or item.kinds(DOWN)]
    if not rounds:
        return Chart(title, caption, "", "No bytes were counted.")
    both = {direction: [item.kinds(direction) for item in rounds] for direction in (UP, DOWN)}
    total: dict[str, int] = {}
    for kinds in (*both[UP], *both[DOWN]):
        for kind, size in kinds.items():
            total[kind] = total.get(kind, 0) + size
    everything = sum(total.values()) or 1
    named = sorted(
        (kind for kind in total if total[kind] / everything >= LEAST_SHARE), key=lambda kind: -total[kind]
    )
    named = named[: len(STACK_COLOURS) - 1]
    factor, unit = _scale(max(sum(kinds.values()) for kinds in (*both[UP], *both[DOWN])))

    def layers(direction: str, sign: int) -> dict[str, list[float]]:
        found = {
            words.KINDS.get(kind, kind): [sign * kinds.get(kind, 0) / factor for kinds in both[direction]]
            for kind in named
        }
        rest = [
            sign * sum(size for kind, size in kinds.items() if kind not in named) / factor
            for kinds in both[direction]
        ]
        return found | ({"Everything else": rest} if len(named) < len(total) else {})

    with drawing() as (figure, (panel,)):
        names = [_name(item) for item in rounds]
        keys = _stack(panel, names, layers(UP, 1))
        _stack(panel, names, layers(DOWN, -1))
        panel.axhline(0, color=light("soft"), linewidth=0.8)
        dress(panel, "", "round")
        panel.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        panel.set_ylabel(f"{unit}   down · up")
        svg = svg_text(figure, "bytes")
    return Chart(title, caption, svg, f"{title}, stacked by kind", keys)


def _name(item: Round) -> str:
    return "end" if item.closing else str(item.number)


def _phases(rounds: Sequence[Round]) -> dict[str, list[float]]:
    """Return seconds by phase and round of each round's slowest site; tiny phases are put together."""
    each = [dict(site.phases) if (site := item.slowest_site) else {} for item in rounds]
    for phases, item in zip(each, rounds, strict=True):
        if not phases and item.slowest_site is not None:
            phases["work"] = item.slowest_site.local or 0.0
    names = {name for phases in each for name in phases}
    total = sum(sum(phases.values()) for phases in each) or 1.0
    large = {name for name in names if sum(phases.get(name, 0.0) for phases in each) >= LEAST_SHARE * total}
    ordered = [name for name in PHASE_ORDER if name in large] + sorted(large - set(PHASE_ORDER))
    ordered = ordered[: len(STACK_COLOURS) - 1]
    found = {name: [phases.get(name, 0.0) for phases in each] for name in ordered}
    if names - set(ordered):
        found["Other local work"] = [
            sum(value for name, value in phases.items() if name not in ordered) for phases in each
        ]
    return found


def _scale(largest: float) -> tuple[float, str]:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= factor:
            return factor, unit
    return 1.0, "bytes"


def _stack(panel: Axes, names: Sequence[str], layers: dict[str, list[float]]) -> list[Key]:
    """Draw stacked bars and return their keys."""
    bottom = [0.0] * len(names)
    keys = []
    for colour, (label, values) in zip(STACK_COLOURS, layers.items(), strict=False):
        panel.bar(
            range(len(names)), values, _width(len(names)), bottom=bottom, color=light(colour), linewidth=0
        )
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        keys.append(Key(label, colour))
    tick_places(panel, names)
    return keys


def tick_places(panel: Axes, names: Sequence[str]) -> None:
    """Name the places on the x axis, only some of them where they are many."""
    step = max(1, -(-len(names) // 16))
    last = len(names) - 1
    shown = [
        index
        for index in range(len(names))
        if index == last or (index % step == 0 and last - index > step // 2)
    ]
    panel.set_xticks(shown, [names[index] for index in shown])


def _width(bars: int) -> float:
    return 0.72 if bars <= 60 else 1.0  # many thin bars with gaps would only flicker


def site_line(panel: Axes, story: Story, alias: str, series: dict[int, float]) -> None:
    """Draw one site's line; a round without a value leaves a gap."""
    if not series:
        return
    place = list(story.sites).index(alias)
    rounds = range(min(series), max(series) + 1)
    panel.plot(
        list(rounds),
        [series.get(number, float("nan")) for number in rounds],
        color=light(site_colour(story, alias)),
        marker=MARKERS[place // len(SITE_COLOURS) % len(MARKERS)],
        linestyle=DASHES[place // len(SITE_COLOURS) % len(DASHES)],
        markersize=3.2 if len(rounds) <= 60 else 0,
        linewidth=1.7,
    )


def dress(panel: Axes, title: str, x_label: str, *, integers: bool = False) -> None:
    """Give a panel its title, its axis and its quiet grid."""
    from matplotlib.ticker import MaxNLocator

    if title:
        panel.set_title(title, fontsize=9, color=light("soft"), loc="left")
    panel.set_xlabel(x_label)
    if integers:
        panel.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    panel.grid(axis="y", color=light("grid"), linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(light("soft"))
    panel.tick_params(length=0)


@contextmanager
def drawing(
    panels: int = 1, *, share_y: bool = False, size: tuple[float, float] = (WIDTH, HEIGHT)
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """Make a figure without any global state of matplotlib and with settings that give the same bytes each time."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.hashsalt": "wardround",
        "svg.fonttype": "none",
        "text.parse_math": False,  # a site may be called anything
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": light("ink"),
        "axes.labelcolor": light("soft"),
        "axes.facecolor": "none",
        "xtick.color": light("soft"),
        "ytick.color": light("soft"),
        "axes.labelsize": 8.5,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axes = figure.subplots(1, panels, squeeze=False, sharey=share_y)
        yield figure, list(axes[0])


def svg_text(figure: Figure, name: str) -> str:
    """Return a figure as SVG for inlining: no prologue, ids of its own, colours from the page."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    by_value = {values[0]: variable for variable, values in COLOURS.items()}
    return re.sub(
        r"#[0-9a-f]{6}\b",
        lambda found: f"var(--{by_value[found[0]]})" if found[0] in by_value else found[0],
        text,
    )
