"""`wardround run`: the coordinator of a project, on its own machine, for hospitals elsewhere.

Starts and mends the SuperLink and the ServerApp, admits the sites' keys, waits for the sites, and writes the same run
folder as a trial. There is no data here and no site's folder is known: sites connect when they come, and find back by
themselves after an outage. Who is approved or revoked meanwhile is admitted or sent away within seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from common.errors import (
    ConfigError,
    CredentialError,
    MismatchError,
    ProcessError,
    QuorumError,
    StorageError,
    WardroundError,
)
from common.events import EventLog
from ops.admission import Watch, check_server, check_still_admitted, choose_admitted, copy_keys, credentials
from ops.arrivals import Arrivals
from ops.coordinator import Coordinator, Sites
from ops.flower_commands import Addresses, Transport
from ops.options import Options
from ops.pki import TrialPki, load_public_pem
from ops.plan import Plan, make_run_plan, new_run_folder
from ops.ports import LOOPBACK, alone_at, check_port, free_ports, release_ports
from ops.processes import ProcessGroup
from ops.provision_files import join_address, split_address
from ops.provision_project import Project, read_project
from ops.remote import coordinator_plan
from ops.tables import print_closing
from ops.trial import Conduct, conduct, finished, holding

LISTEN = "0.0.0.0"
CONTROL = f"{LOOPBACK}:9093"
REFRESH_SECONDS = 0.25
NODES_SECONDS = 2.0
MEMORY_SECONDS = 30.0
KEYS_FOLDER = "keys"
NOTE = "coordinator"
"""Key of config.json by which a run of a project is known, and continued."""
READMIT_SECONDS = 5.0
UNTOLD = (
    "The SuperLink did not take the change of who is admitted. It is told again until it does; if that does not help, stop the "
    "run and resume it."
)
BLIND = (
    "The project's folder cannot be read any more, so approvals and revocations do not reach this run. Let the account that "
    "runs it read project.json (in the container: uid 10001)."
)
NOT_THERE = {QuorumError.code, MismatchError.code}


@dataclass(frozen=True)
class Place:
    """Where a coordinator runs.

    Attributes:
        project: The project's folder, only read.
        listen: HOST or HOST:PORT of the Fleet port; the port is the project's where none is given.
        control: HOST:PORT of the Control API, reachable from this machine alone.
    """

    project: Path
    listen: str = LISTEN
    control: str = CONTROL

    def addresses(self, project: Project) -> Addresses:
        """Return where the SuperLink listens, each port checked to be free; ServerAppIo gets any one on loopback.

        Raises:
            ConfigError: No address, or a Control API that others could reach.
            ProcessError: A port is in use.
        """
        host, port = split_address(self.listen)
        port = port or project.port
        control_host, control_port = split_address(self.control)
        if control_port is None or control_host not in (LOOPBACK, "localhost", "::1"):
            raise ConfigError(
                f"--control must be a port of this machine's loopback, e.g. {CONTROL}: whoever reaches the Control API "
                f"decides who takes part; got '{self.control[:60]}'."
            )
        try:
            check_port(host, port)
        except ProcessError as error:
            raise ProcessError(
                f"The project's port {port} cannot be used: a run of this project goes on here already, or another program "
                "has it. The sites' kits call this port, so stop the other one, or wait for its end.",
                detail=f"{error} {error.detail}",
            ) from error
        try:
            check_port(LOOPBACK if control_host == "localhost" else control_host, control_port)
        except ProcessError as error:
            raise ProcessError(
                f"Port {control_port} for the Control API cannot be used. Choose another one: --control {LOOPBACK}:PORT.",
                detail=f"{error} {error.detail}",
            ) from error
        appio = f"{LOOPBACK}:{free_ports(1)[0]}"
        return Addresses(join_address(host, port), join_address(control_host, control_port), appio)

    def note(self) -> dict[str, Any]:
        """Return what config.json remembers of it."""
        return {NOTE: {"project": str(self.project), "listen": self.listen, "control": self.control}}


class ProjectRun:
    """The processes of one run of a project.

    Args:
        plan: What runs.
        place: Where.
        addresses: Where the SuperLink listens.
        events: The command's events.
        refresh: Called while waiting (live view).
    """

    def __init__(
        self, plan: Plan, place: Place, addresses: Addresses, events: EventLog, refresh: Callable[[], None]
    ) -> None:
        self.plan, self.place, self.events = plan, place, events
        self.group = ProcessGroup(events)
        self.arrivals = Arrivals(plan, events)
        self._addresses, self._refresh = addresses, refresh
        self._watch = Watch(place.project)
        self._coordinator: Coordinator | None = None
        self._pki: TrialPki | None = None
        self._changed: Project | None = None
        self._readmit: Mapping[str, Path] | None = None
        self._readmit_at = 0.0
        self._blind = False
        self._names: dict[bytes, str] = {}
        self._nodes_at = self._memory_at = 0.0

    def start(self) -> None:
        """Start SuperLink and ServerApp, admit the keys, submit the run.

        Raises:
            CredentialError: The project's credentials are not in order.
            ProcessError: A process could not be started or was not ready in time.
        """
        self.events.emit("trial.phase", phase="keys")
        self._pki = credentials(self.place.project, self.plan.out / KEYS_FOLDER)
        self._admit(self._pki.site_public)
        self.events.emit("trial.phase", phase="start")
        self._coordinator = Coordinator(
            self.plan, self._addresses, self._pki, self.group, self.events, env={}, idle=self._refresh,
            sites=Sites(list(self._pki.site_public)),
        )  # fmt: skip
        self._coordinator.start_link()
        self.events.emit("trial.phase", phase="ready")
        self._coordinator.start_app()

    def watch(self) -> dict[str, object]:
        """Keep everything going until the run's end, and return its `run.end` event with what an operator can do.

        Raises:
            ProcessError: The coordinator's processes cannot be kept alive.
        """
        assert self._coordinator is not None
        while (end := self._coordinator.tend()) is None:
            self._refresh()
            self._follow_project(self._coordinator)
            self._see_nodes(self._coordinator)
            self.arrivals.look()
            self._sample_memory()
            time.sleep(REFRESH_SECONDS)
        return self._explained(end)

    def stop(self) -> None:
        """Stop what was started; nothing is left behind here. The sites stay as they are, and wait for the next run."""
        self.events.emit("trial.phase", phase="stop")
        try:
            if self._coordinator is not None:
                self._coordinator.close()
        finally:
            self.group.stop_all()
            release_ports([int(self._addresses.serverappio.rpartition(":")[2])])

    def _admit(self, keys: Mapping[str, Path]) -> None:
        self._names = {load_public_pem(path, site=alias): alias for alias, path in keys.items()}

    def _follow_project(self, coordinator: Coordinator) -> None:
        """Let the SuperLink know who was approved or revoked since."""
        self._changed = self._watch.changed() or self._changed
        if self._changed is not None:
            self._take_change(self._changed)
        if self._watch.blind != self._blind:
            self._blind = self._watch.blind
            if self._blind:
                self.events.emit("warning", code=StorageError.code, message=BLIND)
        if self._readmit is not None and time.monotonic() >= self._readmit_at:
            self._tell_link(coordinator, self._readmit)

    def _take_change(self, project: Project) -> None:
        """Note who is admitted now; on a volume that is full, again and again until it can be written."""
        if self._readmit is None and time.monotonic() < self._readmit_at:
            return
        try:
            keys = copy_keys(project, self.plan.out / KEYS_FOLDER)
        except StorageError as error:
            if not self._readmit_at:
                self.events.emit("warning", code=error.code, message=UNTOLD)
            self._readmit_at = time.monotonic() + READMIT_SECONDS
            return
        before = {alias: pem for pem, alias in self._names.items()}
        self._admit(keys)
        self._tell_change(before, {alias: pem for pem, alias in self._names.items()})
        self._changed, self._readmit, self._readmit_at = None, keys, 0.0

    def _tell_link(self, coordinator: Coordinator, keys: Mapping[str, Path]) -> None:
        """Let the SuperLink know the admitted keys, again and again until it takes them: a run is not ended for it."""
        try:
            if coordinator.readmit(keys):
                self._readmit = None
        except WardroundError as error:
            if not self._readmit_at:
                self.events.emit("warning", code=error.code, message=UNTOLD)
            self._readmit_at = time.monotonic() + READMIT_SECONDS

    def _tell_change(self, before: Mapping[str, bytes], now: Mapping[str, bytes]) -> None:
        for alias in sorted(alias for alias in now if before.get(alias, now[alias]) != now[alias]):
            self.events.emit(
                "warning", site=alias, code="admitted",
                message=f"{alias}: its key was replaced; the old one is not let in any more.",
            )  # fmt: skip
        for alias in sorted(before.keys() - now.keys()):
            self.events.emit(
                "warning", site=alias, code="revoked",
                message=f"{alias}: its key was revoked; it is not let in any more.",
            )  # fmt: skip
        for alias in sorted(now.keys() - before.keys()):
            there = (
                "it may connect now" if alias in self.plan.config.sites else "it takes part in the next run"
            )
            self.events.emit(
                "warning", site=alias, code="admitted", message=f"{alias}: its key was approved; {there}."
            )

    def _see_nodes(self, coordinator: Coordinator) -> None:
        """Note which sites are connected; a SuperLink that is being mended is asked again."""
        if not self.arrivals.waiting or time.monotonic() < self._nodes_at:
            return
        self._nodes_at = time.monotonic() + NODES_SECONDS
        try:
            nodes = coordinator.control.nodes()
        except (ProcessError, CredentialError):  # a SuperLink that is ending breaks off handshakes, too
            return
        self.arrivals.connected(
            {self._names[node.public_key] for node in nodes if node.online and node.public_key in self._names}
        )

    def _sample_memory(self) -> None:
        if time.monotonic() < self._memory_at:
            return
        self._memory_at = time.monotonic() + MEMORY_SECONDS
        for name, (rss, peak) in self.group.memory().items():
            self.events.emit("memory", name=name, rss=rss, peak=peak)

    def _explained(self, end: dict[str, object]) -> dict[str, object]:
        """Add who never came, and what to do about it, to the verdict of a run that lacked sites."""
        self.arrivals.look()
        never = self.arrivals.never
        if end.get("verdict") == "ok" or end.get("code") not in NOT_THERE or not never:
            return end
        try:
            server = read_project(self.place.project).server
        except WardroundError:  # it can be unreadable by now: the run's own verdict counts
            return end
        told = (
            f"Never connected: {', '.join(never)}. There: start the command lines of `wardround site commands` (or the "
            f"containers), read the SuperNode's log, and let the firewall pass connections out to {server}. Then let the run "
            "go on."
        )
        return {**end, "message": f"{end.get('message', '')} {told}".strip()}


def work_at(place: Place, addresses: Addresses) -> Callable[..., dict[str, object]]:
    """Return the work of a project's run, for `ops.trial.conduct`."""

    def work(plan: Plan, events: EventLog, refresh: Callable[[], None]) -> dict[str, object]:
        ports = (int(address.rpartition(":")[2]) for address in (addresses.fleet, addresses.control))
        with alone_at(*ports):
            (
                plan.out / "events.jsonl"
            ).touch()  # from now on the run folder is worth keeping, whatever happens
            run = ProjectRun(plan, place, addresses, events, refresh)
            try:
                run.start()
                return run.watch()
            finally:
                run.stop()

    return work


