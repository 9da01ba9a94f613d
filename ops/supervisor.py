"""Keeping a trial's processes alive: what ended is started again, with growing waits, up to a limit.

Alive means more than "has a process id". A SuperNode that gave up exits with 0, a worker can hang, a launcher that
vanished leaves a healthy-looking SuperLink behind. So every exit counts as a fault unless it was asked for, and a
process may have a sign of life of its own (the worker answers its health check, the SuperNode is listed as online);
one that gives none for too long is ended and started again. Restarts in a row are counted: a process that runs well
for a minute starts over. One that cannot be kept alive is given up, by name and with the end of its log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import VERDICT, ConfigError, CredentialError, LedgerError, ProcessError
from common.events import EventLog
from ops.processes import Process, ProcessGroup, explain

FIRST_WAIT = 0.5
LONGEST_WAIT = 15.0
LIMIT = 6
WELL_SECONDS = 60.0
LOOK_SECONDS = 2.0
HOPELESS = {ConfigError.exit_code, CredentialError.exit_code, LedgerError.exit_code}
"""Exit codes that the same start will give again; tried twice, because the other end may be what is restarting."""
HOPELESS_LIMIT = 2


@dataclass
class Charge:
    """One process under supervision.

    Attributes:
        process: How it is started.
        sign: Returns true while it shows life; none where running is enough.
        patience: Seconds without a sign after which it is restarted.
        on_restart: Called after it was started again.
        attempts: Restarts in a row.
        begun: When it was started last.
        due: When it is started again; none while it runs.
        seen: When it showed life last.
    """

    process: Process
    sign: Callable[[], bool] | None = None
    patience: float = 60.0
    on_restart: Callable[[], None] | None = None
    attempts: int = 0
    begun: float = 0.0
    due: float | None = None
    looked: float = 0.0
    seen: float = 0.0
    given_up: str = ""
    why: str = "exited"
    held: bool = False


class Supervisor:
    """Watches processes of a group and starts them again.

    Args:
        group: Starts and ends them.
        events: Gets process.restart.
        on_give_up: Told of a process that cannot be kept alive, with the verdict; raising it ends the trial.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        group: ProcessGroup,
        events: EventLog,
        on_give_up: Callable[[Charge, ProcessError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.charges: dict[str, Charge] = {}
        self._group = group
        self._events = events
        self._on_give_up = on_give_up
        self._clock = clock

    def take(
        self,
        process: Process,
        *,
        sign: Callable[[], bool] | None = None,
        patience: float = 60.0,
        on_restart: Callable[[], None] | None = None,
    ) -> None:
        """Supervise a process that was started."""
        now = self._clock()
        self.charges[process.name] = Charge(process, sign, patience, on_restart, seen=now, begun=now)

    def hold(self, names: Sequence[str]) -> None:
        """End processes and leave them until `let_go`; a name that is not supervised yet is passed over."""
        for charge in (self.charges[name] for name in names if name in self.charges):
            charge.held, charge.due = True, None
            if not charge.process.collected:
                self._group.stop(charge.process.name, seconds=0.0)

    def let_go(self, names: Sequence[str]) -> None:
        """Start processes that were held."""
        for charge in (self.charges[name] for name in names if name in self.charges):
            charge.held = False
            if not charge.given_up:
                charge.why = "lost"  # through no fault of its own: it does not count
                self._start_again(charge, waited=0.0)

    def poll(self) -> None:
        """Look at every process once; never waits.

        Raises:
            ProcessError: From `on_give_up`.
        """
        for charge in list(self.charges.values()):
            if charge.given_up or charge.held:
                continue
            if charge.due is not None:
                if self._clock() >= charge.due:
                    self._start_again(charge, waited=wait_before(charge.attempts))
            elif charge.process.exit_code() is not None:
                self._plan(charge, "exited")
            elif charge.sign is not None:
                self._look(charge, charge.sign)

    def _look(self, charge: Charge, sign: Callable[[], bool]) -> None:
        now = self._clock()
        if now - charge.looked < LOOK_SECONDS:
            return
        charge.looked = now
        if sign():
            charge.seen = now
        elif now - charge.seen > charge.patience:
            self._plan(charge, "silent")

    def _plan(self, charge: Charge, why: str) -> None:
        """Plan a restart, or give up."""
        now = self._clock()
        code = charge.process.exit_code()
        if code is not None:
            self._group.note_exit(charge.process)
        if charge.seen - charge.begun > WELL_SECONDS or (
            charge.sign is None and now - charge.begun > WELL_SECONDS
        ):
            charge.attempts = 0  # it ran, and showed life, for long enough
        charge.attempts += 1
        charge.why = why
        limit = HOPELESS_LIMIT if code in HOPELESS else LIMIT
        if charge.attempts > limit:
            ended = f"ended {explain(code)}" if code is not None else "gave no sign of life"
            tail = charge.process.tail()
            said = spoken(tail)
            charge.given_up = (
                f"Process '{charge.process.name}' {ended} and was started again {charge.attempts - 1} times in a row "
                f"without lasting{f'. It said: {said}' if said else '; its log says why.'}"
            )
            if charge.process.pid and not charge.process.collected:
                self._group.stop(charge.process.name, seconds=0.0)
            self._on_give_up(charge, ProcessError(charge.given_up, detail=tail, site=charge.process.site))
            return
        charge.due = now + wait_before(charge.attempts)

    def _start_again(self, charge: Charge, waited: float) -> None:
        if charge.process.exit_code() is None:
            self._group.stop(charge.process.name, seconds=0.0)
        self._events.emit(
            "process.restart", name=charge.process.name, site=charge.process.site or None, attempt=max(charge.attempts, 1),
            why=charge.why, seconds=waited,
        )  # fmt: skip
        self._group.start(charge.process)
        charge.due = None
        charge.begun = charge.seen = charge.looked = self._clock()
        if charge.on_restart is not None:
            charge.on_restart()


def wait_before(attempt: int) -> float:
    """Return the seconds before a restart: the first at once, then doubling up to a limit."""
    return 0.0 if attempt <= 1 else min(FIRST_WAIT * 2.0 ** min(attempt - 2, 30), LONGEST_WAIT)


def spoken(tail: str) -> str:
    """Return the sentence with which a process of ours explained its end, empty if it gave none."""
    lines = [line for line in tail.splitlines() if line.startswith(VERDICT)]
    return lines[-1].removeprefix(VERDICT) if lines else ""
