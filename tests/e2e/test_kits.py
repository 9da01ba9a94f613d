"""From startup kit to first round, for real: two hospitals with their own keys, and a coordinator that has no data."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from client.site_config import SiteConfig, write_site_config
from common.events import read_events
from common.federation import Federation, write_federation
from ops.approve import approve, revoke
from ops.kit_request import make_request
from ops.ports import free_ports, release_ports
from ops.provision import provision
from ops.provision_project import ProjectConfig
from tests.harness import FEATURES, write_table_site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]
WARDROUND = str(Path(sys.executable).parent / "wardround")
DATA = {
    "task": "tabular",
    "spatial_dims": 0,
    "channels": list(FEATURES),
    "labels": ["well", "ill"],
    "patch": [],
}


class Hospital:
    """One site's three command lines, each started again when it ends, as a service manager does."""

    def __init__(self, alias, kit, folder):
        self.alias, self.kit, self.folder = alias, kit, folder
        self.home = folder / "home"
        self.running, self.codes, self.port = {}, [], free_ports(1)[0]
        write_table_site(folder / "data", seed=len(alias))

    def ask(self):
        return make_request(self.kit, keys=self.folder / "keys", out=self.folder / "request.json").path

    def commands(self):
        write_site_config(
            SiteConfig(
                alias=self.alias, data=self.folder / "data", socket=self.folder / "w.sock", home=self.home
            ),
            self.folder / "site.toml",
        )
        argv = [WARDROUND, "site", "commands", str(self.kit), "--keys", str(self.folder / "keys")]
        argv += ["--config", str(self.folder / "site.toml"), "--state", str(self.folder / "state")]
        text = run(*argv, "--appio", f"127.0.0.1:{self.port}")
        lines = text.splitlines()
        return {name.removeprefix("# "): line for name, line in zip(lines[::2], lines[1::2], strict=True)}

    def look_up(self):
        self.lines = self.commands()
        assert list(self.lines) == [f"{kind}-{self.alias}" for kind in ("worker", "relay", "supernode")]

    def start(self):
        self.look_up()
        self.tend()

    def tend(self):
        for name, line in self.lines.items():
            process = self.running.get(name)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                self.codes.append((name.partition("-")[0], process.returncode))
            with (self.folder / f"{name}.log").open("ab") as log:
                self.running[name] = subprocess.Popen(
                    ["sh", "-c", f"exec {line}"], stdout=log, stderr=log, start_new_session=True
                )

    def stop(self):
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.running = {}

    def log(self, name):
        return (self.folder / f"{name}-{self.alias}.log").read_text()


class Project:
    def __init__(self, folder):
        self.folder, self.port = folder, free_ports(1)[0]
        self.control = f"127.0.0.1:{free_ports(1)[0]}"
        self.home = folder / "tiny"
        described = {"name": "tiny", "coordinator": {"names": ["127.0.0.1"], "port": self.port}}
        provision(
            ProjectConfig.model_validate(
                described | {"sites": [{"alias": alias} for alias in ("oak", "elm")]}
            ),
            self.home,
        )
        write_federation(folder / "described", Federation("tables", settings={"data": DATA}))
        self.hospitals = []
        for alias in ("oak", "elm"):
            site = folder / alias
            site.mkdir()
            (self.home / "kits" / alias).rename(site / "kit")
            self.hospitals.append(Hospital(alias, site / "kit", site))
        self.oak, self.elm = self.hospitals

    def command(self, verb, *more):
        return [WARDROUND, verb, *map(str, more), "--project", str(self.home)]

    def begin(self, out, *more):
        federation = self.folder / "described" / "federation.json"
        argv = self.command("run", "--federation", federation, "--out", out, "--listen", "127.0.0.1")
        return hearing([*argv, "--control", self.control, *more])

    def wait(self, process, check=lambda: False, seconds=150.0):
        """Wait for a check or the process's end; hospitals' processes are started again meanwhile."""
        limit = time.monotonic() + seconds
        while process.poll() is None and not check():
            for hospital in self.hospitals:
                if hospital.running:
                    hospital.tend()
            assert time.monotonic() < limit, "waited too long"
            time.sleep(0.2)


def run(*argv, code=0):
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


