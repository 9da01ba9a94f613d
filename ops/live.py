"""The live view of a run, driven by its event files: a table that is redrawn on a terminal, plain lines elsewhere.

It only reads, so it can be opened on any run folder at any time and never disturbs the run. Where standard output is
no terminal (a build server, a file) every event of interest becomes one line, and the log stays readable.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ops import words
from ops.story import DIRECTIONS, Process, Restart, Round, Site, SiteRound, Story
from ops.story_fields import integer, number
from ops.story_reader import RunReader, Tail

__all__ = ["LiveView", "Tail", "line_of", "panel"]

STALE_SECONDS = 60.0
REDRAW_SECONDS = 0.5
BAR_WIDTH = 40


class LiveView:
    """Follows a run folder.

    Args:
        out: The run folder; its files may not exist yet.
        console: Where to draw.
        live: Redraw in place (True) or write lines (False); None asks the console's file.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        out: Path,
        console: Console | None = None,
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.console = console or Console()
        self._reader = RunReader(out)
        self._clock = clock
        self._drawn = 0.0
        in_place = self.console.is_interactive and self.console.file.isatty() if live is None else live
        self._live: Live | None = None
        if in_place:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)

    @property
    def story(self) -> Story:
        """What is known of the run."""
        return self._reader.story

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        self.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        if self._live is not None:
            self._live.stop()

    def refresh(self) -> None:
        """Read what is new and show it; cheap enough to be called several times a second."""
        if self._live is None:
            self._reader.poll(self._tell)
            return
        new = self._reader.poll()
        now = self._clock()
        if new or now - self._drawn >= REDRAW_SECONDS:
            self._live.update(panel(self.story, now), refresh=True)
            self._drawn = now

    def _tell(self, event: dict[str, Any]) -> None:
        line = line_of(event, self.story)
        if line:
            self.console.print(Text(line), soft_wrap=True)


def panel(story: Story, now: float) -> RenderableType:
    """Return the live picture of a story.

    Args:
        story: What is known.
        now: Seconds since the epoch.
    """
    parts: list[RenderableType] = [_headline(story, now)]
    processes = _processes(story, now)
    if processes is not None:
        parts.append(processes)
    if story.planned:
        parts.append(_progress(story))
    if story.sites:
        parts.append(_sites(story, now))
    if story.warnings:
        last = story.warnings[-1]
        parts.append(Text(f"warning ({last.code}): {last.message}", style="yellow"))
    title = " · ".join(
        text
        for text in ("wardround", story.method, story.data, story.runtime and f"{story.runtime} runtime")
        if text
    )
    return Panel(Group(*parts), title=Text(title), title_align="left", border_style="cyan", padding=(0, 1))


def _headline(story: Story, now: float) -> Text:
    verdict = story.verdict
    if verdict is not None:
        word, style = ("completed", "bold green") if verdict.ok else ("failed", "bold red")
        took = story.seconds
        text = Text(word, style=style)
        if verdict.failure is not None:
            text.append(f" ({verdict.failure.code}): {verdict.failure.message}", style="red")
        return text.append(f"  {words.duration(took)}" if took is not None else "", style="dim")
    doing = words.TRIAL_PHASES.get(story.phase, story.phase) or (
        "running" if story.rounds else "waiting for events"
    )
    text = Text(doing, style="bold")
    elapsed = story.elapsed(now)
    if elapsed is not None:
        text.append(f"  {words.duration(elapsed)}", style="dim")
    if story.resumes:
        text.append(f"  {words.continued(story.resumes[-1].round)}", style="yellow")
    if story.latest is not None and now - story.latest > STALE_SECONDS:
        text.append(f"  last event {words.duration(now - story.latest)} ago", style="yellow")
    return text


def _processes(story: Story, now: float) -> Text | None:
    started = [item for item in story.processes.values() if item.started]
    if not started:
        return None
    text = Text()
    broken = [item for item in started if item.broke]
    for item in broken:
        text.append(f"{item.name} ended by itself (exit code {item.exit_code})  ", style="bold red")
    for item in _restarting(story, now):
        if item.restart is not None:
            text.append(f"{item.name} is started again ({_why(item.restart)})  ", style="yellow")
    # Who is waited for is worth a line only while the trial starts.
    ready = [item for item in started if item.ready_seconds is not None]
    text.append(f"{len(ready)} of {words.plural(len(started), 'process', 'processes')} ready", style="dim")
    again = sum(item.restart is not None for item in started)
    text.append(f", {again} started again" if again else "", style="dim")
    waiting = [item.name for item in started if item.ready_seconds is None and item.exit_code is None]
    if waiting and story.phase in {"start", "register", "ready"}:
        text.append(f"; waiting for {', '.join(waiting[:6])}{' …' if len(waiting) > 6 else ''}", style="dim")
    return text


