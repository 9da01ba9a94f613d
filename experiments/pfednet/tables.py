"""Tables and plots of pFedNet's study.

    .venv/bin/python -m experiments.pfednet.tables [--results DIR] [--out DIR]

Reads what `study` has written so far; what is not there yet is a dash. Writes to `--out`:

    tables.md     methods on test cases by task; λ and networks on validation and test cases; codecs with their bytes; also printed
    splits.png    figures over the unevenness δ of the pictures' labels, a line a method
    lam.png       quality and distance of neighbours over λ (the paper's Fig. 7, 9 and 12)
    bytes.png     quality against bytes up for every codec

"a ± b" is mean and standard deviation (n - 1) over seeds. MB are 10^6 bytes of whole messages up, by site and round.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from matplotlib.ticker import NullFormatter

from experiments.fipa.plots import COLOURS, panels, save
from experiments.lab import overall, validation
from experiments.pfednet.study import CODECS, LAMS, METHODS, NETWORKS, RESULTS, ROUNDS, SPLITS
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

SERIES = {"raw": COLOURS[6], "bf16": COLOURS[3], "stc": COLOURS[0], "cer": COLOURS[1], "cer+stc": COLOURS[2]}


def tagged(results: Results, task: str, key: str, label: str) -> list[Result]:
    """Return the runs of one line of a table, by seed; `key` is the tag that names it."""
    return chosen(
        results,
        lambda run: run["tags"].get("task") == task and run["tags"].get(key) == label,
        f"{label}, {task}",
    )


def method_table(results: Results, task: str) -> str:
    """Return the methods on one task's test cases."""
    by_label = {label: tagged(results, task, "method", label) for label in METHODS}
    sites = sites_of(run for runs in by_label.values() for run in runs)
    rows = [
        [
            label,
            str(len(runs)),
            spread([overall(run) for run in runs]),
            *(spread([at_site(run, site) for run in runs]) for site in sites),
            spread([sent(run) for run in runs], 4),
            spread([run["seconds"] for run in runs], 0),
        ]
        for label, runs in by_label.items()
    ]
    every = [run for runs in by_label.values() for run in runs]
    head = ["method", "seeds", "all test cases", *sites, "MB up", "CPU seconds"]
    return f"### {task}: {figure_name(every) or MISSING}, {ROUNDS[task]} rounds\n\n{markdown(head, rows)}"


def at_sites(run: Result, figure: str) -> float:
    """Return the mean over the sites of a figure on test cases."""
    return statistics.fmean(row[figure] for row in run["test"].values())


FIGURES = {
    "balanced accuracy, all test cases": overall,
    "accuracy, mean over sites": lambda run: at_sites(run, "accuracy"),
    "AUC, mean over sites": lambda run: at_sites(run, "auc"),
}


def split_tables(results: Results) -> str:
    """Return the methods over δ, a table a figure."""
    parts = []
    for title, measure in FIGURES.items():
        rows = [
            [label, *(spread([measure(run) for run in tagged(results, task, "method", label)]) for task in SPLITS)]
            for label in METHODS
        ]  # fmt: skip
        head = ["method", *(f"δ = {task.removeprefix('split-')}" for task in SPLITS)]
        parts.append(f"### {title}\n\n{markdown(head, rows)}")
    return "\n".join(parts)


def split_plot(results: Results, path: Path) -> None:
    """Draw the same, a panel a figure."""
    figure, axes = panels(1, len(FIGURES), width=3.2, height=3.0)
    places = range(len(SPLITS))
    for one, (title, measure) in zip(axes[0], FIGURES.items(), strict=True):
        for label, colour in zip(METHODS, COLOURS, strict=False):
            groups = [[measure(run) for run in tagged(results, task, "method", label)] for task in SPLITS]
            there = [(place, group) for place, group in zip(places, groups, strict=True) if group]
            one.errorbar(
                [place for place, _ in there], [statistics.fmean(group) for _, group in there],
                [deviation(group) for _, group in there], color=colour, marker="o", ms=3.5, lw=1.3, capsize=2, label=label,
            )  # fmt: skip
        one.set_xticks(list(places), [task.removeprefix("split-") for task in SPLITS])
        one.set_title(title, fontsize=9)
        one.set_xlabel("δ: commoner class to rarer one", fontsize=8)
        finish(one, legend=one is axes[0][-1], outside=True)
    save(figure, path)


def lam_table(results: Results, task: str) -> str:
    """Return λ and the networks of one task on validation and test cases."""
    rows = []
    for label in (*(f"lam={lam}" for lam in LAMS), *NETWORKS):
        runs = tagged(results, task, "point", label)
        rows.append(
            [label, str(len(runs)), spread([validation(run) for run in runs]), spread([overall(run) for run in runs])]
        )  # fmt: skip
    head = ["point", "seeds", "validation, mean over sites", "all test cases"]
    return f"### {task}\n\n{markdown(head, rows)}"


