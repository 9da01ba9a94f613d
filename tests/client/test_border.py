"""The border: what comes in or goes out is judged and written down first, or it does not pass."""

import math

import pytest
import torch

from client.border import MB, Border
from client.ledger import Ledger, verify
from client.site_config import SiteConfig
from common.config import GuardConfig
from common.errors import LedgerError, MismatchError, PayloadError, PolicyError
from common.payload import Kind, Payload, PayloadSpec
from common.wire import CLOSING, HELLO, decode, encode, read_header
from tests.client.borders import (
    SECRET,
    SPECS,
    TEMPLATE,
    Borders,
    answer,
    entries,
    figures,
    model,
    question,
    release,
    sha,
    tensors,
)  # fmt: skip


@pytest.fixture
def make(tmp_path):
    borders = Borders(tmp_path)
    yield borders
    borders.close()


# ---- in --------------------------------------------------------------------------------------------------------------


def test_a_good_message_is_noted_part_by_part_and_given_on(make):
    border, parts = make(), question()
    envelope = border.receive(parts)
    assert torch.equal(envelope.payloads["model"].tensors["w"], tensors()["w"])
    found = entries(border)
    names = [("model", "model"), ("config", "config"), ("figures", "figures")]
    assert [(entry.part, entry.kind) for entry in found] == names
    for entry, part in zip(found, ("p.model", "config", "head"), strict=True):
        assert (entry.bytes, entry.sha256) == (len(parts[part]), sha(parts[part]))
        assert (entry.run, entry.round, entry.phase, entry.direction) == ("run-1", 1, "round", "in")
        assert (entry.decision, entry.reason) == ("received", "")
    assert found[0].shapes == {"w": [3, 4], "b": [4], "n": [2]}
    assert found[0].norm == pytest.approx(4.0)  # sqrt(12 + 4): integers do not count
    assert verify(border.ledger.path, border.ledger.head).entries == 3


def changed(**other):
    return {**question(), **other}