def run_project(
    options: Options,
    federation: Path,
    place: Place,
    *,
    transport: Transport = "memory",
    command: str = "",
    console: Console | None = None,
) -> int:
    """Run a project's federation from its coordinator and return the command's exit code.

    Args:
        options: What was typed.
        federation: The federation.json.
        place: The project and its addresses.
        transport: Where the SuperLink keeps messages.
        command: The command line that repeats it.
        console: The terminal.

    Raises:
        ConfigError, DataError, CredentialError, ProcessError: What is wrong, before anything is started or written.
    """
    place = replace(place, project=place.project.absolute())
    plan, addresses = checked(options, federation, place)
    plan.out = new_run_folder(options)
    plan.transport, plan.command = transport, command
    plan.notes.update(place.note())
    plan.notes["authority"] = read_project(place.project).authority
    with holding(plan.out):
        plan.write()
        return conduct(
            Conduct(plan.out, lambda events: plan, work_at(place, addresses), console or Console())
        )


def checked(options: Options, federation: Path, place: Place) -> tuple[Plan, Addresses]:
    """Check everything that can be checked before a run begins, and return its plan and addresses.

    Raises:
        ConfigError, DataError, CredentialError, ProcessError: As `run_project`.
    """
    project = read_project(place.project)
    sites = choose_admitted(project, options.sites)
    check_server(place.project, project)
    plan = make_run_plan(options, federation, sites, Path())
    return plan, place.addresses(project)


