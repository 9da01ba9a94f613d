"""Which of a run's sites have come, and who is still waited for: told by alias while a run begins."""

from __future__ import annotations

import time
from collections.abc import Callable

from common.events import EventLog
from ops.plan import Plan
from ops.story_reader import Tail
from ops.words import duration

GRACE_SECONDS = 20.0
"""Sites that are up connect within this time after the SuperLink; before it nobody is named."""
AGAIN_SECONDS = 30.0
WAITING = "waiting"


class Arrivals:
    """Follows the sites until the first round begins.

    Args:
        plan: What runs.
        events: The command's events.
        clock: Seconds, monotonic.
    """

    def __init__(self, plan: Plan, events: EventLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._events, self._clock = plan, events, clock
        self._tail = Tail(plan.out / "events.jsonl")
        self._tail.poll()  # what earlier attempts said is over
        self._missing = dict.fromkeys(plan.config.sites)
        self._here: set[str] = set()
        self._ever: set[str] = set()
        self._told: list[str] = []
        self._tell_at = clock() + GRACE_SECONDS
        self.waiting = True

    @property
    def never(self) -> list[str]:
        """Sites that neither connected nor answered, in the order of the sites."""
        return [
            alias for alias in self._plan.config.sites if alias in self._missing and alias not in self._ever
        ]

    def connected(self, aliases: set[str]) -> None:
        """Note which sites are connected now."""
        self._here = aliases
        self._ever |= aliases

    def look(self) -> None:
        """Read what the ServerApp said, and name who is waited for, now and then."""
        for event in self._tail.poll():
            name = event.get("event")
            if name in ("site.ready", "site.joined", "site.refused") and event.get("code") != "silent":
                self._missing.pop(str(event.get("site", "")), None)
            elif name == "round.start" and self.waiting:
                self.waiting = False
                self._events.emit("trial.phase", phase="run")
        now, missing = self._clock(), list(self._missing)
        if not self.waiting or now < self._tell_at or missing == self._told:
            return
        self._told, self._tell_at = missing, now + AGAIN_SECONDS
        if missing:
            self._events.emit("warning", code=WAITING, message=self._sentence(missing))

    def _sentence(self, missing: list[str]) -> str:
        away = [alias for alias in missing if alias not in self._here]
        silent = [alias for alias in missing if alias in self._here]
        parts = [f"not connected: {', '.join(away)}"] if away else []
        parts += [f"connected, no first answer yet: {', '.join(silent)}"] if silent else []
        patience = duration(self._plan.config.rounds.ready_timeout)
        return f"Waiting for {len(missing)} of {len(self._plan.config.sites)} sites ({'; '.join(parts)}), up to {patience} (ready_timeout)."
