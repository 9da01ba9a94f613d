"""What a report says about faults: who took part, who was missing and why, who was asked again, what was interrupted."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ops import words
from ops.report_view import Table
from ops.story import NO_REASON, Attempt, Failure, Round, Story
from ops.story_reader import cleaned

RUNS = "runs"
AGAIN = "\u21bb"  # beside a number of cases: asked again so often
_LATE = "An answer came after its round had ended, or twice; it was refused."
_TIMES = ("Wall", "Slowest site", "Overhead", "Loss")


@dataclass
class _Row:
    """Rounds in which the same happened: their cells, the sentences behind them, and a note."""

    rounds: list[Round]
    cells: list[tuple[str, str]]
    tips: list[str]
    note: str


@dataclass
class _Group:
    """When the same reason was given for the same site."""

    numbers: list[int] = field(default_factory=list)
    closing: bool = False
    times: int = 0

    def add(self, item: Round, times: int = 1) -> None:
        self.times += times
        if item.closing:
            self.closing = True
        else:
            self.numbers.append(item.number)

    @property
    def when(self) -> str:
        return ", ".join(
            text for text in (words.ranges(self.numbers), "closing" if self.closing else "") if text
        )


def participation(story: Story) -> Table:
    """Return who contributed how many cases to which round; equal rounds in a row share one line."""
    rows: list[_Row] = []
    for item in story.cycles:
        found = [_part(item, alias) for alias in story.sites]
        row = _Row(
            [item],
            [(text, kind) for text, kind, _ in found],
            [tip for _, _, tip in found],
            _note(story, item),
        )
        if rows and _same(rows[-1], row):
            rows[-1].rounds.append(item)
        else:
            rows.append(row)
    noted = any(row.note for row in rows)
    table = Table(
        [("Round", 1), *((alias, 1) for alias in story.sites), *([("Notes", 1)] if noted else [])], []
    )
    for place, row in enumerate(rows):
        first, last = row.rounds[0], row.rounds[-1]
        name = str(first.number) if first is last else f"rounds {first.number}\N{EN DASH}{last.number}"
        cells = [("closing evaluation" if first.closing else name, ""), *row.cells]
        table.rows.append([*cells, *([(row.note, "text")] if noted else [])])
        table.tips |= {(place, column): tip for column, tip in enumerate(row.tips, start=1) if tip}
    return table


def _same(one: _Row, other: _Row) -> bool:
    before, after = one.rounds[-1], other.rounds[0]
    follows = after.number == before.number + 1 and not before.closing and not after.closing
    return follows and (one.cells, one.note) == (other.cells, other.note)


def _part(item: Round, alias: str) -> tuple[str, str, str]:
    """Return (words, CSS class, sentence behind it) of a site's part in a round."""
    missing, place = item.missing, item.sites.get(alias)
    again = f" {AGAIN}{place.retries}" if place and place.retries else ""
    tip = place.trouble.message if place and place.trouble and again else ""
    if alias in missing:
        return missing[alias].code + again, "num bad", missing[alias].message
    kind = "num warn" if again else "num"
    if item.closing and (alias in item.contributed or (place and place.answered)):
        return "evaluated" + again, kind, tip
    cases = item.cases.get(alias, place.cases if place else None)
    if cases is not None:
        return words.count(cases) + again, kind, tip
    if item.asked and alias not in item.asked:
        return "not asked", "num quiet", ""
    return words.NONE + again, "num warn" if again else "num quiet", tip


def _note(story: Story, item: Round) -> str:
    notes = []
    if item.again:
        times = f" ({item.again} times)" if item.again > 1 else ""
        notes.append(f"run again after an interruption{times}")
    joined = [one.site for one in story.joined if one.round == item.number]
    if joined:
        notes.append(f"joined: {', '.join(dict.fromkeys(joined))}")
    late = [alias for alias, place in item.sites.items() if place.late]
    if late:
        notes.append(f"answered too late: {', '.join(late)}")
    if not item.ended:
        notes.append("not ended")
    return "; ".join(notes)


def round_times(story: Story) -> Table:
    """Return seconds and loss by round."""
    table = Table([(name, 1) for name in ("Round", *_TIMES)], [])
    for item in story.cycles:
        loss = words.NONE if item.loss is None else f"{item.loss:.4f}"
        times = [words.duration(value) for value in (item.seconds, item.slowest, item.overhead)]
        name = "closing evaluation" if item.closing else str(item.number)
        table.rows.append([(name, ""), *((value, "num") for value in (*times, loss))])
    return table


def absences(story: Story) -> Table:
    """Return who was missing when and why, and what to do; the same reason stands once, with its rounds."""
    groups: dict[tuple[str, Failure], _Group] = {}
    for item in story.cycles:
        for alias, failure in item.missing.items():
            groups.setdefault((alias, failure), _Group()).add(item)
    table = Table([(name, 1) for name in ("Round", "Site", "Code", "Reason", "What to do")], [])
    for alias, failure in story.refused.items():
        table.rows.append(_absence("start", alias, failure))
    for (alias, failure), group in groups.items():
        table.rows.append(_absence(group.when, alias, failure))
    return table