BEGUN = []


def hearing(argv):
    """Start a command that hears Ctrl-C, also where these tests run in the background."""
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    BEGUN.append(subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ))  # fmt: skip
    return BEGUN[-1]


def events(out, name="events.jsonl"):
    return list(read_events(out / name)) if (out / name).is_file() else []


def named(items, event):
    return [item for item in items if item["event"] == event]


def rounds(out):
    return [item["round"] for item in named(events(out), "round.end") if not item.get("closing")]


def both(out, after):
    """Whether both hospitals contributed to a round after a given one."""
    ends = named(events(out), "round.end")
    return any(item["round"] > after and len(item["sites"]) == 2 for item in ends)


def linked(out):
    """Whether the SuperLink listens; a SuperNode that calls before may wait half a minute until it calls again."""
    conducted = events(out, "events-trial.jsonl")
    return any(item["name"] == "superlink" for item in named(conducted, "process.ready"))


def started(out):
    return named(events(out, "events-trial.jsonl"), "process.start")


def alive(out):
    pids = [item["pid"] for item in started(out)]
    return [
        pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


@contextmanager
def provisioned(folder):
    """A project whose two hospitals are admitted; everything that was started for it ends with it."""
    made = Project(folder)
    for hospital in made.hospitals:
        approve(hospital.ask(), made.home)
    try:
        yield made
    finally:
        while BEGUN:  # of a test that failed
            process = BEGUN.pop()
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=60)
        for hospital in made.hospitals:
            hospital.stop()
        release_ports([made.port, int(made.control.rpartition(":")[2]), made.oak.port, made.elm.port])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with provisioned(tmp_path_factory.mktemp("p")) as made:
        yield made


@pytest.fixture(scope="module")
def first(project):
    out = project.folder / "runs" / "first"
    process = project.begin(out, "--rounds", "2", "--set", "batch_size=8")
    for hospital in project.hospitals:
        hospital.look_up()
    project.wait(process, lambda: linked(out))
    for hospital in project.hospitals:
        hospital.tend()
    project.wait(process)
    for hospital in project.hospitals:
        hospital.stop()
    return process.returncode, out, process.communicate()[0]


@pytest.fixture(scope="module")
def refused(project, first):
    """A revoked hospital knocks; then the other one, whose key is its own and approved, says that it is the revoked one."""
    oak, elm = project.hospitals
    revoke("elm", project.home, "laptop stolen")
    out = project.folder / "runs" / "second"
    process = project.begin(out, "--sites", "oak", "--rounds", "1", "--set", "batch_size=8")
    file = oak.folder / "site.toml"
    file.write_text(file.read_text().replace('alias = "oak"', 'alias = "elm"'))
    honest = oak.lines.pop("supernode-oak")
    lie = re.sub(r"(site=\W+)oak", r"\1elm", honest)
    assert lie != honest
    oak.tend()  # all but its SuperNode: it must not end the run before the other one has knocked
    elm.lines = {"supernode-elm": elm.lines["supernode-elm"]}
    project.wait(process, lambda: linked(out))
    elm.tend()
    project.wait(process, lambda: ("supernode", 10) in elm.codes)
    elm.stop()
    assert process.poll() is None, process.communicate()[0]
    oak.lines["supernode-oak"] = lie
    oak.tend()
    project.wait(process)
    oak.stop()
    return process.returncode, out, process.communicate()[0]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """A project of its own, for what takes minutes."""
    with provisioned(tmp_path_factory.mktemp("d")) as made:
        yield made


def test_two_hospitals_and_a_coordinator_without_data_complete_a_run(first):
    code, out, text = first
    assert code == 0, text
    assert rounds(out) == [1, 2]
    assert all(set(item["sites"]) == {"oak", "elm"} for item in named(events(out), "round.end"))
    assert load_file(out / "models" / "global.safetensors")
    assert (out / "report.html").stat().st_size > 10_000
    assert not alive(out)


def test_both_hospitals_have_it_in_their_ledgers(project, first):
    for hospital in project.hospitals:
        assert '"model"' in (hospital.home / "ledger.jsonl").read_text()
        assert run(WARDROUND, "ledger", "verify", str(hospital.home)).startswith("whole ")


