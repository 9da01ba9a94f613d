"""What is wrong with a run just now, which site, since when, and what to do: what an operator needs at night.

The story (`ops/story.py`) tells what is so, not since when. `Since` notes the times beside it, from the same events, and
counts what must never go back although a round is run again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ops import words
from ops.report_faults import resume_command, resume_effect
from ops.story import Failure, Round, Story
from ops.story_fields import Event, aliases, mapping, number, round_number, text

MOST_WARNINGS = 5
WARNING_SECONDS = 3600.0  # before the newest event; older ones are in the report
SLOW_FACTOR, SLOW_SECONDS = 3.0, 120.0
"""A site that everybody waits for is named once it takes this much longer than its last round, and this long at least."""
_CLOSING = "the closing evaluation"


@dataclass
class Since:
    """When things began, in seconds since the epoch; what carries no time is left out.

    Attributes:
        rounds: The round that began last, and when.
        asked: When a site was asked last.
        failed: Since when a site has been missing without an answer in between.
        failures: How often a site was missing; over all attempts, so that it never goes back.
        refused: When a site was refused.
        exited: When a process ended without having been told to.
        warned: When each warning of the story came.
    """

    rounds: tuple[int, float] | None = None
    asked: dict[str, float] = field(default_factory=dict)
    failed: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    refused: dict[str, float] = field(default_factory=dict)
    exited: dict[str, float] = field(default_factory=dict)
    warned: list[float | None] = field(default_factory=list)
    _counted: set[str] = field(default_factory=set)

    def note(self, event: Event) -> None:
        """Take an event's time; one of a kind that matters to nobody here is passed over."""
        handler = _HANDLERS.get(event["event"])
        if handler is not None:
            handler(self, event, text(event, "site"), number(event, "t"))

    def _round_start(self, event: Event, alias: str, when: float | None) -> None:
        self._counted = set()
        found = round_number(event)
        self.rounds = None if found is None or when is None else (found, when)

    def _asked(self, event: Event, alias: str, when: float | None) -> None:
        if when is not None:
            self.asked[alias] = when

    def _reply(self, event: Event, alias: str, when: float | None) -> None:
        self.failed.pop(alias, None)

    def _failed(self, event: Event, alias: str, when: float | None) -> None:
        self._missing(alias, when)

    def _round_end(self, event: Event, alias: str, when: float | None) -> None:
        for gone in aliases(event.get("missing")):  # one that never failed by name, but did not contribute
            if gone not in self._counted:
                self._missing(gone, when)

    def _missing(self, alias: str, when: float | None) -> None:
        if not alias:
            return
        self._counted.add(alias)
        self.failures[alias] = self.failures.get(alias, 0) + 1
        if when is not None:
            self.failed.setdefault(alias, when)

    def _refused(self, event: Event, alias: str, when: float | None) -> None:
        if when is not None:
            self.refused[alias] = when

    def _here(self, event: Event, alias: str, when: float | None) -> None:
        self.refused.pop(alias, None)

    def _exit(self, event: Event, alias: str, when: float | None) -> None:
        if when is not None and event.get("expected") is not True:
            self.exited[text(event, "name")] = when

    def _warning(self, event: Event, alias: str, when: float | None) -> None:
        self.warned.append(when)


