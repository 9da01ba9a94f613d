"""Every method with its payloads compressed: on real sites and the real round loop, through wire bytes."""

import hashlib
import math

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord

from client.ledger import read
from client.site_config import Privacy
from common.config import WireConfig
from common.errors import QuorumError
from common.guard import l2_norm
from common.methods import METHODS
from common.payload import Kind, Payload
from common.store import tensor_bytes
from common.wire import ROUND, bytes_by_kind, decode, encode, read_header
from server.strategy import MethodStrategy, tensors_of
from tests.harness import Federation, MemoryLink, table_config
from tests.server.test_strategy import SitesGrid
from tests.test_every_method import best_models, state_bytes

pytestmark = pytest.mark.slow

ALL = sorted(METHODS)


def is_model(spec):
    return spec.like_model and spec.kind in (Kind.MODEL, Kind.UPDATE)


CODED = [name for name in ALL if any(map(is_model, METHODS[name].server.uplink))]
STC = WireConfig(uplink_codec="stc", uplink_p=0.5)
HALF = WireConfig(uplink_codec="bf16", downlink_codec="bf16")
MIXED = WireConfig(uplink_codec="stc", uplink_p=0.5, downlink_codec="float16")
WAYS = {"stc": STC, "bf16": HALF}


def config(name="fedavg", wire=STC, **options):
    return table_config(name, **options).model_copy(update={"wire": wire})


@pytest.fixture
def federation(tmp_path):
    return Federation(tmp_path)


def heads(federation, way):
    """Return the head of every payload that travelled in a round, up or down."""
    place = {"down": 2, "up": 3}[way]
    return [
        head
        for seen in federation.link.seen
        if (header := read_header(seen[place])).phase == ROUND
        for head in header.payloads
    ]


