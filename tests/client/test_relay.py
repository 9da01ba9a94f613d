"""The relay against real gRPC on a Unix socket: it carries bytes, and says safely why it could not."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from flwr.app import Context, Message, RecordDict

import common
from client import relay as module
from client.relay import call_worker, failure_parts, query, relay, site_of
from common.errors import PayloadError, WorkerError
from common.flower import from_record, make_message, relay_figures
from common.frames import CHUNK_BYTES
from common.proto import wardround_pb2 as pb
from common.wire import WIRE_SCHEMA, decode
from tests.client.sockets import serving, short_folder

PARTS = {"head": b"question", "p.model": bytes(range(256)) * (CHUNK_BYTES // 256 + 10)}
SECRET = "/mnt/pacs/Mueller_Hans/17.dcm"


@pytest.fixture
def socket():
    with short_folder() as folder:
        yield str(folder / "worker.sock")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(call_worker, "__kwdefaults__", {"connect": 0.3})
    monkeypatch.delenv("WARDROUND_WORKER", raising=False)


def context(**config):
    return Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})


def ask(socket, *, parts=PARTS, ttl=60.0, **config):
    """Send a message through the relay and return its answer's parts, the whole reply and its header."""
    message = make_message(parts, node=7, kind="query", group="0", ttl=ttl)
    message.metadata.__dict__["_message_id"] = "m1"
    reply = relay(message, context(**{"site": "alpha", "worker": socket} | config))
    assert isinstance(reply, Message)
    assert not reply.has_error()  # Flower would send an exception's text to the coordinator
    found = from_record(reply.content)
    return found, reply


def failure_of(found):
    assert found.keys() == {"head"}
    envelope = decode(found)
    assert envelope.failure
    assert SECRET not in repr(envelope)
    assert "/" not in envelope.failure[1]
    return envelope.site, *envelope.failure


def answer(site, parts, context):
    return {"head": b"answer of " + site.encode(), "p.model": parts["p.model"][::-1]}


def test_parts_go_to_the_worker_and_its_answer_comes_back(socket):
    seen = []

    def work(site, parts, context):
        seen.append((site, parts))
        return answer(site, parts, context)

    with serving(socket, work):
        found, reply = ask(socket)
    assert seen == [("alpha", PARTS)]
    assert found == {"head": b"answer of alpha", "p.model": PARTS["p.model"][::-1]}
    figures = relay_figures(reply.content)
    assert figures.keys() == {"cpu_s", "peak_mb"}
    assert figures["peak_mb"] > 10
    assert reply.metadata.reply_to_message_id == "m1"


def test_the_worker_gets_the_time_that_the_message_has_left(socket):
    left = []

    def work(site, parts, context):
        left.append(context.time_remaining())
        return {"head": b"x"}

    with serving(socket, work):
        ask(socket, ttl=50.0)
        ask(socket, ttl=0.001)
    assert 45 < left[0] < 51
    assert left[1] < 1.5


def test_no_worker_there(socket):
    started = time.monotonic()
    site, code, message = failure_of(ask(socket)[0])
    assert time.monotonic() - started < 3
    assert (site, code) == ("alpha", "worker")
    assert message.startswith("alpha: no worker answers on its socket")
    assert message.endswith("Start the site's worker, then retry.")


def test_a_file_that_is_no_socket(socket):
    Path(socket).write_text(SECRET)
    assert failure_of(ask(socket)[0])[1] == "worker"


def test_a_worker_that_comes_back_is_found(socket):
    up, done = threading.Event(), threading.Event()

    def start_later():
        time.sleep(0.4)
        with serving(socket, lambda site, parts, context: {"head": b"back"}):
            up.set()
            done.wait(10)

    thread = threading.Thread(target=start_later)
    thread.start()
    try:
        assert call_worker(socket, PARTS, timeout=5, site="alpha", connect=10) == {"head": b"back"}
        assert up.is_set()
    finally:
        done.set()
        thread.join()


def test_the_way_to_the_worker_costs_next_to_nothing(socket):
    with serving(socket, lambda site, parts, context: {"head": b"x"}):
        seconds = []
        for _ in range(5):
            started = time.monotonic()
            ask(socket, parts={"head": b"x"})
            seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.15  # gRPC's own way of waiting for a channel takes 0.2 s at least


def test_a_socket_of_another_user(socket, monkeypatch):
    class Forbidden(module.sockets.socket):
        def connect(self, path):
            raise PermissionError(13, SECRET)

    monkeypatch.setattr(module.sockets, "socket", Forbidden)
    assert (
        failure_of(ask(socket)[0])[2]
        == "alpha: the relay may not open the worker's socket. Run both as the same user."
    )


def test_a_socket_path_too_long(socket):
    assert failure_of(ask(socket + "x" * 200)[0])[1] == "worker"


def test_a_worker_that_raises(socket):
    def work(site, parts, context):
        raise RuntimeError(SECRET)

    with serving(socket, work):
        site, code, message = failure_of(ask(socket)[0])
    assert (site, code) == ("alpha", "worker")
    assert message == "alpha: the call to the worker broke (UNKNOWN): look at the worker's log at the site."


def test_a_worker_that_aborts_with_a_text(socket):
    def work(site, parts, context):
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, SECRET)

    with serving(socket, work):
        assert "(INVALID_ARGUMENT)" in failure_of(ask(socket)[0])[2]