def _restarting(story: Story, now: float) -> list[Process]:
    """Return the processes that were started again just now and have not said that they are ready."""
    found = [item for item in story.processes.values() if item.restart is not None and not item.broke]
    return [item for item in found if item.restart and now - (item.restart.when or now) < STALE_SECONDS]


def _why(restart: Restart) -> str:
    nth = "" if restart.attempt is None else f"attempt {restart.attempt}"
    return ", ".join(part for part in (restart.why, nth) if part) or "no reason was told"


def _progress(story: Story) -> RenderableType:
    planned = story.planned or 1
    done = len(story.completed)
    row = Table.grid(padding=(0, 1))
    current = story.current
    words_now = f"round {min(done, planned)} of {planned} done"
    if current is not None and not current.ended:
        words_now += ", closing evaluation" if current.closing else f", round {current.number} under way"
    row.add_row(ProgressBar(total=planned, completed=min(done, planned), width=BAR_WIDTH), Text(words_now))
    return row


def _sites(story: Story, now: float) -> Table:
    table = Table(expand=False, box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    models = story.models_seen or [""]
    title = words.figure_title(story.primary) if story.primary else "figure"
    for name in ("Site", "Doing", "Step", "For"):
        table.add_column(name, no_wrap=True)
    for model in models:
        table.add_column(f"{title} {model}".strip(), justify="right", no_wrap=True)
    for name in ("Down", "Up"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("State", no_wrap=True, overflow="ellipsis")
    for alias, site in story.sites.items():
        doing = site.activity
        since = None if doing.since is None or story.ended else max(now - doing.since, 0.0)
        cells = [
            Text(alias, style="bold"),
            Text(words.DOING.get(doing.phase, doing.phase)),
            Text(_step(site)),
            Text(words.duration(since) if since is not None else ""),
            *(Text(_latest(story, alias, model)) for model in models),
            *(Text(words.size(_moved(story, alias, direction))) for direction in DIRECTIONS),
            _state(story, site, now),
        ]
        table.add_row(*cells)
    return table


def _step(site: Site) -> str:
    step, steps = site.activity.step, site.activity.steps
    if step is None:
        return ""
    return f"{step}/{steps}" if steps else str(step)


def _latest(story: Story, alias: str, model: str) -> str:
    series = story.series(alias, model) if model else {}
    if not series:
        return words.NONE
    number = max(series)
    return f"{words.figure(story.primary, series[number])} r{number}"


def _moved(story: Story, alias: str, direction: str) -> int | None:
    carried = story.carried(alias, direction)
    return story.messages(alias, direction) if carried is None else carried


def _state(story: Story, site: Site, now: float) -> Text:
    broken = [item.name for item in story.processes.values() if item.site == site.alias and item.broke]
    if broken:
        return Text(f"{broken[0]} ended", style="bold red")
    restarting = [item.name for item in _restarting(story, now) if item.site == site.alias]
    if restarting:
        return Text(f"{restarting[0]} is started again", style="yellow")
    if site.refused is not None:
        return Text(f"refused: {site.refused.code}", style="bold red")
    current = story.current
    place = current.sites.get(site.alias) if current else None
    if place is None:
        return Text("ready", style="green") if site.ready else Text("starting", style="dim")
    if place.failure is not None:
        return Text(f"failed: {place.failure.code}", style="bold red")
    if place.answered:
        return Text("ok" if not place.retries else f"ok, was asked again ({place.retries})", style="green")
    if place.retries:
        return Text(_asked_again(place), style="yellow")
    before = story.rounds.get(current.number - 1) if current else None
    if before is not None and site.alias in before.sites and before.sites[site.alias].late:
        return Text(f"its answer to round {before.number} came too late", style="yellow")
    return Text("working" if place.asked else "not asked", style="dim")


def _asked_again(place: SiteRound) -> str:
    """Return how a site stands that is being asked again: "not reached, asked again (2)"."""
    code = place.trouble.code if place.trouble else "unknown"
    return f"{'not reached' if code in _NOT_REACHED else code}, asked again ({place.retries})"


_NOT_REACHED = frozenset({"transport", "worker", "cancelled", "unknown"})


def line_of(event: dict[str, Any], story: Story) -> str | None:
    """Return the line that an event is worth in a log, None for the many that are worth none.

    Args:
        event: The event.
        story: The story with the event already in it.
    """
    name, site = event["event"], str(event.get("site", ""))
    if name == "trial.phase":
        phase = str(event.get("phase", ""))
        return _timed(event, story, words.TRIAL_PHASES.get(phase, phase))
    if name == "process.exit" and event.get("expected") is not True:
        return _timed(event, story, f"{event.get('name')} ended by itself (exit code {event.get('code')})")
    if name == "run.start":
        size = f", {words.count(story.parameters)} trainable values" if story.parameters else ""
        return _timed(
            event, story, f"run of {story.method}: {words.plural(story.planned or 0, 'round')}{size}"
        )
    if name in _FAULTS:
        told = _FAULTS[name](event, story)
        return _timed(event, story, told) if told else None
    if name == "site.ready" and site in story.sites:
        cases = ", ".join(f"{count} {split}" for split, count in story.sites[site].cases.items())
        return _timed(event, story, f"{site} is ready: {cases or 'no'} cases")
    if name in {"site.refused", "site.failed", "warning"}:
        what = {"site.refused": "refused", "site.failed": "failed", "warning": "warning"}[name]
        message = str(event.get("message", "")).removeprefix(f"{site}: ")
        return _timed(event, story, f"{site or 'coordinator'} {what} ({event.get('code')}): {message}")
    if name == "round.end" and (item := story.rounds.get(integer(event, "round") or 0)) is not None:
        return _timed(event, story, _round_line(item, story))
    if name in {"run.end", "trial.end"}:
        return _timed(event, story, _end_line(name.partition(".")[0], story))
    return None


def _retry_line(event: dict[str, Any], story: Story) -> str:
    site, item = str(event.get("site", "")), story.rounds.get(integer(event, "round") or 0)
    place = item.sites.get(site) if item else None
    if place is None:
        return ""
    message = place.trouble.message.removeprefix(f"{site}: ") if place.trouble else ""
    return f"{site} {_asked_again(place)}: {message}"


def _late_line(event: dict[str, Any], story: Story) -> str:
    return f"{event.get('site', '')} answered round {event.get('round')} too late; the answer is refused"


def _joined_line(event: dict[str, Any], story: Story) -> str:
    cases = integer(event, "cases")
    told = "" if cases is None else f" with {words.plural(cases, 'case')}"
    return f"{event.get('site', '')} takes part from round {event.get('round')}{told}"


def _resume_line(event: dict[str, Any], story: Story) -> str:
    return f"the run is {words.continued(integer(event, 'round'))}"


def _refused_line(event: dict[str, Any], story: Story) -> str:
    what = f"the checkpoint of round {event.get('round')} is refused ({event.get('code')})"
    return f"{what}: {event.get('message', '')} The one before it is used."


def _restart_line(event: dict[str, Any], story: Story) -> str:
    process = story.processes.get(str(event.get("name", "")))
    return f"{process.name} is started again ({_why(process.restart)})" if process and process.restart else ""


_FAULTS: dict[str, Callable[[dict[str, Any], Story], str]] = {
    "site.retry": _retry_line,
    "site.late": _late_line,
    "site.joined": _joined_line,
    "run.resume": _resume_line,
    "checkpoint.refused": _refused_line,
    "process.restart": _restart_line,
}


def _timed(event: dict[str, Any], story: Story, text: str) -> str:
    when = number(event, "t")
    since = when - story.begun if when is not None and story.begun is not None else 0.0
    return f"[{since:7.1f} s] {text}"


def _round_line(item: Round, story: Story) -> str:
    what = "closing evaluation" if item.closing else f"round {item.number}/{story.planned or '?'}"
    text = f"{what} in {words.duration(item.seconds)} (overhead {words.duration(item.overhead)})"
    if item.loss is not None:
        text += f", loss {item.loss:.4f}"
    models = [
        model
        for model in story.models_seen
        if any(item.number - 1 in story.series(a, model) for a in story.sites)
    ]
    if models:
        figures = [
            f"{alias} "
            + "/".join(
                words.figure(story.primary, story.series(alias, model).get(item.number - 1))
                for model in models
            )
            for alias in story.sites
        ]
        of = f"after round {item.number - 1}" if item.number > 1 else "of the initial model"
        text += f" · {words.figure_title(story.primary)} {of} ({'/'.join(models)}): {', '.join(figures)}"
    if item.missing:
        text += " · missing: " + ", ".join(f"{alias} ({why.code})" for alias, why in item.missing.items())
    return text


def _end_line(what: str, story: Story) -> str:
    verdict = story.run_end if what == "run" else story.trial_end
    assert verdict is not None
    if verdict.failure is not None:
        return f"{what} failed ({verdict.failure.code}): {verdict.failure.message}"
    return f"{what} completed in {words.duration(verdict.seconds)}"
