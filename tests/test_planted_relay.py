"""The relay and the worker's service: a worker that breaks with patients' names in its texts says none of them."""

from types import SimpleNamespace

import grpc
import pytest
from flwr.app import Context, RecordDict

from client.relay import call_worker, relay
from common.flower import from_record, make_message
from common.wire import decode
from tests.client.sockets import serving, short_folder
from tests.client.workers import FakeSite, served
from tests.planted import ERRORS, FILES, TEXT, TOKENS, leaks


def through_relay(socket):
    """Send a message through the relay; return everything of its reply."""
    message = make_message({"head": b"x"}, node=7, kind="query", group="0", ttl=20.0)
    message.metadata.__dict__["_message_id"] = "m1"
    config = {"site": "beta", "worker": str(socket)}
    reply = relay(
        message, Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})
    )
    assert not reply.has_error()
    parts = from_record(reply.content)
    return SimpleNamespace(parts=parts, whole=b"".join(parts.values()) + repr(reply.content).encode())


def test_no_text_of_a_worker_that_breaks_passes_the_relay():
    def work(site, parts, context):
        if next(kinds) == "abort":
            context.abort(grpc.StatusCode.INTERNAL, TEXT)
        raise RuntimeError(TEXT)

    kinds = iter(["abort", "raise"])
    with short_folder() as folder, serving(folder / "w.sock", work):
        for _ in range(2):
            reply = through_relay(folder / "w.sock")
            assert b"beta: the call to the worker broke" in reply.parts["head"]
            assert leaks(reply.whole, [*TOKENS, str(folder)]) == []


@pytest.mark.parametrize("error", ERRORS)
def test_no_text_of_a_site_that_breaks_passes_worker_and_relay(error):
    def work(parts, check):
        raise ERRORS[error]()

    with short_folder() as folder, served(folder) as start:
        start(FakeSite("beta", folder, work))
        reply = through_relay(start.path)
        assert decode(reply.parts).failure[0] in {"internal", "data"}
        assert leaks(reply.whole, [*TOKENS, str(folder)]) == []


def test_no_path_of_a_missing_socket_passes_the_relay(tmp_path, monkeypatch):
    monkeypatch.setattr(call_worker, "__kwdefaults__", {"connect": 0.1})
    reply = through_relay(tmp_path / FILES / "w.sock")
    assert leaks(reply.whole, [*TOKENS, str(tmp_path)]) == []
