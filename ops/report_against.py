"""A run's figures by hospital beside those of other runs over the same data: a table and bars.

Runs that were measured on other hospitals, other cases or another figure are refused: their difference would say nothing
about the methods.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from ops import words
from ops.plots import Chart, Key, drawing, dress, light, svg_text
from ops.report_view import Table
from ops.story import LOWER_IS_BETTER, Figures, Story
from ops.story_fields import mapping
from ops.story_reader import read_story

MOST = 4  # other runs; more bars could not be told apart
COLOURS = ("k0", "s4", "s5", "s2", "s3")
WIDTH = 10.0  # inches; the page's whole width
MOST_NUMBERED = 60  # bars up to which each carries its number
_DATA = {
    "task": "task",
    "spatial_dims": "number of axes",
    "channels": "channels",
    "labels": "labels",
    "spacing": "spacing",
    "orientation": "orientation",
}


@dataclass(frozen=True)
class Beside:
    """What the page shows of runs side by side: where the figures are from, table, and bars."""

    place: str
    table: Table
    chart: Chart


def read_others(folders: Sequence[Path], story: Story) -> list[Story]:
    """Return the stories of other run folders.

    Args:
        folders: The folders.
        story: The run that they are held against.

    Raises:
        ConfigError: More than `MOST`, a folder without a run, or a run that cannot be compared; the sentence says why.
    """
    if len(folders) > MOST:
        raise ConfigError(f"--against takes at most {MOST} runs, got {len(folders)}. Leave some out.")
    others = [read_story(folder) for folder in folders]
    for number, other in enumerate(others, 1):
        why = _difference(story, other)
        if why:
            named = f"The {words.ordinal(number)} run of --against ({other.method or 'unknown method'})"
            raise ConfigError(
                f"{named} cannot stand beside this one: {why}. Give a run over the same hospitals and data.",
                detail=str(folders[number - 1]),
            )
    return others


def _difference(story: Story, other: Story) -> str:
    """Return why two runs cannot be compared, empty where they can."""
    for whose, item in (("this run", story), ("it", other)):
        if item.final_place() is None:
            return f"{whose} tells no figures"
    if set(story.sites) != set(other.sites):
        only = [sorted(set(one.sites) - set(two.sites)) for one, two in ((story, other), (other, story))]
        told = [
            f"{words.joined(names[:3])} only in {where}"
            for names, where in zip(only, ("this run", "it"), strict=True)
            if names
        ]
        return f"the hospitals differ ({'; '.join(told)})"
    if story.data != other.data:
        return f"its data is '{other.data}', this run's '{story.data}'"
    ours, theirs = (mapping(item.config.get("data")) for item in (story, other))
    for key, name in _DATA.items() if ours and theirs else ():
        if ours.get(key) != theirs.get(key):
            return f"the {name} of the data differ"
    if story.primary != other.primary:
        return f"its main figure is {other.primary}, this run's {story.primary}"
    splits = [place[0] for item in (story, other) if (place := item.final_place())]
    if len(set(splits)) > 1:
        return f"its figures are of {splits[1]} cases, this run's of {splits[0]} cases"
    for alias in story.sites:
        cases = [
            found.cases for item in (story, other) if (found := _own(item, alias)) and found.cases is not None
        ]
        if len(set(cases)) > 1:
            return f"{alias} was measured on {cases[1]} cases there and on {cases[0]} here"
    return ""


def _own(story: Story, alias: str) -> Figures | None:
    return story.final(alias, story.own_model)


def beside(story: Story, others: Sequence[Story]) -> Beside | None:
    """Return table and bars of a run and others; None where there are no others.

    Args:
        story: The page's run.
        others: Runs of `read_others`.
    """
    place = story.final_place()
    if not others or place is None:
        return None
    runs = [story, *others]
    names = labels(runs)
    models = ", ".join(
        f"{name} {words.MODELS.get(run.own_model, run.own_model)}"
        for name, run in zip(names, runs, strict=True)
    )
    where = f"{words.figure_title(story.primary)} on the same {place[0]} cases at the end of each run; each hospital's own model: {models}."
    return Beside(where, _table(runs, names), _bars(runs, names))


def labels(runs: Sequence[Story]) -> list[str]:
    """Return a name for each run: its method, where that is not enough its seed, and where that is not its folder."""
    forms = [
        [run.method or "unknown method" for run in runs],
        [f"{run.method}, seed {run.seed}" for run in runs],
        [f"{run.method}, {run.run}" for run in runs],
    ]
    chosen = []
    for place in range(len(runs)):
        unique = [form[place] for form in forms if form.count(form[place]) == 1]
        chosen.append(unique[0] if unique else f"{forms[0][place]} ({words.ordinal(place + 1)} run)")
    return chosen


def _table(runs: Sequence[Story], names: Sequence[str]) -> Table:
    """Return the main figure by hospital and run, the best in bold, with the difference to the page's run."""
    primary = runs[0].primary
    titles = [names[0], *(title for name in names[1:] for title in (name, "difference"))]
    table = Table([("Site", 1), *((title, 1) for title in titles)], [])
    values = [{alias: found.main for alias in runs[0].sites if (found := _own(run, alias))} for run in runs]
    best = min if words.base(primary) in LOWER_IS_BETTER else max
    for alias in runs[0].sites:
        row = [each.get(alias) for each in values]
        table.rows.append([(alias, "site"), *_cells(primary, row, best)])
    shared = [alias for alias in runs[0].sites if all(each.get(alias) is not None for each in values)]
    if len(shared) > 1:
        means: list[float | None] = [
            statistics.fmean(each[alias] or 0.0 for alias in shared) for each in values
        ]
        title = "mean" if len(shared) == len(runs[0].sites) else f"mean of the {len(shared)} with all figures"
        table.foot.append([(title, ""), *_cells(primary, means, best)])
    return table


