"""What the tables and plots of every study share: runs of one line, mean ± deviation, markdown, the command."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.fipa.plots import tidy
from experiments.lab import console, read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = dict[str, Any]
Results = dict[str, Result]

TITLES = {"dice": "Dice"}
MISSING = "-"


def chosen(results: Results, fits: Callable[[Result], bool], what: str) -> list[Result]:
    """Return the finished runs of one line, by seed.

    Args:
        results: All, by name.
        fits: Whether a run belongs to the line.
        what: The line, for the error.

    Returns:
        One run a seed; none where nothing is finished yet.

    Raises:
        ValueError: Runs that differ in more than the seed, or two of one seed: their mean would be of nothing.
    """
    runs = sorted((run for run in results.values() if fits(run)), key=lambda run: run["seed"])
    kinds = {(run["rounds"], run["data"], repr(run["params"]), tuple(sorted(run["test"]))) for run in runs}
    if len(kinds) > 1 or len({run["seed"] for run in runs}) < len(runs):
        raise ValueError(
            f"The results of '{what}' are of {len(kinds)} settings and {len(runs)} runs; expected one setting and one run a "
            "seed. Give results of one study alone."
        )
    return runs


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return "mean ± standard deviation (n - 1)", the value alone where there is one, a dash where there is none."""
    if not values:
        return MISSING
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def sent(run: Result) -> float:
    """Return the MB (10^6 bytes) that a site sent in a round, on average."""
    up = run["bytes"]["up"]
    return float(sum(up.values()) / len(up) / run["rounds"] / 1e6)


def at_site(run: Result, site: str) -> float:
    """Return the primary figure on a site's test cases."""
    return float(run["test"][site][run["primary"]])


def sites_of(runs: Iterable[Result]) -> list[str]:
    """Return the sites of some runs."""
    return sorted({site for run in runs for site in run["test"]})


def figure_name(runs: Iterable[Result]) -> str:
    """Return what the primary figure of some runs is called."""
    return ", ".join(sorted({TITLES.get(str(run["primary"]), str(run["primary"])) for run in runs}))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation (n - 1); 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def finish(axes: Axes, *, legend: bool = True, outside: bool = False) -> None:
    """Tidy a panel; one without any line says so, as an empty frame looks like a fault."""
    if not axes.get_legend_handles_labels()[0]:
        axes.text(0.5, 0.5, "not run yet", transform=axes.transAxes, ha="center", fontsize=8, color="#666666")
        axes.tick_params(labelsize=7)
        return
    tidy(axes)
    axes.set_axisbelow(True)
    shown = axes.get_legend()
    if shown is not None and not legend:
        shown.remove()
    elif outside:
        axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def tables_command(
    argv: list[str], doc: str, results: Path, write: Callable[[Results, Path], str], study: str
) -> None:
    """Write a study's tables and plots of what is finished.

    Args:
        argv: --results DIR and --out DIR.
        doc: Text of --help.
        results: Where the study writes by default.
        write: Writes tables and plots into a folder and returns the tables.
        study: The module that makes results, for the error.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results, help="folder of the study's results")
    parser.add_argument("--out", type=Path, help="folder of tables and plots; by default under the results")
    options = parser.parse_args(argv)
    found = read_results(options.results)
    if not found:
        parser.error(f"the folder holds no result; run {study} first, or give --results")
    console.out(write(found, options.out or options.results / "tables"), highlight=False)
