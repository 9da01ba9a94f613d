"""`wardround trial`: a whole federation as processes of this machine, from keys to report, one command.

Started are: the SuperLink and the ServerApp's launcher at the coordinator, and for each hospital a worker, a SuperNode
with its own key, and a relay launcher. All of them are watched; when one ends that was not told to, the trial ends too,
names it and shows the end of its log. Everything that was started is stopped, however the trial ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from common.errors import ProcessError, WardroundError, safe_sentence
from common.events import EventLog
from ops.control import ControlClient, bundle
from ops.failure import print_failure
from ops.flower_commands import (
    Addresses,
    Runtime,
    loopback_addresses,
    relay_launcher,
    server_superexec,
    superlink,
    supernode,
)
from ops.live import LiveView
from ops.options import Options
from ops.pki import TrialPki, check_credentials, make_trial_pki
from ops.plan import Plan, new_run_folder
from ops.ports import LOOPBACK, free_ports, release_ports
from ops.prepare import prepare, short_folder, write_sites
from ops.processes import Process, ProcessGroup
from ops.report import write_report
from ops.story_reader import Tail
from ops.tables import print_closing

START_SECONDS = 90.0
REFRESH_SECONDS = 0.25
MEMORY_SECONDS = 2.0
INTERRUPTED = 130
RAY_SECONDS = 15.0

Fleet = Callable[
    [str, str], str
]  # (site, SuperLink's Fleet address) -> address the site's SuperNode is given


class Federation:
    """The processes of one trial.

    Args:
        plan: What to run.
        runtime: "fast" or "stock".
        device: Where workers compute.
        threads: CPU threads per worker.
        events: The command's own events.
        fleet: Puts something between a site and the SuperLink (a counting proxy, in tests).
    """

    def __init__(
        self,
        plan: Plan,
        *,
        runtime: Runtime,
        device: str,
        threads: int,
        events: EventLog,
        fleet: Fleet | None = None,
    ) -> None:
        self.plan = plan
        self.runtime: Runtime = runtime
        self.device = device
        self.threads = threads or max(1, (os.cpu_count() or 1) // len(plan.sites))
        self.events = events
        self.group = ProcessGroup(events)
        self.logs = plan.out / "logs"
        self.sockets: dict[str, Path] = {}
        self._fleet = fleet or (lambda site, address: address)
        self._short: Path | None = None
        self._control: ControlClient | None = None
        self._run = 0
        self._memory_at = 0.0

    def start(self, on_wait: Callable[[], None]) -> None:
        """Start everything and submit the run.

        Args:
            on_wait: Called while waiting (live view).

        Raises:
            ProcessError: A process ended or was not ready in time.
        """
        aliases = list(self.plan.sites)
        self.events.emit("trial.phase", phase="keys")
        pki = make_trial_pki(self.plan.out / "pki", aliases)
        addresses = loopback_addresses()
        check_credentials(ca=pki.ca, cert=pki.server_cert, key=pki.server_key, names=[LOOPBACK])
        self.events.emit("trial.phase", phase="start")
        self._short = short_folder()
        self.sockets = {alias: self._short / f"{index}.sock" for index, alias in enumerate(aliases)}
        link = self.group.start(superlink(addresses, pki, self.logs))
        self._start_workers()
        relays = self._start_relays(pki)
        self._control = ControlClient(addresses.control, pki.ca)
        self._wait([link], self._control.alive, on_wait)
        self.events.emit("trial.phase", phase="register")
        for alias in aliases:
            self._control.register(pki.site_public[alias], site=alias)
        self._start_coordinator(addresses, pki)
        # Submitted now, so that the ServerApp imports while the sites start: its roster waits for every site's first
        # answer before round 1.
        self._run = self._control.start_run(bundle(), {"wardround": self.plan.config.to_json()})
        self._start_network(addresses, pki, relays)
        self.events.emit("trial.phase", phase="ready")
        for alias in aliases:
            worker = self.group.processes[f"worker-{alias}"]
            self._wait([worker], lambda alias=alias: worker_answers(self.sockets[alias]), on_wait)  # type: ignore[misc]
        nodes = [self.group.processes[f"supernode-{alias}"] for alias in aliases]
        self._wait(nodes, self._all_online, on_wait)
        self.events.emit("trial.phase", phase="run")

    def _start_workers(self) -> None:
        files = write_sites(self.plan, self.sockets, device=self.device, threads=self.threads)
        for alias, file in files.items():
            argv = [sys.executable, "-P", "-m", "client.worker", str(file)]
            env = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
            self.group.start(
                Process(f"worker-{alias}", argv, self.logs / f"worker-{alias}.log", env=env, site=alias)
            )

    def _start_coordinator(self, addresses: Addresses, pki: TrialPki) -> None:
        env = {
            "WARDROUND_RUN_DIR": str(self.plan.out),
            "WARDROUND_RUN_ID": self.plan.out.name,
            "WARDROUND_RUNTIME": self.runtime,
        }
        self.group.start(server_superexec(addresses, pki, self.logs, env=env))

    def _start_relays(self, pki: TrialPki) -> dict[str, str]:
        """Start the relay launchers and return the address at which each waits for its SuperNode."""
        addresses = {}
        for alias, port in zip(self.plan.sites, free_ports(len(self.plan.sites)), strict=True):
            addresses[alias] = f"{LOOPBACK}:{port}"
            self.group.start(
                relay_launcher(alias, pki, self.logs, clientappio=addresses[alias], runtime=self.runtime)
            )
        return addresses

    def _start_network(self, addresses: Addresses, pki: TrialPki, relays: dict[str, str]) -> None:
        for alias, clientappio in relays.items():
            self.group.start(
                supernode(
                    alias, pki, self.logs, fleet=self._fleet(alias, addresses.fleet), clientappio=clientappio,
                    node_config={"site": alias, "worker": str(self.sockets[alias])}, runtime=self.runtime,
                    events=self.plan.out / f"events-{alias}-net.jsonl",
                )
            )  # fmt: skip

    def _all_online(self) -> bool:
        assert self._control is not None
        return sum(node.online for node in self._control.nodes()) == len(self.plan.sites)

    def _wait(self, processes: list[Process], check: Callable[[], bool], on_wait: Callable[[], None]) -> None:
        def checking() -> bool:
            on_wait()
            return check()

        self.group.wait_ready([process.name for process in processes], checking, START_SECONDS)

    def watch(self, on_wait: Callable[[], None]) -> dict[str, object]:
        """Wait for the run's end and return its `run.end` event.

        Raises:
            ProcessError: A process ended, or the ServerApp ended without a word.
        """
        assert self._control is not None
        ended_at = 0.0
        run_end = RunEnd(self.plan.out)
        look_at = time.monotonic() + 2.0
        while True:
            on_wait()
            end = run_end.look()
            self._sample_memory()
            if end is not None:
                return end
            self.group.poll()
            if time.monotonic() > look_at:
                look_at = time.monotonic() + 2.0
                if self._control.run_status(self._run).finished:
                    ended_at = ended_at or time.monotonic()
                if ended_at and time.monotonic() - ended_at > 1.0:  # its last event had time to arrive
                    raise ProcessError(
                        "The ServerApp ended without a verdict; its log says why.",
                        detail=self.group.processes["serverapp"].tail(),
                    )
            time.sleep(REFRESH_SECONDS)

    def _sample_memory(self) -> None:
        if time.monotonic() < self._memory_at:
            return
        self._memory_at = time.monotonic() + MEMORY_SECONDS
        for name, (rss, peak) in self.group.memory().items():
            self.events.emit("memory", name=name, rss=rss, peak=peak)

    def stop(self) -> None:
        """Stop everything that was started; nothing is left behind."""
        self.events.emit("trial.phase", phase="stop")
        self._memory_at = 0.0
        try:
            self._sample_memory()
            if self._control is not None:
                self._control.close()
        finally:
            self.group.stop_all()
            release_ports()
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)


def worker_answers(socket: Path, timeout: float = 1.0) -> bool:
    """Return True if a worker's health service says it serves."""
    if not socket.exists():
        return False
    try:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout
            )
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class RunEnd:
    """Looks for the server's `run.end` event, reading only what is new.

    Args:
        out: The run folder.
    """

    def __init__(self, out: Path) -> None:
        self._tail = Tail(out / "events.jsonl")

    def look(self) -> dict[str, object] | None:
        """Return the event once it is there."""
        return next((event for event in self._tail.poll() if event.get("event") == "run.end"), None)


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt, so that a stopped trial cleans up as after Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_trial(
    options: Options,
    *,
    runtime: Runtime = "fast",
    device: str = "auto",
    threads: int = 0,
    command: str = "",
    fleet: Fleet | None = None,
    console: Console | None = None,
) -> int:
    """Run a trial and return the command's exit code."""

    def work(plan: Plan, events: EventLog, refresh: Callable[[], None]) -> dict[str, object]:
        federation = Federation(
            plan, runtime=runtime, device=device, threads=threads, events=events, fleet=fleet
        )
        try:
            federation.start(refresh)
            return federation.watch(refresh)
        finally:
            federation.stop()

    return conduct(options, work, runtime=runtime, command=command, console=console)


