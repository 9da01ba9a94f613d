"""One message cycle: ask every site, wait until the deadline, ask again where a message got lost.

A message can vanish without a word: a SuperNode that is killed and comes back at once is never missed by Flower, and
what it had taken is gone. So a site that is silent for a while is asked, beside the work, what it is doing (PING);
one that says it is not working on the round has lost the message, and gets it again. A site that cannot be reached is
asked again with growing waits: a few times where the round can do without it, else until the deadline. Every
ticket stays watched, so the first good answer counts, and one that comes twice or too late is recognised and refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from common.config import RoundConfig
from common.errors import CancelledError, StorageError, WardroundError, WorkerError
from common.events import EventLog
from common.frames import Parts
from common.proto.wardround_pb2 import Phase
from common.wire import PING, Envelope, decode, encode
from server.link import Answer, Link

TRANSPORT = "transport"
UNREACHED = frozenset({TRANSPORT, WorkerError.code, CancelledError.code, StorageError.code})
HICCUPS = frozenset(
    {WardroundError.code}
)  # an exception nobody foresaw (memory, a driver): worth a few repetitions
LONGEST_WAIT = 60.0
LATE_SECONDS = 30.0  # an answer that is late by less than this still arrives, and is refused by name
SETTLE_SECONDS = 1.0  # between "I am not working on it" and asking again: the answer may be on its way
NEVER = float("inf")


@dataclass
class Watched:
    """Where one site stands in a cycle.

    Attributes:
        attempts: Repetitions so far.
        asked: When it was asked last; `NEVER` while a repetition is due.
        again: When it will be asked again; `NEVER` while an answer is awaited.
        probed: When it was last asked what it is doing.
        trouble: (code, sentence) of its last failure.
    """

    attempts: int = 0
    asked: float = NEVER
    again: float = NEVER
    probed: float = 0.0
    trouble: tuple[str, str] | None = None


@dataclass
class LateTickets:
    """Tickets of rounds that are over; what they still bring is refused.

    Attributes:
        open: (site, round, when asked) by ticket.
    """

    open: dict[str, tuple[str, int, float]] = field(default_factory=dict)

    def refuse(self, answer: Answer, events: EventLog) -> bool:
        """Refuse an answer to one of them; false if it is none."""
        found = self.open.pop(answer.ticket, None)
        if found is None:
            return False
        site, number, asked = found
        if answer.parts is not None:  # Flower's own word that the message expired is no answer
            events.emit("site.late", site=site, round=number, seconds=time.monotonic() - asked)
        return True

    def forget(self, older_than: float) -> None:
        """Drop tickets asked before a moment: Flower has dropped their messages."""
        self.open = {ticket: found for ticket, found in self.open.items() if found[2] >= older_than}


class Cycle:
    """Asks the sites of one cycle and brings back what they answer.

    Args:
        link: How sites are reached.
        events: Where it is told.
        rounds: Deadline, retries, waits.
        run: Run identifier.
        number: The round.
        phase: ROUND or CLOSING.
        nodes: Node of each site that is there.
        message: Makes a site's message.
        needed: How many sites the round needs.
        late: Tickets of former rounds.
        absent: Sites that were missing in the former round; they are not waited for where the round can do without.
        gone: Returns (code, sentence) of a site that is not asked any more, however long the round waits.
    """

    def __init__(
        self,
        link: Link,
        events: EventLog,
        rounds: RoundConfig,
        *,
        run: str,
        number: int,
        phase: Phase,
        nodes: dict[str, int],
        message: Callable[[str], Parts],
        needed: int,
        late: LateTickets,
        absent: Iterable[str] = (),
        gone: Callable[[str], tuple[str, str] | None] = lambda site: None,
    ) -> None:
        self._gone = gone
        self._link, self._events, self._rounds = link, events, rounds
        self._run, self._number, self._phase = run, number, phase
        self._nodes, self._message, self._needed = nodes, message, needed
        self._late, self._absent = late, set(absent)
        self._started = time.monotonic()
        self._deadline = self._started + rounds.deadline
        self._waiting: dict[str, Watched] = {}
        self._tickets: dict[str, tuple[str, float]] = {}
        self._probes: dict[str, str] = {}
        self.answered: set[str] = set()

    def run(
        self,
        sites: Sequence[str],
        take: Callable[[str, Answer, float], tuple[str, str] | None],
        miss: Callable[[str, str, str], None],
    ) -> None:
        """Ask the sites and hand over their answers until all have answered or failed, or the time is over.

        Args:
            sites: Whom to ask, in their fixed order.
            take: Takes (site, answer, seconds since asked); returns (code, sentence) if it is no good answer.
            miss: Told (site, code, sentence) of a site that will not contribute.
        """
        self._late.forget(self._started - self._rounds.deadline - LATE_SECONDS)
        self._waiting = {site: Watched(again=0.0) for site in sites}
        try:
            while self._waiting and time.monotonic() < self._deadline:
                self._ask_due(miss)
                answers = self._link.poll([*self._tickets, *self._probes, *self._late.open])
                for answer in answers:
                    self._sort(answer, take, miss)
                self._probe_silent()
                if self._waiting and not answers:
                    time.sleep(self._rounds.poll)
            for site, watched in list(self._waiting.items()):
                self._give_up(site, miss, *self._overdue(site, watched))
        finally:
            for ticket, (site, asked) in self._tickets.items():
                self._late.open[ticket] = (site, self._number, asked)

    def _overdue(self, site: str, watched: Watched) -> tuple[str, str]:
        if watched.again < NEVER and watched.trouble:
            return watched.trouble
        said = f" Before that: {watched.trouble[1]}" if watched.trouble else ""
        return (
            "deadline",
            f"{site}: did not answer within the round's deadline of {self._rounds.deadline:g} s.{said}",
        )

    def _ask_due(self, miss: Callable[[str, str, str], None]) -> None:
        now = time.monotonic()
        for site, watched in list(self._waiting.items()):
            if watched.again > now:
                continue
            if (why := self._gone(site)) is not None:
                self._give_up(site, miss, *why)
                continue
            watched.again = NEVER
            if watched.attempts:
                code, sentence = watched.trouble or (TRANSPORT, f"{site}: the message got lost.")
                self._events.emit(
                    "site.retry", site=site, round=self._number, code=code, message=sentence, attempt=watched.attempts,
                    seconds=now - watched.asked if watched.asked < NEVER else None,
                )  # fmt: skip
            ticket = self._ask(site, self._message(site), self._phase)
            watched.asked = watched.probed = time.monotonic()
            if ticket:
                self._tickets[ticket] = (site, watched.asked)
                self._events.emit("site.asked", site=site, round=self._number)
            else:
                trouble = (TRANSPORT, f"{site}: the message could not be handed to Flower.")
                self._failed(site, trouble, miss)

    def _ask(self, site: str, parts: Parts, phase: Phase) -> str:
        remaining = max(self._deadline - time.monotonic(), 1.0) + LATE_SECONDS
        return self._link.ask(self._nodes[site], parts, phase=phase, round=self._number, ttl=remaining)

    def _sort(
        self,
        answer: Answer,
        take: Callable[[str, Answer, float], tuple[str, str] | None],
        miss: Callable[[str, str, str], None],
    ) -> None:
        if answer.ticket in self._probes:
            self._hear(self._probes.pop(answer.ticket), answer)
            return
        site, asked = self._tickets.pop(answer.ticket, ("", 0.0))
        if not site:
            self._late.refuse(answer, self._events)
            return
        if site not in self._waiting:  # it has answered already, or failed for good
            self._late.open[answer.ticket] = (site, self._number, asked)
            self._late.refuse(answer, self._events)
            return
        trouble = take(site, answer, time.monotonic() - asked)
        if trouble is None:
            self.answered.add(site)
            del self._waiting[site]
        elif not any(other == site for other, _ in self._tickets.values()):
            self._failed(site, trouble, miss)
        else:
            self._waiting[site].trouble = trouble  # it was asked again meanwhile: that answer decides

    def _failed(self, site: str, trouble: tuple[str, str], miss: Callable[[str, str, str], None]) -> None:
        """Plan a repetition, or give the site up for this round."""
        watched = self._waiting[site]
        watched.trouble = trouble
        allowed = 0 if site in self._absent else self._rounds.retries
        spare = len(self.answered) + len(self._waiting) - 1 >= self._needed
        wait = min(self._rounds.retry_wait * 2.0**watched.attempts, LONGEST_WAIT)
        enough = watched.attempts >= allowed and (spare or trouble[0] in HICCUPS)
        final = trouble[0] not in UNREACHED | HICCUPS
        if final or enough or time.monotonic() + wait >= self._deadline:
            self._give_up(site, miss, *trouble)
            return
        watched.attempts += 1
        watched.again = time.monotonic() + wait

    def _give_up(self, site: str, miss: Callable[[str, str, str], None], code: str, sentence: str) -> None:
        del self._waiting[site]
        miss(site, code, sentence)

    def _probe_silent(self) -> None:
        """Ask sites that are silent what they are doing; one question at a time."""
        now = time.monotonic()
        for site, watched in self._waiting.items():
            if watched.again < NEVER or now - watched.probed < self._rounds.probe:
                continue
            if site in self._probes.values():
                continue
            parts = encode(Envelope(self._run, self._number, PING, site))
            watched.probed = now
            ticket = self._ask(site, parts, PING)
            if ticket:
                self._probes[ticket] = site

    def _hear(self, site: str, answer: Answer) -> None:
        """Take a site's word on what it is doing: a message it does not know of is sent again."""
        watched = self._waiting.get(site)
        if watched is None:
            return
        watched.probed = time.monotonic()
        try:
            envelope = decode(answer.parts) if answer.parts is not None else None
        except WardroundError:
            return
        if envelope is None or envelope.failure or (envelope.site, envelope.run) != (site, self._run):
            return  # the site or its worker is not there now: its round's own answer will say so, or the next question
        if envelope.phase == PING and envelope.round != self._number and watched.again == NEVER:
            watched.trouble = (
                TRANSPORT,
                f"{site}: the round's message got lost on the way; it is sent again.",
            )
            watched.attempts += 1
            watched.again = time.monotonic() + SETTLE_SECONDS
