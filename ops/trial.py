"""`wardround trial`, `simulate` and `resume`: a whole federation as processes of this machine, one command, from keys to
report; and from the last complete round to the end, if something ended it before.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from common.errors import ProcessError, WardroundError, safe_sentence
from common.events import EventLog, read_events
from ops.failure import print_failure
from ops.federation import REFRESH_SECONDS, Env, Federation, Fleet, worker_answers
from ops.flower_commands import Runtime, Transport
from ops.live import LiveView
from ops.options import Options
from ops.plan import LOCK_FILE, Plan, new_run_folder, read_plan
from ops.prepare import check_sites, prepare, short_folder, write_sites
from ops.processes import Process, ProcessGroup
from ops.report import write_report
from ops.story_reader import Tail
from ops.tables import print_closing

START_SECONDS = 90.0
INTERRUPTED = 130
RAY_SECONDS = 15.0


class RunEnd:
    """Looks for the server's `run.end` event, reading only what is new.

    Args:
        out: The run folder.
    """

    def __init__(self, out: Path) -> None:
        self._tail = Tail(out / "events.jsonl")
        self._tail.poll()  # what an earlier attempt said is over

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


@contextmanager
def holding(out: Path) -> Iterator[None]:
    """Keep other commands away from a run folder; the kernel lets go of it with this process, however it ends.

    Raises:
        ProcessError: Another command runs it.
    """
    handle = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ProcessError(
                "Another command is running this run folder. Wait for its end, or stop it first.",
                detail=str(out),
            ) from error
        yield
    finally:
        os.close(handle)


Work = Callable[[Plan, EventLog, Callable[[], None]], dict[str, object]]


def run_trial(
    options: Options,
    *,
    runtime: Runtime = "fast",
    transport: Transport = "memory",
    device: str = "auto",
    threads: int = 0,
    command: str = "",
    fleet: Fleet | None = None,
    env: Env | None = None,
    console: Console | None = None,
) -> int:
    """Run a trial and return the command's exit code."""
    settings = {
        "runtime": runtime, "transport": transport, "device": device, "threads": threads, "command": command,
    }  # fmt: skip
    return _run_new(options, settings, work_of(fleet, env), console)


def run_simulated(
    options: Options,
    *,
    device: str = "auto",
    threads: int = 0,
    command: str = "",
    console: Console | None = None,
) -> int:
    """Run the same apps in Flower's simulation runtime and return the command's exit code."""
    settings = {"runtime": "simulation", "device": device, "threads": threads, "command": command}
    return _run_new(options, settings, simulate, console)


def resume_run(
    out: Path, *, fleet: Fleet | None = None, env: Env | None = None, console: Console | None = None
) -> int:
    """Continue a run from its last complete round and return the command's exit code.

    Raises:
        ConfigError: No run folder, or one that cannot be continued.
        ProcessError: Another command runs it.
    """
    console = console or Console()
    out = out.resolve()
    plan = read_plan(out)
    with holding(out):
        if finished(out):
            console.print(
                f"This run is complete; nothing to continue. Its report: {out / 'report.html'}",
                soft_wrap=True,
            )
            return 0
        work = simulate if plan.runtime == "simulation" else work_of(fleet, env)

        def planned(events: EventLog) -> Plan:
            check_sites(plan, events, console)
            return plan

        return conduct(Conduct(out, planned, work, console))


def finished(out: Path) -> bool:
    """Return whether a run's last attempt ended well."""
    path = out / "events.jsonl"
    ends = [event for event in read_events(path) if event.get("event") == "run.end"] if path.is_file() else []
    return bool(ends) and ends[-1].get("verdict") == "ok"


def work_of(fleet: Fleet | None, env: Env | None) -> Work:
    """Return the work of a trial of processes."""

    def work(plan: Plan, events: EventLog, refresh: Callable[[], None]) -> dict[str, object]:
        federation = Federation(plan, events=events, refresh=refresh, fleet=fleet, env=env)
        try:
            federation.start()
            return federation.watch()
        finally:
            federation.stop()

    return work


def simulate(plan: Plan, events: EventLog, refresh: Callable[[], None]) -> dict[str, object]:
    """Run a plan in Flower's simulation runtime."""
    short = short_folder()
    group = ProcessGroup(events)
    try:
        socket = short / "sites.sock"
        files = write_sites(plan, dict.fromkeys(plan.sites, socket), threads=plan.threads)
        events.emit("trial.phase", phase="start")
        argv = [sys.executable, "-P", "-m", "client.worker", *map(str, files.values())]
        worker = group.start(
            Process("worker", argv, plan.out / "logs" / "worker.log", env={"PYTHONUNBUFFERED": "1"})
        )
        group.wait_ready(worker.name, lambda: worker_answers(socket), START_SECONDS)
        log = plan.out / "logs" / "simulation.log"
        argv = [sys.executable, "-P", "-m", "ops.simulate"]
        argv += [str(plan.out), str(socket), str(len(plan.sites))]
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


def _run_new(options: Options, settings: dict[str, object], work: Work, console: Console | None) -> int:
    console = console or Console()
    out = new_run_folder(options)

    def planned(events: EventLog) -> Plan:
        return prepare(options, out, settings=settings, events=events, console=console)

    with holding(out):
        return conduct(Conduct(out, planned, work, console))


@dataclass(frozen=True)
class Conduct:
    """What `conduct` needs.

    Attributes:
        out: The run folder.
        plan: Makes or reads the plan.
        work: Runs it.
        console: The terminal.
    """

    out: Path
    plan: Callable[[EventLog], Plan]
    work: Work
    console: Console


class Shielded:
    """Calls a view, and goes on without it once it breaks: what is shown must not end what runs.

    Args:
        view: Shows something.
        console: Is told once that it broke.
    """

    def __init__(self, view: Callable[[], None], console: Console) -> None:
        self._view: Callable[[], None] | None = view
        self._console = console

    def __call__(self) -> None:
        """Show, if it still can."""
        if self._view is None:
            return
        try:
            self._view()
        except Exception as error:
            self._view = None
            self._console.print(
                f"The live view broke ({type(error).__name__}); the run goes on. `wardround watch` shows it again."
            )


def conduct(what: Conduct) -> int:
    """Plan, work, report: what a trial, a simulation and a continued run have in common.

    Returns:
        0 if the run ended well, else the exit code of what went wrong.
    """
    out, console = what.out, what.console
    events = EventLog(out / "events-trial.jsonl", "trial", run=out.name)
    started = time.monotonic()
    failure: tuple[str, str] | None = None
    code, detail = 0, ""
    try:
        with signals_as_interrupt():
            plan = what.plan(events)
            tell_start(plan, events)
            with LiveView(out, console=console) as view:
                show = Shielded(view.refresh, console)
                end = what.work(plan, events, show)
                show()
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
    if (out / "events.jsonl").exists() or (out / "sites").exists():
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
