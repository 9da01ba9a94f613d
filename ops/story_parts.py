"""The parts that a run's story (`ops/story.py`) is made of: sites, rounds, processes, attempts, and what went wrong.

Plain records. What an event did not tell is None, empty or False; nothing is filled in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
        retries: How often it was asked again.
        trouble: Why it was asked again the last time.
        late: Answers of it that came after the round, or twice, and were refused.
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
    retries: int = 0
    trouble: Failure | None = None
    late: int = 0

    def moved(self, direction: str) -> int | None:
        """Return the bytes of a direction, None if none were counted."""
        kinds = self.bytes.get(direction)
        return None if kinds is None else sum(kinds.values())


@dataclass(frozen=True)
class Masks:
    """What the masks of a round look like side by side (common/mask_figures.py); lists are in the order of `sites`.

    Attributes:
        sites: Whose masks they are.
        parameters: Values that may be sensitive.
        density: Share of them that is sensitive, by site.
        tensors: Names, with their `sizes`.
        by_tensor: Density by site and tensor.
        overlap: Jaccard index of every two sites, None where neither has a sensitive value.
        chance: The same as random masks of these densities would have; `chance_by_tensor` of these in every tensor.
        holders: How many values 0, 1, ... sites find sensitive.
        tensors_left_out, sites_left_out: How many are not told.
    """

    sites: list[str]
    parameters: int
    density: list[float]
    tensors: list[str]
    sizes: list[int]
    by_tensor: list[list[float]]
    overlap: list[list[float | None]]
    chance: list[list[float | None]]
    chance_by_tensor: list[list[float | None]]
    holders: list[int]
    tensors_left_out: int = 0
    sites_left_out: int = 0


@dataclass(frozen=True)
class Network:
    """Which sites a round joined, and how far their own parts are apart (common/methods/pfednet.py).

    Attributes:
        edges: Pairs of aliases; None where they were too many to be told.
        count: How many pairs.
        lam: The λ that was used, absolute.
        before, after: Mean ‖z_i - z_j‖₂ over the edges, before and after the fusion step.
        iterations: Of the solver.
        converged: The solver ended within its tolerance.
    """

    edges: list[tuple[str, str]] | None
    count: int
    lam: float | None
    before: float | None
    after: float | None
    iterations: int
    converged: bool


@dataclass
class Round:
    """One cycle of the run.

    Attributes:
        number: From 1; the closing evaluation has the number after the last round.
        closing: True for the closing evaluation.
        started: The server told its begin.
        attempt: Which of the server's attempts ran it, from 0.
        again: How often it had been begun before and was run again after an interruption.
        ended: The server told its end.
        seconds, slowest, overhead, loss: As the server told them.
        masks: What the method told of the sites' masks.
        network: What it told of the network between them.
    """

    number: int
    closing: bool = False
    started: bool = False
    attempt: int = 0
    again: int = 0
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
    masks: Masks | None = None
    network: Network | None = None

    def site(self, alias: str) -> SiteRound:
        """Return what is known of a site, making room for it."""
        return self.sites.setdefault(alias, SiteRound())

    @property
    def missing(self) -> dict[str, Failure]:
        """Who did not contribute, and why."""
        found = {alias: item.failure for alias, item in self.sites.items() if item.failure}
        return found | {alias: Failure(*NO_REASON) for alias in self.said_missing if alias not in found}

    @property
    def troubled(self) -> bool:
        """A site was missing, had to be asked again or answered too late, or the round was run again."""
        return bool(
            self.missing or self.again or any(item.retries or item.late for item in self.sites.values())
        )

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


@dataclass(frozen=True)
class Witness:
    """A ledger's head as the coordinator noted it: entries and hash, and the round it came with."""

    round: int | None
    entries: int
    head: str


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
    styles: int | None = None
    activity: Activity = field(default_factory=Activity)
    figures: dict[tuple[int, str, str], Figures] = field(default_factory=dict)
    witness: Witness | None = None


@dataclass
class Process:
    """A process of the run. Memory in MB; `restart` is its last one, unless it has said since that it is ready."""

    name: str
    site: str = ""
    started: bool = False
    ready_seconds: float | None = None
    exit_code: int | None = None
    expected: bool = False
    peak: float | None = None
    gpu: float | None = None
    restart: Restart | None = None

    @property
    def broke(self) -> bool:
        """It ended without having been told to, and was not started again."""
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


@dataclass(frozen=True)
class Restart:
    """A process that the supervisor starts again. `why`: exited, silent or lost; `wait` in seconds."""

    name: str
    site: str = ""
    why: str = ""
    attempt: int | None = None
    wait: float | None = None
    when: float | None = None


@dataclass(frozen=True)
class Resume:
    """The server continued from its checkpoint of a round (0: none was), for the attempt-th time."""

    round: int | None
    attempt: int | None = None
    when: float | None = None


@dataclass(frozen=True)
class RefusedCheckpoint:
    """A checkpoint that could not be read, so that the one before it was used."""

    round: int | None
    failure: Failure
    when: float | None = None


@dataclass(frozen=True)
class Joined:
    """A site that came, or came back as another node, while the run went on."""

    site: str
    round: int | None
    cases: int | None = None


@dataclass
class Attempt:
    """One try at the run, by the operator's command or by the server.

    Attributes:
        begun: When it began, seconds since the epoch.
        latest: When it was heard last.
        verdict: How it ended; None while it goes on, or if it was cut off.
        resumed: The round after which it continued, None for a fresh start.
        working: The command is past its preparations.
    """

    begun: float | None = None
    latest: float | None = None
    verdict: Verdict | None = None
    resumed: int | None = None
    working: bool = False

    @property
    def seconds(self) -> float | None:
        """How long it took: as it said itself, or, if it was cut off, from its first event to its last one."""
        if self.verdict is not None:
            return self.verdict.seconds
        if self.begun is None or self.latest is None:
            return None
        return max(self.latest - self.begun, 0.0)

    def heard(self, when: float | None) -> None:
        """Note that it was heard."""
        if when is not None:
            self.begun = when if self.begun is None else min(self.begun, when)
            self.latest = when if self.latest is None else max(self.latest, when)
