"""The coordinator's side: a SuperLink that ends is mended, and what really runs is looked at."""

import json
import os
import signal
import sys
import time

import psutil
import pytest

from common.errors import ProcessError
from ops import coordinator as module
from ops.coordinator import GONE_SECONDS, SUBMITTED_SECONDS
from ops.processes import Process, ProcessGroup
from tests.ops.coordinated import World

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


@pytest.fixture
def filed(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch, transport="file")


# ---- the SuperLink ---------------------------------------------------------------------------------------------------


def test_a_link_in_memory_has_forgotten_all_so_the_sites_are_taken_off_registered_and_connected(world):
    world.begun()
    world.link.code = -9
    assert world.tend() is None
    assert world.did == [
        "noted superlink", "disconnect", "stop serverapp", "start superlink", "ready superlink", "register oak key-1",
        "register elm key-2", "start serverapp", "run 2", "connect",
    ]  # fmt: skip
    assert world.restarts() == [("superlink", 1, "exited", 0)]
    world.app = True
    assert world.tend() is None
    world.end(verdict="ok")
    assert world.tend()["verdict"] == "ok"


def test_a_link_in_a_file_comes_back_alone(filed):
    filed.begun()
    (filed.out / "superlink.db").write_text("its runs")
    filed.link.code = -9
    assert filed.tend() is None
    assert filed.did == ["noted superlink", "start superlink", "ready superlink"]
    assert filed.database == filed.out / "superlink.db"
    assert filed.database.read_text() == "its runs"
    assert filed.tend() is None  # the ServerApp went on
    assert len(filed.did) == 3
    filed.end(verdict="ok")
    assert filed.tend()["verdict"] == "ok"


def test_a_server_app_that_did_not_outlive_its_link_in_a_file_is_followed_by_another(filed):
    filed.begun()
    filed.link.code, filed.app = -9, False
    assert filed.tend() is None
    assert filed.tend(GONE_SECONDS + 0.1) is None
    assert filed.did[-2:] == ["end run 1", "run 2"]


@pytest.mark.parametrize("transport", ["memory", "file"])
@pytest.mark.parametrize("call", ["end run 1", "run 2"])
@pytest.mark.parametrize("fault", ["lost", "exited"])
def test_a_link_that_dies_while_the_run_is_submitted_again_is_mended_next(
    tmp_path, monkeypatch, transport, call, fault
):
    world = World(tmp_path, monkeypatch, transport).begun()
    control = world.coordinator.control

    def dying(what, real=control._call):
        if what == call and not world.broken:
            world.broken.add("once")
            world.link.code = -9
        real(what)

    control._call = dying
    if fault == "lost":
        assert world.lose_app() is None
    else:
        world.app, world.group.processes["serverapp"].code = False, 1
        assert world.tend() is None
    for _ in range(3):
        assert world.tend(GONE_SECONDS + 0.1) is None
    assert world.group.processes["superlink"].code is None
    assert world.group.processes["serverapp"].code is None
    assert world.did[-1] in ("run 2", "run 3", "connect")
    world.app = True
    world.tend()
    world.end(verdict="ok")
    assert world.tend()["verdict"] == "ok"


@pytest.mark.parametrize("fault", ["lost", "exited"])
def test_a_link_that_lives_and_refuses_ends_the_trial(world, fault):
    world.begun()
    world.broken.add("end run 1")
    if fault == "exited":
        world.group.processes["serverapp"].code = 1
    with pytest.raises(ProcessError, match="INTERNAL"):
        world.lose_app()


def test_a_link_that_ends_again_before_it_answers_is_tried_up_to_the_limit(world):
    world.begun()
    world.link.code = -9
    start, deaths = world.group.start, []

    def dying(process):
        start(process)
        if process.name == "superlink" and len(deaths) < 2:
            deaths.append(process)
            process.code = 1

    world.group.start = dying
    for _ in range(4):
        assert world.tend() is None
    assert world.link.code is None
    assert world.did[-1] == "connect"


# ---- real processes --------------------------------------------------------------------------------------------------

LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)  # never collects it: a killed one stays as a zombie
"""


def test_a_killed_server_app_is_noticed_though_its_launcher_never_collects_it(tmp_path, monkeypatch):
    real = psutil.Process
    world = World(tmp_path, monkeypatch)
    monkeypatch.setattr(module.psutil, "Process", real)
    log = tmp_path / "launcher.log"
    argv = [sys.executable, "-S", "-c", LAUNCHER]
    with ProcessGroup(world.log) as group:
        started = group.start(Process("serverapp", argv, log))
        limit = time.monotonic() + 20
        while not started.tail():
            assert time.monotonic() < limit
            time.sleep(0.01)
        child = int(started.tail())
        world.coordinator.start_link()
        world.coordinator._group.processes["serverapp"] = started
        world.coordinator._submit()
        world.did.clear()
        for _ in range(3):
            assert world.tend(SUBMITTED_SECONDS + 1) is None
        assert not world.did  # it lives
        os.kill(child, signal.SIGKILL)
        while real(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < limit
            time.sleep(0.01)
        world.tend(GONE_SECONDS + 0.1)
        assert world.did == ["end run 1", "run 2"]
        assert world.restarts() == [("ServerApp", 1, "lost", 0)]
    assert not psutil.pid_exists(started.pid)


def test_a_half_written_event_waits_for_its_end(world):
    world.begun()
    event = {"v": 1, "t": 1.0, "process": "server", "event": "run.end", "verdict": "ok", "flower_run": "1"}
    line = json.dumps(event).encode()
    with (world.out / "events.jsonl").open("ab", buffering=0) as file:
        file.write(line[:20])
        assert world.tend() is None
        file.write(line[20:] + b"\n")
    assert world.tend()["verdict"] == "ok"
