"""The worker's service: one piece of work at a time, on a socket of its own user, and no broken call ends it."""

import logging
import os
import signal
import socket as sockets
import stat
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import common
from client import worker as module
from client.relay import call_worker
from client.site_config import SiteConfig, write_site_config
from client.worker import Service, build_sites, claim_socket, failure, main, make_server
from common.config import RunConfig
from common.errors import CancelledError, ConfigError, PolicyError, WorkerError
from common.events import EventLog, read_events
from common.frames import to_frames
from common.proto.wardround_pb2 import Frame, PartStart
from common.proto.wardround_pb2_grpc import WorkerStub
from common.wire import HELLO, Envelope, decode, encode
from tests.client.sockets import short_folder
from tests.harness import table_config, write_table_site

SECRET = "/mnt/pacs/Mueller_Hans/17.dcm"
PARTS = {"head": b"question", "p.model": bytes(3_000_000)}


class FakeSite:
    """A site whose work a test decides."""

    def __init__(self, alias, folder, work=None):
        self.alias, self.device = alias, "cpu"
        self.events = EventLog(folder / f"{alias}.jsonl", "worker", site=alias)
        self.read_events = lambda: list(read_events(folder / f"{alias}.jsonl"))
        self.work = work or (lambda parts, check: {"head": b"done by " + alias.encode()})
        self.calls = []

    def handle(self, parts, check_cancelled):
        self.calls.append(parts)
        return self.work(parts, check_cancelled)


@pytest.fixture
def folder():
    with short_folder() as made:
        yield made


@pytest.fixture
def serve(folder):
    """Return a function that serves sites and says how to call them."""
    servers = []

    def start(*sites):
        service = Service({site.alias: site for site in sites})
        server, checks = make_server(service, folder / "run" / "w.sock")
        servers.append(server)
        start.service, start.server, start.checks, start.path = (
            service,
            server,
            checks,
            folder / "run" / "w.sock",
        )
        return lambda site="alpha", parts=PARTS: call_worker(
            str(start.path), parts, timeout=20, site=site, connect=10
        )

    yield start
    for server in servers:
        server.stop(0).wait()


def channel(path):
    return grpc.insecure_channel(f"unix:{path}")


def failed(parts):
    envelope = decode(parts)
    assert envelope.failure
    assert SECRET not in repr(parts)
    assert envelope.software == common.__version__
    return envelope.site, *envelope.failure


def wait_until(condition, seconds=10.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.005)


# ---- work ------------------------------------------------------------------------------------------------------------


def test_a_message_goes_to_the_site_it_names(folder, serve):
    alpha, beta = FakeSite("alpha", folder), FakeSite("beta", folder)
    call = serve(alpha, beta)
    assert call("beta") == {"head": b"done by beta"}
    assert call("alpha") == {"head": b"done by alpha"}
    assert alpha.calls == beta.calls == [PARTS]


def test_a_simulations_partition_is_the_site_of_that_number(folder, serve):
    call = serve(FakeSite("beta", folder), FakeSite("alpha", folder))
    assert call("partition:0") == {"head": b"done by beta"}
    assert call("partition:1") == {"head": b"done by alpha"}


@pytest.mark.parametrize(
    "alias", ["gamma", "", "ALPHA", "partition:2", "partition:-1", "partition:x", "partition:", "partition:²"]
)
def test_a_wrong_alias_is_told_which_ones_there_are(folder, serve, alias):
    alpha, beta = FakeSite("alpha", folder), FakeSite("beta", folder)
    call = serve(alpha, beta) if alias.isascii() else None
    service = serve.service if call else Service({"alpha": alpha, "beta": beta})
    found = call(alias) if call else service.answer(alias, to_frames(PARTS), threading.Event())
    site, code, message = failed(found)
    assert (site, code) == ("worker", "worker")
    assert message.startswith(f"This worker serves alpha, beta, the SuperNode says it is '{alias}'")
    assert not alpha.calls
    assert not beta.calls


def test_a_broken_call_is_answered_safely_and_the_worker_goes_on(folder, serve, caplog):
    def work(parts, check):
        raise [
            ValueError(SECRET),
            PolicyError("alpha: the policy says no.", detail=SECRET),
            KeyError(SECRET),
            OSError(2, SECRET, SECRET),
        ][len(site.calls) - 1]

    site = FakeSite("alpha", folder, work)
    call = serve(site)
    with caplog.at_level(logging.ERROR, "wardround.worker"):
        assert failed(call()) == (
            "alpha",
            "internal",
            "unexpected ValueError; the full text is in the site's own worker log",
        )
        assert failed(call()) == ("alpha", "policy", "alpha: the policy says no.")
        assert failed(call())[1:] == (
            "internal",
            "unexpected KeyError; the full text is in the site's own worker log",
        )
        assert failed(call())[1] == "internal"
    assert caplog.text.count(SECRET) >= 4  # the hospital's own log has it all
    warnings = [event for event in site.read_events() if event["event"] == "warning"]
    assert [event["code"] for event in warnings] == ["internal", "policy", "internal", "internal"]
    assert SECRET not in repr(site.read_events())
    assert site.read_events()[-1]["phase"] == "idle"
    site.work = lambda parts, check: {"head": b"well again"}
    assert call() == {"head": b"well again"}


@pytest.mark.parametrize(
    "frames",
    [
        [Frame(chunk=b"x")],
        [Frame(part=PartStart(name="head", nbytes=9)), Frame(chunk=b"x")],
        [Frame(part=PartStart(name="head", nbytes=2**63))],
    ],
)
def test_a_malformed_message_never_reaches_the_site(folder, serve, frames):
    site = FakeSite("alpha", folder)
    call = serve(site)
    with channel(serve.path) as opened:
        answer = WorkerStub(opened).Handle(iter(frames), metadata=(("wardround-site", "alpha"),), timeout=10)
        parts = module.from_frames(answer)
    assert failed(parts)[:2] == ("worker", "payload")
    assert site.calls == []
    assert call() == {"head": b"done by alpha"}


