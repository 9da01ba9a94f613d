"""The runtime with real processes: TLS, keys, forked and stock relays, faults, counted bytes, nothing left behind."""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from fleet import Fleet
from proxy import CountingProxy

from common.errors import ProcessError
from ops.pki import make_trial_pki
from ops.processes import session_members

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
TASK = re.compile(r"task pid=(\d+) status=(\w+ \d+) wall=([\d.]+)s cpu=([\d.]+)s maxrss=(\d+)MB")


def tasks(fleet, site):
    return TASK.findall(fleet.group.processes[f"relay-{site}"].log.read_text())


def wait_for(check, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def relays(fleet, site):
    """Forked processes of a site that work on a task: children of the launcher beside its poller."""
    launcher = psutil.Process(fleet.group.processes[f"relay-{site}"].pid)
    return [child for child in launcher.children()[1:] if child.status() != psutil.STATUS_ZOMBIE]


def clear_of(pids):
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    )


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    with Fleet(tmp_path_factory.mktemp("fast"), ["oak", "elm", "fir"], victim="elm") as fleet:
        yield fleet.start()


def test_fast_rounds(fast, record_property):
    lines = fast.run(rounds=5, size=500_000)
    assert [(line["same"], line["errors"], line["missing"]) for line in lines] == [(3, [], 0)] * 5
    assert all(line["warnings"] == [] and line["torch"] == 0 for line in lines)
    median = statistics.median(line["seconds"] for line in lines[1:])
    cpu = statistics.median(float(task[3]) for task in tasks(fast, "oak"))
    record_property("seconds_per_round", median)
    record_property("relay_cpu_seconds", cpu)
    assert median < 2.5  # Flower alone cannot go below 3 s
    assert cpu < 0.3
    assert [task[1] for task in tasks(fast, "oak")] == ["exit 0"] * 5
    assert "warning" not in fast.group.processes["supernode-oak"].log.read_text()


def test_bundle_is_not_unpacked_at_the_site(fast):
    homes = [Path(fast.group.processes[f"relay-{site}"].env["FLWR_HOME"]) for site in fast.sites]
    assert len(tasks(fast, "oak")) >= 1
    assert not [home for home in homes if (home / "apps").exists()]


def test_killed_relay_is_an_error_at_once_and_the_site_goes_on(fast):
    start = time.monotonic()
    lines = fast.run(rounds=2, op="kill")
    assert time.monotonic() - start < 20  # Flower notices after 57 s
    assert [code for code, _ in lines[0]["errors"]] == [8]
    assert lines[0]["seconds"] < 5
    assert lines[0]["same"] == 2
    assert lines[1]["same"] == 3
    assert [task[1] for task in tasks(fast, "elm")][-2:] == ["signal 9", "exit 0"]
    fast.group.poll()


def test_launcher_stopped_during_work_reports_it_and_can_be_replaced(fast):
    run = fast.submit(rounds=2, op="sleep")
    (relay,) = wait_for(lambda: relays(fast, "elm"))
    time.sleep(0.5)  # it has taken its message and sleeps
    fast.group.stop("relay-elm")
    assert not relay.is_running()
    assert fast.group.processes["relay-elm"].exit_code() == 0
    fast.start_relay("elm")
    assert fast.wait(run).completed
    lines = fast.rounds()[-2:]
    assert [code for code, _ in lines[0]["errors"]] == [8]
    assert lines[1]["same"] == 3


def test_killed_poller_ends_its_launcher(fast):
    launcher = fast.group.processes["relay-fir"]
    poller = psutil.Process(launcher.pid).children()[0]
    poller.kill()
    with pytest.raises(ProcessError, match=r"'relay-fir' ended with code 9 \(process\)") as caught:
        fast.group.wait_ready("relay-fir", lambda: False, timeout=10)
    assert "asks the SuperNode for tasks has ended" in caught.value.detail
    fast.start_relay("fir")
    assert fast.run(rounds=1)[0]["same"] == 3


def test_stopped_run_frees_the_sites(fast):
    run = fast.submit(rounds=1, op="sleep")
    wait_for(lambda: relays(fast, "elm"))
    time.sleep(1.0)  # it has taken its message: one killed before that is noticed by Flower alone, after 57 s
    assert fast.control.stop_run(run)
    status = fast.wait(run)
    assert (status.sub_status, status.completed) == ("stopped", False)
    relays(fast, "elm")[0].kill()  # the echo app does not notice; a worker's call would be cancelled
    assert fast.run(rounds=1)[0]["same"] == 3


