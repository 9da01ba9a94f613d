"""What the events of commands, servers and processes add to a story: how often the run was tried, and what broke.

A run that was killed or failed and was continued writes on in the same files. Every `trial.start` after a first one,
and every `run.start`, is another attempt at the same run: the verdict is that of the last one, and what it repeats
takes the place of what had been there.
"""

from __future__ import annotations

from ops.story import Activity, Attempt, Joined, Process, RefusedCheckpoint, Restart, Resume, Story
from ops.story_fields import (
    Event,
    aliases,
    failure_of,
    first_of,
    integer,
    number,
    put_aside,
    round_number,
    round_of,
    site_of,
    text,
    verdict_of,
)

_PREPARING = frozenset({"data", "check"})
_WORKED = frozenset({"run", "report", "stop"})
_CLOSING = frozenset({"report", "stop"})


def heard(story: Story, event: Event) -> None:
    """Note which attempts an event shows to be alive."""
    when = number(event, "t")
    if story.commands and story.commands[-1].verdict is None:
        story.commands[-1].heard(when)
    if story.servings and story.servings[-1].verdict is None and event.get("process") == "server":
        story.servings[-1].heard(when)


def trial_start(story: Story, event: Event) -> None:
    """The operator's command began."""
    if not story.commands or story.commands[-1].verdict is not None or story.commands[-1].working:
        _begin_command(story, event)
    story.commands[-1].working = True
    story.trial = True
    story.method = text(event, "method") or story.method
    story.task = text(event, "task") or story.task
    story.data = text(event, "data") or story.data
    story.runtime = text(event, "runtime") or story.runtime
    story.planned = first_of(integer(event, "rounds"), story.planned)
    for alias in aliases(event.get("sites")):
        site_of(story, alias)


def trial_phase(story: Story, event: Event) -> None:
    """The command turned to something else; preparations after work are a new command."""
    phase = text(event, "phase")
    last = story.commands[-1] if story.commands else None
    if last is None or last.verdict is not None:
        fresh = last is None or phase not in _CLOSING
    else:
        fresh = last.working and (phase in _PREPARING or (phase == "keys" and story.phase in _WORKED))
    if fresh:
        _begin_command(story, event)
    story.trial = True
    story.phase = phase


def trial_end(story: Story, event: Event) -> None:
    """The command told its verdict."""
    if not story.commands or story.commands[-1].verdict is not None:
        _begin_command(story, event)
    story.trial_end = verdict_of(event)
    _ended(story.commands[-1], event)


def _begin_command(story: Story, event: Event) -> None:
    again = bool(story.commands)
    when = number(event, "t")
    story.commands.append(Attempt(when, when))
    story.trial_end, story.phase = None, ""
    if not again:
        return
    story.run_end = None
    for process in story.processes.values():  # those of the former command are gone
        process.started, process.exit_code, process.ready_seconds, process.restart = False, None, None, None
    for site in story.sites.values():
        site.activity = Activity()


def _ended(attempt: Attempt, event: Event) -> None:
    attempt.heard(number(event, "t"))
    attempt.verdict = verdict_of(event)


def run_start(story: Story, event: Event) -> None:
    """The server began; after a first time it is another attempt, which has no verdict yet."""
    when = number(event, "t")
    last = story.commands[-1] if story.commands else None
    ended = last.latest if last is not None and last.verdict is not None else None
    if ended is not None and when is not None and when > ended:
        _begin_command(story, event)
        story.commands[-1].working = True
    story.servings.append(Attempt(when, when))
    story.method = text(event, "method") or story.method
    story.task = text(event, "task") or story.task
    story.run = text(event, "run") or story.run
    story.planned = first_of(integer(event, "rounds"), story.planned)
    story.seed = first_of(integer(event, "seed"), story.seed)
    story.parameters = first_of(integer(event, "parameters"), story.parameters)
    story.model_bytes = first_of(integer(event, "bytes"), story.model_bytes)
    story.run_end = None