def test_calls_wait_for_their_turn(folder, serve):
    working, most = [], []

    def work(parts, check):
        working.append(1)
        most.append(len(working))
        time.sleep(0.05)
        working.pop()
        return {"head": b"x"}

    call = serve(FakeSite("alpha", folder, work), FakeSite("beta", folder, work))
    answers = []
    threads = [
        threading.Thread(target=lambda site=site: answers.append(call(site)))
        for site in ("alpha", "beta", "alpha")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == [{"head": b"x"}] * 3
    assert most == [1, 1, 1]


# ---- cancellation ----------------------------------------------------------------------------------------------------


def start_call(opened, alias="alpha"):
    return WorkerStub(opened).Handle(to_frames(PARTS), metadata=(("wardround-site", alias),), timeout=30)


def until_cancelled(outcome, working):
    def work(parts, check):
        working.set()
        try:
            for _ in range(2000):
                check()
                time.sleep(0.005)
        except CancelledError as error:
            outcome.append(error)
            raise
        return {"head": b"nobody came"}

    return work


def test_work_ends_when_the_caller_goes_away_and_the_next_call_is_served(folder, serve):
    outcome, working = [], threading.Event()
    site = FakeSite("alpha", folder, until_cancelled(outcome, working))
    call = serve(site)
    with channel(serve.path) as opened:
        pending = start_call(opened)
        assert working.wait(10)
        pending.cancel()
        wait_until(lambda: outcome)
    assert isinstance(outcome[0], CancelledError)
    site.work = lambda parts, check: {"head": b"next"}
    assert call() == {"head": b"next"}
    assert "cancelled" in [event.get("code") for event in site.read_events()]


def test_work_ends_when_the_callers_process_is_gone(folder, serve):
    outcome, working = [], threading.Event()
    serve(FakeSite("alpha", folder, until_cancelled(outcome, working)))
    opened = channel(serve.path)
    pending = start_call(opened)
    assert working.wait(10)
    opened.close()  # as the kernel does for a process that ended
    wait_until(lambda: outcome)
    assert pending.code() is not None


def test_a_waiting_call_that_is_cancelled_leaves_the_queue(folder, serve):
    released, working = threading.Event(), threading.Event()

    def work(parts, check):
        working.set()
        released.wait(20)
        return {"head": b"first"}

    site = FakeSite("alpha", folder, work)
    call = serve(site, FakeSite("beta", folder))
    answers = []
    first = threading.Thread(target=lambda: answers.append(call()))
    first.start()
    assert working.wait(10)
    with channel(serve.path) as opened:
        pending = start_call(opened, "beta")
        time.sleep(0.1)
        pending.cancel()
    beta = serve.service.sites["beta"]
    wait_until(lambda: "cancelled" in [event.get("code") for event in beta.read_events()])
    released.set()
    first.join(20)
    assert answers == [{"head": b"first"}]
    assert beta.calls == []
    assert call("beta") == {"head": b"done by beta"}


def test_a_caller_that_went_away_before_the_work_began_is_noticed(folder):
    class Gone:
        def invocation_metadata(self):
            return (("wardround-site", "alpha"),)

        def add_callback(self, callback):
            return False  # as gRPC says it: the call has ended, the callback will never be called

    service = Service({"alpha": FakeSite("alpha", folder, lambda parts, check: (check(), {"head": b"x"})[1])})
    frames = list(service.Handle(to_frames(PARTS), Gone()))
    assert failed(module.from_frames(frames))[1] == "cancelled"


def test_stopping_ends_the_work_with_an_answer(folder, serve):
    outcome, working = [], threading.Event()
    call = serve(FakeSite("alpha", folder, until_cancelled(outcome, working)))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    assert working.wait(10)
    serve.service.stopping.set()
    thread.join(10)
    assert failed(answers[0])[1] == "cancelled"


def test_a_message_that_breaks_off_with_its_relay_is_no_failure_of_the_worker(folder, serve, caplog):
    site = FakeSite("alpha", folder)
    call = serve(site)
    begun, gone = threading.Event(), threading.Event()

    def half():
        yield Frame(part=PartStart(name="head", nbytes=10))
        begun.set()
        gone.wait(10)

    with channel(serve.path) as opened:
        pending = WorkerStub(opened).Handle(half(), metadata=(("wardround-site", "alpha"),), timeout=30)
        assert begun.wait(10)
        time.sleep(0.05)
        pending.cancel()
        gone.set()
        wait_until(lambda: "went away before its message was whole" in caplog.text)
    assert "Traceback" not in caplog.text
    assert site.calls == []
    assert call() == {"head": b"done by alpha"}


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
        config = table_config(sites=("alpha",)).to_json()
        asked = encode(Envelope("run", 0, HELLO, "", config=config))
        answer = decode(call_worker(str(folder / "w.sock"), asked, timeout=20, site="alpha", connect=20))
        assert answer.failure is None
        assert (answer.site, answer.run, answer.phase, answer.cases) == ("alpha", "run", HELLO, 12)
        bad = encode(Envelope("run", 0, HELLO, "", config=RunConfig().to_json()))
        refused = decode(call_worker(str(folder / "w.sock"), bad, timeout=20, site="alpha", connect=20))
        assert refused.failure
        assert str(folder) not in repr(refused)
    finally:
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        thread.join(20)
    assert codes == [0]
    assert not (folder / "w.sock").exists()