def resume_project_run(
    out: Path, *, project: Path | None = None, place: Place | None = None, console: Console | None = None
) -> int:
    """Continue a project's run from its last complete round and return the command's exit code.

    Args:
        out: The run folder.
        project: The project's folder, if it lies elsewhere by now.
        place: Where it runs; as before if none.
        console: The terminal.

    Raises:
        ConfigError: No run folder of a project, no project, or too few of the run's sites still admitted.
        CredentialError: The project's credentials are not in order.
        ProcessError: Another command runs it, or a port is in use.
    """
    console, out = console or Console(), out.resolve()
    plan, before = coordinator_plan(out), read_note(out)
    if before is None:
        raise ConfigError("This run folder is not of `wardround run`: continue it without --project.")
    place = place or Place(Path(before["project"]), before["listen"], before["control"])
    if project is not None:
        place = replace(place, project=project.absolute())
    with holding(out):
        if finished(out):
            console.print("This run is complete; nothing to continue.")
            print_closing(out, console)
            return 0
        found = read_project(place.project)
        check_still_admitted(found, plan.config)
        check_server(place.project, found)
        return conduct(Conduct(out, lambda events: plan, work_at(place, place.addresses(found)), console))


def read_note(out: Path) -> dict[str, str] | None:
    """Return what config.json remembers of the coordinator; None for a folder of a trial, or of nothing."""
    try:
        note = json.loads((out / "config.json").read_text(encoding="utf-8"))[NOTE]
        return {key: str(note[key]) for key in ("project", "listen", "control")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