MALFORMED = {
    "no header": ({key: data for key, data in question().items() if key != "head"}, PayloadError),
    "empty": ({}, PayloadError),
    "broken header": (changed(head=b"\xff\xff"), PayloadError),
    "altered payload": (changed(**{"p.model": bytes(len(question()["p.model"]))}), PayloadError),
    "cut payload": (changed(**{"p.model": question()["p.model"][:-1]}), PayloadError),
    "a part too many": (changed(**{SECRET: b"x"}), PayloadError),
    "no text": (changed(config=b"\xff"), PayloadError),
    "another schema": (changed(head=b"\x08\x63"), MismatchError),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_message_is_noted_as_refused_with_the_reason(make, name):
    parts, kind = MALFORMED[name]
    border = make()
    with pytest.raises(kind) as caught:
        border.receive(parts)
    [entry] = entries(border)
    assert (entry.part, entry.direction, entry.decision) == ("message", "in", "refused")
    assert (entry.bytes, entry.sha256) == (sum(map(len, parts.values())), sha(*parts.values()))
    assert entry.reason == f"{kind.code}: {caught.value}"
    assert border.ledger.bytes_in("run-1", 1, "in") == border.ledger.bytes_in("", 0, "in") == 0


def test_bytes_in_are_limited_over_repetitions_and_restarts_of_a_round(make):
    parts = question(config="x" * 20_000)
    size = sum(map(len, parts.values()))
    policy = {"max_in_mb": 2.5 * size / MB}
    border = make(policy)
    border.receive(parts)
    border = make(policy)  # the worker was started again
    border.receive(parts)
    border = make(policy)
    for _ in range(2):
        with pytest.raises(
            PolicyError, match=r"alpha: .* MB would come in in round 1, the site's policy allows"
        ):
            border.receive(parts)
    found = entries(border)
    assert [entry.decision for entry in found] == ["received"] * 6 + ["refused"] * 6
    assert all(entry.reason.startswith("policy: alpha: ") for entry in found[6:])
    border.receive(question(round_=2))  # another round, another run
    border.receive(question(run="run-2"))
    with pytest.raises(PolicyError):
        border.receive(parts)


def test_a_message_above_the_limit_is_refused_at_once_and_does_not_count(make):
    parts = question()
    size = sum(map(len, parts.values()))
    with pytest.raises(PolicyError):
        make({"max_in_mb": (size - 0.5) / MB}).receive(parts)
    border = make({"max_in_mb": (size + 0.5) / MB})
    border.receive(parts)
    assert border.ledger.bytes_in("run-1", 1, "in") > 0


def test_without_a_limit_everything_comes_in(make):
    border, parts = make(), question()
    size = sum(map(len, parts.values()))
    for _ in range(10):
        border.receive(question())
    assert border.ledger.bytes_in("run-1", 1, "in") == 10 * size


def test_headers_count_among_the_bytes_that_come_in(make):
    parts = question(payloads={}, versions={"model": "x" * 100_000})
    border = make({"max_in_mb": 0.25})
    border.receive(parts)
    border.receive(parts)
    with pytest.raises(PolicyError):
        border.receive(parts)


def test_a_message_that_is_only_a_header_is_noted_too(make):
    border = make()
    border.receive(question(payloads={}, config=""))
    assert len(entries(border)) >= 1


def test_a_header_that_is_refused_for_its_size_is_noted(make):
    border = make({"max_in_mb": 0.01})
    with pytest.raises(PolicyError):
        border.receive(question(payloads={}, config="", versions={"model": "x" * 100_000}))
    assert [entry.decision for entry in entries(border)] == ["refused"]


@pytest.mark.parametrize(
    ("payloads", "sentence"),
    [
        ({}, "payload 'model' is missing"),
        (model() | {"more": Payload("more", Kind.MODEL, tensors())}, "unexpected payload 'more'"),
        (model(float("nan")), "not finite"),
        (model(1e9), "root mean square"),
        (model(kind=Kind.UPDATE), "of kind 'update'"),
    ],
)
def test_what_came_down_is_held_against_the_promise_before_use(make, payloads, sentence):
    with pytest.raises(PayloadError, match=sentence):
        make().accept(payloads, SPECS, TEMPLATE, GuardConfig())
    make().accept(model(), SPECS, TEMPLATE, GuardConfig())


# ---- out -------------------------------------------------------------------------------------------------------------


def test_every_part_of_a_released_answer_has_a_line_with_its_hash(make):
    border = make()
    extra = {"extra": Payload("extra", Kind.DATA_SKETCH, {"s": torch.arange(5.0)})}
    specs = (*SPECS, PayloadSpec("extra", Kind.DATA_SKETCH, like_model=False))
    asked = question()
    border.receive(asked)
    before = len(entries(border))
    reply = answer(payloads=model() | extra, summary='{"cases": 3}')
    parts = release(border, reply, specs=specs)
    found = entries(border)
    assert sorted(parts) == ["head", "metrics", "p.extra", "p.model", "summary"]
    noted = {(entry.direction, entry.sha256): entry for entry in found}
    for name, data in parts.items():
        if name != "head":
            entry = noted["out", sha(data)]
            assert (entry.part, entry.bytes) == (name.removeprefix("p."), len(data))
    assert ("in", sha(asked["config"])) in noted
    assert ("in", sha(asked["p.model"])) in noted
    header = read_header(parts)
    header.ledger = ""  # the one thing that can only be known once the header was noted
    figures_entry = noted["out", sha(header.SerializeToString(deterministic=True))]
    assert (figures_entry.part, figures_entry.cases) == ("figures", 10)
    out = found[before:]
    assert len(out) == len(parts)
    assert {entry.decision for entry in out} == {"released"}
    assert {(entry.run, entry.round, entry.phase) for entry in out} == {("run-1", 1, "round")}
    assert [entry.kind for entry in out if entry.part == "extra"] == ["data-sketch"]


def test_a_released_answer_says_what_was_meant_and_carries_the_head_as_a_witness(make):
    border = make()
    border.receive(question())
    parts = release(border, answer())
    got = decode(parts)
    assert got.ledger == border.ledger.head
    assert verify(border.ledger.path, got.ledger).head == got.ledger
    assert (got.cases, got.loss, got.run, got.round, got.site) == (10, 0.25, "run-1", 1, "alpha")
    assert got.metrics == [figures(4)]
    for name, tensor in tensors().items():
        assert torch.equal(got.payloads["model"].tensors[name], tensor)
    later = decode(release(border, answer(round_=2)))
    summary = verify(border.ledger.path, got.ledger)  # an older head is a witness still
    assert summary.head == later.ledger != got.ledger
    other = border.ledger.path.parent / "other" / border.ledger.path.name
    Ledger(other).close()
    with pytest.raises(LedgerError, match="cut short"):
        verify(other, got.ledger)


def test_another_record_of_the_same_length_is_not_what_the_head_witnesses(make, tmp_path):
    border = make()
    head = decode(release(border, answer())).ledger
    other = Border(
        SiteConfig.model_validate({"alias": "alpha", "data": "/n", "socket": "/n", "home": tmp_path / "2"})
    )
    release(other, answer(payloads=model(2.0)))
    other.close()
    assert other.ledger.count == border.ledger.count
    with pytest.raises(LedgerError, match="the head noted elsewhere"):
        verify(other.ledger.path, head)


REFUSED = {
    "kind": ({"kinds": ["control"]}, answer(), PolicyError, "lets no payload of kind 'model' out"),
    "cases": ({"min_cases": 11}, answer(), PolicyError, "10 training cases are fewer"),
    "bytes": ({"max_out_mb": 1e-5}, answer(), PolicyError, "would leave in round 1"),
    "missing": ({}, answer(payloads={}), PayloadError, "is missing"),
    "not finite": ({}, answer(payloads=model(math.inf)), PayloadError, "not finite"),
    "huge": ({}, answer(payloads=model(1e9)), PayloadError, "root mean square"),
    "unpromised": (
        {},
        answer(payloads=model() | {"notes": Payload("notes", Kind.CONTROL, {})}),
        PayloadError,
        "unexpected payload 'notes'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_leave_is_noted_as_refused_with_the_reason_and_stays(make, name):
    policy, reply, kind, sentence = REFUSED[name]
    border = make(policy)
    with pytest.raises(kind, match=sentence) as caught:
        release(border, reply)
    found = entries(border)
    assert {entry.part for entry in found} == {"metrics", "figures"} | set(reply.payloads)
    assert {entry.decision for entry in found} == {"refused"}
    assert {entry.reason for entry in found} == {f"{kind.code}: {caught.value}"}
    assert border.ledger.bytes_in("run-1", 1, "out") == 0
    assert caught.value.site == "alpha"
    assert SECRET not in str(caught.value)


def test_a_kind_that_the_policy_names_leaves(make):
    border = make({"kinds": ["model"], "min_cases": 10})
    assert "p.model" in release(border, answer())


def test_bytes_out_are_limited_over_repetitions_and_restarts_of_a_round(make):
    size = sum(map(len, encode(answer()).values()))
    policy = {"max_out_mb": (2 * size + 0.5) / MB}
    border = make(policy)
    for _ in range(2):
        release(border, answer())
        border = make(policy)
    assert border.ledger.bytes_in("run-1", 1, "out") == 2 * size
    for _ in range(2):
        with pytest.raises(PolicyError, match="MB would leave in round 1"):
            release(border, answer())
    assert border.ledger.bytes_in("run-1", 1, "out") == 2 * size  # what was refused does not count
    release(border, answer(round_=2))
    release(border, answer(run="run-2"))


def test_what_came_in_does_not_use_up_what_may_leave(make):
    size = sum(map(len, encode(answer()).values()))
    border = make({"max_out_mb": (size + 0.5) / MB})
    for _ in range(5):
        border.receive(question())
    release(border, answer())
    assert border.ledger.bytes_in("run-1", 1, "out") == size


@pytest.mark.parametrize("phase", [HELLO, CLOSING])
def test_no_payload_leaves_against_the_policy_in_any_phase(make, phase):
    with pytest.raises((PolicyError, PayloadError)):
        release(make({"kinds": ["control"]}), answer(phase=phase))
