"""The border: what comes in or goes out is judged and written down first, or it does not pass."""

import errno
import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.border import MB, Border, clipped
from client.ledger import Ledger, read, verify
from client.site import Site
from client.site_config import SiteConfig
from client.worker import failure
from common.config import GuardConfig
from common.errors import DataError, LedgerError, MismatchError, PayloadError, PolicyError, StorageError
from common.events import EventLog
from common.payload import Kind, Payload, PayloadSpec
from common.site_summary import SiteSummary, require_fit
from common.wire import CLOSING, HELLO, ROUND, Envelope, MetricSet, decode, encode, read_header
from tests.client.ledgers import full_disk
from tests.harness import Federation, MemoryLink, table_config, versions_for, write_table_site

SECRET = "Mueller_Hans"
SPECS = (PayloadSpec("model", Kind.MODEL),)
TEMPLATE = {"w": torch.zeros(3, 4), "b": torch.zeros(4), "n": torch.zeros(2, dtype=torch.int64)}


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()


def tensors(value=1.0):
    return {"w": torch.full((3, 4), value), "b": torch.full((4,), -value), "n": torch.tensor([1, 10**12])}


def model(value=1.0, kind=Kind.MODEL):
    return {"model": Payload("model", kind, tensors(value))}


def question(run="run-1", round_=1, value=1.0, **fields):
    """A message of the coordinator."""
    fields = {"payloads": model(value), "config": '{"a": 1}', "phase": ROUND} | fields
    return encode(Envelope(run, round_, site="alpha", **fields))


def figures(cases, name="global"):
    return MetricSet(1, "validation", name, cases, {"dice": (3.5, 4.0)}, "dice")


def answer(run="run-1", round_=1, **fields):
    fields = {
        "payloads": model(),
        "metrics": [figures(4)],
        "cases": 10,
        "loss": 0.25,
        "phase": ROUND,
    } | fields
    return Envelope(run, round_, site="alpha", **fields)


@pytest.fixture
def make(tmp_path):
    opened = []

    def border(policy=None, privacy=None):
        for old in opened:
            old.close()
        values = {"alias": "alpha", "data": "/none", "socket": "/none", "home": tmp_path / SECRET}
        config = SiteConfig.model_validate(values | {"policy": policy or {}, "privacy": privacy or {}})
        opened.append(Border(config))
        return opened[-1]

    yield border
    for old in opened:
        old.close()


def entries(border):
    return list(read(border.ledger.path))


def release(border, reply, received=None, guard=None, specs=SPECS):
    return border.release(reply, received or {}, specs, TEMPLATE, guard or GuardConfig())


# ---- in --------------------------------------------------------------------------------------------------------------


def test_a_good_message_is_noted_part_by_part_and_given_on(make):
    border, parts = make(), question()
    envelope = border.receive(parts)
    assert torch.equal(envelope.payloads["model"].tensors["w"], tensors()["w"])
    found = entries(border)
    assert [(entry.part, entry.kind) for entry in found] == [("model", "model"), ("config", "config")]
    for entry, part in zip(found, ("p.model", "config"), strict=True):
        assert (entry.bytes, entry.sha256) == (len(parts[part]), sha(parts[part]))
        assert (entry.run, entry.round, entry.phase, entry.direction) == ("run-1", 1, "round", "in")
        assert (entry.decision, entry.reason) == ("received", "")
    assert found[0].shapes == {"w": [3, 4], "b": [4], "n": [2]}
    assert found[0].norm == pytest.approx(4.0)  # sqrt(12 + 4): integers do not count
    assert verify(border.ledger.path, border.ledger.head).entries == 2


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
    parts = question()
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
    assert [entry.decision for entry in found] == ["received"] * 4 + ["refused"] * 4
    assert all(entry.reason.startswith("policy: alpha: ") for entry in found[4:])
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
    border = make()
    for _ in range(10):
        border.receive(question())