def test_the_run_folder_says_which_node_is_which_site(first):
    _, out, _ = first
    assert sorted(json.loads((out / "nodes.json").read_text()).values()) == ["elm", "oak"]


def test_a_revoked_key_is_not_let_in(project, refused):
    assert "does not know this key" in project.elm.log("supernode")


def test_a_site_cannot_take_another_ones_name(refused):
    """Its worker and its SuperNode both say that it is elm."""
    code, out, text = refused
    assert code == 5, text
    assert "oak: says it is 'elm', but its key was approved for 'oak'" in text
    assert not rounds(out)


@pytest.mark.faults
def test_stopped_resumed_and_a_revoked_site_is_sent_away(disturbed):
    out = disturbed.folder / "runs" / "second"
    settings = ("--set", "batch_size=8", "--set", "quorum=0.5", "--set", "deadline=60")
    disturbed.oak.start()
    process = disturbed.begin(out, "--rounds", "500", *settings)

    def missed():
        return any(item["code"] == "waiting" for item in named(events(out, "events-trial.jsonl"), "warning"))

    disturbed.wait(process, missed)
    assert process.poll() is None, process.communicate()[0]
    disturbed.elm.start()
    disturbed.wait(process, lambda: rounds(out))
    taken = subprocess.run(
        disturbed.command("run", "--federation", disturbed.folder / "described", "--listen", "127.0.0.1"),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert taken.returncode == 9
    assert f"port {disturbed.port} cannot be used" in taken.stderr
    process.send_signal(signal.SIGINT)
    disturbed.wait(process)
    text = process.communicate()[0]
    assert process.returncode == 130, text
    assert "not connected: elm" in text
    assert not alive(out)

    done = max(rounds(out))
    process = hearing([WARDROUND, "resume", out])
    disturbed.wait(process, lambda: max(rounds(out)) > done + 1)
    assert process.poll() is None, process.communicate()[0]
    assert named(events(out), "run.resume")[-1]["round"] in (done, done - 1)

    # a SuperLink that is killed has forgotten everybody; the hospitals find back by themselves
    link = next(item for item in reversed(started(out)) if item["name"] == "superlink")
    os.kill(link["pid"], signal.SIGKILL)
    done = max(rounds(out))
    disturbed.wait(process, lambda: both(out, after=done + 1))
    assert process.poll() is None, process.communicate()[0]
    assert len([item for item in started(out) if item["name"] == "superlink"]) == 3

    revoke("elm", disturbed.home, "laptop stolen")
    disturbed.wait(process, lambda: ("supernode", 10) in disturbed.elm.codes)
    before = max(rounds(out))
    disturbed.wait(process, lambda: max(rounds(out)) > before + 1)
    assert process.poll() is None, process.communicate()[0]
    assert named(events(out), "round.end")[-1]["sites"] == ["oak"]
    assert "does not know this key" in disturbed.elm.log("supernode")
    process.send_signal(signal.SIGINT)
    disturbed.wait(process)


@pytest.mark.faults
def test_a_run_goes_on_without_the_revoked_site_and_does_not_wait_for_it(disturbed):
    out = disturbed.folder / "runs" / "second"
    done, begun = max(rounds(out)), time.monotonic()
    process = hearing(disturbed.command("resume", out))
    disturbed.wait(process, lambda: max(rounds(out)) > done + 1)
    assert time.monotonic() - begun < 120  # ready_timeout is 300 s
    process.send_signal(signal.SIGINT)
    disturbed.wait(process)
    assert named(events(out), "round.end")[-1]["sites"] == ["oak"]
    assert "elm refused (credential)" in process.communicate()[0]


@pytest.mark.faults
def test_a_site_that_never_comes_is_named_with_what_to_do(disturbed):
    disturbed.elm.stop()
    disturbed.oak.stop()
    out = disturbed.folder / "runs" / "third"
    process = disturbed.begin(out, "--sites", "oak", "--set", "ready_timeout=3")
    disturbed.wait(process)
    text = process.communicate()[0]
    assert process.returncode == 8, text
    assert "Never connected: oak. There: start the command lines" in text
    assert f"out to 127.0.0.1:{disturbed.port}" in text