def run_simulated(
    options: Options,
    *,
    device: str = "auto",
    threads: int = 0,
    command: str = "",
    console: Console | None = None,
) -> int:
    """Run the same apps in Flower's simulation runtime and return the command's exit code."""

    def work(plan: Plan, events: EventLog, refresh: Callable[[], None]) -> dict[str, object]:
        short = short_folder()
        group = ProcessGroup(events)
        try:
            socket = short / "sites.sock"
            files = write_sites(plan, dict.fromkeys(plan.sites, socket), device=device, threads=threads)
            events.emit("trial.phase", phase="start")
            argv = [sys.executable, "-P", "-m", "client.worker", *map(str, files.values())]
            worker = group.start(
                Process("worker", argv, plan.out / "logs" / "worker.log", env={"PYTHONUNBUFFERED": "1"})
            )
            group.wait_ready(worker.name, lambda: worker_answers(socket), START_SECONDS)
            log = plan.out / "logs" / "simulation.log"
            argv = [
                sys.executable,
                "-P",
                "-m",
                "ops.simulate",
                str(plan.out),
                str(socket),
                str(len(plan.sites)),
            ]
            runner = group.start(Process("simulation", argv, log, env={"PYTHONUNBUFFERED": "1"}))
            events.emit("trial.phase", phase="run")
            run_end = RunEnd(plan.out)
            while (end := run_end.look()) is None:
                refresh()
                group.poll()
                time.sleep(REFRESH_SECONDS)
            runner.expected = True
            limit = time.monotonic() + RAY_SECONDS
            while runner.exit_code() is None and time.monotonic() < limit:  # Ray takes its own processes down
                time.sleep(REFRESH_SECONDS)
            return end
        finally:
            events.emit("trial.phase", phase="stop")
            group.stop_all()
            shutil.rmtree(short, ignore_errors=True)

    return conduct(options, work, runtime="simulation", command=command, console=console)