@pytest.mark.xfail(reason="the header's bytes of an incoming message are not counted over repetitions")
def test_headers_count_among_the_bytes_that_come_in(make):
    parts = question(payloads={}, versions={"model": "x" * 100_000})
    border = make({"max_in_mb": 0.25})
    border.receive(parts)
    border.receive(parts)
    with pytest.raises(PolicyError):
        border.receive(parts)


@pytest.mark.xfail(reason="a message that is only a header leaves no line in the ledger")
def test_a_message_that_is_only_a_header_is_noted_too(make):
    border = make()
    border.receive(question(payloads={}, config=""))
    assert len(entries(border)) >= 1


@pytest.mark.xfail(reason="a message that is only a header leaves no line in the ledger")
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


@pytest.mark.parametrize("phase", [HELLO, CLOSING])
@pytest.mark.xfail(reason="payloads of a first or closing answer are held against no promise and no policy")
def test_no_payload_leaves_against_the_policy_in_any_phase(make, phase):
    with pytest.raises((PolicyError, PayloadError)):
        release(make({"kinds": ["control"]}), answer(phase=phase))


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures_that_the_hospital_keeps_in_are_in_no_part_of_the_answer(make):
    secret = figures(4, name="withheld")
    border = make(privacy={"metrics": False})
    reply = answer(metrics=[secret])
    parts = release(border, reply)
    got = decode(parts)
    assert got.metrics == []
    assert "metrics" not in parts
    assert not any(b"withheld" in data for data in parts.values())
    assert got.payloads.keys() == {"model"}
    assert got.cases == 10
    assert {entry.part for entry in entries(border)} == {"model", "figures"}
    assert reply.metrics == [secret]  # the site's own copy is whole


@pytest.mark.parametrize(("least", "left"), [(1, [3, 4, 5]), (4, [4, 5]), (5, [5]), (6, [])])
def test_figures_over_too_few_cases_stay_in(make, least, left):
    border = make(privacy={"metrics_min_cases": least})
    parts = release(border, answer(metrics=[figures(cases) for cases in (3, 4, 5)]))
    assert [item.cases for item in decode(parts).metrics] == left
    assert ("metrics" in parts) == bool(left)


# ---- clipping --------------------------------------------------------------------------------------------------------


def norm64(new, old=None):
    """The L2 norm in float64, over floating tensors, by Python's exact sum."""
    total = []
    for name, tensor in new.items():
        if tensor.is_floating_point():
            diff = tensor.double() - (old[name].double() if old else 0.0)
            total += [value * value for value in diff.reshape(-1).tolist()]
    return math.sqrt(math.fsum(total))


def between(new, old=None):
    return torch.cat([(new[n].double() - (old[n].double() if old else 0.0)).reshape(-1) for n in ("w", "b")])


def random_model(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(t.shape, generator=generator) * scale for name, t in TEMPLATE.items() if name != "n"
    }
    return made | {"n": torch.tensor([seed, -seed])}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    size=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    step=st.sampled_from([1e-4, 0.1, 1.0, 1e4]),
    most=st.sampled_from([1e-2, 0.5, 1.0, 30.0]),
    kind=st.sampled_from([Kind.MODEL, Kind.UPDATE]),
)
def test_what_training_adds_is_scaled_down_to_the_bound_and_keeps_its_direction(seed, size, step, most, kind):
    base = random_model(seed, size)
    change = random_model(seed + 1, step)
    old = base if kind is Kind.MODEL else None
    new = {n: base[n] + change[n] if old else change[n] for n in change}
    kept = {name: tensor.clone() for name, tensor in new.items()}
    got = clipped(Payload("model", kind, new, {"note": 1}), Payload("model", Kind.MODEL, base), most)
    assert (got.name, got.kind, got.meta) == ("model", kind, {"note": 1})
    assert [tensor.dtype for tensor in got.tensors.values()] == [tensor.dtype for tensor in new.values()]
    assert all(torch.equal(new[name], kept[name]) for name in new)  # the site's own model is left alone
    assert torch.equal(got.tensors["n"], new["n"])
    # float32 holds a value near `size` only so exactly: half a unit in the last place for each of the 16 values
    coarse = (
        4
        * 2.0**-24
        * max(float(t.abs().max()) for t in (*base.values(), *got.tensors.values()) if t.is_floating_point())
    )
    before = norm64(new, old)
    if before <= most:
        assert all(torch.equal(got.tensors[name], new[name]) for name in new)
        return
    assert norm64(got.tensors, old) == pytest.approx(most, rel=1e-6, abs=coarse)
    wanted = between(new, old) * (most / before)
    assert float((between(got.tensors, old) - wanted).norm()) <= coarse + 1e-6 * most


