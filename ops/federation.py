"""The processes of a trial: a coordinator, and for each hospital a worker, a SuperNode with its own key, a relay launcher.

All are kept alive (ops/supervisor.py for the sites, ops/coordinator.py for the coordinator); a site that cannot be is
given up by name, and the run goes on while its quorum can do without. Everything that was started is stopped, however
the trial ends.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import ProcessError
from common.events import EventLog
from ops.control import NodeInfo
from ops.coordinator import START_SECONDS, Coordinator, Sites
from ops.flower_commands import Addresses, Runtime, loopback_addresses, relay_launcher, supernode
from ops.pki import TrialPki, check_credentials, load_public_pem, make_trial_pki
from ops.plan import Plan
from ops.ports import LOOPBACK, free_ports, release_ports
from ops.prepare import short_folder, write_sites
from ops.processes import Process, ProcessGroup
from ops.supervisor import Charge, Supervisor
from server.roster import needed_sites

REFRESH_SECONDS = 0.25
MEMORY_SECONDS = 2.0
NODES_SECONDS = 5.0
WORKER_PATIENCE = 90.0  # a worker's health is answered beside its work, but a busy machine can hold it up
ONLINE_PATIENCE = (
    180.0  # a SuperNode reconnects by itself after an outage of the network; only a hung one is restarted
)

Fleet = Callable[
    [str, str], str
]  # (site, SuperLink's Fleet address) -> address the site's SuperNode is given
Env = Mapping[str, Mapping[str, str]]


class Federation:
    """The processes of one trial.

    Args:
        plan: What to run.
        events: The command's own events.
        refresh: Called while waiting (live view).
        fleet: Puts something between a site and the SuperLink (a counting proxy, in tests).
        env: Extra variables by process name (a shifted clock, in tests).
    """

    def __init__(
        self,
        plan: Plan,
        *,
        events: EventLog,
        refresh: Callable[[], None],
        fleet: Fleet | None = None,
        env: Env | None = None,
    ) -> None:
        self.plan = plan
        self.runtime: Runtime = "stock" if plan.runtime == "stock" else "fast"
        self.threads = plan.threads or max(1, (os.cpu_count() or 1) // len(plan.sites))
        self.events = events
        self.group = ProcessGroup(events)
        self.supervisor = Supervisor(self.group, events, self._given_up)
        self.logs = plan.out / "logs"
        self.sockets: dict[str, Path] = {}
        self._refresh = refresh
        self._fleet = fleet or (lambda site, address: address)
        self._env = env or {}
        self._short: Path | None = None
        self._coordinator: Coordinator | None = None
        self._memory_at = self._nodes_at = 0.0
        self._online: set[bytes] = set()
        self._lost_sites: set[str] = set()

    def start(self) -> None:
        """Start everything and submit the run.

        Raises:
            ProcessError: A process could not be kept alive or was not ready in time.
        """
        aliases = list(self.plan.sites)
        self.events.emit("trial.phase", phase="keys")
        pki = make_trial_pki(self.plan.out / "pki", aliases)
        addresses = loopback_addresses()
        check_credentials(ca=pki.ca, cert=pki.server_cert, key=pki.server_key, names=[LOOPBACK])
        self.events.emit("trial.phase", phase="start")
        self._short = short_folder()
        self.sockets = {alias: self._short / f"{index}.sock" for index, alias in enumerate(aliases)}
        nodes = [f"supernode-{alias}" for alias in aliases]
        sites = Sites(
            aliases,
            disconnect=lambda: self.supervisor.hold(nodes),
            connect=lambda: self.supervisor.let_go(nodes),
        )
        self._coordinator = Coordinator(
            self.plan, addresses, pki, self.group, self.events, env=self._env, idle=self._idle, sites=sites
        )
        self._start_workers()
        relays = self._start_relays(pki)
        self._coordinator.start_link()
        self.events.emit("trial.phase", phase="register")
        # Submitted now, so that the ServerApp imports while the sites start: its roster waits for every site's first
        # answer before round 1.
        self._coordinator.start_app()
        self._start_network(addresses, pki, relays)
        self.events.emit("trial.phase", phase="ready")
        for alias in aliases:
            self._wait(f"worker-{alias}", lambda alias=alias: worker_answers(self.sockets[alias]))  # type: ignore[misc]
        for alias in aliases:
            self._wait(f"supernode-{alias}", lambda alias=alias: self._is_online(alias, pki))  # type: ignore[misc]
        self.events.emit("trial.phase", phase="run")

    def _keep(self, process: Process, sign: Callable[[], bool] | None = None, patience: float = 60.0) -> None:
        process.env = {**process.env, **self._env.get(process.name, {})}
        self.group.start(process)
        self.supervisor.take(process, sign=sign, patience=patience)

    def _start_workers(self) -> None:
        files = write_sites(self.plan, self.sockets, threads=self.threads)
        for alias, file in files.items():
            argv = [sys.executable, "-P", "-m", "client.worker", str(file)]
            env = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
            log = self.logs / f"worker-{alias}.log"
            self._keep(
                Process(f"worker-{alias}", argv, log, env=env, site=alias),
                lambda alias=alias: worker_answers(self.sockets[alias]),  # type: ignore[misc]
                WORKER_PATIENCE,
            )

    def _start_relays(self, pki: TrialPki) -> dict[str, str]:
        """Start the relay launchers and return the address at which each waits for its SuperNode."""
        addresses = {}
        for alias, port in zip(self.plan.sites, free_ports(len(self.plan.sites)), strict=True):
            addresses[alias] = f"{LOOPBACK}:{port}"
            self._keep(
                relay_launcher(alias, pki, self.logs, clientappio=addresses[alias], runtime=self.runtime)
            )
        return addresses

    def _start_network(self, addresses: Addresses, pki: TrialPki, relays: dict[str, str]) -> None:
        for alias, clientappio in relays.items():
            process = supernode(
                alias, pki, self.logs, fleet=self._fleet(alias, addresses.fleet), clientappio=clientappio,
                node_config={"site": alias, "worker": str(self.sockets[alias])}, runtime=self.runtime,
                events=self.plan.out / f"events-{alias}-net.jsonl",
            )  # fmt: skip
            self._keep(process, lambda alias=alias: self._is_online(alias, pki), ONLINE_PATIENCE)  # type: ignore[misc]

    def _is_online(self, alias: str, pki: TrialPki) -> bool:
        """Return whether the SuperLink lists a site's key as online; it is asked every few seconds for all."""
        assert self._coordinator is not None
        if time.monotonic() > self._nodes_at:
            try:
                nodes: list[NodeInfo] = self._coordinator.control.nodes()
            except ProcessError:  # the SuperLink is being mended
                return False
            self._online = {node.public_key for node in nodes if node.online}
            self._nodes_at = time.monotonic() + (
                NODES_SECONDS if len(self._online) == len(self.plan.sites) else 0.3
            )
        return load_public_pem(pki.site_public[alias], site=alias) in self._online

    def _wait(self, name: str, check: Callable[[], bool]) -> None:
        """Wait until a process shows life, restarting what ends; one that never does is given up as any other."""
        charge = self.supervisor.charges[name]
        limit = time.monotonic() + START_SECONDS
        while not check():
            self._tick()
            if charge.given_up:
                return
            if time.monotonic() > limit:
                raise ProcessError(
                    f"Process '{name}' was not ready within {START_SECONDS:.0f} s; its log says why.",
                    detail=charge.process.tail(), site=charge.process.site,
                )  # fmt: skip
            time.sleep(0.1)
        self.group.note_ready(charge.process)

    def _idle(self) -> None:
        """What goes on while the coordinator waits for its own processes."""
        self._refresh()
        self.supervisor.poll()

    def _tick(self) -> dict[str, object] | None:
        assert self._coordinator is not None
        self._idle()
        self._sample_memory()
        return self._coordinator.tend()

    def watch(self) -> dict[str, object]:
        """Keep everything going until the run's end and return its `run.end` event.

        Raises:
            ProcessError: What is needed cannot be kept alive.
        """
        while (end := self._tick()) is None:
            time.sleep(REFRESH_SECONDS)
        return end

    def _given_up(self, charge: Charge, error: ProcessError) -> None:
        """Go on without a site if the quorum allows it."""
        site = charge.process.site
        self._lost_sites.add(site)
        left = len(self.plan.sites) - len(self._lost_sites)
        if not site or left < max(needed_sites(self.plan.config, len(self.plan.sites)), 1):
            raise error
        self.events.emit("warning", site=site, code=error.code, message=str(error))

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
            if self._coordinator is not None:
                self._coordinator.close()
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