Work = Callable[[Plan, EventLog, Callable[[], None]], dict[str, object]]


def conduct(options: Options, work: Work, *, runtime: str, command: str, console: Console | None) -> int:
    """Prepare, work, report: what a trial and a simulation have in common.

    Returns:
        0 if the run ended well, else the exit code of what went wrong.
    """
    console = console or Console()
    out = new_run_folder(options)
    events = EventLog(out / "events-trial.jsonl", "trial", run=out.name)
    started = time.monotonic()
    planned = False
    failure: tuple[str, str] | None = None
    code, detail = 0, ""
    try:
        with signals_as_interrupt():
            plan = prepare(options, out, runtime=runtime, command=command, events=events, console=console)
            planned = True
            tell_start(plan, events)
            with LiveView(out, console=console) as view:
                end = work(plan, events, view.refresh)
                view.refresh()
            if end.get("verdict") != "ok":
                failure = (str(end.get("code", "internal")), str(end.get("message", "the run failed")))
                code = exit_code(end)
    except KeyboardInterrupt:
        failure, code = (
            ("interrupted", "Stopped before the end; everything that was started is stopped."),
            INTERRUPTED,
        )
    except WardroundError as error:
        failure, code, detail = safe_sentence(error), error.exit_code, error.detail
    words = {"code": failure[0], "message": failure[1]} if failure else {}
    events.emit(
        "trial.end", verdict="failed" if failure else "ok", seconds=time.monotonic() - started, **words
    )
    events.close()
    if planned:
        write_report(out)
        print_closing(out, console)
    else:
        shutil.rmtree(out, ignore_errors=True)  # nothing ran, so the name stays free for the next try
    if failure:
        print_failure(*failure, detail)
    return code


def tell_start(plan: Plan, events: EventLog) -> None:
    """Say what begins."""
    config = plan.config
    events.emit(
        "trial.start", method=config.method, task=config.data.task, data=plan.federation.name,
        sites=list(plan.sites), rounds=config.rounds.rounds, runtime=plan.runtime,
    )  # fmt: skip


def exit_code(end: dict[str, object]) -> int:
    """Return the exit code of a failed run's error code."""
    codes = {kind.code: kind.exit_code for kind in WardroundError.__subclasses__()}
    return codes.get(str(end.get("code")), 1)
