"""The worker's service: one piece of work at a time, and no broken or abandoned call ends it."""

import contextlib
import logging
import threading
import time

import pytest

from client import worker as module
from client.worker import Service
from common.errors import CancelledError, PolicyError
from common.frames import to_frames
from common.proto.wardround_pb2 import Frame, PartStart
from common.proto.wardround_pb2_grpc import WorkerStub
from tests.client.sockets import short_folder
from tests.client.workers import PARTS, SECRET, FakeSite, channel, failed, served, wait_until


@pytest.fixture
def folder():
    with short_folder() as made:
        yield made


@pytest.fixture
def serve(folder):
    with served(folder) as start:
        yield start


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

    def half(gone):
        yield Frame(part=PartStart(name="head", nbytes=10))
        gone.wait(10)

    def told():
        return "went away before its message was whole" in caplog.text

    for pause in (0.05, 0.5, 5.0):  # a busy machine may not have begun to listen when the relay is gone
        gone = threading.Event()
        with channel(serve.path) as opened:
            pending = WorkerStub(opened).Handle(
                half(gone), metadata=(("wardround-site", "alpha"),), timeout=30
            )
            time.sleep(pause)
            pending.cancel()
            gone.set()
        with contextlib.suppress(AssertionError):
            wait_until(told, seconds=3)
            break
    assert told()
    assert "Traceback" not in caplog.text
    assert site.calls == []
    assert call() == {"head": b"done by alpha"}