def test_supernode_killed_and_started_again_waits_until_it_is_let_in(tmp_path):
    with Fleet(tmp_path, ["oak"]) as fleet:
        fleet.start()
        os.kill(fleet.group.processes["supernode-oak"].pid, signal.SIGKILL)
        wait_for(lambda: fleet.group.processes["supernode-oak"].exit_code())
        again = fleet.start_supernode("oak")
        wait_for(lambda: "still counts as connected" in again.log.read_text())
        start = time.monotonic()
        wait_for(lambda: "SuperNode ID" in again.log.read_text().split("still counts")[-1], seconds=100)
        assert time.monotonic() - start > 10
        assert fleet.run(rounds=1)[0]["same"] == 1


def test_stop_leaves_nothing(fast):
    pids = fast.pids()
    everything = [
        *pids,
        *(child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)),
    ]
    assert len(everything) >= len(pids) + 3  # pollers
    start = time.monotonic()
    fast.group.stop_all()
    assert time.monotonic() - start < 12
    assert clear_of(everything)
    assert not session_members(set(pids))
    assert {process.exit_code() for process in fast.group.processes.values()} == {0}


def test_stock_rounds(tmp_path, record_property):
    with Fleet(tmp_path, ["oak", "elm", "fir"], runtime="stock") as fleet:
        fleet.start()
        lines = fleet.run(rounds=2, size=1000)
        assert [(line["same"], line["errors"]) for line in lines] == [(3, [])] * 2
        record_property("seconds_per_round", lines[1]["seconds"])
        record_property("relay_cpu_seconds", statistics.median(lines[1]["cpu"]))
        pids = fleet.pids()
    assert clear_of(pids)


def test_counted_bytes_are_those_of_the_wire(tmp_path, record_property):
    proxies = {}

    def through(site, port):
        proxies[site] = CountingProxy(("127.0.0.1", port))
        return proxies[site].port

    with Fleet(tmp_path, ["oak", "elm"], through=through) as fleet:
        fleet.start()
        lines = fleet.run(rounds=3, size=500_000, idle=4.0)
        assert [line["same"] for line in lines] == [2] * 3
    for site, proxy in proxies.items():
        with proxy:
            events = fleet.transport(site)
            last = events[-1]
            assert proxy.down > 1_500_000
            for direction in ("up", "down"):
                error = last[direction] / getattr(proxy, direction) - 1
                record_property(f"{site}_{direction}_error", error)
                assert abs(error) < 0.03, (site, direction, last, proxy.up, proxy.down)
            assert last["calls"] > 20
            assert all(late["t"] - soon["t"] > 0.9 for soon, late in pairwise(events[:-1]))
            assert all(event["site"] == site and event["process"] == "supernode" for event in events)
            assert [event["up"] for event in events] == sorted(event["up"] for event in events)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return make_trial_pki(tmp_path_factory.mktemp("stranger"), ["oak"])


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with Fleet(tmp_path_factory.mktemp("refusing"), ["oak"]) as fleet:
        yield fleet.start()


@pytest.mark.parametrize(
    ("name", "credential", "sentence"),
    [
        ("supernode-oak", "site_keys", "Site oak: the coordinator does not know this key"),
        ("supernode-oak", "ca", "was not signed by the authority given here"),
        ("relay-oak", "site_secrets", "The SuperNode refuses this launcher"),
    ],
)
def test_credentials_of_a_stranger_are_refused_and_named(running, stranger, name, credential, sentence):
    running.group.stop(name)
    start = running.start_supernode if name.startswith("supernode") else running.start_relay
    start("oak", **{credential: getattr(stranger, credential)})
    with pytest.raises(ProcessError) as caught:
        running.group.wait_ready(name, lambda: False, timeout=30)
    running.group.stop(name)
    start("oak")
    assert f"'{name}' ended with code 10 (credential)" in str(caught.value)
    assert caught.value.site == "oak"
    assert sentence in caught.value.detail
    assert running.run(rounds=1)[0]["same"] == 1


def test_nothing_survives_a_trial_that_is_killed(tmp_path):
    script = Path(__file__).parent / "fleet.py"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    trial = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    )
    pids = [int(word) for word in trial.stdout.readline().split()]
    assert len(pids) == 4
    relay = wait_for(
        lambda: [child for pid in pids for child in psutil.Process(pid).children(recursive=True)][1:]
    )
    everything = [trial.pid, *pids, *(child.pid for child in relay)]
    trial.kill()
    trial.wait()
    wait_for(lambda: clear_of(everything), seconds=15)
