"""Every method with its payloads compressed: on real sites and the real round loop, through wire bytes."""

import hashlib
import math
import shutil

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord

from client.ledger import read
from client.site_config import Privacy
from common.config import WireConfig
from common.errors import BaseLostError, QuorumError
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
BOTH = WireConfig(
    uplink_codec="cer-stc",
    uplink_p=0.5,
    gamma=0.05,
    gamma_schedule="linear",
    downlink_codec="stc",
    downlink_p=0.5,
)
DOWN = WireConfig(downlink_codec="stc", downlink_p=0.3)
WAYS = {"stc": STC, "bf16": HALF, "cer-stc": BOTH}
UP_BYTES = {"stc": "ternary", "bf16": "bf16", "cer-stc": "piecewise-ternary"}
DOWN_BYTES = {"stc": {"raw"}, "bf16": {"bf16"}, "cer-stc": {"raw", "ternary"}}


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
    for way, specs, codecs in (
        ("up", half.uplink, {UP_BYTES[wire]}),
        ("down", half.downlink, {"raw"} if name == "local-only" and wire == "cer-stc" else DOWN_BYTES[wire]),
    ):
        models = {spec.name for spec in specs if is_model(spec)}
        travelled = heads(federation, way)
        assert {head.codec for head in travelled if head.name in models} == (codecs if models else set())
        assert {head.codec for head in travelled if head.name not in models} <= {"raw"}


@pytest.mark.parametrize("wire", [MIXED, BOTH], ids=["stc up, float16 down", "cer-stc up, stc down"])
@pytest.mark.parametrize("name", ALL)
def test_neither_a_resume_nor_the_order_of_replies_changes_a_bit(federation, name, wire):
    whole = federation.run(config(name, wire), home="whole")
    links = MemoryLink(federation.open_sites("cut"), backwards=True)
    cut = federation.start(config(name, wire), home="cut", link=links)
    cut.state = cut.round(1)
    cut._save(1)
    cut.round(2)  # answered but never closed: the sites are ahead, with residuals of a round that never was
    resumed = federation.start(config(name, wire), home="cut")
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


@pytest.mark.parametrize("wire", [MIXED, BOTH], ids=["stc up, float16 down", "cer-stc up, stc down"])
def test_the_hooks_of_a_flower_strategy_speak_it_too(federation, wire):
    settings = config(wire=wire).model_copy(update={"sites": federation.aliases})
    whole = federation.run(settings, home="a")
    grid, strategy = SitesGrid(federation.open_sites("b")), MethodStrategy(config=settings)
    arrays = ArrayRecord(strategy.initial())
    for number in (1, 2, 3):
        ids = grid.push_messages(list(strategy.configure_train(number, arrays, ConfigRecord(), grid)))
        arrays, _ = strategy.aggregate_train(number, reversed(grid.pull_messages(ids)))
    assert tensor_bytes(tensors_of(arrays)) == tensor_bytes(whole.server.model(whole.state))


# ---- the way down by stc: both ends hold a model -------------------------------------------------------------------------


def models_down(federation):
    """Return the codec of every model that came down, by round and site."""
    return {
        (round_, alias): head.codec
        for alias, round_, down, _ in federation.link.seen
        for head in read_header(down).payloads
        if head.name == "model"
    }


def test_the_first_model_comes_whole_and_then_changes_of_it(federation):
    federation.run(config(wire=DOWN))
    found = models_down(federation)
    assert {codec for (round_, _), codec in found.items() if round_ == 1} == {"raw"}
    assert {codec for (round_, _), codec in found.items() if round_ > 1} == {"ternary"}
    assert {round_ for round_, _ in found} == {1, 2, 3, 4}  # the closing evaluation is a way down too