@pytest.mark.parametrize("wire", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_every_method_runs_to_the_end_and_its_models_travel_coded(federation, name, wire):
    federation.run(config(name, WAYS[wire]))
    ends = [event for event in federation.events() if event["event"] == "round.end"]
    assert [len(event["cases"]) for event in ends] == [3] * 4
    assert not any(event["missing"] for event in ends)
    half = METHODS[name].server
    bytes_codec = {"stc": "ternary"}.get(wire, wire)
    for way, specs, codec in (
        ("up", half.uplink, bytes_codec),
        ("down", half.downlink, "bf16" if wire == "bf16" else "raw"),
    ):
        models = {spec.name for spec in specs if is_model(spec)}
        travelled = heads(federation, way)
        assert {head.codec for head in travelled if head.name in models} == ({codec} if models else set())
        assert {head.codec for head in travelled if head.name not in models} <= {"raw"}


@pytest.mark.parametrize("name", ALL)
def test_neither_a_resume_nor_the_order_of_replies_changes_a_bit(federation, name):
    whole = federation.run(config(name, MIXED), home="whole")
    links = MemoryLink(federation.open_sites("cut"), backwards=True)
    cut = federation.start(config(name, MIXED), home="cut", link=links)
    cut.state = cut.round(1)
    cut.checkpoints.write(1, cut.state)
    cut.round(2)  # answered but never closed: the sites are ahead, with residuals of a round that never was
    resumed = federation.start(config(name, MIXED), home="cut")
    assert resumed.resume()
    resumed.execute()
    assert state_bytes(resumed.state) == state_bytes(whole.state)
    assert best_models(federation, resumed, "cut") == best_models(federation, whole, "whole")


@pytest.mark.parametrize("name", CODED)
def test_what_is_left_out_is_in_the_sites_state_and_changes_the_next_round(federation, name):
    loop = federation.start(config(name))
    loop.state = loop.round(1)
    states = {alias: site._session.states for alias, site in federation.link.sites.items()}
    left = {alias: state.before(2) for alias, state in states.items()}
    for state in left.values():
        residual = {key: value for key, value in state.tensors.items() if key.startswith("codec:model/")}
        assert residual
        assert l2_norm(residual) > 0
    once = loop.round(2)
    for alias, state in left.items():
        forgotten = {
            key: torch.zeros_like(value) if key.startswith("codec:") else value
            for key, value in state.tensors.items()
        }
        states[alias].write(1, type(state)(forgotten, state.values))
    assert state_bytes(loop.round(2)) != state_bytes(once)


def test_without_compression_the_state_of_a_site_has_nothing_of_it(federation):
    federation.run(config(wire=WireConfig()))
    state = federation.link.sites["alpha"]._session.states.before(4)
    assert not any(key.startswith("codec:") for key in (*state.tensors, *state.values))


def test_raw_payloads_are_plain_tensors_to_the_byte(federation):
    """The format as docs/architecture.md tells it: little-endian values, tensor after tensor, and nothing else."""
    federation.run(config(wire=WireConfig()))
    count = 0
    for _, _, down, up in federation.link.seen:
        for parts in (down, up):
            for head in read_header(parts).payloads:
                payload = decode(parts).payloads[head.name]
                plain = b"".join(tensor.numpy().tobytes() for tensor in payload.tensors.values())
                assert (head.codec, parts[f"p.{head.name}"]) == ("raw", plain)
                assert hashlib.sha256(plain).digest() == head.sha256
                assert [item.name for item in head.tensors] == list(payload.tensors)
                count += 1
    assert count == 3 * (3 + 4)


# ---- bytes, ledger, bounds -----------------------------------------------------------------------------------------------


def test_bytes_by_kind_are_those_that_travel(federation):
    federation.run(config(wire=HALF))
    told = {
        (e["site"], e["round"], e["direction"]): e
        for e in federation.events()
        if e["event"] == "bytes" and e["round"]
    }
    for alias, round_, down, up in federation.link.seen:
        for direction, parts in (("down", down), ("up", up)):
            if round_:
                event = told[alias, round_, direction]
                assert event["kinds"] == bytes_by_kind(parts)
                assert event["total"] == sum(map(len, parts.values()))


@pytest.mark.parametrize("wire", WAYS)
def test_the_ledger_tells_bytes_as_they_travel_and_norms_as_they_arrive(federation, wire):
    loop = federation.start(config(wire=WAYS[wire]))
    arrived = {}
    fold = loop.server.fold

    def watch(acc, reply):
        arrived[reply.site] = {key: value.clone() for key, value in reply.payloads["model"].tensors.items()}
        return fold(acc, reply)

    loop.server.fold = watch
    loop.round(1)
    for alias, round_, down, up in federation.link.seen:
        if round_ != 1:
            continue
        found = {
            entry.direction: entry
            for entry in read(federation.link.sites[alias].border.ledger.path)
            if entry.part == "model" and entry.round == 1
        }
        for direction, parts in (("in", down), ("out", up)):
            entry, blob = found[direction], parts["p.model"]
            assert (entry.bytes, entry.sha256) == (len(blob), hashlib.sha256(blob).hexdigest())
            assert entry.shapes == {name: list(like.shape) for name, like in loop.template.items()}
        assert found["out"].norm == pytest.approx(
            l2_norm(arrived[alias]), rel=1e-2 if wire == "bf16" else 1e-6
        )
        sent = loop.server.send(loop.state, alias, loop._context(1, alias))[0].tensors
        rounded = {key: value.bfloat16().float() for key, value in sent.items()} if wire == "bf16" else sent
        assert found["in"].norm == pytest.approx(l2_norm(rounded), rel=1e-12)


def test_a_hospitals_bound_holds_for_what_leaves_over_rounds(federation):
    most = 0.05
    links = MemoryLink(federation.open_sites())
    links.sites["beta"].border.privacy = Privacy(clip_norm=most)
    loop = federation.start(config(), link=links)
    norms = []
    for number in (1, 2, 3):
        loop.state = loop.round(number)
        norms.append(loop.history[-1].norms)
    assert all(
        norm["beta"] <= most * (1 + 1e-5) for norm in norms
    )  # measured on the model, with its float32 steps
    assert all(norm["beta"] > 0.2 * most for norm in norms)
    assert any(norm["alpha"] > 2 * most for norm in norms)
    residual = links.sites["beta"]._session.states.before(4)
    kept = {key: value for key, value in residual.tensors.items() if key.startswith("codec:")}
    assert 0 < l2_norm(kept) <= most


def test_the_coordinators_guard_measures_what_is_reconstructed(federation):
    whole = federation.start(config(), home="a")
    whole.round(1)
    norms = whole.history[-1].norms
    largest = max(norms, key=norms.get)
    limit = sorted(norms.values())[-2] * 1.0001
    guarded = config()
    guarded = guarded.model_copy(update={"guard": guarded.guard.model_copy(update={"update_norm": limit})})
    loop = federation.start(guarded, home="b")
    loop.round(1)
    assert list(loop.history[-1].missing) == [largest]
    assert "guard.update_norm" in loop.history[-1].missing[largest][1]


# ---- faults --------------------------------------------------------------------------------------------------------------


def spoil(federation, change, wire=STC):
    """Let beta's answer of round 2 be changed, with a right checksum: it must be refused by name, the state stay."""

    def tamper(alias, round_, parts):
        if alias != "beta" or round_ != 2:
            return parts
        envelope = decode(parts)
        change(envelope.payloads)
        return encode(envelope)

    full = config(wire=wire)
    full = full.model_copy(update={"rounds": full.rounds.model_copy(update={"quorum": 1.0})})
    loop = federation.start(full, link=MemoryLink(federation.open_sites(), tamper=tamper))
    loop.state = loop.round(1)
    before = state_bytes(loop.state)
    with pytest.raises(QuorumError, match="beta"):
        loop.round(2)
    assert state_bytes(loop.state) == before
    code, sentence = loop.history[-1].missing["beta"]
    assert code == "payload"
    assert sentence.startswith("beta: payload 'model'")
    return sentence


def test_a_corrupt_container_is_refused_by_name(federation):
    def change(payloads):
        data = bytearray(payloads["model"].data)
        data[len(data) // 2] ^= 0xFF
        payloads["model"].data = bytes(data)

    assert "checksum" in spoil(federation, change)


def test_a_container_that_is_cut_is_refused_by_name(federation):
    def change(payloads):
        payloads["model"].data = payloads["model"].data[:5]

    assert "Codec 'bf16'" in spoil(federation, change, HALF)


def test_an_answer_without_the_runs_compression_is_refused_by_name(federation):
    def change(payloads):
        model = payloads["model"]
        payloads["model"] = Payload("model", Kind.MODEL, model.tensors)

    assert "is coded as 'raw', the run's configuration asks for 'ternary'" in spoil(federation, change)


def test_a_corrupt_message_down_is_refused_noted_and_told(federation):
    links = MemoryLink(federation.open_sites())
    loop = federation.start(config(wire=HALF), link=links)
    inner = links.ask

    def ask(node, parts, **options):
        if node == 2 and options["round"] == 1:
            envelope = decode(parts)
            envelope.payloads["model"].data = envelope.payloads["model"].data[:-1]
            parts = encode(envelope)
        return inner(node, parts, **options)

    links.ask = ask
    loop.round(1)
    code, sentence = loop.history[-1].missing["beta"]
    assert code == "payload"
    assert "Codec 'bf16'" in sentence
    [entry] = [e for e in read(links.sites["beta"].border.ledger.path) if e.decision == "refused"]
    assert (entry.direction, entry.part) == ("in", "message")


def test_training_that_diverged_is_refused_as_without_compression(federation, monkeypatch):
    links = MemoryLink(federation.open_sites())
    loop, site = federation.start(config(), link=links), links.sites["beta"]
    train = type(site._session.half).train

    def diverged(self, work, received, state):
        result = train(self, work, received, state)
        if work.ctx.site == "beta":
            next(iter(result.payloads[0].tensors.values())).fill_(math.nan)
        return result

    monkeypatch.setattr(type(site._session.half), "train", diverged)
    loop.round(1)
    code, sentence = loop.history[-1].missing["beta"]
    assert (code, "not finite" in sentence) == ("payload", True)
    refused = [entry for entry in read(site.border.ledger.path) if entry.decision == "refused"]
    assert {entry.part for entry in refused} >= {"model"}


def test_a_first_round_asked_again_gives_the_same_bits(federation):
    loop = federation.start(config(wire=MIXED))
    assert state_bytes(loop.round(1)) == state_bytes(loop.round(1))


def test_a_site_that_misses_a_round_goes_on_with_its_own_residual(federation):
    def lose(alias, round_, parts):
        return None if alias == "beta" and round_ == 2 else parts

    loop = federation.run(config(wire=MIXED), link=MemoryLink(federation.open_sites(), tamper=lose))
    assert loop.done == 3
    assert [list(entry.missing) for entry in loop.history] == [[], ["beta"], [], []]


def test_the_hooks_of_a_flower_strategy_speak_it_too(federation):
    settings = config(wire=MIXED).model_copy(update={"sites": federation.aliases})
    whole = federation.run(settings, home="a")
    grid, strategy = SitesGrid(federation.open_sites("b")), MethodStrategy(config=settings)
    arrays = ArrayRecord(strategy.initial())
    for number in (1, 2, 3):
        ids = grid.push_messages(list(strategy.configure_train(number, arrays, ConfigRecord(), grid)))
        arrays, _ = strategy.aggregate_train(number, reversed(grid.pull_messages(ids)))
    assert tensor_bytes(tensors_of(arrays)) == tensor_bytes(whole.server.model(whole.state))
