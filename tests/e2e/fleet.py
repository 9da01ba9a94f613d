"""A small federation of real processes running the echo app, for tests of the runtime."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from common.events import EventLog, read_events
from ops import flower_commands as commands
from ops.control import ControlClient, bundle_from
from ops.pki import make_trial_pki
from ops.ports import free_ports, release_ports
from ops.processes import ProcessGroup

APP = Path(__file__).parent / "echo_app"
SECONDS = 90.0  # above the 57 s after which Flower itself notices a relay that is gone


class Fleet:
    """SuperLink, ServerApp launcher, and a SuperNode with its relay launcher per site.

    `through` maps a site to the port it is told instead of the SuperLink's Fleet port.
    """

    def __init__(self, folder, sites, *, runtime="fast", through=None, victim=""):
        self.folder, self.sites, self.runtime = folder, list(sites), runtime
        self.out = folder / "rounds.jsonl"
        self.events = EventLog(folder / "events.jsonl", "trial")
        self.group = ProcessGroup(self.events)
        self.pki = make_trial_pki(folder / "pki", self.sites)
        self.addresses = commands.loopback_addresses()
        self.appio = {
            site: f"127.0.0.1:{port}"
            for site, port in zip(self.sites, free_ports(len(self.sites)), strict=True)
        }
        self.control = ControlClient(self.addresses.control, self.pki.ca)
        self.path = {"PYTHONPATH": os.pathsep.join([str(APP), os.environ.get("PYTHONPATH", "")])}
        self.through = through or (lambda site, port: port)
        self.victim = victim

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.control.close()
        self.group.stop_all()
        self.events.close()
        addresses = [
            self.addresses.fleet,
            self.addresses.control,
            self.addresses.serverappio,
            *self.appio.values(),
        ]
        release_ports([int(address.rpartition(":")[2]) for address in addresses])

    def start(self):
        """Start everything and wait until the sites are connected."""
        self.group.start(commands.superlink(self.addresses, self.pki, self.folder))
        env = {
            "ECHO_OUT": str(self.out),
            "ECHO_RUNTIME": self.runtime,
            "ECHO_VICTIM": self.victim,
            **self.path,
        }
        self.group.start(commands.server_superexec(self.addresses, self.pki, self.folder, env=env))
        for site in self.sites:
            self.start_relay(site)
        self.group.wait_ready("superlink", self.control.alive, SECONDS)
        for site in self.sites:
            self.control.register(self.pki.site_public[site], site=site)
        for site in self.sites:
            self.start_supernode(site)
        names = [f"supernode-{site}" for site in self.sites]
        self.group.wait_ready(
            names, lambda: sum(node.online for node in self.control.nodes()) == len(names), SECONDS
        )
        return self

    def start_relay(self, site, **other):
        return self.group.start(
            commands.relay_launcher(
                site, replace(self.pki, **other), self.folder, clientappio=self.appio[site], runtime=self.runtime,
                app="echo_client:app", env=self.path,
            )
        )  # fmt: skip

    def start_supernode(self, site, **other):
        port = int(self.addresses.fleet.rpartition(":")[2])
        return self.group.start(
            commands.supernode(
                site, replace(self.pki, **other), self.folder, fleet=f"127.0.0.1:{self.through(site, port)}",
                clientappio=self.appio[site], node_config={"site": site}, runtime=self.runtime,
                events=self.folder / f"events-{site}.jsonl",
            )
        )  # fmt: skip

    def submit(self, **settings):
        return self.control.start_run(bundle_from(APP), {"sites": len(self.sites), **settings})

    def wait(self, run, seconds=SECONDS):
        """Wait for a run's end and return its status."""
        deadline = time.monotonic() + seconds
        while not (status := self.control.run_status(run)).finished:
            self.group.poll()
            assert time.monotonic() < deadline, self.group.processes["serverapp"].tail(40)
            time.sleep(0.1)
        return status

    def rounds(self):
        return [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.exists() else []

    def run(self, **settings):
        """Run the echo app and return the lines of its rounds."""
        before = len(self.rounds())
        status = self.wait(self.submit(**settings))
        assert status.completed, self.group.processes["serverapp"].tail(40)
        return self.rounds()[before:]

    def transport(self, site):
        return [
            event
            for event in read_events(self.folder / f"events-{site}.jsonl")
            if event["event"] == "transport"
        ]

    def pids(self):
        return [process.pid for process in self.group.processes.values()]


if __name__ == "__main__":  # a trial to be killed: python fleet.py FOLDER
    fleet = Fleet(Path(sys.argv[1]), ["oak"])
    fleet.start()
    fleet.submit(op="sleep")
    while not Path(fleet.group.processes["relay-oak"].log).read_text().count("asking"):
        time.sleep(0.1)
    print(*fleet.pids(), flush=True)
    time.sleep(120)
