"""The coordinator's side of a trial: SuperLink, ServerApp, and the run, kept going through their ends.

Flower starts a ServerApp once and never again, keeps a run whose ServerApp is gone for a minute, and looks healthy
without anything that could start one. So the run is tended from outside: a ServerApp that vanished, or ended without a
verdict, is followed by a new Flower run that continues from the last complete round. With messages in memory (the
default, and the only way for large models) a SuperLink that died has forgotten everything: it is started anew, the
sites' keys are registered again, and their SuperNodes connect afresh. With messages in a file it comes back with its
runs, and the ServerApp goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.errors import CancelledError, ProcessError, WardroundError, WorkerError
from common.events import EventLog
from ops.control import ControlClient, bundle, register
from ops.flower_commands import Addresses, Transport, server_superexec, superlink
from ops.pki import TrialPki, load_public_pem
from ops.plan import Plan
from ops.processes import ProcessGroup
from ops.story_reader import Tail
from ops.supervisor import wait_before
from server.admitted import write_nodes

START_SECONDS = 90.0
GONE_SECONDS = 1.0  # a ServerApp that ends has this long for its last event to arrive
SUBMITTED_SECONDS = 60.0
HANGING_SECONDS = 30.0  # after its last word; then it is ended
LIMIT = 5
# Verdicts that may be the trace of a coordinator's process that broke down, not of the run itself.
DOUBTFUL = {WardroundError.code, WorkerError.code, CancelledError.code, "transport"}
REFRESH_SECONDS = 0.1


@dataclass
class Sites:
    """The sites' side.

    Attributes:
        aliases: Whose keys are registered.
        disconnect: Called when the SuperLink has forgotten the sites; those elsewhere find out by themselves.
        connect: Called when it knows them again.
    """

    aliases: list[str]
    disconnect: Callable[[], None] = lambda: None
    connect: Callable[[], None] = lambda: None


class Coordinator:
    """SuperLink and ServerApp of one run.

    Args:
        plan: What runs.
        addresses: Where the SuperLink listens.
        pki: Credentials.
        group: Starts processes.
        events: The command's events.
        env: Extra variables by process name.
        idle: Called while waiting.
        sites: The sites' side.
    """

    def __init__(
        self,
        plan: Plan,
        addresses: Addresses,
        pki: TrialPki,
        group: ProcessGroup,
        events: EventLog,
        *,
        env: Mapping[str, Mapping[str, str]],
        idle: Callable[[], None],
        sites: Sites,
    ) -> None:
        self._plan, self._addresses, self._pki = plan, addresses, pki
        self._group, self._events, self._idle, self._sites = group, events, idle, sites
        self._keys: Mapping[str, Path] = {alias: pki.site_public[alias] for alias in sites.aliases}
        self._logs = plan.out / "logs"
        self._env = env
        transport: Transport = plan.transport
        self._database = plan.out / "superlink.db" if transport == "file" else None
        self.control = ControlClient(addresses.control, pki.ca)
        self._tail = Tail(plan.out / "events.jsonl")
        self._run = 0
        self._failures = 0
        self._app_seen = self._submitted = self._ended = 0.0
        self._end: dict[str, object] | None = None

    def start_link(self) -> None:
        """Start the SuperLink and wait until it answers and knows the sites' keys."""
        if self._database is not None:  # of an earlier attempt, whose runs are over
            for path in self._database.parent.glob(self._database.name + "*"):
                path.unlink()
        self._start_link()
        self.register()

    def _start_link(self) -> None:
        process = superlink(self._addresses, self._pki, self._logs, database=self._database)
        process.env = {**process.env, **self._env.get(process.name, {})}
        self._group.start(process)
        self._wait("superlink", self.control.alive)

    def register(self) -> None:
        """Register the sites' keys, and tell the ServerApp which node is which site."""
        write_nodes(self._plan.out, register(self.control, self._keys))

    def readmit(self, keys: Mapping[str, Path]) -> bool:
        """Admit exactly these keys from now on: new ones are registered, the SuperLink forgets all others.

        Args:
            keys: Public key's file by alias.

        Returns:
            False if the SuperLink is being mended: call again later. It will know these keys in any case.
        """
        self._keys = keys
        with self._unless_link_died():
            wanted = {load_public_pem(path, site=alias): alias for alias, path in keys.items()}
            known = self.control.nodes()
            # Revocations first: a key that is not taken must not hold them up, and who is revoked is not asked from now on.
            stay = {node.node_id: wanted[node.public_key] for node in known if node.public_key in wanted}
            write_nodes(self._plan.out, stay)
            for node in known:
                if node.node_id not in stay:
                    self.control.unregister(node.node_id)
            self.register()
            return True
        return False

    def start_app(self) -> None:
        """Start what starts the ServerApp, and submit the run."""
        env = {
            "WARDROUND_RUN_DIR": str(self._plan.out),
            "WARDROUND_RUN_ID": self._plan.out.name,
            "WARDROUND_RUNTIME": self._plan.runtime,
            **self._env.get("serverapp", {}),
        }
        self._group.start(server_superexec(self._addresses, self._pki, self._logs, env=env))
        self._submit()

    def _submit(self) -> None:
        self._tail.poll()  # what earlier attempts said is over
        self._end = None
        self._run = self.control.start_run(bundle(), {"wardround": self._plan.config.to_json()})
        self._submitted, self._app_seen, self._ended = time.monotonic(), 0.0, 0.0

    def tend(self) -> dict[str, object] | None:
        """Look at everything once, mend what broke, and return the run's end once it has one.

        Raises:
            ProcessError: The coordinator's processes cannot be kept alive.
        """
        self._read_events()
        if self._end is not None and stands(self._end):
            return self._end  # whatever else broke in this moment: the run is over
        if self._group.processes["superlink"].exit_code() is not None:
            self._mend_link()
            return None
        if self._group.processes["serverapp"].exit_code() is not None:
            self._mend_app("exited")
            return None
        now = time.monotonic()
        if self._app_lives():
            self._app_seen = now
        if self._end is not None:
            return self._judge(self._end, now)
        if self._app_seen and now - self._app_seen > GONE_SECONDS:
            self._read_events()
            if self._end is None:
                self._continue("lost")
        elif not self._app_seen and now - self._submitted > SUBMITTED_SECONDS:
            self._mend_app("silent")
        return None

    def _read_events(self) -> None:
        for event in self._tail.poll():
            if event.get("event") == "checkpoint":
                self._failures = 0  # a round was completed: what went wrong before is overcome
            elif event.get("event") == "run.end" and event.get("flower_run") == str(self._run):
                self._end = event  # not the last word of an attempt that was killed

    def _judge(self, end: dict[str, object], now: float) -> dict[str, object] | None:
        """Return a verdict that a broken SuperLink may have caused only after other tries."""
        self._ended = self._ended or now
        if now - self._app_seen <= GONE_SECONDS and now - self._ended <= HANGING_SECONDS:
            return None
        if self._failures + 1 >= LIMIT:
            return end
        self._mend_app("failed") if now - self._ended > HANGING_SECONDS else self._continue("failed")
        return None

    def _app_lives(self) -> bool:
        try:
            children = psutil.Process(self._group.processes["serverapp"].pid).children(recursive=True)
            return any(child.status() != psutil.STATUS_ZOMBIE for child in children)
        except psutil.Error:
            return False

    def _continue(self, why: str) -> None:
        """Submit the run again; it continues from its last complete round."""
        self._count("ServerApp", why)
        with self._unless_link_died():
            self.control.stop_run(self._run)
            self._submit()

    @contextmanager
    def _unless_link_died(self) -> Iterator[None]:
        """Pass over an error that a SuperLink's end explains: it is mended when it is looked at next."""
        try:
            yield
        except ProcessError:
            if self._group.processes["superlink"].exit_code() is None:
                raise

    def _mend_app(self, why: str) -> None:
        self._count("serverapp", why)
        self._group.stop("serverapp", seconds=0.0)
        with self._unless_link_died():
            self.control.stop_run(self._run)
            self.start_app()

    def _mend_link(self) -> None:
        self._group.note_exit(self._group.processes["superlink"])
        self._count("superlink", "exited")
        if self._database is not None:
            with self._unless_link_died():
                self._start_link()
            return
        self._sites.disconnect()
        self._group.stop("serverapp", seconds=0.0)
        with self._unless_link_died():
            self._start_link()
            self.register()
            self.start_app()
            self._sites.connect()

    def _count(self, name: str, why: str) -> None:
        self._failures += 1
        if self._failures > LIMIT:
            raise ProcessError(
                f"The coordinator's {name} ended {self._failures} times in a row without a round being completed; its "
                "log says why.", detail=self._group.processes["serverapp"].tail(),
            )  # fmt: skip
        wait = wait_before(self._failures)
        self._events.emit("process.restart", name=name, attempt=self._failures, why=why, seconds=wait)
        limit = time.monotonic() + wait
        while time.monotonic() < limit:
            self._idle()
            time.sleep(REFRESH_SECONDS)

    def _wait(self, name: str, check: Callable[[], bool]) -> None:
        """Wait for a process of the coordinator, and keep the rest going meanwhile."""
        process = self._group.processes[name]
        limit = time.monotonic() + START_SECONDS
        while not check():
            self._idle()
            if process.exit_code() is not None or time.monotonic() > limit:
                raise ProcessError(
                    f"Process '{name}' did not become ready; its log says why.", detail=process.tail()
                )
            time.sleep(REFRESH_SECONDS)
        self._group.note_ready(process)

    def close(self) -> None:
        """Close the connection to the SuperLink."""
        self.control.close()


def stands(end: Mapping[str, object]) -> bool:
    """Return whether a verdict is the run's own, whatever happened to the coordinator's processes."""
    return end.get("verdict") == "ok" or end.get("code") not in DOUBTFUL
