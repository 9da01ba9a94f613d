"""The first exchange: which sites are there, and do they fit the run?

Every connected node is asked once. Its answer says its alias and what its data looks like; a site that does not fit is
refused with its name and the field. The run begins when every expected site has answered. Where the coordinator says which
node is which site (server/admitted.py), a node is held to it: it cannot take another site's name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import common
from common.config import RunConfig
from common.errors import (
    CancelledError,
    CredentialError,
    MismatchError,
    PayloadError,
    QuorumError,
    WardroundError,
    safe_sentence,
)
from common.events import EventLog
from common.federation import is_alias
from common.site_summary import SiteSummary, require_fit
from common.versions import require_same
from common.wire import HELLO, Envelope, decode, encode
from server.answers import check_figures, device_of, named, told
from server.link import Answer, Link

SETTLE_SECONDS = 3.0  # without an expected list: how long after the last new site the roster closes
RETRY_SECONDS = 5.0  # a site whose worker is not up yet is asked again after this long
REFUSED_SECONDS = 60.0  # a site that did not fit is asked again in a running round after this long
RETRY_CODES = {"worker", "transport"}


@dataclass
class Roster:
    """The sites of a run.

    Attributes:
        nodes: Flower's node id by alias, in the fixed order of the sites.
        summaries: What each site said of its data.
        cases: Training cases by alias.
        refused: (code, sentence) by alias of those that do not fit.
    """

    nodes: dict[str, int] = field(default_factory=dict)
    summaries: dict[str, SiteSummary] = field(default_factory=dict)
    cases: dict[str, int] = field(default_factory=dict)
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)


class RosterCall:
    """Asks every node once and collects the roster.

    Args:
        link: How sites are reached.
        run: Run identifier.
        config: The run's configuration.
        events: Where it is told.
        versions: What this end runs (common/versions.py); a site must run the same.
        admitted: Returns the alias that each node's key was admitted for; None where nobody knows.
    """

    def __init__(
        self,
        link: Link,
        run: str,
        config: RunConfig,
        events: EventLog,
        versions: dict[str, str],
        admitted: Callable[[], Mapping[int, str] | None] = lambda: None,
    ) -> None:
        self.versions = versions
        self.admitted = admitted
        self.link = link
        self.run = run
        self.config = config
        self.events = events
        self.roster = Roster()
        self._asked: dict[int, float] = {}
        self._tickets: dict[str, int] = {}
        self._last_new = time.monotonic()
        self._patience = config.rounds.ready_timeout
        self._trouble: dict[int, tuple[str, str]] = {}
        self._refused: dict[int, tuple[str, float]] = {}
        self._strange: set[int] = set()
        self._parted: set[str] = set()
        self._parts = encode(
            Envelope(
                run, 0, HELLO, "", rounds=config.rounds.rounds, config=config.to_json(), versions=versions
            )
        )

    def collect(self, patience: float | None = None) -> Roster:
        """Return the roster once it is complete.

        Args:
            patience: Seconds to wait; the configuration's `ready_timeout` where None.

        Raises:
            QuorumError: Expected sites did not answer in time, naming them.
            MismatchError: A site does not fit and the run cannot do without it.
        """
        self._patience = patience or self.config.rounds.ready_timeout
        limit = time.monotonic() + self._patience
        expected = set(self.config.sites)
        while time.monotonic() < limit:
            self.dismiss()
            self._part_with_revoked()
            self._ask_new(limit)
            for answer in self.link.poll(self._tickets):
                self._take(answer)
            known = self.roster.nodes.keys() | self.roster.refused.keys()
            if expected and expected <= known:
                break
            settled = time.monotonic() - self._last_new > SETTLE_SECONDS and not self._open()
            if not expected and self.roster.nodes and settled:
                break
            time.sleep(self.config.rounds.poll)
        return self._close(expected)

    def look(self) -> list[str]:
        """Ask nodes that appeared since, take what they answered, and return the sites that joined; waits for nobody."""
        before, now = dict(self.roster.nodes), time.monotonic()
        for node, (alias, when) in list(self._refused.items()):
            if now - when > REFUSED_SECONDS:  # perhaps mended since
                self._asked[node] = 0.0
                del self._refused[node]
                self.roster.refused.pop(alias, None)
        self._ask_new(time.monotonic() + self.config.rounds.ready_timeout)
        for answer in self.link.poll(self._tickets):
            self._take(answer)
        joined = [alias for alias, node in self.roster.nodes.items() if before.get(alias) != node]
        if joined:
            self.roster.nodes = self._ordered(self.roster.nodes)
        return joined

    def revoked(self, alias: str) -> tuple[str, str] | None:
        """Return (code, sentence) if the key is not admitted any more by which a site of the roster takes part."""
        known = self.admitted()
        if known is None or known.get(self.roster.nodes.get(alias, 0)) == alias:
            return None
        return CredentialError.code, f"{alias}: its key is not admitted any more; the site is not asked."

    def _part_with_revoked(self) -> None:
        """Wait for no site whose key is not admitted any more: it cannot come, unless a new key is approved meanwhile."""
        known = self.admitted()
        admitted = set(self.config.sites if known is None else known.values())
        for alias in self._parted & admitted:
            self._parted.discard(alias)
            self.roster.refused.pop(alias, None)
        for alias in self.config.sites:
            if alias not in admitted | self._parted:
                message = f"{alias}: its key is not admitted any more; the site is not waited for."
                self._parted.add(alias)
                self.roster.refused[alias] = (CredentialError.code, message)
                self.events.emit("site.refused", site=alias, code=CredentialError.code, message=message)

    def dismiss(self) -> list[str]:
        """Take the sites off the roster whose node's key is not admitted any more, and return them."""
        gone = {alias: why for alias in self.roster.nodes if (why := self.revoked(alias))}
        for alias, why in gone.items():
            del self.roster.nodes[alias]
            self._parted.add(alias)
            self.roster.refused[alias] = why
            self.events.emit("site.refused", site=alias, code=why[0], message=why[1])
        return list(gone)

    def _ordered(self, nodes: dict[str, int]) -> dict[str, int]:
        order = [alias for alias in self.config.sites if alias in nodes] or sorted(nodes)
        return {alias: nodes[alias] for alias in order}

    def _open(self) -> bool:
        """Return True while an answer is awaited or a node will be asked again."""
        return bool(self._tickets) or any(again < float("inf") for again in self._asked.values())

    def _close(self, expected: set[str]) -> Roster:
        nodes, refused = self.roster.nodes, self.roster.refused
        silent = sorted(expected - nodes.keys() - refused.keys())
        needed = needed_sites(self.config, len(expected) or len(nodes.keys() | refused.keys()))
        trouble = dict(self._trouble.values())
        for alias in silent:
            waited = f"{alias}: gave no first answer within {self._patience:.0f} s"
            message = trouble.get(alias, f"{waited}; is its SuperNode running and registered?")
            self.events.emit("site.refused", site=alias, code="silent", message=message)
        if len(nodes) < max(needed, 1):
            said = " ".join([*(sentence for _, sentence in refused.values()), *trouble.values()])
            if refused and (not expected or expected & refused.keys()):
                raise MismatchError(f"{said} Silent: {', '.join(silent)}." if silent else said)
            raise QuorumError(
                f"{len(nodes)} of {len(expected) or 'any number of'} sites answered, {max(needed, 1)} are needed; "
                f"silent: {', '.join(silent) or 'all'}. Check that each site's SuperNode and worker run, then start again. "
                f"{said}".rstrip()
            )
        self.roster.nodes = self._ordered(nodes)
        return self.roster

    def _ask_new(self, limit: float) -> None:
        now, known = time.monotonic(), self.admitted()
        for node in self.link.nodes():
            if now < self._asked.get(node, 0.0) or not self._belongs(node, known):
                continue
            ticket = self.link.ask(node, self._parts, phase=HELLO, round=0, ttl=max(limit - now, 1.0))
            self._asked[node] = float("inf") if ticket else now + RETRY_SECONDS
            self._last_new = now
            if ticket:
                self._tickets[ticket] = node

    def _belongs(self, node: int, known: Mapping[int, str] | None) -> bool:
        """Return whether a node may be asked: its key is admitted, for a site of this run."""
        if known is None:
            return True
        if node in known:
            return not self.config.sites or known[node] in self.config.sites
        if node not in self._strange:
            self._strange.add(node)
            message = (
                f"{_number(node)}: is connected with a key that is not admitted to this run; it is not asked."
            )
            self.events.emit("warning", code=CredentialError.code, message=message)
        return False

    def _take(self, answer: Answer) -> None:
        node = self._tickets.pop(answer.ticket, None)
        if node is None:  # answered already
            return
        self._trouble.pop(node, None)
        known = self.admitted()
        if not self._belongs(node, known):  # its key was revoked while its answer was on the way
            return
        bound = known[node] if known is not None else ""
        alias = bound or _number(node)
        if answer.parts is None:
            self._refuse(alias, node, "transport", f"{alias}: {answer.error}.")
            return
        try:
            envelope = decode(answer.parts)
            if envelope.failure:  # first of all: a relay that cannot reach its worker may not know its alias
                usable = envelope.site in self.config.sites or (
                    not self.config.sites and is_alias(envelope.site)
                )
                name = bound or (envelope.site if usable else alias)
                self._refuse(name, node, *told(envelope.failure, ""))
                return
            claimed = self._alias(envelope, alias, bound)
            if self.roster.nodes.get(claimed, node) != node:
                raise MismatchError(
                    f"{alias}: says it is '{claimed}', as another node does; give each SuperNode its own alias.",
                    site=alias,
                )
            alias = claimed
            summary = self._fit(alias, envelope)
        except WardroundError as error:
            code, sentence = safe_sentence(error)
            self._refuse(alias, node, code, named(sentence, alias))
            return
        self.roster.nodes[alias] = node
        self.roster.refused.pop(alias, None)  # it was, with another key or before it was mended
        self.roster.summaries[alias] = summary
        self.roster.cases[alias] = envelope.cases
        self.events.emit(
            "site.ready", site=alias, cases=dict(summary.cases), device=device_of(envelope), software=envelope.software,
            check=summary.model_dump(mode="json"),
        )  # fmt: skip

    def _alias(self, envelope: Envelope, fallback: str, bound: str) -> str:
        alias = envelope.site
        if bound and alias != bound:
            raise CredentialError(
                f"{bound}: says it is '{ascii(alias[:64])[1:-1]}', but its key was approved for '{bound}'; it is refused. "
                f"Write alias = \"{bound}\" into its site.toml, or approve the key for the other site.", site=bound,
            )  # fmt: skip
        if self.config.sites and alias in self.config.sites:
            return alias
        if self.config.sites:
            raise MismatchError(
                f"{fallback}: says it is '{ascii(alias[:64])[1:-1]}', which is not a site of this run ({', '.join(self.config.sites)})."
            )
        if not is_alias(alias):
            raise MismatchError(
                f"{fallback}: its alias is not 1 to 64 letters, digits, dots, dashes and underscores; correct its site.toml."
            )
        return alias

    def _fit(self, alias: str, envelope: Envelope) -> SiteSummary:
        if (envelope.run, envelope.phase) != (self.run, HELLO):
            raise PayloadError(f"{alias}: answered something else than was asked.", site=alias)
        if envelope.software != common.__version__:
            raise MismatchError(
                f"{alias}: runs wardround {ascii(envelope.software[:40])[1:-1]}, the coordinator {common.__version__}; "
                "install the same version.",
                site=alias,
            )
        require_same(self.versions, envelope.versions, site=alias)
        check_figures(envelope, 0, alias)
        try:
            summary = SiteSummary.model_validate_json(envelope.summary)
        except ValueError as error:
            raise PayloadError(f"{alias}: its data summary cannot be read.", site=alias) from error
        require_fit(summary, self.config.data)
        if envelope.cases != summary.cases.get("training", 0):
            raise PayloadError(
                f"{alias}: says {envelope.cases} training cases, its summary {summary.cases.get('training', 0)}; it is refused.",
                site=alias,
            )
        return summary

    def _refuse(self, alias: str, node: int, code: str, message: str) -> None:
        if (
            code in RETRY_CODES or code == CancelledError.code
        ):  # a worker that is still starting gets another chance
            self._asked[node] = time.monotonic() + RETRY_SECONDS
            self._trouble[node] = (alias, message)
            self.events.emit("warning", site=alias, code=code, message=message)
            return
        self.roster.refused[alias] = (code, message)
        self._refused[node] = (alias, time.monotonic())
        self.events.emit("site.refused", site=alias, code=code, message=message)


def _number(node: int) -> str:
    """Return what a node is called whose site is not known."""
    return f"node-{node % 10_000:04d}"


def needed_sites(config: RunConfig, asked: int) -> int:
    """Return how many of the asked sites a round needs."""
    return math.ceil(config.rounds.quorum * asked - 1e-6)  # 2/3 of 3 is 2, whatever the float says