def _absence(when: str, alias: str, failure: Failure) -> list[tuple[str, str]]:
    advice = words.advice(failure.code)
    return [
        (when, "text short"),
        (alias, "site"),
        (failure.code, "bad"),
        (failure.message, "text"),
        (advice, "text"),
    ]


def repetitions(story: Story) -> Table:
    """Return who was asked again, or answered too late, when, how often and why."""
    groups: dict[tuple[str, Failure], _Group] = {}
    for item in story.cycles:
        for alias, place in item.sites.items():
            if place.retries:
                why = place.trouble or Failure(*NO_REASON)
                groups.setdefault((alias, why), _Group()).add(item, place.retries)
            if place.late:
                groups.setdefault((alias, Failure("late", _LATE)), _Group()).add(item, place.late)
    table = Table([(name, 1) for name in ("Round", "Site", "Code", "Times", "Last reason")], [])
    for (alias, why), group in groups.items():
        cells = [(why.code, "warn"), (words.count(group.times), "num"), (why.message, "text")]
        table.rows.append([(group.when, "text short"), (alias, "site"), *cells])
    return table


def missed(story: Story) -> list[str]:
    """Return a sentence for each site that was missing: "beech missed 2 of 20 rounds: worker"."""
    sentences = []
    for alias in story.sites:
        expected = [item for item in story.training if not item.asked or alias in item.asked]
        gone = [item for item in expected if alias in item.missing]
        closing = [item for item in story.cycles if item.closing and alias in item.missing]
        if not gone and not closing:
            continue
        codes = Counter(item.missing[alias].code for item in (*gone, *closing)).most_common()
        why = ", ".join(code if len(codes) == 1 else f"{code} {times}" for code, times in codes)
        what = [f"{len(gone)} of {words.plural(len(expected), 'round')}"] if gone else []
        what += ["the closing evaluation"] if closing else []
        sentences.append(f"{alias} missed {' and '.join(what)}: {why}")
    return sentences


def interruptions(story: Story) -> Table:
    """Return in the order of time what interrupted the run and how it went on; empty where nothing did."""
    rows: list[tuple[float | None, str, str, str]] = []
    for place, attempt in enumerate(story.attempts, start=1):
        if place > 1 and attempt.resumed is None:
            rows.append(
                (attempt.begun, f"attempt {place} began", "", "It tells no round after which it continues.")
            )
        if place < len(story.attempts):
            rows.append((attempt.latest, f"attempt {place} ended", "", _ending(attempt)))
    for item in story.refused_checkpoints:
        what = "a checkpoint" if item.round is None else f"the checkpoint of round {item.round}"
        why = f"{item.failure.code}: {item.failure.message} The one before it was used."
        rows.append((item.when, f"{what} refused", "", why))
    for resume in story.resumes:
        nth = f"For the {words.ordinal(resume.attempt)} time." if resume.attempt else ""
        rows.append((resume.when, words.continued(resume.round), "", nth))
    for restart in story.restarts:
        why = words.RESTARTS.get(restart.why, restart.why) or "No reason was recorded"
        nth = f"; attempt {restart.attempt}" if restart.attempt is not None else ""
        wait = f"; waited {words.duration(restart.wait)}" if restart.wait is not None else ""
        rows.append((restart.when, f"{restart.name} started again", restart.site, f"{why}{nth}{wait}."))
    rows.sort(key=lambda row: float("inf") if row[0] is None else row[0])
    table = Table([(name, 1) for name in ("When (UTC)", "What", "Site", "Why")], [])
    for when, what, site, why in rows:
        table.rows.append([(words.moment(when), ""), (what, "text short"), (site, "site"), (why, "text")])
    return table


def _ending(attempt: Attempt) -> str:
    verdict = attempt.verdict
    if verdict is None:
        return "Cut off: nothing was told after this moment (killed, or the machine went down)."
    if verdict.failure is None:
        return "Completed."
    return f"Failed ({verdict.failure.code}): {verdict.failure.message}"


def witnesses(story: Story) -> Table:
    """Return the last ledger head that the coordinator noted of each site; empty where none was."""
    table = Table([(name, 1) for name in ("Site", "Round", "Ledger head the coordinator noted")], [])
    for alias, site in story.sites.items():
        if site.witness is not None:
            head = f"{site.witness.entries}:{site.witness.head}"
            table.rows.append(
                [(alias, "site"), (words.count(site.witness.round), "num"), (head, "text code")]
            )
    return table


def resume_command(where: str) -> str:
    """Return the command that continues a run.

    Args:
        where: The run folder, as a person would type it.
    """
    return f"wardround resume {shlex.quote(where)}"


def run_name(folder: Path) -> str:
    """Return a run folder by its name alone, with the usual `runs/` before it: a page tells no path of its machine."""
    folder = folder.resolve()
    return str(cleaned(f"{RUNS}/{folder.name}" if folder.parent.name == RUNS else folder.name))


def resume_effect(story: Story) -> str:
    """Return what that command does: "continues after round 7"."""
    if story.checkpoint is not None:
        return f"continues after round {story.checkpoint}"
    return "continues after the last whole round" if story.completed else "begins again with round 1"