def test_the_bound_itself_is_untouched_to_the_bit_and_a_hair_above_is_not():
    tensors_ = {"w": torch.tensor([3.0, 4.0]), "n": torch.tensor([9])}
    payload = Payload("delta", Kind.UPDATE, tensors_)
    assert clipped(payload, None, 5.0) is payload
    got = clipped(payload, None, 4.999)
    assert norm64(got.tensors) < 5.0
    assert torch.equal(got.tensors["n"], tensors_["n"])


@pytest.mark.parametrize(
    ("base", "new", "most"),
    [
        (torch.tensor([2.0**24]), torch.tensor([2.0**24 + 2]), 1.5),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16), 0.005),
        (torch.ones(1000), torch.ones(1000) + 0.01 * torch.arange(1, 1001) / 1000, 1e-5),
    ],
)
@pytest.mark.xfail(reason="rounding back to the model's dtype can carry the update beyond the bound")
def test_the_bound_holds_after_rounding_to_the_models_dtype(base, new, most):
    got = clipped(Payload("model", Kind.MODEL, {"w": new}), Payload("model", Kind.MODEL, {"w": base}), most)
    assert norm64(got.tensors, {"w": base}) <= most


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.MODEL, Kind.UPDATE)])
def test_other_kinds_are_not_scaled(kind):
    payload = Payload("p", kind, {"w": torch.full((9,), 100.0)})
    assert clipped(payload, None, 1.0) is payload


def test_a_model_that_was_not_sent_down_counts_as_a_whole_and_an_update_never_as_a_difference():
    big = {"w": torch.full((4,), 10.0)}
    same = Payload("model", Kind.MODEL, {"w": big["w"].clone()})
    assert clipped(Payload("model", Kind.MODEL, big), same, 1.0).tensors is big
    assert norm64(clipped(Payload("model", Kind.MODEL, big), None, 1.0).tensors) == pytest.approx(1.0)
    assert norm64(clipped(Payload("model", Kind.UPDATE, big), same, 1.0).tensors) == pytest.approx(1.0)


def test_what_leaves_is_the_scaled_update_and_the_ledger_says_so(make):
    received = model(1.0)
    border = make(privacy={"clip_norm": 0.5})
    reply = answer(payloads=model(2.0))
    parts = release(border, reply, received)
    left = decode(parts).payloads["model"].tensors
    assert norm64(left, received["model"].tensors) == pytest.approx(0.5, rel=1e-6)
    assert torch.equal(left["n"], tensors()["n"])
    [entry] = [entry for entry in entries(border) if entry.part == "model"]
    assert entry.sha256 == sha(parts["p.model"])
    assert entry.norm == pytest.approx(norm64(left), rel=1e-9)
    assert torch.equal(reply.payloads["model"].tensors["w"], tensors(2.0)["w"])


