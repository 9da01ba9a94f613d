"""A run in one row, as the dashboard, its JSON and its metrics show it: small, and without the story behind it.

What changes with the clock alone (silent since, for how long) is worked out when it is asked for, so a row stays as it
is until its run writes another event.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from ops.dashboard_since import Since, last_seconds, missing_now, waited_for
from ops.story import DOWN, GLOBAL, UP, VALIDATION, Story

RUNNING, OK, FAILED, SILENT, UNREAD = "running", "ok", "failed", "silent", "unread"
STATES = (RUNNING, OK, FAILED, SILENT)
PART, WAITED, MISSING, REFUSED, STARTING, NOT_ASKED = (
    "takes part", "waited for", "missing", "refused", "starting", "not asked",
)  # fmt: skip
MOST_POINTS = 60


@dataclass(frozen=True)
class SiteRow:
    """One site.

    Attributes:
        alias: Its alias.
        state: PART, WAITED, MISSING, REFUSED, STARTING or NOT_ASKED.
        code, message: Why it is missing or refused.
        since: When that began, seconds since the epoch.
        up: It answered when it was last asked, as far as that is decided.
        failures: How often it was missing, over all attempts.
        bytes_up, bytes_down: Of its connection where that is counted, else of its messages; None if neither is.
        seconds: Between question and answer, of its last answer.
    """

    alias: str
    state: str
    code: str = ""
    message: str = ""
    since: float | None = None
    up: bool = False
    failures: int = 0
    bytes_up: int | None = None
    bytes_down: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RunRow:
    """One run.

    Attributes:
        name: Its folder's name.
        problem: Why it could not be read, empty if it could; UNREAD where its turn has not come.
        verdict: OK, FAILED or empty.
        ended: Nothing more will come.
        code, message: Why it failed.
        round: The round under way, or the last one; 0 before the first, None if unknown.
        closing: That is the closing evaluation.
        completed, planned: Whole rounds, and how many there shall be.
        figure, model: Name of the main figure, and of which model `series` is.
        series: (round, mean over sites) of it on validation cases.
        figured: How many sites the last one is of.
        bytes_up, bytes_down: Of all sites.
        wire: They were counted on the wire, not from messages.
        took: Seconds of the whole run; None before its verdict.
        worked: Seconds of the attempts before the last one.
        attempt: When the last attempt began.
        begun, latest: First and newest event, seconds since the epoch.
    """

    name: str
    problem: str = ""
    method: str = ""
    task: str = ""
    data: str = ""
    phase: str = ""
    verdict: str = ""
    ended: bool = False
    code: str = ""
    message: str = ""
    round: int | None = None
    closing: bool = False
    completed: int = 0
    planned: int | None = None
    sites: tuple[SiteRow, ...] = ()
    figure: str = ""
    model: str = ""
    series: tuple[tuple[int, float], ...] = ()
    figured: int = 0
    bytes_up: int | None = None
    bytes_down: int | None = None
    wire: bool = False
    took: float | None = None
    worked: float = 0.0
    attempt: float | None = None
    begun: float | None = None
    latest: float | None = None
    events: int = 0
    unreadable: int = 0
    states: dict[str, list[str]] = field(default_factory=dict)

    def age(self, now: float) -> float | None:
        """Return the seconds since its newest event; None if it has none."""
        return None if self.latest is None else max(now - self.latest, 0.0)

    def state(self, now: float, silent_after: float) -> str:
        """Return RUNNING, OK, FAILED, SILENT, or UNREAD where its events were not read.

        Args:
            now: Seconds since the epoch.
            silent_after: Seconds without an event after which a run that has not ended counts as silent.
        """
        if self.problem:
            return UNREAD
        age = self.age(now)
        quiet = age is not None and age > silent_after
        if self.verdict and (self.ended or quiet):
            return self.verdict
        return SILENT if quiet else RUNNING

    def silent_since(self, now: float, silent_after: float) -> float | None:
        """Return when it was heard last if it is SILENT, else None."""
        return self.latest if self.state(now, silent_after) == SILENT else None

    def seconds(self, now: float, silent_after: float) -> float | None:
        """Return how long the run took, or has been going on; a silent one until it was heard last."""
        if self.took is not None:
            return self.took
        end = now if self.state(now, silent_after) == RUNNING else self.latest
        start = self.begun if self.attempt is None else self.attempt
        return None if start is None or end is None else self.worked + max(end - start, 0.0)


def summary(name: str, story: Story, since: Since, written: float | None) -> RunRow:
    """Return a story's row.

    Args:
        name: The folder's name.
        story: What is known.
        since: Its times.
        written: When an event file was written last: an event from the future, of a clock that was wrong, must not
            hide that a run went silent.
    """
    current, verdict, attempts = story.current, story.verdict, story.attempts
    wire = all(story.total(direction, wire=True) is not None for direction in (UP, DOWN))
    latest = story.latest
    if latest is not None and written is not None:
        latest = min(latest, written)
    sites = tuple(_site(story, since, alias) for alias in story.sites)
    model, series, figured = _series(story)
    return RunRow(
        name,
        method=story.method,
        task=story.task,
        data=story.data,
        phase=story.phase,
        verdict="" if verdict is None else OK if verdict.ok else FAILED,
        ended=story.ended,
        code=verdict.failure.code if verdict and verdict.failure else "",
        message=verdict.failure.message if verdict and verdict.failure else "",
        round=_round(story),
        closing=current is not None and current.closing,
        completed=len(story.completed),
        planned=story.planned,
        sites=sites,
        figure=story.primary,
        model=model,
        series=series,
        figured=figured,
        bytes_up=story.total(UP, wire=wire),
        bytes_down=story.total(DOWN, wire=wire),
        wire=wire,
        took=story.seconds,
        worked=sum(item.seconds or 0.0 for item in attempts[:-1]),
        attempt=attempts[-1].begun if attempts else None,
        begun=story.begun,
        latest=latest,
        events=story.events,
        unreadable=story.unreadable,
        states=_by_state(sites),
    )


def _round(story: Story) -> int | None:
    """Return the round under way or the last one; the closing evaluation counts as the last training round."""
    item = story.current
    if item is None:
        return None if story.planned is None else 0
    return item.number - 1 if item.closing else item.number


def _by_state(sites: tuple[SiteRow, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(site.state, []).append(site.alias)
    return found


def _site(story: Story, since: Since, alias: str) -> SiteRow:
    gone, refused = missing_now(story, alias), story.refused.get(alias)
    code, message, when = "", "", None
    if refused is not None:
        state, code, message, when = REFUSED, refused.code, refused.message, since.refused.get(alias)
    elif gone is not None:
        state, code, message, when = MISSING, gone[0].code, gone[0].message, since.failed.get(alias)
    else:
        state = _present(story, alias)
        when = since.asked.get(alias) if state == WAITED else None
    asked = any(alias in item.sites and item.sites[alias].answered for item in story.rounds.values())
    carried = [story.carried(alias, direction) for direction in (UP, DOWN)]
    counted = [story.messages(alias, direction) for direction in (UP, DOWN)]
    up, down = (known if wire is None else wire for wire, known in zip(carried, counted, strict=True))
    return SiteRow(
        alias, state, code, message, when, asked and gone is None and refused is None,
        since.failures.get(alias, 0), up, down, last_seconds(story, alias),
    )  # fmt: skip


def _present(story: Story, alias: str) -> str:
    """Return the state of a site that is neither missing nor refused."""
    if alias in waited_for(story):
        return WAITED
    item = story.current
    if item is not None and (alias in item.sites or alias in item.contributed):
        return PART
    if item is not None and item.started and item.asked and alias not in item.asked:
        return NOT_ASKED
    return PART if story.sites[alias].ready else STARTING


def _series(story: Story) -> tuple[str, tuple[tuple[int, float], ...], int]:
    """Return (model, (round, mean over sites) of its main figure on validation cases, sites of the last one)."""
    model = story.own_model or GLOBAL
    values: dict[int, list[float]] = {}
    for alias in story.sites:
        for number, value in story.series(alias, model, VALIDATION).items():
            values.setdefault(number, []).append(value)
    points = [(number, statistics.fmean(values[number])) for number in sorted(values)]
    last = len(values[points[-1][0]]) if points else 0
    if len(points) > MOST_POINTS:
        step = (len(points) - 1) / (MOST_POINTS - 1)
        points = [points[round(place * step)] for place in range(MOST_POINTS)]
    return model, tuple(points), last
