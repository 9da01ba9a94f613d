"""The story of a run: what its event files say, in typed form, and the figures that follow from them.

Nothing here is estimated. A figure whose events are absent is None, a table whose events are absent is empty, and a
run that was cut anywhere is told as far as it went. `ops/story_reader.py` fills a story from the files, event by event,
so the live view and the report see the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DOWN, UP = "down", "up"
DIRECTIONS = (DOWN, UP)
GLOBAL, PERSONAL = "global", "personal"
VALIDATION, TEST = "validation", "test"
LOWER_IS_BETTER = frozenset({"hd95", "assd", "loss", "brier", "ece", "nll", "mae", "mse", "rmse"})
NO_REASON = ("unknown", "No reason was recorded.")


@dataclass(frozen=True)
class Failure:
    """Why something did not happen: a code and a safe sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class Figures:
    """A site's figures for one model.

    Attributes:
        round: Round whose result was evaluated; 0 is the initial model.
        split: "validation" or "test".
        model: "global" or "personal".
        cases: Evaluated cases, None if not told.
        values: Figure by name; a class's figure is "name/class".
        primary: Name of the main figure.
    """

    round: int
    split: str
    model: str
    cases: int | None
    values: dict[str, float]
    primary: str

    @property
    def main(self) -> float | None:
        """The main figure."""
        return self.values.get(self.primary)


@dataclass
class SiteRound:
    """One site in one round; None and empty where nothing was told.

    Attributes:
        asked: A message went out to it.
        answered: Its answer was taken.
        waited: Seconds between question and answer, at the coordinator.
        local: Seconds in the worker.
        phases: Seconds in the worker by phase.
        relay: What its relay said of itself (cpu_s, peak_mb).
        bytes: Bytes by direction and kind.
        failure: Why it did not contribute.
    """

    asked: bool = False
    answered: bool = False
    waited: float | None = None
    local: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    cases: int | None = None
    loss: float | None = None
    relay: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    failure: Failure | None = None

    def moved(self, direction: str) -> int | None:
        """Return the bytes of a direction, None if none were counted."""
        kinds = self.bytes.get(direction)
        return None if kinds is None else sum(kinds.values())


@dataclass
class Round:
    """One cycle of the run.

    Attributes:
        number: From 1; the closing evaluation has the number after the last round.
        closing: True for the closing evaluation.
        ended: The server told its end.
        seconds, slowest, overhead, loss: As the server told them.
    """

    number: int
    closing: bool = False
    asked: list[str] = field(default_factory=list)
    ended: bool = False
    seconds: float | None = None
    slowest: float | None = None
    overhead: float | None = None
    loss: float | None = None
    contributed: list[str] = field(default_factory=list)
    said_missing: list[str] = field(default_factory=list)
    cases: dict[str, int] = field(default_factory=dict)
    sites: dict[str, SiteRound] = field(default_factory=dict)

    def site(self, alias: str) -> SiteRound:
        """Return what is known of a site, making room for it."""
        return self.sites.setdefault(alias, SiteRound())

    @property
    def missing(self) -> dict[str, Failure]:
        """Who did not contribute, and why."""
        found = {alias: item.failure for alias, item in self.sites.items() if item.failure}
        return found | {alias: Failure(*NO_REASON) for alias in self.said_missing if alias not in found}

    @property
    def slowest_site(self) -> SiteRound | None:
        """The site that computed longest: it decides how long the round takes."""
        timed = [item for item in self.sites.values() if item.local is not None]
        return max(timed, key=lambda item: item.local or 0.0, default=None)

    def kinds(self, direction: str) -> dict[str, int]:
        """Return the bytes of all sites by kind."""
        total: dict[str, int] = {}
        for item in self.sites.values():
            for kind, size in item.bytes.get(direction, {}).items():
                total[kind] = total.get(kind, 0) + size
        return total


@dataclass
class Transport:
    """What a site's connection carried, summed over restarts of its SuperNode; `last` is its last own count."""

    down: int = 0
    up: int = 0
    calls: int = 0
    last: tuple[int, int, int] = (0, 0, 0)


