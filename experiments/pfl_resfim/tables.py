"""Tables and plots of the study's results.

    .venv/bin/python -m experiments.pfl_resfim.tables [--results DIR] [--out DIR]

Reads what `study` has written so far; what is not there yet is a dash. Writes to `--out`:

    tables.md     for each task all methods on test cases, and the sweep on validation cases; also printed
    sweep.png     the sweep: one column of panels per parameter, one row per task
    sites.png     test cases: all of them and by site, per method
    curves.png    validation cases over the rounds, per method

"a ± b" is mean and standard deviation (n - 1) over seeds; "all test cases" weighs every case the same, "mean over sites"
every site. MB are 10^6 bytes of whole messages up, with handshake and closing round, divided by sites and rounds. CPU seconds
are those of a whole run: all sites, coordinator and evaluation on one core.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.fipa.plots import COLOURS, panels, save
from experiments.lab import overall, validation
from experiments.pfl_resfim.study import BASE, METHODS, RANDOM, RESULTS, SWEEP
from experiments.tables import (
    MISSING,
    Result,
    Results,
    at_site,
    chosen,
    deviation,
    figure_name,
    finish,
    markdown,
    sent,
    sites_of,
    spread,
    tables_command,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASKS = {"brain": "default brain trial (3D)", "vessels": "retinal vessels (2D)"}
REFERENCES = ("FedAvg", "local only")
DASHES = ("-", "--", "-.", ":")
# One colour and one line style a method in all plots, also where some are missing.
LOOKS = {
    label: (COLOURS[place], DASHES[place % len(DASHES)] if label != "pFL-ResFIM" else "-")
    for place, label in enumerate(METHODS)
}


def method_runs(results: Results, task: str, label: str) -> list[Result]:
    """Return the finished runs of a method of the comparison, by seed.

    Raises:
        ValueError: As `chosen`.
    """
    return chosen(
        results,
        lambda run: run["tags"].get("task") == task and run["tags"].get("method") == label,
        f"{label}, {task}",
    )


def sweep_runs(results: Results, task: str, name: str, value: str) -> list[Result]:
    """Return the finished runs of the sweep with one parameter's value, by seed.

    Raises:
        ValueError: As `chosen`.
    """
    tags = {"task": task, **BASE, name: value}
    return chosen(results, lambda run: run["tags"] == tags, f"{name}={value}, {task}")


def of_task(results: Results, task: str) -> list[Result]:
    """Return all runs of a task."""
    return [run for run in results.values() if run["tags"].get("task") == task]


def method_table(results: Results, task: str) -> str:
    """Return the comparison of the methods on one task's test cases, with a title."""
    by_label = {label: method_runs(results, task, label) for label in (*METHODS, RANDOM)}
    every = [run for runs in by_label.values() for run in runs]
    sites = sites_of(every)
    rows = []
    for label, runs in by_label.items():
        figures = [spread([overall(run) for run in runs])]
        figures += [spread([at_site(run, site) for run in runs]) for site in sites]
        rows.append(
            [label, str(len(runs)), *figures, spread([sent(run) for run in runs]),
             spread([run["seconds"] for run in runs], 0)]
        )  # fmt: skip
    head = ["method", "seeds", "all test cases", *sites, "MB up per site and round", "CPU seconds"]
    rounds = ", ".join(str(number) for number in sorted({run["rounds"] for run in every})) or MISSING
    title = f"Test cases, {TASKS[task]}: {figure_name(every) or MISSING}, rounds: {rounds}"
    return f"## {title}\n\n{markdown(head, rows)}"


def references(results: Results, task: str) -> dict[str, list[float]]:
    """Return validation figures of methods beside the sweep: after as many rounds, of the sweep's seeds."""
    swept = [run for run in of_task(results, task) if "method" not in run["tags"]]
    seeds, rounds = {run["seed"] for run in swept}, {run["rounds"] for run in swept}
    found: dict[str, list[float]] = {label: [] for label in REFERENCES}
    if len(rounds) != 1:
        return found
    last = rounds.pop()
    for label, values in found.items():
        runs = [run for run in method_runs(results, task, label) if run["seed"] in seeds]
        values += [validation(run, last) for run in runs if str(last) in run["validation"]]
    return found


def sweep_table(results: Results) -> str:
    """Return the sweep on validation cases, both tasks beside each other, with a title."""
    rows = []
    for name, values in SWEEP.items():
        for value in values:
            shown = f"{value} (base)" if value == BASE[name] else value
            row = [name, shown]
            for task in TASKS:
                runs = sweep_runs(results, task, name, value)
                row += [
                    str(len(runs)),
                    spread([validation(run) for run in runs]),
                    spread([sent(run) for run in runs]),
                ]
            rows.append(row)
    for label in REFERENCES:
        row = [label, ""]
        for task in TASKS:
            figures = references(results, task)[label]
            row += [str(len(figures)), spread(figures), ""]
        rows.append(row)
    head = ["parameter", "value"]
    for task in TASKS:
        head += [f"{task}, seeds", f"{task}, mean over sites", f"{task}, MB up per site and round"]
    swept = [run for run in results.values() if "method" not in run["tags"]]
    rounds = [sorted({run["rounds"] for run in swept if run["tags"]["task"] == task}) for task in TASKS]
    each = "; ".join(
        f"{task} after {', '.join(map(str, numbers)) or MISSING} rounds"
        for task, numbers in zip(TASKS, rounds, strict=True)
    )
    return f"## Validation cases, one parameter at a time: {figure_name(swept) or MISSING}, {each}\n\n{markdown(head, rows)}"