def test_a_worker_that_dies_during_the_call(socket):
    working, released = threading.Event(), threading.Event()

    def work(site, parts, context):
        working.set()
        released.wait(20)
        return {"head": b"late"}

    with serving(socket, work) as server:
        killer = threading.Thread(target=lambda: (working.wait(5), server.stop(0)))
        killer.start()
        try:
            site, code, message = failure_of(ask(socket)[0])
        finally:
            released.set()  # only now: a worker let go earlier might still get its answer out
            killer.join()
    assert (site, code) == ("alpha", "worker")
    assert message.startswith("alpha: the call to the worker broke (")


def test_a_worker_that_dies_in_the_middle_of_its_answer(socket):
    def work(site, parts, context):
        return Dying({"head": b"x", "p.model": b"y"})

    class Dying(dict):
        def items(self):
            yield "head", b"x"
            raise RuntimeError(SECRET)

    with serving(socket, work):
        assert "broke (UNKNOWN)" in failure_of(ask(socket)[0])[2]


def test_work_beyond_the_deadline(socket):
    released = threading.Event()
    with serving(socket, lambda site, parts, context: (released.wait(5), {"head": b"late"})[1]):
        with pytest.raises(
            WorkerError, match=r"broke \(DEADLINE_EXCEEDED\): the work took longer than the round's deadline"
        ):
            call_worker(socket, PARTS, timeout=0.2, site="alpha", connect=5)
        released.set()


@pytest.mark.parametrize("parts", [{}, {"p.model": b"x"}])
def test_an_answer_without_a_header(socket, parts):
    with serving(socket, lambda site, sent, context: parts):
        assert failure_of(ask(socket)[0]) == ("alpha", "payload", "alpha: the worker's answer has no header.")


def test_a_malformed_answer(socket):
    class Double(dict):
        def items(self):
            return [("head", b"x"), ("head", b"x")]

    with serving(socket, lambda site, sent, context: Double()):
        assert failure_of(ask(socket)[0])[1] == "payload"
        with pytest.raises(PayloadError, match="twice"):
            call_worker(socket, PARTS, timeout=5, site="alpha", connect=5)


def test_a_message_of_another_app(socket):
    message = make_message(PARTS, node=7, kind="query", group="0", ttl=60.0)
    del message.content["wardround"]
    found = from_record(relay(message, context(site="alpha", worker=socket)).content)
    assert failure_of(found)[1] == "payload"


@pytest.mark.parametrize("config", [{"site": ""}, {"worker": ""}, {"site": "", "worker": ""}])
def test_a_supernode_that_does_not_say_who_it_is(socket, config):
    site, code, message = failure_of(ask(socket, **config)[0])
    assert code == "worker"
    assert "--node-config" in message
    assert site == "unknown-site"


def test_a_simulation_names_partitions_and_the_socket_in_the_environment(monkeypatch):
    monkeypatch.setenv("WARDROUND_WORKER", "/s")
    assert site_of(context(**{"partition-id": 2, "num-partitions": 3})) == ("partition:2", "/s")
    assert site_of(context(**{"partition-id": 2, "site": "alpha", "worker": "/t"})) == ("alpha", "/t")


@pytest.mark.parametrize(
    "error",
    [
        ValueError(SECRET),
        OSError(2, SECRET, SECRET),
        KeyError(SECRET),
        WorkerError("alpha: no.", detail=SECRET),
    ],
)
def test_a_failure_says_code_and_sentence_and_nothing_else(error):
    parts = failure_parts(error, "alpha")
    assert SECRET.encode() not in parts["head"]
    header = pb.Header.FromString(parts["head"])
    assert {field.name for field, _ in header.ListFields()} == {"schema", "software", "site", "failure"}
    assert (header.schema, header.software, header.site) == (WIRE_SCHEMA, common.__version__, "alpha")


def test_any_exception_becomes_a_failure_and_its_text_stays_in_the_sites_log(socket, monkeypatch, capsys):
    def explode(*arguments, **options):
        raise ValueError(SECRET)

    monkeypatch.setattr(module, "call_worker", explode)
    assert failure_of(ask(socket)[0])[1:] == (
        "internal",
        "unexpected ValueError; the full text is in the site's own worker log",
    )
    assert SECRET in capsys.readouterr().err


def test_the_relays_schema_is_the_wires():
    assert module.WIRE_SCHEMA == WIRE_SCHEMA


def test_all_kinds_of_messages_are_carried(socket):
    message = make_message({"head": b"x"}, node=7, kind="train", group="1", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m1"
    with serving(socket, lambda site, parts, context: {"head": b"carried"}):
        for handler in (query, module.train, module.evaluate):
            assert from_record(handler(message, context(site="alpha", worker=socket)).content) == {
                "head": b"carried"
            }


def test_a_whole_call_needs_neither_torch_nor_monai(socket):
    code = f"""
import sys
from flwr.app import Context, RecordDict
from client.relay import relay
from common.flower import from_record, make_message
message = make_message({{"head": b"x"}}, node=7, kind="query", group="0", ttl=60.0)
message.metadata.__dict__["_message_id"] = "m1"
config = {{"site": "alpha", "worker": {socket!r}}}
reply = relay(message, Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={{}}))
print(from_record(reply.content)["head"], [name for name in ("torch", "monai", "nibabel", "pandas") if name in sys.modules])
"""
    with serving(socket, lambda site, parts, context: {"head": b"carried"}):
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parents[2],
        )
    assert run.stdout.strip() == "b'carried' []", run.stderr