@dataclass
class Activity:
    """What a worker is doing just now."""

    phase: str = ""
    round: int | None = None
    step: int | None = None
    steps: int | None = None
    since: float | None = None


@dataclass
class Site:
    """A hospital, as far as the events tell."""

    alias: str
    cases: dict[str, int] = field(default_factory=dict)
    ready: bool = False
    device: str = ""
    software: str = ""
    refused: Failure | None = None
    transport: Transport | None = None
    slices: int | None = None
    activity: Activity = field(default_factory=Activity)
    figures: dict[tuple[int, str, str], Figures] = field(default_factory=dict)


@dataclass
class Process:
    """A process of the run. Memory in MB."""

    name: str
    site: str = ""
    started: bool = False
    ready_seconds: float | None = None
    exit_code: int | None = None
    expected: bool = False
    peak: float | None = None
    gpu: float | None = None

    @property
    def broke(self) -> bool:
        """It ended without having been told to."""
        return self.exit_code is not None and not self.expected


@dataclass(frozen=True)
class Notice:
    """A warning."""

    code: str
    message: str
    site: str = ""
    round: int | None = None


@dataclass(frozen=True)
class SavedModel:
    """A model file."""

    name: str
    bytes: int | None
    round: int | None
    site: str = ""


@dataclass(frozen=True)
class Verdict:
    """How something ended."""

    ok: bool
    seconds: float | None = None
    rounds: int | None = None
    failure: Failure | None = None


