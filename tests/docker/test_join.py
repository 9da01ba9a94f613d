"""What a new hospital does, for real: from the kit to the first round, in the containers of kit and coordinator.

The coordinator runs by this repository's compose.yaml, each hospital by the compose file in its own kit and by the commands
of its README. They meet at the engine's bridge, an address of this machine that containers reach.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.federation import Federation, write_federation
from ops.ports import free_ports, release_ports
from ops.provision import provision
from ops.provision_project import ProjectConfig
from tests.docker.stack import Stack, left, plain, take_away
from tests.harness import FEATURES, write_table_site

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]
WARDROUND = str(Path(sys.executable).parent / "wardround")
UID = 10001
ALIASES = ("oak", "elm")
DATA = {
    "task": "tabular",
    "spatial_dims": 0,
    "channels": list(FEATURES),
    "labels": ["well", "ill"],
    "patch": [],
}


def not_tested(why):
    text = f"NOT TESTED: a hospital that joins in containers, because {why}"
    warnings.warn(text, stacklevel=2)
    pytest.skip(text)


def hand_over(folder, user=UID):
    """What `chown -R` does: the containers' user alone may read what is 0600."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, -1)


def open_up(folder):
    """What `chmod -R a+rX` does."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))


def called(engine, folder, *words):
    argv, env = [WARDROUND, *map(str, words)], plain(engine.env)
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, cwd=folder, env=env)


def wardround(engine, folder, *words, code=0):
    """Run a command of this environment in a folder and return what it said."""
    done = called(engine, folder, *words)
    said = done.stdout + done.stderr
    assert done.returncode == code, f"ended with {done.returncode}, not {code}:\n{said[-4000:]}"
    return said


def together(what, hospitals):
    """Do the same at all hospitals at once, as they would."""
    with ThreadPoolExecutor(len(hospitals)) as threads:
        return dict(zip(hospitals, threads.map(what, hospitals.values()), strict=True))


class Hospital:
    """One site's folder, as its README describes it, and the compose project that its kit starts."""

    def __init__(self, engine, alias, folder, name):
        self.engine, self.alias, self.folder, self.name = engine, alias, folder, name
        self.kit = folder / alias

    def wardround(self, *words, code=0):
        return wardround(self.engine, self.folder, *words, code=code)

    def unpack(self, archive):
        with tarfile.open(archive) as packed:
            packed.extractall(self.folder, filter="data")

    def ask(self, server):
        """Steps 1 to 3 of the README; returns (request, the fingerprint that is read out)."""
        self.wardround("site", "verify", self.alias, "--alias", self.alias, "--server", server)
        said = self.wardround("site", "request", self.alias)
        (line,) = [line for line in said.splitlines() if "telephone" in line]
        return self.folder / f"{self.alias}-request.json", line.partition("telephone")[2].strip()

    def prepare(self):
        """Steps 4 and 5: the configuration, the data, and what the containers' user must be able to read."""
        shutil.copy(self.kit / "site.toml", self.folder)
        write_table_site(self.folder / "data", seed=len(self.alias) + ord(self.alias[0]))
        for folder in (self.kit, self.folder / "data"):
            open_up(folder)
        (self.folder / "site.toml").chmod(0o644)
        hand_over(self.folder / f"{self.alias}-keys")

    def up(self, *more, code=0):
        return self.wardround("site", "up", self.alias, "--project-name", self.name, *more, code=code)

    def status(self):
        """Return `site status --json`; it ends with 9 where the site is not well, which the document says, too."""
        words = ("site", "status", self.alias, "--project-name", self.name, "--json")
        done = called(self.engine, self.folder, *words)
        found = json.loads(done.stdout)
        assert done.returncode == (0 if found["healthy"] else 9)
        return found

    def well(self):
        """Whether the engine says that both containers are healthy; cheaper than `status`."""
        words = ("compose", "-p", self.name, "ps", "--format", "{{.Health}}")
        return self.engine.docker(*words).stdout.split() == ["healthy", "healthy"]

    def within(self, *command):
        words = ("compose", "-p", self.name, "exec", "--no-TTY", "worker", *command)
        return self.engine.docker(*words).stdout


