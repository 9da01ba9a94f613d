"""The worker's life: its socket is its own user's alone, its health is told, it starts and ends cleanly."""

import os
import signal
import socket as sockets
import stat
import threading

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.relay import call_worker
from client.site_config import SiteConfig, write_site_config
from client.worker import Service, build_sites, claim_socket, failure, main, make_server
from common.config import RunConfig
from common.errors import ConfigError, WorkerError
from common.wire import HELLO, Envelope, decode, encode
from tests.client.sockets import short_folder
from tests.client.workers import SECRET, FakeSite, channel, failed, served
from tests.harness import table_config, versions_for, write_table_site


@pytest.fixture
def folder():
    with short_folder() as made:
        yield made


@pytest.fixture
def serve(folder):
    with served(folder) as start:
        yield start


# ---- socket and health -----------------------------------------------------------------------------------------------


def test_only_the_workers_own_user_may_connect(folder, serve):
    before = os.umask(0)
    try:
        serve(FakeSite("alpha", folder))
        assert os.umask(0) == 0  # the worker's files get the modes they had
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(serve.path.stat().st_mode)
    assert stat.S_IMODE(serve.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(serve.path.parent.stat().st_mode) == 0o700


def test_health_is_answered_also_during_work(folder, serve):
    released, working = threading.Event(), threading.Event()

    def work(parts, check):
        working.set()
        released.wait(20)
        return {"head": b"x"}

    call = serve(FakeSite("alpha", folder, work))
    thread = threading.Thread(target=call)
    thread.start()
    assert working.wait(10)
    with channel(serve.path) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        assert (
            stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
            == health_pb2.HealthCheckResponse.SERVING
        )
        released.set()
        thread.join(20)
        serve.checks.enter_graceful_shutdown()
        assert (
            stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
            == health_pb2.HealthCheckResponse.NOT_SERVING
        )


def test_a_second_worker_on_the_same_socket_is_refused_and_the_first_goes_on(folder, serve):
    call = serve(FakeSite("alpha", folder))
    with pytest.raises(ConfigError, match="Another worker already answers") as caught:
        make_server(Service({}), serve.path)
    assert str(folder) not in str(caught.value)
    assert call() == {"head": b"done by alpha"}


def test_a_dead_workers_socket_is_taken_over(folder, serve):
    path = folder / "run" / "w.sock"
    path.parent.mkdir()
    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(path))
    call = serve(FakeSite("alpha", folder))
    assert call() == {"head": b"done by alpha"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_worker_that_is_too_busy_to_answer_the_probe_is_not_taken_over(folder):
    with sockets.socket(sockets.AF_UNIX) as busy, sockets.socket(sockets.AF_UNIX) as waiting:
        busy.bind(str(folder / "s"))
        busy.listen(0)
        waiting.connect(str(folder / "s"))  # its queue is full now
        with pytest.raises(ConfigError, match="Another worker already answers"):
            claim_socket(folder / "s")
    assert (folder / "s").exists()


@pytest.mark.parametrize("thing", ["file", "folder", "link", "dangling"])
def test_a_path_that_holds_something_else_is_left_alone(folder, thing):
    path = folder / "s"
    if thing == "folder":
        path.mkdir()
    elif thing == "file":
        path.write_text("the dataset.json of somebody who mixed up two lines of site.toml")
    else:
        if thing == "link":
            (folder / "target").write_text("x")
        path.symlink_to(folder / "target")
    with pytest.raises(ConfigError, match="holds something that is no socket"):
        claim_socket(path)
    assert os.path.lexists(path)


def test_a_path_too_long_for_a_socket_is_refused_without_being_named(tmp_path):
    with pytest.raises(ConfigError, match="too long for a Unix socket") as caught:
        claim_socket(tmp_path / ("x" * 101))
    assert str(tmp_path) not in str(caught.value)
    assert str(tmp_path) in caught.value.detail


def test_a_folder_that_cannot_be_made_is_refused(folder):
    (folder / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        claim_socket(folder / "file" / "w.sock")
    assert str(folder) not in str(caught.value)


# ---- start and end ---------------------------------------------------------------------------------------------------


def site_config(folder, alias="alpha", **changes):
    values = {
        "alias": alias,
        "data": folder / "data" / alias,
        "socket": folder / "w.sock",
        "home": folder / "home" / alias,
    }
    return SiteConfig.model_validate(values | {"compute": {"device": "cpu"}} | changes)


def test_sites_of_one_process_share_a_socket_and_nothing_else(folder):
    good = [site_config(folder), site_config(folder, "beta")]
    sites = build_sites(good)
    assert list(sites) == ["alpha", "beta"]
    sites["beta"].events.emit("phase", phase="idle")
    assert (folder / "home" / "beta" / "events-beta.jsonl").read_text().count("\n") == 1
    for other in (
        site_config(folder),
        site_config(folder, "beta", socket=folder / "other.sock"),
        site_config(folder, "beta", home=folder / "home" / "alpha"),
    ):
        with pytest.raises(ConfigError, match="different aliases, different homes and the same socket"):
            build_sites([site_config(folder), other])


def test_a_failure_is_a_message_the_coordinator_can_read():
    assert failed(failure(ValueError(SECRET), "alpha"))[:2] == ("alpha", "internal")
    assert failed(failure(WorkerError("alpha: no.", detail=SECRET), "alpha")) == (
        "alpha",
        "worker",
        "alpha: no.",
    )


def test_a_bad_configuration_ends_with_its_code_and_a_sentence(folder, caplog, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    (folder / "site.toml").write_text('alias = "a"')
    assert main([str(folder / "site.toml")]) == ConfigError.exit_code
    assert "Bad value for 'data'" in caplog.text
    assert main([str(folder / "none.toml")]) == ConfigError.exit_code


def test_from_start_to_end_with_a_real_site(folder, monkeypatch):
    write_table_site(folder / "data" / "alpha", seed=1)
    write_site_config(site_config(folder), folder / "site.toml")
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main([str(folder / "site.toml")])))
    thread.start()
    try:
        config = table_config(sites=("alpha",))
        asked = encode(Envelope("run", 0, HELLO, "", config=config.to_json(), versions=versions_for(config)))
        answer = decode(call_worker(str(folder / "w.sock"), asked, timeout=20, site="alpha", connect=20))
        assert answer.failure is None
        assert (answer.site, answer.run, answer.phase, answer.cases) == ("alpha", "run", HELLO, 12)
        other = RunConfig()
        bad = encode(Envelope("run", 0, HELLO, "", config=other.to_json(), versions=versions_for(other)))
        refused = decode(call_worker(str(folder / "w.sock"), bad, timeout=20, site="alpha", connect=20))
        assert refused.failure
        assert str(folder) not in repr(refused)
    finally:
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        thread.join(20)
    assert codes == [0]
    assert not (folder / "w.sock").exists()