def _cells(primary: str, row: Sequence[float | None], best: Any) -> list[tuple[str, str]]:
    """Return a row's cells: the figure of each run, and for the others how much more or less it is."""
    known = [value for value in row if value is not None]
    top = best(known) if len(known) > 1 else None
    first, cells = row[0], list[tuple[str, str]]()
    for place, value in enumerate(row):
        cells.append(
            (words.figure(primary, value), "num own" if value is not None and value == top else "num")
        )
        if place:
            change = None if value is None or first is None else value - first
            cells.append((words.figure(primary, change, signed=True), "num quiet"))
    return cells


def _bars(runs: Sequence[Story], names: Sequence[str]) -> Chart:
    """Return a bar for each hospital and run."""
    primary = runs[0].primary
    title = f"{words.figure_title(primary)} by hospital"
    aliases = list(runs[0].sites)
    height = 0.8 / len(runs)
    longest = 0.0
    with drawing(size=(WIDTH, 0.7 + len(aliases) * (0.14 + 0.19 * len(runs)))) as (figure, (panel,)):
        for place, run in enumerate(runs):
            for row, alias in enumerate(aliases):
                found = _own(run, alias)
                if found is None or found.main is None:
                    continue
                middle = row - 0.4 + height * (place + 0.5)
                panel.barh(middle, found.main, 0.86 * height, color=light(COLOURS[place]), linewidth=0)
                longest = max(longest, found.main)
                if len(runs) * len(aliases) <= MOST_NUMBERED:
                    told = words.figure(primary, found.main)
                    panel.annotate(
                        told,
                        (found.main, middle),
                        (4, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8,
                    )
        dress(panel, "", words.figure_title(primary))
        panel.grid(visible=False)
        panel.set_xlim(0, 1.08 if words.bounded(primary) else 1.12 * longest or 1.0)
        panel.set_ylim(len(aliases) - 0.45, -0.55)
        panel.set_yticks(
            range(len(aliases)),
            [alias if len(alias) <= 22 else alias[:21] + "\N{HORIZONTAL ELLIPSIS}" for alias in aliases],
        )
        svg = svg_text(figure, "beside")
    keys = [Key(name, COLOURS[place]) for place, name in enumerate(names)]
    caption = "The hospital's own model of each run, this page's run first."
    return Chart(title, caption, svg, f"{title}, a bar per run; the table says the same", keys)
