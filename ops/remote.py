"""A run on a SuperLink that somebody else keeps alive: containers, a cluster, a service manager.

`ops/coordinator.py` starts and mends the coordinator's processes itself. Here an engine restarts them, and what is left
to do is the run: submit it, see whether it still goes on, submit it again from its last complete round where it does
not, and give the verdict. Only the Control API and the run folder are needed, no data and no process ids.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from common.config import RunConfig
from common.errors import ConfigError, ProcessError
from common.events import EventLog
from common.federation import Federation
from common.methods import get_method
from common.store import write_bytes
from ops.control import ControlClient, RunStatus, bundle, register, wait_for_link
from ops.coordinator import LIMIT, stands
from ops.plan import Plan
from ops.story_reader import Tail
from ops.supervisor import wait_before
from server.admitted import write_nodes

RUN_FILE = ".flower-run"
"""Flower's id of the run under way, for a command that is started again beside it."""
AWAY_SECONDS = 600.0
"""How long a SuperLink may be away; the engine starts it again with growing waits."""
PENDING_SECONDS = 180.0
"""How long a run may wait for a ServerApp; then there is nothing that would start one."""
LAST_WORD_SECONDS = 3.0
HANGING_SECONDS = 60.0
LOOK_SECONDS = 1.0
REFRESH_SECONDS = 0.25
PENDING = "pending"


