"""The story of a run: what its event files say, in typed form, and the figures that follow from them.

Nothing here is estimated. A figure whose events are absent is None, a table whose events are absent is empty, and a
run that was cut anywhere is told as far as it went. `ops/story_reader.py` fills a story from the files, event by event,
so the live view and the report see the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ops.story_parts import (
    NO_REASON,
    Activity,
    Attempt,
    Failure,
    Figures,
    Joined,
    Masks,
    Network,
    Notice,
    Process,
    RefusedCheckpoint,
    Restart,
    Resume,
    Round,
    SavedModel,
    Site,
    SiteRound,
    Transport,
    Verdict,
    Witness,
)

DOWN, UP = "down", "up"
DIRECTIONS = (DOWN, UP)
GLOBAL, PERSONAL = "global", "personal"
VALIDATION, TEST = "validation", "test"
LOWER_IS_BETTER = frozenset({"hd95", "assd", "loss", "brier", "ece", "nll", "mae", "mse", "rmse"})

__all__ = [
    "NO_REASON", "Activity", "Attempt", "Failure", "Figures", "Joined", "Masks", "Network", "Notice", "Process",
    "RefusedCheckpoint", "Restart", "Resume", "Round", "SavedModel", "Site", "SiteRound", "Story", "Transport", "Verdict", "Witness",
]  # fmt: skip


@dataclass
class Story:
    """Everything that is known of a run, over all its attempts.

    A run that was interrupted and continued is one run: a round that was run again stands here as it was run last.

    Attributes:
        commands: The operator's command, each time it was given.
        servings: The server, each time it began.
        replaced: Rounds that were run again, as they had been before; they count in bytes alone.
        whole: Whole rounds that the last server told when it ended; None while one goes on.
        checkpoint: Round of the newest checkpoint.
    """

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
    commands: list[Attempt] = field(default_factory=list)
    servings: list[Attempt] = field(default_factory=list)
    replaced: list[Round] = field(default_factory=list)
    whole: int | None = None
    checkpoint: int | None = None
    resumes: list[Resume] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    refused_checkpoints: list[RefusedCheckpoint] = field(default_factory=list)
    joined: list[Joined] = field(default_factory=list)
    events: int = 0
    unreadable: int = 0

    @property
    def verdict(self) -> Verdict | None:
        """How the last attempt ended; None while it goes on, or if it was cut off.

        The command's own verdict counts before the server's: it also knows of processes and keys.
        """
        return self.trial_end or self.run_end

    @property
    def ended(self) -> bool:
        """Nothing more will come: the command, or without one the server, told its verdict."""
        return self.trial_end is not None or (not self.trial and self.run_end is not None)

    @property
    def attempts(self) -> list[Attempt]:
        """The tries at the run in order: the command's where there is one, else the server's."""
        return self.commands or self.servings

    @property
    def seconds(self) -> float | None:
        """Seconds that the run took, over all attempts, without the time between them; None before its verdict."""
        return self._sum(self.attempts) if self.verdict is not None else None

    @property
    def server_seconds(self) -> float | None:
        """Seconds of them in the server."""
        return self._sum(self.servings) if self.run_end is not None else None

    @staticmethod
    def _sum(attempts: list[Attempt]) -> float | None:
        each = [item.seconds for item in attempts]
        known = [value for value in each if value is not None]
        return sum(known) if known and len(known) == len(each) else None

    def elapsed(self, now: float) -> float | None:
        """Return the seconds until now that the run was worked on, without the time between attempts."""
        last = self.attempts[-1].begun if self.attempts else self.begun
        if last is None:
            return None
        return max(now - last, 0.0) + sum(item.seconds or 0.0 for item in self.attempts[:-1])

    @property
    def resumable(self) -> bool:
        """`wardround resume` can continue it: a trial or simulation whose server had begun, and that did not end well."""
        ended_well = any(end is not None and end.ok for end in (self.run_end, self.trial_end))
        return self.trial and bool(self.servings or self.rounds) and not ended_well

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
        most = float("inf") if self.whole is None else self.whole
        return [item for item in self.training if item.ended and item.contributed and item.number <= most]

    @property
    def masks(self) -> dict[int, Masks]:
        """What was told of the sites' masks, by round; empty where the method has none."""
        return {item.number: item.masks for item in self.training if item.masks is not None}

    @property
    def networks(self) -> dict[int, Network]:
        """What was told of the network between sites, by round; empty where the method has none."""
        return {item.number: item.network for item in self.training if item.network is not None}

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
        """Return a site's bytes of the whole run by kind, with those of rounds that were run again."""
        total: dict[str, int] = {}
        for item in (*self.rounds.values(), *self.replaced):
            for kind, size in item.sites.get(alias, SiteRound()).bytes.get(direction, {}).items():
                total[kind] = total.get(kind, 0) + size
        return total

    def messages(self, alias: str, direction: str) -> int | None:
        """Return the bytes of a site's messages, None if none were counted."""
        cycles = (*self.rounds.values(), *self.replaced)
        counted = [item.sites[alias].moved(direction) for item in cycles if alias in item.sites]
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