def test_without_a_bound_nothing_is_scaled(make):
    parts = release(make(), answer(payloads=model(1000.0)), model(1.0))
    assert torch.equal(decode(parts).payloads["model"].tensors["w"], tensors(1000.0)["w"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_and_not_scaled_away(make, bad):
    border = make(privacy={"clip_norm": 0.5})
    reply = answer(payloads=model(1.0))
    reply.payloads["model"].tensors["w"][0, 0] = bad
    with pytest.raises(PayloadError, match="not finite"):
        release(border, reply, model(1.0))
    assert {entry.decision for entry in entries(border)} == {"refused"}


@pytest.mark.xfail(
    reason="clipping comes before the check of shapes: a foreign RuntimeError, and no line in the ledger"
)
def test_a_wrong_shape_is_refused_by_name_also_where_updates_are_scaled(make):
    border = make(privacy={"clip_norm": 0.5})
    reply = answer(payloads=model(2.0))
    reply.payloads["model"].tensors["w"] = torch.ones(5)
    with pytest.raises(PayloadError, match="has shape"):
        release(border, reply, model(1.0))


# ---- what cannot be noted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 100])
def test_what_cannot_be_noted_does_not_leave(make, monkeypatch, after):
    border = make()
    release(border, answer())
    head, data = border.ledger.head, border.ledger.path.read_bytes()
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, after)
        with pytest.raises(
            StorageError, match=r"alpha: the ledger cannot be written \(no space is left"
        ) as caught:
            release(border, answer(round_=2))
    assert SECRET not in str(caught.value)
    assert border.ledger.head == head
    assert border.ledger.path.read_bytes() == data
    assert border.ledger.bytes_in("run-1", 2, "out") == 0
    got = decode(release(border, answer(round_=2)))  # there is space again
    assert verify(border.ledger.path, got.ledger).head == got.ledger


def test_what_cannot_be_noted_is_not_taken_in(make, monkeypatch):
    border = make()
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, 0)
        with pytest.raises(StorageError):
            border.receive(question())
        with pytest.raises(StorageError):
            border.receive({})
    assert entries(border) == []
    border.receive(question())


def test_a_refusal_that_cannot_be_noted_still_keeps_the_answer_in(make, monkeypatch):
    border = make({"kinds": ["control"]})
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, 0)
        with pytest.raises(StorageError):
            release(border, answer())
    assert entries(border) == []


def test_a_ledger_that_another_program_changed_lets_nothing_out(make):
    border = make()
    release(border, answer())
    with border.ledger.path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(LedgerError, match="another program changed it"):
        release(border, answer(round_=2))


def test_one_site_has_one_border(make, tmp_path):
    border = make()
    with pytest.raises(LedgerError, match="another worker writes this ledger"):
        Border(
            SiteConfig.model_validate(
                {"alias": "alpha", "data": "/n", "socket": "/n", "home": tmp_path / SECRET}
            )
        )
    border.close()
    make()


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_is_noted_with_its_code_and_sentence(make):
    border = make()
    parts = failure(DataError("alpha: case 3 has no label."), "alpha")
    border.failed("run-1", 2, ROUND, parts)
    [entry] = entries(border)
    assert (entry.part, entry.kind, entry.direction, entry.decision) == (
        "failure",
        "failure",
        "out",
        "released",
    )
    assert entry.reason == "data: alpha: case 3 has no label."
    assert (entry.run, entry.round, entry.phase) == ("run-1", 2, "round")
    assert (entry.bytes, entry.sha256) == (len(parts["head"]), sha(parts["head"]))


def test_a_foreign_error_is_noted_without_its_text(make):
    border = make()
    border.failed("run-1", 2, CLOSING, failure(ValueError(f"/data/{SECRET}"), "alpha"))
    [entry] = entries(border)
    assert entry.reason.startswith("internal: unexpected ValueError")
    assert SECRET not in border.ledger.path.read_text()


@pytest.mark.parametrize("phase", [HELLO, ROUND, CLOSING, 0, 99])
def test_a_failure_of_any_phase_is_noted(make, phase):
    border = make()
    border.failed("run-1", 0, phase, failure(DataError("x"), "alpha"))
    assert len(entries(border)) == 1


def test_a_failure_that_cannot_be_noted_is_no_further_error(make, monkeypatch):
    border = make()
    parts = failure(StorageError("alpha: no space"), "alpha")
    with monkeypatch.context() as patch:
        full_disk(patch, errno.ENOSPC, 0)
        border.failed("run-1", 1, ROUND, parts)
    assert entries(border) == []
    with border.ledger.path.open("ab") as file:
        file.write(b"x")
    border.failed("run-1", 1, ROUND, parts)
    border.close()
    border.failed("run-1", 1, ROUND, parts)