class Coordinator:
    """The coordinator's machine: a project's folder, and the profiles `coordinator` and `dashboards` of compose.yaml."""

    def __init__(self, engine, folder, name, address):
        self.engine, self.folder, self.address = engine, folder, address
        self.port, self.board = free_ports(2)
        self.project = folder / "trial-2026"
        described = {
            "name": "trial-2026",
            "coordinator": {"names": [address], "port": self.port},
            "sites": [{"alias": alias} for alias in ALIASES],
        }
        provision(ProjectConfig.model_validate(described), self.project)
        (self.project / "authority").rename(folder / "authority")  # where the network is not
        write_federation(folder / "described", Federation("tables", settings={"data": DATA}))
        open_up(folder / "described")
        hand_over(self.project)  # before approvals: root's changes must stay readable for the container
        self.stack = Stack(engine, name)
        self.stack.env = {
            "WARDROUND_PROJECT": str(self.project),
            "WARDROUND_FEDERATION": str(folder / "described" / "federation.json"),
            "WARDROUND_METHOD": "fedavg",
            "WARDROUND_PORT": str(self.port),
            "WARDROUND_DASHBOARD_PORT": str(self.board),
        }

    def wardround(self, *words):
        return wardround(self.engine, self.folder, *words, "--project", self.project)

    def begin(self, run, rounds, settings="batch_size=8"):
        self.stack.env.update(WARDROUND_RUN=run, WARDROUND_ROUNDS=str(rounds), WARDROUND_SETTINGS=settings)
        self.stack.compose("--profile", "coordinator", "up", "--detach", "--no-build")

    def events(self, run, event):
        """Events of a run's folder; also of a container that has ended."""
        copy = self.folder / f"{run}.jsonl"
        source = f"{self.stack.container('coordinator')}:/runs/{run}/events.jsonl"
        if self.engine.docker("cp", source, str(copy), check=False).returncode:
            return []
        lines = copy.read_text().splitlines(keepends=True)
        items = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be under way
        return [item for item in items if item["event"] == event]

    def rounds(self, run):
        return [item for item in self.events(run, "round.end") if not item.get("closing")]


@pytest.fixture(scope="module")
def joined(stack, tmp_path_factory):
    """Two hospitals with approved keys, and a coordinator; nothing is started yet."""
    engine = stack.engine
    if os.geteuid():
        not_tested(f"only root may give a folder to uid {UID}, which the containers run as")
    if not engine.env.get("DOCKER_HOST", "unix://").startswith("unix://"):
        not_tested("the engine is on another machine, which sees none of these folders")
    found = engine.docker(
        "network", "inspect", "bridge", "--format", "{{range .IPAM.Config}}{{.Gateway}} {{end}}", check=False
    )
    gateways = found.stdout.split()
    if not gateways:
        not_tested("the engine has no bridge with a gateway, at which containers would reach this machine")
    folder, name = tmp_path_factory.mktemp("join"), f"wardround-join-{os.getpid()}"
    coordinator = Coordinator(engine, folder, name, gateways[0])

    def join(hospital):
        hospital.folder.mkdir()
        hospital.unpack(coordinator.project / "kits" / f"{hospital.alias}.tar.gz")
        request, spoken = hospital.ask(f"{coordinator.address}:{coordinator.port}")
        coordinator.wardround("site", "approve", request, "--fingerprint", spoken)
        hospital.prepare()

    hospitals = {
        alias: Hospital(engine, alias, folder / f"at-{alias}", f"{name}-{alias}") for alias in ALIASES
    }
    together(join, hospitals)
    yield coordinator, hospitals
    for project in (*(hospital.name for hospital in hospitals.values()), name):
        take_away(engine, project)
        assert not left(engine, project)
    release_ports([coordinator.port, coordinator.board])


@pytest.fixture(scope="module")
def first(joined):
    """Two rounds: (coordinator, hospitals, the container's exit code, seconds from `up` to its end)."""
    coordinator, hospitals = joined
    begun = time.monotonic()
    coordinator.begin("first", 2)
    for said in together(Hospital.up, hospitals).values():
        assert "running" in said
    coordinator.stack.wait_for(lambda: coordinator.stack.state("coordinator")["Status"] == "exited", 120)
    return (
        coordinator,
        hospitals,
        coordinator.stack.state("coordinator")["ExitCode"],
        time.monotonic() - begun,
    )


@pytest.fixture(scope="module")
def second(first):
    """A run that goes on as long as it is looked at; both hospitals have found it by themselves."""
    coordinator, hospitals, *_ = first
    coordinator.begin("second", 500, "batch_size=8 quorum=0.5 deadline=60")
    coordinator.stack.wait_for(
        lambda: any(len(item["sites"]) == 2 for item in coordinator.rounds("second")), 150
    )
    for hospital in hospitals.values():
        coordinator.stack.wait_for(hospital.well, 60)
    return coordinator, hospitals


