"""The closing tables on the terminal: every round, the final figures, who was missing, and the verdict last."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ops import report_faults as faults
from ops import report_view as view
from ops import words
from ops.report import REPORT_FILE
from ops.story import DOWN, UP, Story
from ops.story_reader import RunReader

MOST_ROWS = 40
WIDEST = 240
LEFT_OUT = frozenset({"loss"})  # of the final figures; the report has it


def print_closing(out: Path, console: Console) -> None:
    """Print what a run brought, as far as its events tell.

    Args:
        out: The run folder.
        console: Where to print.
    """
    reader = RunReader(out)
    reader.poll()
    story = reader.story
    figures = figure_tables(story)
    if any(_natural_width(table, console) > console.width for table in figures):
        figures = figure_tables(story, apart=True)
    for table in (rounds_table(story), *figures, absence_table(story)):
        if table is not None:
            _print(table, console)
    for sentence in faults.missed(story):
        console.print(Text(sentence, style="yellow"), soft_wrap=True)
    for item in story.warnings[-5:]:
        console.print(
            Text(f"warning {item.site} ({item.code}): {item.message}".replace("  ", " "), style="yellow")
        )
    console.print(verdict_text(story, out), soft_wrap=True)


def _table(title: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.title_style = "bold"
    return table


def _natural_width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(width=WIDEST), table).maximum


def _print(table: Table, console: Console) -> None:
    """Print a table; in a log, which has no width of its own, as wide as it wants to be."""
    width = None if console.is_terminal else min(max(_natural_width(table, console), console.width), WIDEST)
    console.print(table, width=width, crop=False)


def rounds_table(story: Story) -> Table | None:
    """Return a row per round and site: figures of the round's result, seconds, bytes, cases; None before round 1."""
    cycles = [item for item in story.cycles if item.asked]
    if not cycles:
        return None
    models = story.models_seen
    fitting = max(2, MOST_ROWS // max(len(story.sites), 1))
    left_out = max(0, len(cycles) - fitting)
    title = words.figure_title(story.primary) if story.primary else ""
    caption = (
        f"rounds 1 to {cycles[left_out - 1].number} are left out here; the report has them all"
        if left_out
        else None
    )
    table = _table("Rounds", caption)
    table.add_column("Round", no_wrap=True)
    table.add_column("Site", no_wrap=True)
    for name in (*(f"{title}\n{model}" for model in models), "Local", "Up", "Down", "Cases"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in cycles[left_out:]:
        for index, alias in enumerate(story.sites):
            place = item.sites.get(alias)
            figures = [story.series(alias, model).get(item.number) for model in models]
            cells = [words.NONE if item.closing else words.figure(story.primary, value) for value in figures]
            local = words.duration(place.local if place else None)
            moved = [words.size(place.moved(direction) if place else None) for direction in (UP, DOWN)]
            name = ("end" if item.closing else str(item.number)) if index == 0 else ""
            name += ", run again" if name and item.again else ""
            table.add_row(Text(name), Text(alias), *cells, local, *moved, _part(story, item.number, alias))
    return table


def _part(story: Story, number: int, alias: str) -> Text:
    item = story.rounds[number]
    missing = item.missing.get(alias)
    place = item.sites.get(alias)
    again = f", again {place.retries}" if place and place.retries else ""
    if missing is not None:
        return Text(missing.code + again, style="red")
    cases = item.cases.get(alias, place.cases if place else None)
    told = words.NONE if item.closing or cases is None else str(cases)
    return Text(told + again, style="yellow" if again else "")


def figure_tables(story: Story, *, apart: bool = False) -> list[Table]:
    """Return the final figures by site, model and class: in one table, or one per figure (narrow terminals)."""
    place = story.final_place()
    if place is None:
        return []
    split, number = place
    after = f"after round {number}" if number else "of the initial model"
    found = []
    for content in view.result_tables(story, apart=apart, without=LEFT_OUT):
        what = content.head[-1][0] if len(content.head) == 4 else "figures"
        table = _table(f"Final {what} on {split} cases, {after}")
        groups = [title for title, span in content.head for _ in range(span)]
        for group, name in zip(groups, content.second, strict=True):
            title = group if name in ("", "all") else f"{group}\n{name}"
            left = group in ("Site", "Model")
            table.add_column(title, justify="left" if left else "right", min_width=5)
        for row in content.rows:
            style = "bold" if any(kind.endswith("own") for _, kind in row) else ""
            table.add_row(*(Text(cell) for cell, _ in row), style=style)
        found.append(table)
    return found


def absence_table(story: Story) -> Table | None:
    """Return who was missing when and why; None if nobody was."""
    content = faults.absences(story)
    if not content.rows:
        return None
    table = _table("Missing sites")
    for title, _ in content.head:
        table.add_column(title, no_wrap=title in {"Round", "Site", "Code"})
    for row in content.rows[:MOST_ROWS]:
        table.add_row(*(Text(cell) for cell, _ in row))
    if len(content.rows) > MOST_ROWS:
        table.caption = f"{len(content.rows) - MOST_ROWS} more in the report"
    return table


def verdict_text(story: Story, out: Path) -> Text:
    """Return the verdict, what to do next, and where the report lies."""
    verdict = story.verdict
    report = out / REPORT_FILE
    where = f"Report: {report}" if report.is_file() else ""
    if verdict is None:
        text = Text("No verdict yet", style="bold yellow")
        text.append(": the run is still going, or was cut off.", style="default")
        text.append(_continue(story, out, "If it was cut off, continue"), style="default")
    elif verdict.failure is not None:
        text = Text(f"Failed ({verdict.failure.code}): ", style="bold red")
        text.append(verdict.failure.message, style="default")
        text.append(f"\nWhat to do: {words.advice(verdict.failure.code)}", style="default")
        text.append(_continue(story, out, "Then continue"), style="default")
        if (out / "logs").is_dir():
            text.append(f"\nLogs: {out / 'logs'}", style="dim")
    else:
        done, sites = len(story.completed), len(story.sites)
        text = Text("Completed", style="bold green")
        took = f" in {words.duration(story.seconds)}" if story.seconds is not None else ""
        took += f" over {len(story.attempts)} attempts" if len(story.attempts) > 1 else ""
        text.append(
            f": {words.plural(done, 'round')} with {words.plural(sites, 'site')}{took}.", style="default"
        )
        if (out / "models").is_dir():
            text.append(f"\nModels: {out / 'models'}", style="dim")
    if where:
        text.append(f"\n{where}", style="bold default")
    return text


def _continue(story: Story, out: Path, lead: str) -> str:
    """Return a line with the command that continues the run, empty where it cannot be continued."""
    if not story.resumable:
        return ""
    return f"\n{lead}: {faults.resume_command(str(out))} ({faults.resume_effect(story)})"