def run_resume(story: Story, event: Event) -> None:
    """The server continues after a round: what was there of later rounds will be run again."""
    found = integer(event, "round")
    found = found if found is not None and found >= 0 else None
    last = story.servings[-1] if story.servings else None
    if last is None or last.verdict is not None or last.resumed is not None:  # its run.start was lost
        story.servings.append(Attempt(number(event, "t"), number(event, "t")))
        story.run_end = None
    story.resumes.append(Resume(found, integer(event, "attempt"), number(event, "t")))
    story.servings[-1].resumed = found
    if story.commands and story.commands[-1].verdict is None and story.commands[-1].resumed is None:
        story.commands[-1].resumed = found
    story.whole = None
    if found is not None:
        story.checkpoint = found or None
        put_aside(story, found + 1)


def run_end(story: Story, event: Event) -> None:
    """The server told its verdict."""
    if not story.servings or story.servings[-1].verdict is not None:
        story.servings.append(Attempt())
    story.run_end = verdict_of(event)
    story.whole = story.run_end.rounds
    _ended(story.servings[-1], event)


def round_start(story: Story, event: Event) -> None:
    """A round began; if it is there already, it is run again and takes the place of what was there."""
    found = round_number(event)
    if found is None:
        return
    there = story.rounds.get(found)
    put_aside(story, found if there is not None and there.started else found + 1)
    item = round_of(story, event)
    if item is None:
        return
    story.whole = None
    item.started, item.closing = True, event.get("closing") is True
    item.asked = aliases(event.get("sites"))
    for alias in item.asked:
        site_of(story, alias)


def checkpoint(story: Story, event: Event) -> None:
    """The server wrote its state."""
    story.checkpoint = first_of(round_number(event), story.checkpoint)


def checkpoint_refused(story: Story, event: Event) -> None:
    """A checkpoint could not be read."""
    refused = RefusedCheckpoint(round_number(event), failure_of(event), number(event, "t"))
    story.refused_checkpoints.append(refused)


def site_joined(story: Story, event: Event) -> None:
    """A site came, or came back, while the run went on."""
    alias = text(event, "site")
    if not alias:
        return
    site, cases = site_of(story, alias), integer(event, "cases")
    site.ready, site.refused = True, None
    story.refused.pop(alias, None)
    if cases is not None and cases >= 0 and not site.cases:
        site.cases = {"training": cases}
    story.joined.append(Joined(alias, round_number(event), cases))


def _process(story: Story, event: Event) -> Process | None:
    name = text(event, "name")
    if not name:
        return None
    process = story.processes.setdefault(name, Process(name))
    process.site = text(event, "site") or process.site
    return process


def process_start(story: Story, event: Event) -> None:
    """A process was started."""
    if process := _process(story, event):
        process.started, process.exit_code, process.ready_seconds = True, None, None
        transport = story.sites[process.site].transport if process.site in story.sites else None
        if transport is not None and process.name.startswith("supernode"):
            transport.last = (0, 0, 0)  # it counts from nothing


def process_ready(story: Story, event: Event) -> None:
    """A process answered."""
    if process := _process(story, event):
        process.ready_seconds, process.restart = number(event, "seconds"), None


def process_exit(story: Story, event: Event) -> None:
    """A process ended."""
    if process := _process(story, event):
        process.exit_code = integer(event, "code")
        process.expected = event.get("expected") is True


def process_restart(story: Story, event: Event) -> None:
    """The supervisor starts a process again."""
    if process := _process(story, event):
        process.exit_code, process.ready_seconds = None, None
        process.restart = Restart(
            process.name, process.site, text(event, "why"), integer(event, "attempt"), number(event, "seconds"),
            number(event, "t"),
        )  # fmt: skip
        story.restarts.append(process.restart)


def memory(story: Story, event: Event) -> None:
    """A process told its memory."""
    name, alias = text(event, "name"), text(event, "site")
    if name == "worker" and alias and story.runtime != "simulation":  # one worker serves all in a simulation
        event = {**event, "name": f"worker-{alias}"}
    process = _process(story, event)
    for key in ("peak", "gpu"):
        found = number(event, key)
        if process and found is not None:
            setattr(process, key, max(found, getattr(process, key) or 0.0))