def test_a_coordinator_that_is_killed_between_rounds_sends_and_gets_the_same_bytes(federation):
    def travelled(link, first):
        return [
            (alias, round_, down, {part: data for part, data in up.items() if part.startswith("p.")})
            for alias, round_, down, up in link.seen
            if round_ >= first
        ]

    whole = federation.run(config(wire=BOTH), home="whole")
    expected = travelled(federation.link, 3)
    cut = federation.start(config(wire=BOTH), home="cut")
    for number in (1, 2):
        cut.state = cut.round(number)
        cut._save(number)
    cut.round(3)
    again = federation.start(config(wire=BOTH), home="cut")  # new sites, too: all they know is on their disk
    assert again.resume()
    again.execute()
    assert travelled(federation.link, 3) == expected
    assert {codec for (round_, _), codec in models_down(federation).items() if round_ >= 3} == {"ternary"}
    assert state_bytes(again.state) == state_bytes(whole.state)
    ends = [loop.checkpoints.folder / "round-000003" / "state.safetensors" for loop in (whole, again)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize("retries", [0, 3])
def test_a_site_that_lost_its_state_is_sent_the_whole_model_in_the_same_round(federation, retries):
    settings = config(wire=DOWN)
    settings = settings.model_copy(update={"rounds": settings.rounds.model_copy(update={"retries": retries})})
    whole = federation.run(settings, home="whole")
    loop = federation.start(settings, home="lost")
    for number in (1, 2, 3):
        loop.state = loop.round(number)
        loop._save(number)
        if number == 1:
            shutil.rmtree(federation.link.sites["beta"]._session.states.folder)
    assert not any(log.missing for log in loop.history)
    assert state_bytes(loop.state) == state_bytes(whole.state)  # R is the same, whole or changed
    [retry] = [event for event in federation.events("lost") if event["event"] == "site.retry"]
    assert (retry["site"], retry["round"], retry["code"], retry["attempt"]) == ("beta", 2, "base", 1)
    assert "holds none; it needs the whole model" in retry["message"]
    sent = [(round_, head.codec) for alias, round_, down, _ in federation.link.seen if alias == "beta"
            for head in read_header(down).payloads if head.name == "model"]  # fmt: skip
    assert sent == [(1, "raw"), (2, "ternary"), (2, "raw"), (3, "ternary")]
    entries = list(read(federation.link.sites["beta"].border.ledger.path))
    refused = {entry.part: entry for entry in entries if entry.decision == "refused"}
    assert (refused["model"].round, refused["model"].direction) == (2, "in")
    assert refused["model"].reason.startswith("base: ")
    assert [e.decision for e in entries if e.part == "model" and e.round == 2] == [
        "refused",
        "received",
        "released",
    ]


def test_a_site_that_never_has_the_model_is_asked_once_more_and_then_named(federation, monkeypatch):
    links = MemoryLink(federation.open_sites())
    loop = federation.start(config(wire=DOWN), link=links)

    def lost(parts, kept):
        raise BaseLostError("beta: it holds none.")

    loop.state = loop.round(1)
    monkeypatch.setattr(links.sites["beta"].border, "receive", lost)
    loop.round(2)
    assert loop.history[-1].missing == {"beta": ("base", "beta: it holds none.")}
    assert sum(alias == "beta" and round_ == 2 for alias, round_, *_ in links.seen) == 2


def test_a_model_that_was_changed_at_the_site_is_noticed(federation):
    """A state that was restored from elsewhere is whole by its own checksums; the coordinator's tells it is another."""
    links = MemoryLink(federation.open_sites())
    loop = federation.start(config(wire=DOWN), link=links)
    loop.state = loop.round(1)
    states = links.sites["beta"]._session.states
    state = states.before(2)
    key = next(key for key in state.tensors if key.startswith("codec:@model/"))
    state.tensors[key].view(-1)[0].add_(1e-3)
    states.write(1, state)
    loop.round(2)
    assert not loop.history[-1].missing
    [retry] = [event for event in federation.events() if event["event"] == "site.retry"]
    assert (retry["site"], retry["code"]) == ("beta", "base")
    assert "with other values" in retry["message"]


def test_after_a_round_without_it_a_site_is_sent_the_whole_model(federation):
    def lose(alias, round_, parts):
        return None if alias == "beta" and round_ == 2 else parts

    federation.run(config(wire=BOTH), link=MemoryLink(federation.open_sites(), tamper=lose))
    found = {place: codec for place, codec in models_down(federation).items() if place[0] > 2}
    assert {place for place, codec in found.items() if codec == "raw"} == {(3, "beta")}


def test_a_resumed_coordinator_knows_who_was_not_there(federation):
    def lose(alias, round_, parts):
        return None if alias == "beta" and round_ == 2 else parts

    loop = federation.start(config(wire=DOWN), link=MemoryLink(federation.open_sites(), tamper=lose))
    for number in (1, 2):
        loop.state = loop.round(number)
        loop._save(number)
    again = federation.start(config(wire=DOWN))
    assert again.resume()
    again.round(3)
    assert models_down(federation) == {(3, "alpha"): "ternary", (3, "beta"): "raw", (3, "gamma"): "ternary"}


def test_ledger_and_bytes_of_a_change_are_those_that_travel(federation):
    loop = federation.start(config(wire=DOWN))
    loop.state = loop.round(1)
    loop.round(2)
    R = loop.downlink._streams["model", ""].R
    for alias, round_, down, _ in federation.link.seen:
        if round_ != 2:
            continue
        blob = down["p.model"]
        [entry] = [
            entry
            for entry in read(federation.link.sites[alias].border.ledger.path)
            if (entry.part, entry.round, entry.direction) == ("model", 2, "in")
        ]
        assert (entry.bytes, entry.sha256) == (len(blob), hashlib.sha256(blob).hexdigest())
        assert entry.shapes == {name: list(like.shape) for name, like in loop.template.items()}
        assert entry.norm == pytest.approx(l2_norm(R), rel=1e-12)
        [event] = [
            event
            for event in federation.events()
            if event["event"] == "bytes"
            and (event["site"], event["round"], event["direction"]) == (alias, 2, "down")
        ]
        assert (event["kinds"]["model"], event["total"]) == (len(blob), sum(map(len, down.values())))


def test_a_corrupt_change_down_is_refused_by_name(federation):
    links = MemoryLink(federation.open_sites())
    loop = federation.start(config(wire=DOWN), link=links)
    loop.state = loop.round(1)
    inner = links.ask

    def ask(node, parts, **options):
        if node == 2:
            envelope = decode(parts)
            data = bytearray(envelope.payloads["model"].data)
            data[len(data) // 2] ^= 1
            envelope.payloads["model"].data = bytes(data)
            parts = encode(envelope)
        return inner(node, parts, **options)

    links.ask = ask
    loop.round(2)
    code, sentence = loop.history[-1].missing["beta"]
    assert code == "payload"
    assert "Codec 'ternary'" in sentence


def test_without_stc_down_a_site_keeps_no_model_for_it_and_the_coordinator_none(federation):
    loop = federation.run(config(wire=STC))
    state = federation.link.sites["alpha"]._session.states.before(4)
    assert not any(key.startswith("codec:@") for key in (*state.tensors, *state.values))
    saved = loop.checkpoints.read(3)
    assert not any(key.startswith("wire:") for key in (*saved.tensors, *saved.values))