def codec_table(results: Results, task: str) -> str:
    """Return the codecs of one task: quality and bytes, as a ratio to the raw bytes of the same task."""
    raw = [sent(run) for run in tagged(results, task, "codec", "raw")]
    rows = []
    for label in CODECS:
        runs = tagged(results, task, "codec", label)
        ratio = [statistics.fmean(raw) / sent(run) for run in runs] if raw else []
        rows.append(
            [label, str(len(runs)), spread([validation(run) for run in runs]), spread([overall(run) for run in runs]),
             spread([1000 * sent(run) for run in runs], 1), spread(ratio, 1)]
        )  # fmt: skip
    head = ["codec", "seeds", "validation, mean over sites", "all test cases", "kB up", "raw / it"]
    return f"### {task}\n\n{markdown(head, rows)}"


def lam_plot(results: Results, path: Path) -> None:
    """Draw validation and test quality over λ, a panel a task."""
    tasks = [
        task
        for task in ROUNDS
        if any("point" in r["tags"] and r["tags"]["task"] == task for r in results.values())
    ]
    figure, axes = panels(1, max(1, len(tasks)), width=3.0, height=2.8)
    for one, task in zip(axes[0], tasks, strict=False):
        runs = {lam: tagged(results, task, "point", f"lam={lam}") for lam in LAMS}
        there = {float(lam): found for lam, found in runs.items() if found}
        for measure, label, colour in ((validation, "validation", COLOURS[0]), (overall, "test", COLOURS[1])):
            groups = [[measure(run) for run in found] for found in there.values()]
            one.errorbar(
                list(there), [statistics.fmean(each) for each in groups], [deviation(each) for each in groups],
                color=colour, marker="o", ms=3.5, lw=1.3, capsize=2, label=label,
            )  # fmt: skip
        one.set_title(task, fontsize=9)
        one.set_xlabel("λ (share of consensus)", fontsize=8)
        one.set_ylabel(figure_name(run for found in there.values() for run in found), fontsize=8)
        finish(one)
    save(figure, path)


def bytes_plot(results: Results, path: Path) -> None:
    """Draw test quality against bytes up, a panel a task, a colour a family of codecs."""
    tasks = [
        task
        for task in ROUNDS
        if any("codec" in r["tags"] and r["tags"]["task"] == task for r in results.values())
    ]
    figure, axes = panels(1, max(1, len(tasks)), width=4.6, height=3.4)
    for one, task in zip(axes[0], tasks, strict=False):
        shown: set[str] = set()
        every: list[Result] = []
        for label in CODECS:
            runs = tagged(results, task, "codec", label)
            if not runs:
                continue
            every += runs
            family = label.split(" ")[0]
            kilobytes = statistics.fmean(1000 * sent(run) for run in runs)
            quality = [overall(run) for run in runs]
            one.errorbar(
                [kilobytes], [statistics.fmean(quality)], [deviation(quality)], color=SERIES[family], marker="o", ms=4,
                capsize=2, ls="none", label=None if family in shown else family,
            )  # fmt: skip
            one.annotate(
                label.partition(" ")[2], (kilobytes, statistics.fmean(quality)), fontsize=5.5, xytext=(3, 3),
                textcoords="offset points",
            )  # fmt: skip
            shown.add(family)
        one.set_xscale("log")
        one.xaxis.set_minor_formatter(NullFormatter())
        one.set_title(task, fontsize=9)
        one.set_xlabel("kB up, by site and round", fontsize=8)
        one.set_ylabel(f"{figure_name(every)}, test", fontsize=8)
        finish(one)
    save(figure, path)


def write_tables(results: Results, out: Path) -> str:
    """Write tables.md and the plots, and return the tables.

    Raises:
        ValueError: Results of several settings under one label.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = ["## Methods, test cases\n", *(method_table(results, task) for task in ROUNDS)]
    parts += ["## Uneven labels\n", split_tables(results)]
    pointed = {run["tags"]["task"] for run in results.values() if "point" in run["tags"]}
    parts += ["## λ and the network\n", *(lam_table(results, task) for task in ROUNDS if task in pointed)]
    coded = {run["tags"]["task"] for run in results.values() if "codec" in run["tags"]}
    parts += ["## Codecs\n", *(codec_table(results, task) for task in ROUNDS if task in coded)]
    text = "\n".join(parts)
    (out / "tables.md").write_text(text, encoding="utf-8")
    split_plot(results, out / "splits.png")
    lam_plot(results, out / "lam.png")
    bytes_plot(results, out / "bytes.png")
    return text


def main(argv: list[str]) -> None:
    """Write tables and plots of what is finished."""
    tables_command(argv, __doc__, RESULTS, write_tables, "experiments.pfednet.study")


if __name__ == "__main__":
    main(sys.argv[1:])