_HANDLERS: dict[str, Callable[[Since, Event, str, float | None], None]] = {
    "round.start": Since._round_start,
    "round.end": Since._round_end,
    "site.asked": Since._asked,
    "site.retry": Since._asked,
    "site.reply": Since._reply,
    "site.failed": Since._failed,
    "site.refused": Since._refused,
    "site.ready": Since._here,
    "site.joined": Since._here,
    "process.exit": Since._exit,
    "warning": Since._warning,
}


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong.

    Attributes:
        grave: The run stands or fails by it; else it goes on in spite of it.
        what: A safe sentence.
        site: Alias of the site concerned, empty if it is the run.
        code: Error code, empty if there is none.
        since: Seconds since the epoch, None if not known.
        advice: What to do.
        command: What to type, empty if there is nothing.
        effect: What that command does.
    """

    grave: bool
    what: str
    site: str = ""
    code: str = ""
    since: float | None = None
    advice: str = ""
    command: str = ""
    effect: str = ""


def missing_now(story: Story, alias: str) -> tuple[Failure, int] | None:
    """Return why a site is missing and for how many rounds in a row; None if it answered when it was last asked."""
    why: Failure | None = None
    times = 0
    for item in reversed(story.cycles):
        gone = item.missing.get(alias)
        if gone is not None:
            why, times = why or gone, times + 1
        elif _answered(item, alias) or (why is not None and alias in item.sites):
            break
    return None if why is None else (why, times)


def _answered(item: Round, alias: str) -> bool:
    place = item.sites.get(alias)
    return alias in item.contributed or (place is not None and place.answered)


def troubles(story: Story, since: Since, now: float, silent_since: float | None, where: str) -> list[Trouble]:
    """Return what is wrong now, the gravest first; empty where nothing is.

    Args:
        story: The run.
        since: Its times.
        now: Seconds since the epoch.
        silent_since: When a run without an end was heard last, if that is too long ago; else None.
        where: The run folder as a person would type it.
    """
    verdict = story.verdict
    if verdict is not None and verdict.ok:
        return []
    found: list[Trouble] = []
    resume = (resume_command(where), resume_effect(story)) if story.resumable else ("", "")
    if verdict is not None and verdict.failure is not None:
        failure, ended = verdict.failure, story.attempts[-1].latest if story.attempts else story.latest
        advice = words.advice(failure.code)
        found.append(Trouble(True, failure.message, "", failure.code, ended, advice, *resume))
    elif silent_since is not None:
        found.append(_silent(story, since, now, silent_since, resume))
    found += _missing(story, since)
    if verdict is None:
        found += _processes(story, since)
        found += _waiting(story, since, now)
    found += _warnings(story, since)
    if story.unreadable:
        lines = words.plural(story.unreadable, "line")
        told = f"{lines} of the event files could not be read and were left out."
        found.append(Trouble(False, told, advice="Look whether the volume is full or the files were edited."))
    return sorted(found, key=lambda item: not item.grave)


def waited_for(story: Story) -> list[str]:
    """Return the sites that the round under way still waits for."""
    item = story.current
    if item is None or item.ended or story.verdict is not None:
        return []
    asked = [alias for alias, place in item.sites.items() if place.asked]
    return [alias for alias in asked if alias not in item.missing and not _answered(item, alias)]


def _name(item: Round) -> str:
    return _CLOSING if item.closing else f"round {item.number}"


def _silent(story: Story, since: Since, now: float, last: float, resume: tuple[str, str]) -> Trouble:
    told = f"No event for {words.duration(now - last)}, and the run has not said that it ended."
    waiting, item = waited_for(story), story.current
    deadline = number(mapping(story.config.get("rounds")), "deadline")
    began = since.rounds
    if item is not None and waiting and deadline and began is not None and began[0] == item.number:
        told = f"{told[:-1]}: {_name(item)} waits for {words.joined(waiting)}."
        left = began[1] + deadline - now
        if left > 0:
            advice = (
                f"The round's deadline is in {words.duration(left)}; a site that trains long is silent that long. "
                "Ask the site whether its worker works, or wait for the deadline."
            )
            return Trouble(False, told, "", "silent", last, advice)
        told += f" The round's deadline passed {words.duration(-left)} ago: the server is not there any more."
    advice = "Look whether the coordinator's processes live and whether its volume is full."
    if resume[0]:
        advice += " If the run was cut off, continue it."
    return Trouble(True, told, "", "silent", last, advice, *resume)


def _missing(story: Story, since: Since) -> list[Trouble]:
    found = [
        Trouble(True, without(alias, failure.message), alias, failure.code, since.refused.get(alias), words.advice(failure.code))
        for alias, failure in story.refused.items()
    ]  # fmt: skip
    for alias in story.sites:
        gone = missing_now(story, alias)
        if gone is None or alias in story.refused:
            continue
        failure, times = gone
        many = f" Missing for {words.plural(times, 'round')} in a row." if times > 1 else ""
        when = since.failed.get(alias)
        found.append(
            Trouble(
                False,
                without(alias, failure.message) + many,
                alias,
                failure.code,
                when,
                words.advice(failure.code),
            )
        )
    return found


def _processes(story: Story, since: Since) -> list[Trouble]:
    found = []
    for process in story.processes.values():
        when = since.exited.get(process.name)
        if process.broke:
            told = f"{process.name} ended by itself (exit code {process.exit_code})."
            found.append(Trouble(True, told, process.site, "process", when, words.advice("process")))
        elif process.restart is not None:
            told = f"{process.name} is started again. {words.RESTARTS.get(process.restart.why, 'No reason was told')}."
            when = process.restart.when
            found.append(Trouble(False, told, process.site, "process", when, words.advice("process")))
    return found


def _waiting(story: Story, since: Since, now: float) -> list[Trouble]:
    """Return who has not come, who is asked again, and who alone keeps the others waiting."""
    found = []
    item, waiting = story.current, waited_for(story)
    for alias, site in story.sites.items():
        known = any(alias in cycle.sites for cycle in story.cycles)
        if story.servings and not site.ready and not known and alias not in story.refused:
            told, begun = f"{alias} has not come yet.", story.servings[-1].begun
            found.append(Trouble(False, told, alias, "silent", begun, words.advice("silent")))
    if item is None:
        return found
    for alias in waiting:
        place, asked = item.sites[alias], since.asked.get(alias)
        if place.retries:
            why = place.trouble or Failure("", "")
            told = f"Asked again {words.plural(place.retries, 'time')} in {_name(item)}. {without(alias, why.message)}".strip()
            found.append(Trouble(False, told, alias, why.code, asked, words.advice(why.code)))
        elif len(waiting) == 1 and len(item.sites) > 1 and asked is not None:
            usual = last_seconds(story, alias)
            if now - asked > max(SLOW_SECONDS, SLOW_FACTOR * (usual or 0.0)):
                before = f"; its last round took {words.duration(usual)}" if usual is not None else ""
                told = f"All others wait for it in {_name(item)}{before}."
                found.append(Trouble(False, told, alias, "", asked, words.advice("deadline")))
    return found


def last_seconds(story: Story, alias: str) -> float | None:
    """Return the seconds between question and answer of a site's last answer; None if it never answered."""
    for item in reversed(story.cycles):
        place = item.sites.get(alias)
        if place is not None and place.answered:
            return place.local if place.waited is None else place.waited
    return None


def _warnings(story: Story, since: Since) -> list[Trouble]:
    times = since.warned if len(since.warned) == len(story.warnings) else [None] * len(story.warnings)
    first = (story.latest or 0.0) - WARNING_SECONDS
    new = [
        Trouble(False, without(item.site, item.message), item.site, item.code, when, words.ADVICE.get(item.code, ""))
        for item, when in zip(story.warnings, times, strict=True)
        if when is not None and when >= first
    ]  # fmt: skip
    return new[: -MOST_WARNINGS - 1 : -1]


def without(alias: str, sentence: str) -> str:
    """Return a sentence without the alias that it begins with, for where the alias stands before it anyway."""
    return sentence.removeprefix(f"{alias}: ") if alias else sentence
