"""`wardround ledger`: what came into a hospital and what left it, for its data-protection officer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.ledger import LEDGER_FILE, RECOVERED, Entry, read, verify
from client.ledger_lines import HEAD_FILE
from common.errors import LedgerError, WardroundError
from ops.words import NONE, size

ledger_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
)
MEANINGS = {
    "model": "weights of the shared network",
    "update": "change of the shared network's weights",
    "fisher-sketch": "how much each weight matters to the task, condensed",
    "sensitivity-mask": "which weights matter most, as yes or no",
    "style-spectrum": "brightness and contrast of the pictures, as averaged frequencies",
    "data-sketch": "condensed statistics of the data set",
    "cluster": "which group of similar sites was chosen",
    "control": "correction values of the training",
    "metrics": "figures of the evaluation",
    "summary": "counts and ranges of the data set",
    "figures": "case count, loss and seconds",
    "config": "settings of the run",
    "failure": "why the site could not answer: a code and a sentence",
    RECOVERED: "the record's own note: a line that a crash cut was taken off",
}
_NO_MEANING = "a kind this software does not know"
_REFUSED_SHOWN = 20  # reasons listed in the summary

PATH_HELP = "A ledger.jsonl, a site's home folder, or a run folder of a trial (all its sites)."


@ledger_app.callback()
def _group() -> None:
    """Read what came into a hospital and what left it, and prove that the record is unchanged.

    The worker writes every part that comes in and every part that leaves as
    one line of ledger.jsonl in the site's home folder, before it leaves. Each
    line carries the hash of the line before, so a changed, removed, added or
    moved line is found.

    [bold]Examples[/bold]

      is the record whole?        wardround ledger verify /var/lib/wardround
      every site of a trial:      wardround ledger verify runs/NAME
      what left in one run:       wardround ledger show /var/lib/wardround \\
                                    --run RUN --direction out
    """


@ledger_app.command("verify")
def verify_ledgers(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATHS]...", help=f"{PATH_HELP} This folder if left out.", show_default=False
        ),
    ] = None,
    head: Annotated[
        str,
        typer.Option(
            "--head",
            metavar="N:HASH",
            help="A head that somebody else noted (the coordinator notes one with every answer); for one ledger.",
        ),
    ] = "",
) -> None:
    """Prove that ledgers are whole and unchanged.

    One line per ledger: entries, time span, head. A ledger that is not whole
    is named with its first wrong line and what is wrong with it. Reads only;
    the worker may go on.

    [bold]Why --head[/bold]

      Somebody who may write every file of the hospital's volume can write a
      new record from the start. Nobody can do so and keep a head that was
      noted elsewhere. The coordinator's events.jsonl has one with every
      answer (site.reply, ledger).

    [bold]Examples[/bold]

      wardround ledger verify /var/lib/wardround
      wardround ledger verify runs/20260101-120000-fedavg
      wardround ledger verify /var/lib/wardround --head 42:9f86d0...

    Exit code: 0 all whole, 14 at least one is not.
    """
    console, errors = Console(), Console(stderr=True)
    found = [place for path in paths or [Path()] for place in _ledgers(path)]
    if head and len(found) != 1:
        raise typer.BadParameter(
            f"it is the head of one ledger; {len(found)} were given.", param_hint="--head"
        )
    wrong = 0
    for place in found:
        try:
            summary = verify(place, head)
        except WardroundError as error:
            wrong += 1
            said = f"[bold red]not whole[/bold red] {escape(str(place))}: {escape(error.message)}"
            errors.print(said, highlight=False, soft_wrap=True)
            continue
        span = f"{summary.first_time} to {summary.last_time}" if summary.entries else "nothing recorded yet"
        torn = f", and {summary.torn_bytes} bytes of a line that is not whole" if summary.torn_bytes else ""
        witness = ", the given head fits" if head else ""
        said = f"[bold green]whole[/bold green] {escape(str(place))}: {summary.entries} entries{torn}{witness}, {span}, "
        console.print(f"{said}head {summary.head}", highlight=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(LedgerError.exit_code)


@ledger_app.command("show")
def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help=PATH_HELP)],
    run: Annotated[str | None, typer.Option("--run", help="Only this run.")] = None,
    round_: Annotated[int | None, typer.Option("--round", min=0, help="Only this round.")] = None,
    direction: Annotated[
        Literal["in", "out"] | None, typer.Option("--direction", help="Only what came in, or what went out.")
    ] = None,
    last: Annotated[
        int, typer.Option("--last", min=0, help="How many entries to list, the newest; 0 lists all.")
    ] = 50,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the entries as JSON lines instead of tables.")
    ] = False,
) -> None:
    """Show what came into a hospital and what left it.

    First in words: per run and kind how often, how many bytes, from when to
    when, and what was refused and why, over all chosen entries. Then the
    newest of these entries.

    [bold]How to read an entry[/bold]

      Norm      length of the vector of all its values; an odd one stands out
      Cases     training cases behind the part
      SHA-256   first 12 digits of the checksum of its bytes; --json has all,
                and the tensors' names and shapes

    [bold]Examples[/bold]

      what left the hospital:  wardround ledger show /var/lib/wardround \\
                                 --direction out
      one round, all of it:    wardround ledger show /var/lib/wardround \\
                                 --run RUN --round 3 --last 0
      for a spreadsheet:       wardround ledger show runs/NAME --json --last 0

    Exit code: 0, or 14 if it is not whole (shown up to the first wrong line).
    """
    console, errors = Console(), Console(stderr=True)
    wrong = 0
    for place in _ledgers(path):
        failure = _failure(place)
        chosen: deque[Entry] = deque(maxlen=last or None)
        story = Story()
        for entry in _readable(place):
            if _fits(entry, run, round_, direction):
                chosen.append(entry)
                story.add(entry)
        if as_json:
            _print_json(place, chosen)
        else:
            _print_ledger(console, place, story, chosen)
        if failure:
            wrong += 1
            said = f"[bold red]not whole[/bold red] {escape(str(place))}: {escape(failure)}"
            errors.print(said, highlight=False, soft_wrap=True)
        elif not as_json:
            console.print("[bold green]whole[/bold green]: every line was proved.", highlight=False)
    if wrong:
        raise typer.Exit(LedgerError.exit_code)


@dataclass
class Tally:
    """How often something happened, with its bytes and its time span."""

    times: int = 0
    bytes: int = 0
    first: str = ""
    last: str = ""

    def add(self, entry: Entry) -> None:
        """Count one entry."""
        self.times += 1
        self.bytes += entry.bytes
        self.first = self.first or entry.time
        self.last = entry.time


@dataclass
class Story:
    """What a ledger says, counted: by way, run and kind, and the refusals by their reason."""

    passed: dict[tuple[str, str, str], Tally] = field(default_factory=dict)
    refused: dict[tuple[str, str, str, str], Tally] = field(default_factory=dict)
    repaired: int = 0

    def add(self, entry: Entry) -> None:
        """Count one entry."""
        if entry.part == entry.kind == RECOVERED:
            self.repaired += 1
        elif entry.decision == "refused":
            key = (entry.direction, entry.run, entry.kind, entry.reason)
            self.refused.setdefault(key, Tally()).add(entry)
        else:
            self.passed.setdefault((entry.direction, entry.run, entry.kind), Tally()).add(entry)


def _ledgers(path: Path) -> list[Path]:
    """Return the ledgers that a path means; a ledger whose file is gone but whose head is there counts."""
    if not path.is_dir() and (path.exists() or path.with_name(HEAD_FILE).exists()):
        return [path]
    folders = [path, *sorted(path.glob("sites/*/"))]
    found = [
        folder / LEDGER_FILE
        for folder in folders
        if any((folder / name).exists() for name in (LEDGER_FILE, HEAD_FILE))
    ]
    if not found:
        raise LedgerError(
            "There is no ledger here. Give a ledger.jsonl, a site's home folder that holds one, or a run folder "
            "of a trial.",
            detail=str(path),
        )
    return found


def _failure(place: Path) -> str:
    try:
        verify(place)
    except LedgerError as error:
        return error.message
    return ""


def _readable(place: Path) -> Iterator[Entry]:
    """Yield entries up to the first wrong line; `_failure` has said what is wrong there."""
    try:
        yield from read(place)
    except LedgerError:
        return


def _fits(entry: Entry, run: str | None, round_: int | None, direction: str | None) -> bool:
    return run in (None, entry.run) and round_ in (None, entry.round) and direction in (None, entry.direction)


def _print_json(place: Path, entries: deque[Entry]) -> None:
    import json

    for entry in entries:
        line: dict[str, Any] = {"ledger": place.absolute().parent.name, **entry.model_dump(mode="json")}
        typer.echo(json.dumps(line, sort_keys=True, separators=(",", ":")))


def _print_ledger(console: Console, place: Path, story: Story, entries: deque[Entry]) -> None:
    console.rule(f"[bold]{escape(str(place))}[/bold]")
    for way, title in (("out", "What left the hospital"), ("in", "What came in")):
        console.print(f"[bold]{title}[/bold]", highlight=False)
        lines = [
            _sentence(run, kind, tally) for (found, run, kind), tally in story.passed.items() if found == way
        ]
        for line in lines or ["  nothing"]:
            console.print(line, highlight=False)
    console.print("[bold]What was refused[/bold]", highlight=False)
    for number, ((way, run, kind, reason), tally) in enumerate(story.refused.items()):
        if number == _REFUSED_SHOWN:
            said = f"  ... and {len(story.refused) - _REFUSED_SHOWN} more reasons; --json lists every entry"
            console.print(said, highlight=False)
            break
        meant = "it did not leave" if way == "out" else "it came and was not used"
        console.print(
            f"{_sentence(run, kind, tally)}: {meant}. {escape(reason or 'No reason noted.')}", highlight=False
        )
    if not story.refused:
        console.print("  nothing", highlight=False)
    if story.repaired:
        said = f"The record was repaired {_times(story.repaired)} after a crash (a cut line was taken off)."
        console.print(said, highlight=False)
    if entries:
        console.print(_table(entries))


def _sentence(run: str, kind: str, tally: Tally) -> str:
    when = _when(tally.first) if tally.times == 1 else f"{_when(tally.first)} to {_when(tally.last)}"
    what = f"{escape(kind)} ({MEANINGS.get(kind, _NO_MEANING)})"
    return f"  run {escape(run) or NONE}: {what}, {_times(tally.times)}, {size(tally.bytes)}, {when}"


def _table(entries: deque[Entry]) -> Table:
    """Return the entries as a table whose cells have two or three short lines, so that 80 columns hold it."""
    title = f"Entries {entries[0].n} to {entries[-1].n}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("Time\n(UTC)", no_wrap=True)
    table.add_column("Run,\nround", overflow="fold")
    table.add_column("Way,\ndecision", no_wrap=True)
    table.add_column("What", overflow="fold")
    for name in ("Size", "Norm", "Cases"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("SHA-256", no_wrap=True)
    colours = {"released": "bold", "received": "none", "refused": "red"}
    for entry in entries:
        named = entry.kind if entry.part == entry.kind else f"{entry.kind} '{entry.part}'"
        what = [f"[bold]{escape(named)}[/bold]", MEANINGS.get(entry.kind, _NO_MEANING)]
        what += [f"[{colours[entry.decision]}]{escape(entry.reason)}[/]"] if entry.reason else []
        table.add_row(
            _when(entry.time).replace(" ", "\n"),
            f"{escape(entry.run) or NONE}\n{_round(entry)}",
            f"{_way(entry)}\n[{colours[entry.decision]}]{entry.decision}[/]",
            "\n".join(what),
            size(entry.bytes),
            NONE if entry.norm is None else f"{entry.norm:.4g}",
            NONE if entry.cases is None else str(entry.cases),
            entry.sha256[:12],
        )
    return table


def _round(entry: Entry) -> str:
    """Return the round in words, or what the message was for where it belongs to none."""
    if entry.phase in ("round", "closing"):
        return f"round {entry.round}" + ("\nclosing" if entry.phase == "closing" else "")
    return entry.phase


def _way(entry: Entry) -> str:
    """Return what became of a part in a word: one that was refused on its way out never left."""
    if entry.direction == "in":
        return "came"
    return "stayed" if entry.decision == "refused" else "left"


def _when(time: str) -> str:
    return time[:19].replace("T", " ")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
