"""The round loop: one message cycle a round, replies folded as they come, every site accounted for.

A site first evaluates the model it received (the previous round's result), then trains, and answers once; a closing
cycle evaluates the end. A round waits for its sites until the deadline. A site that fails or stays silent is named,
with a code, and the round goes on if the quorum holds; the state changes only when the round is whole.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.compress import Compression
from common.config import RunConfig
from common.downlink import Downlink
from common.errors import BaseLostError, PayloadError, QuorumError, WardroundError, safe_sentence
from common.events import EventLog
from common.frames import Parts
from common.guard import check_size, check_state, check_updates, outliers
from common.method import Accumulator, Groups, Method, Reply, RoundContext
from common.payload import Payloads, State, Tensors, check_payloads
from common.proto.wardround_pb2 import Phase
from common.tasks import divide
from common.wire import CLOSING, ROUND, Envelope, MetricSet, bytes_by_kind, decode, encode
from server.answers import check_figures, check_sender, named, told
from server.checkpoint import Checkpoints, joined, parted
from server.cycle import TRANSPORT, LateTickets
from server.fold import OrderedFold
from server.link import Answer, Link
from server.rebase import WholeAgain
from server.roster import Roster, RosterCall, needed_sites


@dataclass
class RoundLog:
    """What one cycle brought.

    Attributes:
        number: The round.
        cases: Training cases by contributing site.
        missing: (code, sentence) by site that did not contribute.
        metrics: Figures by site.
        losses: Mean training loss by site.
        local: Seconds in the worker by site.
        norms: Norm of the update by site.
        seconds: Wall seconds of the cycle.
    """

    number: int
    cases: dict[str, int] = field(default_factory=dict)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)
    metrics: dict[str, list[MetricSet]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    local: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class RoundLoop:
    """Drives one method over the sites of a roster.

    Args:
        link: How sites are reached.
        roster: The sites that are there, in their fixed order.
        run: Run identifier.
        config: The run's configuration.
        method: The method.
        model: Initial network's state dict (the template of what may arrive).
        groups: Its parameter groups.
        events: Where everything is told.
        checkpoints: Where states and models are written; None keeps nothing.
        call: Lets sites that come later join; None keeps the roster as it is.
    """

    def __init__(
        self,
        link: Link,
        roster: Roster,
        run: str,
        config: RunConfig,
        method: Method,
        model: Tensors,
        groups: Groups,
        events: EventLog,
        checkpoints: Checkpoints | None = None,
        call: RosterCall | None = None,
    ) -> None:
        self.link = link
        self.roster = roster
        self.run = run
        self.config = config
        self.method = method
        self.server = method.server(method.parse(config.params))
        self.server.robust, self.server.sites = config.guard, config.sites
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.items()}
        self.template = self.server.travelling(
            shapes, groups
        )  # without values, or round 0 would stay in memory
        self.compression = Compression(config.wire, self.template, groups)
        self.downlink = Downlink(self.compression)
        self.events = events
        self.checkpoints = checkpoints
        self.call = call
        self.state = self.server.init(model, groups, self._context(0))
        self.done = 0
        self.history: list[RoundLog] = []
        self._late = LateTickets()
        self._absent: set[str] = set()

    def resume(self) -> bool:
        """Continue from the newest checkpoint that can be read; false where the run begins.

        Raises:
            PayloadError: There are checkpoints, and none can be read.
            ConfigError: They are of another configuration.
        """
        if self.checkpoints is None:
            return False
        self.done, state, attempt = self.checkpoints.newest(self.config.to_json(), self._refuse_checkpoint)
        if not attempt and state is None:
            return False
        if state is not None:
            self.state, held = parted(state)
            self.downlink.restore(held)
        self.events.emit("run.resume", round=self.done, attempt=max(attempt, 1))
        return True

    def _refuse_checkpoint(self, number: int, error: WardroundError) -> None:
        code, message = safe_sentence(error)
        self.events.emit("checkpoint.refused", round=number, code=code, message=message)

    def execute(self) -> State:
        """Run the rounds that are left and the closing evaluation, and return the final state.

        Raises:
            QuorumError: Too few sites contributed to a round; the state is the last whole round's.
        """
        for number in range(self.done + 1, self.config.rounds.rounds + 1):
            self.state = self.round(number)
            self.done = number
            self._save(number)
        self._save_model()  # before the closing evaluation: a site missing there must not cost the model
        self.closing()
        return self.state

    def round(self, number: int) -> State:
        """Run one round and return the next state; the loop's own state is untouched.

        Raises:
            QuorumError: Too few sites contributed.
            PayloadError: The result is not finite.
        """
        context = self._context(number)
        sites = self._sample(number)
        needed = max(needed_sites(self.config, len(sites)), 1)
        acc = self.server.begin(self.state, context)
        log, acc = self._cycle(number, ROUND, sites, acc, needed)
        if len(log.cases) < needed:
            self._tell_end(number, log, closing=False)
            raise QuorumError(
                f"Round {number}: {len(log.cases)} sites contributed, {needed} are needed. "
                + " ".join(sentence for _, sentence in log.missing.values())
            )
        state = self.server.finish(self.state, acc, context)
        check_state(state.tensors, what=f"Round {number}")
        self.tell_figures(state, acc, context)
        self._tell_end(number, log, closing=False)
        return state

    def tell_figures(self, state: State, acc: Accumulator, context: RoundContext) -> None:
        """Tell what the method has to say of a finished round."""
        figures = self.server.figures(state, acc, context)
        if figures:
            self.events.emit("method.figures", round=context.round, method=self.method.name, figures=figures)

    def closing(self) -> None:
        """Let every site evaluate the end.

        Raises:
            QuorumError: Too few sites evaluated the end.
        """
        number = self.config.rounds.rounds + 1
        sites = self.expected()
        needed = max(needed_sites(self.config, len(sites)), 1)
        log, _ = self._cycle(number, CLOSING, sites, None, needed)
        self._tell_end(number, log, closing=True)
        if len(log.cases) < needed:
            raise QuorumError(
                f"The closing evaluation: {len(log.cases)} sites took part, {needed} are needed. "
                + " ".join(sentence for _, sentence in log.missing.values())
            )

    def expected(self) -> list[str]:
        """Return the sites that belong to the run, there or not, in their fixed order."""
        return list(self.config.sites) or list(self.roster.nodes)

    def _cycle(
        self, number: int, phase: Phase, sites: list[str], acc: Accumulator | None, needed: int
    ) -> tuple[RoundLog, Accumulator]:
        started = time.monotonic()
        log = RoundLog(number)
        self.history.append(log)
        self._welcome(number)
        self.events.emit("round.start", round=number, sites=sites, closing=phase == CLOSING)
        folded: list[Accumulator] = [acc] if acc is not None else []

        def fold(site: str, parts: Parts) -> None:
            if folded:
                envelope = decode(parts)
                payloads = self.taken(envelope.payloads, number, site)
                folded[0] = self.server.fold(folded[0], Reply(site, envelope.cases, payloads))

        hold = phase == ROUND and self.config.guard.outlier > 0
        order = OrderedFold(sites, fold, self._spool_folder(), hold=hold)

        def miss(site: str, code: str, sentence: str) -> None:
            self._miss(number, site, code, sentence, log, order)

        def take(site: str, answer: Answer, seconds: float) -> tuple[str, str] | None:
            return self._take(number, phase, site, answer, seconds, log, order)

        there = [site for site in sites if site in self.roster.nodes]
        for site in sites:
            if site not in there:
                miss(site, *self._why_absent(site))
        cycle = WholeAgain(
            self.link, self.events, self.config.rounds, run=self.run, number=number, phase=phase,
            nodes=self.roster.nodes, message=lambda site: self._message(number, phase, site),
            needed=needed, late=self._late, absent=self._absent,
            gone=self.call.revoked if self.call is not None else lambda site: None,
        )  # fmt: skip
        try:
            cycle.run(there, take, miss)
            for site, sentence in outliers(log.norms, self.config.guard).items():
                if hold:
                    del log.cases[site]
                    miss(site, PayloadError.code, sentence)
            order.release()
        finally:
            order.close()
            self.downlink.over()
        self._absent = set(log.missing)
        log.seconds = time.monotonic() - started
        return log, folded[0] if folded else Accumulator()

    def _welcome(self, number: int) -> None:
        """Part with sites whose keys were revoked, and let sites join that were not there when the run began."""
        if self.call is not None:
            self.call.dismiss()
        if self.call is None or not set(self.expected()) - self.roster.nodes.keys():
            return
        for site in self.call.look():
            self.events.emit("site.joined", site=site, round=number, cases=self.roster.cases.get(site, 0))

    def _why_absent(self, site: str) -> tuple[str, str]:
        return self.roster.refused.get(
            site, (TRANSPORT, f"{site}: has not given its first answer yet; is its SuperNode running?")
        )

    def sending(self, number: int, site: str) -> Payloads:
        """Return what a site is sent in a round, as it travels."""
        sent, stream = self._sent(number, site), self.server.stream(site)
        return self.downlink.sending(sent, self.server.downlink, number, site, stream)

    def taken(self, payloads: Payloads, number: int, site: str) -> Payloads:
        """Return a site's answer to a round as the method knows it; nothing of it is checked but its coding.

        Raises:
            PayloadError: It is not coded as the run says; the site is named.
        """
        reached = self.downlink.reached(number, site, self.server.stream(site))
        sent = self._sent(number, site)
        return self.compression.taken(payloads, self.server.uplink, sent, who=site, reached=reached)

    def _sent(self, number: int, site: str) -> Payloads:
        return {item.name: item for item in self.server.send(self.state, site, self._context(number, site))}

    def _message(self, number: int, phase: Phase, site: str) -> Parts:
        payloads = self.sending(number, site)
        parts = encode(
            Envelope(
                self.run, number, phase, site,
                rounds=self.config.rounds.rounds, payloads=payloads, config=self.config.to_json(),
            )
        )  # fmt: skip
        self._count_bytes(number, site, "down", parts)
        return parts

    def _take(
        self,
        number: int,
        phase: Phase,
        site: str,
        answer: Answer,
        seconds: float,
        log: RoundLog,
        order: OrderedFold,
    ) -> tuple[str, str] | None:
        """Take one answer; returns (code, sentence) if it is none that counts."""
        if self.call is not None and (revoked := self.call.revoked(site)):
            return revoked  # for good, also of an answer that was on its way: the site is not asked again
        try:
            if answer.parts is None:
                return TRANSPORT, f"{site}: {answer.error}."
            envelope = decode(answer.parts)
            if envelope.failure:
                return self._told(envelope.failure, site)
            norm = self.check(envelope, number, phase, site)
        except WardroundError as error:
            code, sentence = safe_sentence(error)
            return code, named(sentence, site)
        self._count_bytes(number, site, "up", answer.parts)
        log.cases[site] = envelope.cases
        log.metrics[site] = envelope.metrics
        log.losses[site] = envelope.loss
        log.local[site] = sum(envelope.seconds.values())
        log.norms[site] = norm
        self.events.emit(
            "site.reply", site=site, round=number, seconds=seconds, local=log.local[site], phases=envelope.seconds,
            relay=answer.relay, cases=envelope.cases, loss=envelope.loss, ledger=envelope.ledger or None,
        )  # fmt: skip
        for item in envelope.metrics:
            self.events.emit(
                "metric", site=site, round=item.round, split=item.split, model=item.model, cases=item.cases,
                values=divide(item.sums), primary=item.primary,
            )  # fmt: skip
        parts, answer.parts = answer.parts, None
        envelope.payloads.clear()  # a large model shall be here once, not three times, when its turn comes
        order.put(site, parts)
        return None

    def check(self, envelope: Envelope, number: int, phase: Phase, site: str) -> float:
        """Check an answer by all that is known of it; a round's payloads are then as the method knows them.

        Returns:
            The norm of a round's update.

        Raises:
            PayloadError: Naming the site.
        """
        check_sender(envelope, self.run, number, phase, site)
        check_figures(envelope, number, site)
        declared = self.roster.cases.get(site, envelope.cases)
        if envelope.cases > declared:
            raise PayloadError(
                f"{site}: says {envelope.cases} training cases, its first answer said {declared}; the answer is refused.",
                site=site,
            )
        if phase == ROUND:
            if envelope.cases < 1:
                raise PayloadError(f"{site}: contributed no training case.", site=site)
            norm = self._check_round(envelope, number, site)
            self.downlink.arrived(number, site)
            return norm
        return 0.0

    def _told(self, failure: tuple[str, str], site: str) -> tuple[str, str]:
        """Return a site's failure as it may be told; one that lost its model gets it whole when it is asked again."""
        code, sentence = told(failure, site)
        if failure[0] != BaseLostError.code:
            return code, sentence
        self.downlink.lost(site)
        return BaseLostError.code, sentence

    def _check_round(self, envelope: Envelope, number: int, site: str) -> float:
        """Check a round's payloads by all that is known of them, and return the norm of the update."""
        specs, guard = self.server.uplink, self.config.guard
        envelope.payloads = self.taken(envelope.payloads, number, site)
        check_payloads(envelope.payloads, specs, self.template, who=site)
        check_size(envelope.payloads, guard, who=site)
        norm = check_updates(envelope.payloads, specs, self._sent(number, site), guard, who=site)
        reply = Reply(site, envelope.cases, envelope.payloads)
        self.server.check(reply, self.state, self._context(number, site))
        return norm

    def _miss(
        self, number: int, site: str, code: str, sentence: str, log: RoundLog, order: OrderedFold
    ) -> None:
        log.missing[site] = (code, sentence)
        self.events.emit("site.failed", site=site, round=number, code=code, message=sentence)
        order.skip(site)

    def _count_bytes(self, number: int, site: str, direction: str, parts: Parts) -> None:
        kinds = bytes_by_kind(parts)
        self.events.emit(
            "bytes", site=site, round=number, direction=direction, kinds=kinds, total=sum(kinds.values())
        )

    def _tell_end(self, number: int, log: RoundLog, *, closing: bool) -> None:
        slowest = max(log.local.values(), default=0.0)
        total = sum(log.cases.values())
        loss = None
        if total and not closing:
            loss = sum(log.losses[site] * count for site, count in log.cases.items()) / total
        self.events.emit(
            "round.end", round=number, seconds=log.seconds, slowest=slowest, overhead=log.seconds - slowest,
            sites=list(log.cases), missing=list(log.missing), cases=log.cases, closing=closing, loss=loss,
        )  # fmt: skip

    def _sample(self, number: int) -> list[str]:
        """Return the sites asked in a round: all, or a share drawn from (seed, round) alone."""
        sites = self.expected()
        if self.config.rounds.sample >= 1:
            return sites
        count = max(1, round(self.config.rounds.sample * len(sites)))
        chosen = set(random.Random(f"{self.config.seed}/sample/{number}").sample(sites, count))
        return [site for site in sites if site in chosen]

    def _save(self, number: int) -> None:
        if self.checkpoints is None:
            return
        started = time.monotonic()
        size = self.checkpoints.write(number, joined(self.state, self.downlink.state()))
        self.events.emit("checkpoint", round=number, seconds=time.monotonic() - started, bytes=size)

    def _save_model(self) -> None:
        model = self.server.model(self.state)
        if self.checkpoints is None or model is None:
            return
        notes = {"method": self.method.name, "seed": str(self.config.seed), "round": str(self.done)}
        size = self.checkpoints.save_model("global.safetensors", model, notes)
        self.events.emit("model.saved", name="global.safetensors", bytes=size, round=self.done)

    def _spool_folder(self) -> Path | None:
        if self.checkpoints is None:
            return None
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        return self.checkpoints.folder

    def _context(self, number: int, site: str = "") -> RoundContext:
        return RoundContext(self.run, number, self.config.rounds.rounds, self.config.seed, site)