def sweep_plot(results: Results, path: Path) -> None:
    """Draw the sweep: validation figures of each value, with the references as lines."""
    figure, axes = panels(len(TASKS), len(SWEEP), width=2.5, height=2.5)
    for row, task in zip(axes, TASKS, strict=True):
        lines = references(results, task)
        for place, (one, (name, values)) in enumerate(zip(row, SWEEP.items(), strict=True)):
            sweep_panel(one, [sweep_runs(results, task, name, value) for value in values], name, task)
            for label, figures in lines.items():
                if figures:
                    colour, dash = LOOKS[label][0], "--" if label == REFERENCES[0] else ":"
                    one.axhline(statistics.fmean(figures), color=colour, lw=1.4, ls=dash, label=label)
            if place:
                one.sharey(row[0])
            else:
                one.set_ylabel(f"{figure_name(of_task(results, task))}, validation", fontsize=8)
            one.set_title(f"{task}: {name}", fontsize=9)
            finish(one, legend=not place)
        heights = [float(y) for one in row for line in one.lines for y in np.asarray(line.get_ydata(), float)]
        if heights:  # shared axes keep the first panel's limits
            margin = 0.06 * (max(heights) - min(heights)) or 0.01
            row[0].set_ylim(min(heights) - margin, max(heights) + margin)
    save(figure, path)


def sweep_panel(axes: Axes, groups: Sequence[Sequence[Result]], name: str, task: str) -> None:
    """Draw one parameter's values at equal distances; those that can be ordered are joined."""
    values = SWEEP[name]
    found = [(x, [validation(run) for run in runs]) for x, runs in enumerate(groups) if runs]
    ordered = all(value.replace(".", "", 1).isdigit() for value in values)
    axes.errorbar(
        [x for x, _ in found], [statistics.fmean(each) for _, each in found], [deviation(each) for _, each in found],
        color=LOOKS["pFL-ResFIM"][0], ls="-" if ordered else "none", lw=1.4, marker="o", ms=4, capsize=2,
        label="pFL-ResFIM",
    )  # fmt: skip
    axes.set_xticks(range(len(values)), values)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.get_xticklabels()[values.index(BASE[name])].set_fontweight("bold")


def sites_plot(results: Results, path: Path) -> None:
    """Draw the test figures of all cases and of each site as bars, per method."""
    figure, axes = panels(len(TASKS), 1, width=8.5, height=3.0)
    for (one,), task in zip(axes, TASKS, strict=True):
        by_label = {label: method_runs(results, task, label) for label in METHODS}
        every = [run for runs in by_label.values() for run in runs]
        sites, width = sites_of(every), 0.86 / len(METHODS)
        for place, (label, runs) in enumerate(by_label.items()):
            if not runs:
                continue
            groups = [[overall(run) for run in runs]] + [
                [at_site(run, site) for run in runs] for site in sites
            ]
            at = [x + (place - (len(METHODS) - 1) / 2) * width for x in range(len(groups))]
            one.bar(
                at, [statistics.fmean(each) for each in groups], width, yerr=[deviation(each) for each in groups],
                color=LOOKS[label][0], edgecolor="white", lw=0.4, capsize=1.5, error_kw={"lw": 0.8}, label=label,
            )  # fmt: skip
        one.set_xticks(range(len(sites) + 1), ["all test cases", *sites])
        one.set_ylabel(f"{figure_name(every)}, test", fontsize=8)
        one.set_title(TASKS[task], fontsize=9)
        finish(one, outside=True)
    save(figure, path)


def curves_plot(results: Results, path: Path) -> None:
    """Draw validation figures (mean over sites) from round 1 on: mean over seeds, and the deviation as a band."""
    figure, axes = panels(1, len(TASKS), width=5.2, height=3.6)
    for one, task in zip(axes[0], TASKS, strict=True):
        every = []
        for label in METHODS:
            runs = method_runs(results, task, label)
            every += runs
            rounds = (
                sorted(set.intersection(*(set(map(int, run["validation"])) for run in runs)) - {0})
                if runs
                else []
            )
            if not rounds:
                continue
            points = [[validation(run, number) for run in runs] for number in rounds]
            mean, sd = [statistics.fmean(each) for each in points], [deviation(each) for each in points]
            colour, dash = LOOKS[label]
            one.plot(
                rounds, mean, color=colour, ls=dash, lw=2.0 if label == "pFL-ResFIM" else 1.3, label=label
            )
            low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
            one.fill_between(rounds, low, high, color=colour, alpha=0.12, lw=0)
        one.set_title(TASKS[task], fontsize=9)
        one.set_xlabel("round", fontsize=8)
        one.set_ylabel(f"{figure_name(every)}, validation, mean over sites", fontsize=8)
        finish(one)
    save(figure, path)


def write_tables(results: Results, out: Path) -> str:
    """Write tables.md and the plots, and return the tables.

    Args:
        results: By name, as `lab.read_results` returns them.
        out: Folder; made where it is not there.

    Raises:
        ValueError: Results of several settings under one label.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*(method_table(results, task) for task in TASKS), sweep_table(results)])
    (out / "tables.md").write_text(text, encoding="utf-8")
    sweep_plot(results, out / "sweep.png")
    sites_plot(results, out / "sites.png")
    curves_plot(results, out / "curves.png")
    return text


def main(argv: list[str]) -> None:
    """Write tables and plots of what is finished."""
    tables_command(argv, __doc__, RESULTS, write_tables, "experiments.pfl_resfim.study")


if __name__ == "__main__":
    main(sys.argv[1:])