def coordinator_plan(out: Path) -> Plan:
    """Return the plan of a run folder as a coordinator knows it: without the sites' folders.

    Raises:
        ConfigError: No run folder, or one of a configuration that is not valid.
    """
    try:
        document = json.loads((out / "config.json").read_text(encoding="utf-8"))
        config = RunConfig.from_mapping(document["config"])
        federation = Federation(name=document["data_name"], title=document["title"], note=document["note"])
        return Plan(
            config, get_method(config.method), federation, dict.fromkeys(config.sites, Path()), out,
            runtime=document["runtime"], transport=document["transport"], command=document["command"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "This run folder has no configuration that can be run: prepare the run first.",
            detail=f"{out}: {error}",
        ) from error


class RemoteRun:
    """One run on a SuperLink.

    Args:
        plan: What runs; its folder is the one that the ServerApp writes to.
        control: The SuperLink's Control API.
        keys: The sites' public keys by alias.
        events: The command's events.
        idle: Called while waiting.
        clock: Seconds, monotonic.
        sleep: How to wait (seconds).
    """

    def __init__(
        self,
        plan: Plan,
        control: ControlClient,
        keys: Mapping[str, Path],
        events: EventLog,
        *,
        idle: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._plan, self._control, self._keys, self._events = plan, control, keys, events
        self._idle, self._clock, self._sleep = idle, clock, sleep
        self._tail = Tail(plan.out / "events.jsonl")
        self._run = 0
        self._failures = 0
        self._end: dict[str, object] | None = None
        self._submitted = self._looked = 0.0
        self._away: float | None = None
        self._ended: float | None = None

    def begin(self) -> None:
        """Register the sites' keys and submit the run, or take up the one that an earlier command submitted.

        Raises:
            CredentialError: A key that cannot be read, or a SuperLink of another authority.
            ProcessError: The SuperLink does not answer in time.
        """
        wait_for_link(self._control, self._pause)
        self._register()
        self._tail.poll()  # what earlier attempts said is over
        earlier = self._earlier()
        if earlier:
            self._run, self._submitted = earlier, self._clock()
        else:
            self._submit()

    def tend(self) -> dict[str, object] | None:
        """Look once, mend what can be mended from here, and return the run's end once it has one.

        Raises:
            ProcessError: The SuperLink is gone for good, nothing starts a ServerApp, or the run fails again and again.
        """
        self._read_events()
        if self._end is not None and stands(self._end):
            return self._end
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return None
        self._looked = now
        status = self._status(now)
        if status is None:
            return None
        if not status.status:  # a SuperLink that keeps messages in memory was started anew
            self._register()
            self._again("lost")
        elif status.finished or self._end is not None:
            return self._judge(status, now)
        elif status.status == PENDING and now - self._submitted > PENDING_SECONDS:
            raise ProcessError(
                f"No ServerApp was started within {PENDING_SECONDS:.0f} s. Is its launcher running, with the SuperLink's "
                "secret?"
            )
        return None

    def watch(self) -> dict[str, object]:
        """Tend the run until its end, and return its `run.end` event.

        Raises:
            ProcessError: As `tend`.
        """
        while (end := self.tend()) is None:
            self._pause(REFRESH_SECONDS)
        (self._plan.out / RUN_FILE).unlink(missing_ok=True)
        return end

    def stop(self) -> None:
        """Stop the run if it still goes on; a SuperLink that is gone has stopped it already."""
        try:
            if self._run and self._control.stop_run(self._run):
                (self._plan.out / RUN_FILE).unlink(missing_ok=True)
        except ProcessError:
            return

    def _register(self) -> None:
        """Register the sites' keys, and tell the ServerApp which node is which site."""
        write_nodes(self._plan.out, register(self._control, self._keys))

    def _earlier(self) -> int:
        try:
            run = int((self._plan.out / RUN_FILE).read_text(encoding="ascii"))
            status = self._control.run_status(run)
        except (OSError, ValueError, ProcessError):
            return 0
        return run if status.status and not status.finished else 0

    def _submit(self) -> None:
        self._end, self._ended = None, None
        self._run = self._control.start_run(bundle(), {"wardround": self._plan.config.to_json()})
        self._submitted = self._clock()
        write_bytes(self._plan.out / RUN_FILE, str(self._run).encode())

    def _read_events(self) -> None:
        for event in self._tail.poll():
            if event.get("event") == "checkpoint":
                self._failures = 0  # a round was completed: what went wrong before is overcome
            elif event.get("event") == "run.end" and event.get("flower_run") == str(self._run):
                self._end = event

    def _status(self, now: float) -> RunStatus | None:
        """Return where the run stands ("" if the SuperLink does not know it), none while the SuperLink is away."""
        try:
            status = self._control.run_status(self._run)
        except ProcessError:
            if self._control.alive():
                return RunStatus("", "", "")
            self._away = now if self._away is None else self._away
            if now - self._away > AWAY_SECONDS:
                raise ProcessError(
                    f"The SuperLink has not answered for {AWAY_SECONDS:.0f} s; its log says why.",
                ) from None
            return None
        self._away = None
        return status

    def _judge(self, status: RunStatus, now: float) -> dict[str, object] | None:
        """Return a verdict that a broken SuperLink may have caused only after other tries."""
        self._ended = now if self._ended is None else self._ended
        patience = LAST_WORD_SECONDS if status.finished else HANGING_SECONDS
        if now - self._ended <= patience:
            return None
        self._read_events()
        if self._end is not None and (stands(self._end) or self._failures + 1 >= LIMIT):
            return self._end
        self._again("lost" if self._end is None else "failed")
        return None

    def _again(self, why: str) -> None:
        """Submit the run again; it continues from its last complete round."""
        self._failures += 1
        if self._failures > LIMIT:
            raise ProcessError(
                f"The ServerApp ended {self._failures} times in a row without a round being completed; its log says why."
            )
        wait = wait_before(self._failures)
        self._events.emit("process.restart", name="ServerApp", attempt=self._failures, why=why, seconds=wait)
        limit = self._clock() + wait
        while self._clock() < limit:
            self._pause(REFRESH_SECONDS)
        with contextlib.suppress(
            ProcessError
        ):  # not known any more, or the SuperLink is away: the next look tells
            self._control.stop_run(self._run)
        try:
            self._submit()
        except ProcessError:
            if self._control.alive():
                raise

    def _pause(self, seconds: float) -> None:
        self._idle()
        self._sleep(seconds)