# ---- the site behind it ----------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    opened = []

    def open_site(**sections):
        data = tmp_path / "data"
        if not data.exists():
            write_table_site(data, seed=1)
        values = {"alias": "alpha", "data": data, "socket": "/none", "home": tmp_path / "home"}
        config = SiteConfig.model_validate(values | {"compute": {"device": "cpu"}} | sections)
        opened.append(Site(config, EventLog(tmp_path / "events.jsonl", "worker", site="alpha")))
        return opened[-1]

    yield open_site
    for each in opened:
        each.close()


def hello(config, run="run-1"):
    return encode(Envelope(run, 0, HELLO, "alpha", config=config.to_json(), versions=versions_for(config)))


def test_a_site_that_tells_counts_only_still_fits_the_run(site):
    config = table_config()
    got = decode(site(privacy={"summary": "counts"}).handle(hello(config), lambda: None))
    summary = SiteSummary.model_validate_json(got.summary)
    require_fit(summary, config.data)
    assert summary.cases["training"] == got.cases > 0
    defaults = SiteSummary(site="alpha", task="tabular", spatial_dims=0, channels=(), labels=(), cases={})
    hidden = [
        "spacing_min",
        "spacing_max",
        "size_min",
        "size_max",
        "orientations",
        "intensity",
        "class_share",
    ]
    for name in [*hidden, "empty_classes", "missing_share"]:
        assert getattr(summary, name) == getattr(defaults, name)


def test_a_site_that_tells_all_tells_more_than_counts(site):
    config = table_config()
    summary = SiteSummary.model_validate_json(decode(site().handle(hello(config), lambda: None)).summary)
    assert summary != summary.counts_only()
    require_fit(summary, config.data)


def test_counts_alone_never_make_a_site_that_does_not_fit_pass():
    config = table_config().data
    summary = SiteSummary(
        site="alpha",
        task="tabular",
        spatial_dims=0,
        channels=("x",),
        labels=config.labels,
        cases={"training": 3},
    )
    with pytest.raises(MismatchError, match="channels"):
        require_fit(summary.counts_only(), config)


def test_a_federation_of_reserved_hospitals_runs_to_its_end(tmp_path):
    federation = Federation(tmp_path)
    sites = federation.open_sites()
    private = {"metrics": False, "summary": "counts", "clip_norm": 0.05}
    for each in sites.values():
        each.config = SiteConfig.model_validate(each.config.model_dump() | {"privacy": private})
        each.border.privacy = each.config.privacy
    link = MemoryLink(sites)
    loop = federation.run(table_config(rounds=2), link=link)
    assert loop is not None
    ends = [event for event in federation.events() if event["event"] == "run.end"]
    assert [end["verdict"] for end in ends] == ["ok"]
    assert not [event for event in federation.events() if event["event"] == "metric"]
    updates = 0
    for alias, _, asked, replied in link.seen:
        got = decode(replied)
        assert got.failure is None
        assert got.metrics == []
        if "p.model" in replied:
            sent = decode(asked).payloads["model"].tensors
            assert norm64(got.payloads["model"].tensors, sent) <= 0.05 * (1 + 1e-5)
            updates += 1
        verify(sites[alias].border.ledger.path, got.ledger)
    assert updates == 6


@pytest.mark.xfail(
    reason="Site._asked keeps the message before, so a refused message's failure is booked on its round"
)
def test_the_failure_after_a_message_that_cannot_be_read_is_not_booked_on_the_round_before(site):
    one = site()
    one.handle(hello(table_config(), run="before"), lambda: None)
    with pytest.raises(PayloadError) as caught:
        one.handle({"head": b"\xff"}, lambda: None)
    one.failed(failure(caught.value, "alpha"))
    last = list(read(one.border.ledger.path))[-1]
    assert last.part == "failure"
    assert last.run != "before"
