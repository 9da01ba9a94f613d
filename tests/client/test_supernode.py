"""The SuperNode's additions: an exact arithmetic of bytes, few events, and reasons a person can act on."""

import types

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import given
from hypothesis import strategies as st

from client import transport
from client.supernode import ACTIVATE, Admission, Reporter
from common.errors import CredentialError, ProcessError
from common.events import EventLog, read_events

OK = grpc.StatusCode.OK


class Call:
    """A finished call as gRPC hands it to an interceptor."""

    def __init__(self, code=OK, details="", response=None):
        self._code, self._details, self._response = code, details, response

    def code(self):
        return self._code

    def details(self):
        return self._details

    def result(self):
        assert self._code is OK
        return self._response

    def add_done_callback(self, callback):
        callback(self)


def details(method=ACTIVATE, metadata=()):
    return types.SimpleNamespace(method=method, metadata=metadata)


def test_call_is_counted_with_its_metadata():
    counter = transport.TransportCounter()
    request, response = BytesValue(value=b"x" * 1000), BytesValue(value=b"y" * 50)
    interceptor = transport.TransportInterceptor(counter)
    call = interceptor.intercept_unary_unary(
        lambda given, sent: Call(response=response),
        details(metadata=[("key", "value"), ("raw-bin", b"123")]),
        request,
    )
    assert call.result() is response
    down, up, calls = counter.snapshot()
    fields = (3 + 5 + 3) + (7 + 3 + 3)
    assert up == transport.CALL_UP + fields + request.ByteSize()
    assert down == transport.CALL_DOWN + response.ByteSize()
    assert calls == 1


def test_failed_call_counts_what_was_sent():
    counter = transport.TransportCounter()
    failed = Call(code=grpc.StatusCode.UNAVAILABLE)
    request = BytesValue(value=b"x" * 100)
    assert (
        transport.TransportInterceptor(counter).intercept_unary_unary(lambda *_: failed, details(), request)
        is failed
    )
    assert counter.snapshot() == (transport.CALL_DOWN, transport.CALL_UP + request.ByteSize(), 1)


@given(st.lists(st.tuples(st.integers(0, 10**8), st.integers(0, 10**8)), max_size=20))
def test_sums_grow_and_stay_near_the_messages(calls):
    counter = transport.TransportCounter()
    for up, down in calls:
        before = counter.snapshot()
        counter.add_call(up=up, down=down)
        after = counter.snapshot()
        assert up <= after[1] - before[1] <= up * 1.005 + down * 0.005 + 200
        assert down <= after[0] - before[0] <= down * 1.005 + up * 0.005 + 200


def test_every_connection_has_a_handshake():
    counter = transport.TransportCounter()
    told = []
    counter.watch(types.SimpleNamespace(subscribe=told.append))
    for state in (grpc.ChannelConnectivity.CONNECTING, grpc.ChannelConnectivity.READY):
        told[0](state)
    assert counter.snapshot() == (transport.HANDSHAKE_DOWN, transport.HANDSHAKE_UP, 0)


def admit(*answers, site="oak"):
    """Let Admission make a call whose attempts are answered so; return (admission, attempts, seconds slept)."""
    slept, given = [], iter(answers)
    admission = Admission(site, sleep=slept.append)
    attempts = []

    def continuation(*_):
        attempts.append(next(given, answers[-1]))
        return attempts[-1]

    assert admission.intercept_unary_unary(continuation, details(), None) is attempts[-1]
    return admission, attempts, slept


PRESENT = Call(grpc.StatusCode.FAILED_PRECONDITION, "SuperNode with node ID 7 could not be activated.")
REASONS = [
    (
        grpc.StatusCode.FAILED_PRECONDITION,
        "No SuperNode found with the given public key.",
        CredentialError,
        "know this key",
    ),
    (grpc.StatusCode.UNAUTHENTICATED, "Invalid timestamp", CredentialError, "clock"),
    (grpc.StatusCode.UNAVAILABLE, "Ssl handshake failed: certificate", CredentialError, "authority"),
    (grpc.StatusCode.INTERNAL, "/srv/x", ProcessError, "INTERNAL"),
]


@pytest.mark.parametrize(("code", "text", "kind", "sentence"), REASONS)
def test_refusals_are_explained(code, text, kind, sentence):
    admission, attempts, slept = admit(Call(code, text))
    assert isinstance(admission.refusal, kind)
    assert sentence in str(admission.refusal)
    assert str(admission.refusal).startswith("Site oak")
    assert text not in str(admission.refusal)
    assert (len(attempts), slept) == (1, [])


def test_supernode_waits_while_its_predecessor_counts_as_present(capsys):
    admission, attempts, slept = admit(PRESENT, PRESENT, PRESENT, Call())
    assert admission.refusal is None
    assert (len(attempts), len(slept)) == (4, 3)
    assert capsys.readouterr().err.count("still counts as connected") == 1


def test_supernode_that_runs_twice_gives_up():
    admission, _, slept = admit(PRESENT, site="")
    assert isinstance(admission.refusal, ProcessError)
    assert "This site is connected already" in str(admission.refusal)
    assert 60 < sum(slept) <= 90  # Flower forgets a dead one after 60 s


def test_coordinator_that_is_not_there_yet_is_no_refusal():
    admission, _, _ = admit(Call(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"))
    assert admission.refusal is None


def test_admission_lets_other_calls_pass():
    admission = Admission("oak")
    broken = Call(grpc.StatusCode.INTERNAL)
    assert (
        admission.intercept_unary_unary(lambda *_: broken, details("/flwr.proto.Fleet/PullMessages"), None)
        is broken
    )
    assert admission.refusal is None


def test_events_are_cumulative_and_few(tmp_path):
    now = [0.0]
    counter = transport.TransportCounter()
    log = EventLog(tmp_path / "events.jsonl", "supernode", site="oak")
    reporter = Reporter(counter, log, clock=lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        counter.add_call(up=200, down=50)
        if second in (30, 60):
            counter.add_call(up=500_000, down=0)
        reporter.write()
    reporter.stop()
    reporter.stop()
    events = list(read_events(tmp_path / "events.jsonl"))
    assert 10 <= len(events) <= 14  # one each ten quiet seconds, one for each large message, one at the end
    sums = [(event["down"], event["up"], event["calls"]) for event in events]
    assert sums == sorted(sums)
    assert sums[-1] == counter.snapshot()
    assert {(event["process"], event["site"], event["event"]) for event in events} == {
        ("supernode", "oak", "transport")
    }


def test_no_change_no_event(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", "supernode")
    reporter = Reporter(transport.TransportCounter(), log, clock=lambda: 1e9)
    reporter.write()
    reporter.stop()
    assert list(read_events(tmp_path / "events.jsonl")) == []