def test_two_hospitals_join_with_their_kits_and_the_run_ends_well(first):
    coordinator, _, code, _ = first
    assert code == 0, coordinator.stack.logs("coordinator")
    done = coordinator.rounds("first")
    assert [item["round"] for item in done] == [1, 2]
    assert all(sorted(item["sites"]) == sorted(ALIASES) for item in done)
    assert [item["verdict"] for item in coordinator.events("first", "run.end")] == ["ok"]


def test_both_ledgers_are_whole_and_have_the_run(first):
    _, hospitals, *_ = first
    for hospital in hospitals.values():
        home = "/var/lib/wardround"
        assert hospital.within("wardround", "ledger", "verify", home).startswith("whole ")
        shown = hospital.within("wardround", "ledger", "show", home, "--run", "first", "--direction", "out")
        assert "model" in shown, hospital.alias


def test_the_coordinator_started_again_finds_the_sites_and_status_says_how_they_are(second):
    _, hospitals = second
    for found in together(Hospital.status, hospitals).values():
        assert found["healthy"]
        assert {container["service"] for container in found["containers"]} == {"site-net", "worker"}
        assert found["heard"] < 60
        assert not found["silence"]
        assert found["rounds"][-1]["run"] == "second"
        assert any(row["received"] and row["released"] for row in found["rounds"])
    oak = hospitals["oak"]
    shown = oak.wardround("site", "status", oak.alias, "--project-name", oak.name)
    assert "healthy" in shown.splitlines()[0]
    assert "not healthy" not in shown
    assert "run second, round" in shown


def test_dashboards_show_the_runs_on_loopback(second):
    coordinator, _ = second
    coordinator.stack.compose(
        "--profile", "dashboards", "up", "--detach", "--wait", "--no-build", "dashboards"
    )
    (bound,) = coordinator.stack.inspect("dashboards")["NetworkSettings"]["Ports"]["8080/tcp"]
    assert bound == {"HostIp": "127.0.0.1", "HostPort": str(coordinator.board)}
    with urllib.request.urlopen(f"http://127.0.0.1:{coordinator.board}/healthz", timeout=20) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"http://127.0.0.1:{coordinator.board}/", timeout=20) as answer:
        page = answer.read().decode()
    assert 'href="/runs/first"' in page
    assert 'href="/runs/second"' in page


@pytest.mark.parametrize(
    ("file", "old", "new", "more"),
    [
        ("site.toml", "min_cases = 1 ", "min_cases = 0 ", ()),
        ("compose.yaml", "network_mode: none", "network_mode: host", ("--no-check",)),
    ],
)
def test_an_altered_kit_is_named_and_not_started(joined, tmp_path, file, old, new, more):
    _, hospitals = joined
    honest = hospitals["oak"]
    shutil.copytree(honest.folder, tmp_path / "site")
    victim = Hospital(honest.engine, "oak", tmp_path / "site", f"{honest.name}-altered")
    text = (victim.kit / file).read_text()
    assert old in text
    (victim.kit / file).write_text(text.replace(old, new))
    try:
        said = victim.up(*more, code=10)
        assert f"{file} was altered" in " ".join(said.split())
        assert not left(victim.engine, victim.name)
    finally:
        take_away(victim.engine, victim.name)


def test_a_revoked_site_is_told_why_and_the_run_goes_on(second):
    """Elm stays out afterwards."""
    coordinator, hospitals = second
    coordinator.wardround("site", "revoke", "elm", "--reason", "laptop stolen")

    def refused():
        """Health looks back a minute: between two starts it may still say that the coordinator was heard."""
        found = hospitals["elm"].status()
        told = any("does not know this key" in sentence for _, _, sentence in found["said"])
        return told and not found["healthy"]

    coordinator.stack.wait_for(refused, 120)
    before = coordinator.rounds("second")[-1]["round"]
    coordinator.stack.wait_for(lambda: coordinator.rounds("second")[-1]["round"] > before + 1, 90)
    assert coordinator.rounds("second")[-1]["sites"] == ["oak"]
    assert coordinator.stack.state("coordinator")["Status"] == "running"
    assert hospitals["oak"].status()["healthy"]


def test_a_site_that_leaves_and_a_coordinator_that_ends_leave_nothing(second):
    """The last test."""
    coordinator, hospitals = second

    def leave(hospital):
        assert left(hospital.engine, hospital.name)
        words = ("--project-name", hospital.name, "--volumes", "--yes")
        said = hospital.wardround("site", "down", hospital.alias, *words)
        assert f"{hospital.alias} is stopped; its volumes are deleted." in said
        assert not left(hospital.engine, hospital.name)

    together(leave, hospitals)
    coordinator.stack.down()
    assert not left(coordinator.engine, coordinator.stack.name)