@dataclass
class Story:
    """Everything that is known of a run."""

    run: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    task: str = ""
    data: str = ""
    runtime: str = ""
    planned: int | None = None
    seed: int | None = None
    parameters: int | None = None
    model_bytes: int | None = None
    phase: str = ""
    begun: float | None = None
    latest: float | None = None
    sites: dict[str, Site] = field(default_factory=dict)
    rounds: dict[int, Round] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    refused: dict[str, Failure] = field(default_factory=dict)
    warnings: list[Notice] = field(default_factory=list)
    models: dict[str, SavedModel] = field(default_factory=dict)
    trial: bool = False
    run_end: Verdict | None = None
    trial_end: Verdict | None = None
    events: int = 0
    unreadable: int = 0

    @property
    def verdict(self) -> Verdict | None:
        """How the run ended; None while it goes on, or if it was cut off.

        The command's own verdict counts before the server's: it also knows of processes and keys.
        """
        return self.trial_end or self.run_end

    @property
    def ended(self) -> bool:
        """Nothing more will come: the command, or without one the server, told its verdict."""
        return self.trial_end is not None or (not self.trial and self.run_end is not None)

    @property
    def cycles(self) -> list[Round]:
        """All rounds in order, the closing evaluation last."""
        return [self.rounds[number] for number in sorted(self.rounds)]

    @property
    def training(self) -> list[Round]:
        """The rounds in which sites trained."""
        return [item for item in self.cycles if not item.closing]

    @property
    def completed(self) -> list[Round]:
        """The training rounds that were whole; a last round that missed its quorum is none."""
        most = self.run_end.rounds if self.run_end and self.run_end.rounds is not None else float("inf")
        return [item for item in self.training if item.ended and item.contributed and item.number <= most]

    @property
    def current(self) -> Round | None:
        """The round that is going on, or the last one."""
        return self.cycles[-1] if self.rounds else None

    @property
    def primary(self) -> str:
        """Name of the main figure, empty while none was told."""
        for site in self.sites.values():
            for item in site.figures.values():
                return item.primary
        return ""

    @property
    def models_seen(self) -> list[str]:
        """The models that were evaluated, the global one first."""
        kinds = {item.model for site in self.sites.values() for item in site.figures.values()}
        return [kind for kind in (GLOBAL, PERSONAL) if kind in kinds] + sorted(kinds - {GLOBAL, PERSONAL})

    @property
    def own_model(self) -> str:
        """Which model is a hospital's own: the personal one where the method makes one, else the global one."""
        seen = self.models_seen
        return PERSONAL if PERSONAL in seen else (seen or [""])[0]

    @property
    def overheads(self) -> list[float]:
        """Seconds of the completed training rounds beyond the slowest site's own work."""
        return [item.overhead for item in self.completed if item.overhead is not None]

    def series(self, alias: str, model: str, split: str = VALIDATION) -> dict[int, float]:
        """Return a site's main figure by evaluated round."""
        found = {
            item.round: item.main
            for item in self.sites[alias].figures.values()
            if item.model == model and item.split == split and item.main is not None
        }
        return dict(sorted(found.items()))

    def final_place(self) -> tuple[str, int] | None:
        """Return (split, round) of the figures to be quoted as the result, None if there are none.

        Test figures if there are any, else validation figures of the last round that was evaluated in a whole round.
        """
        found = {(item.split, item.round) for site in self.sites.values() for item in site.figures.values()}
        test = [place for place in found if place[0] == TEST]
        if test:
            return max(test, key=lambda place: place[1])
        rounds = sorted(number for split, number in found if split == VALIDATION)
        if not rounds:
            return None
        # Round k's result is evaluated in cycle k + 1.
        whole = {
            item.number - 1 for item in (*self.completed, *(item for item in self.cycles if item.closing))
        }
        return VALIDATION, ([number for number in rounds if number in whole] or rounds)[-1]

    def final(self, alias: str, model: str) -> Figures | None:
        """Return a site's figures to be quoted as its result."""
        place = self.final_place()
        if place is None:
            return None
        return self.sites[alias].figures.get((place[1], place[0], model))

    def finals(self, model: str) -> dict[str, float]:
        """Return the sites' main figures to be quoted, without the sites that have none."""
        found = {alias: self.final(alias, model) for alias in self.sites}
        return {
            alias: item.main for alias, item in found.items() if item is not None and item.main is not None
        }

    def worst(self, model: str) -> tuple[str, float] | None:
        """Return (alias, main figure) of the site that fares worst."""
        finals = self.finals(model)
        if not finals:
            return None
        pick = max if self.primary.split("/")[0] in LOWER_IS_BETTER else min
        alias = pick(finals, key=lambda name: finals[name])
        return alias, finals[alias]

    def kinds(self, alias: str, direction: str) -> dict[str, int]:
        """Return a site's bytes of the whole run by kind."""
        total: dict[str, int] = {}
        for item in self.rounds.values():
            for kind, size in item.sites.get(alias, SiteRound()).bytes.get(direction, {}).items():
                total[kind] = total.get(kind, 0) + size
        return total

    def messages(self, alias: str, direction: str) -> int | None:
        """Return the bytes of a site's messages, None if none were counted."""
        counted = [item.sites[alias].moved(direction) for item in self.rounds.values() if alias in item.sites]
        known = [size for size in counted if size is not None]
        return sum(known) if known else None

    def carried(self, alias: str, direction: str) -> int | None:
        """Return what a site's connection carried, None if that was not measured."""
        transport = self.sites[alias].transport
        if transport is None:
            return None
        return transport.down if direction == DOWN else transport.up

    def framing(self, alias: str, direction: str) -> int | None:
        """Return what TLS and Flower added to a site's messages.

        None if either side was not measured, or if the connection's last count is older than the last message (a run
        that was cut), so that the difference would mean nothing.
        """
        carried, messages = self.carried(alias, direction), self.messages(alias, direction)
        if carried is None or messages is None or carried < messages:
            return None
        return carried - messages

    def total(self, direction: str, *, wire: bool) -> int | None:
        """Return the bytes of all sites; on the wire only if every site measured it."""
        of = self.carried if wire else self.messages
        counted = [of(alias, direction) for alias in self.sites]
        known = [size for size in counted if size is not None]
        return sum(known) if known and (len(known) == len(counted) or not wire) else None
