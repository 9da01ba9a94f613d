"""The way down by STC: both ends hold R, against a slow oracle; who is sent what, what is lost, and what is refused."""

import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import CODECS
from common.compress import Compression
from common.config import WireConfig
from common.downlink import BASE_ROUND, BASE_SHA256, Downlink, digest, keep, received
from common.errors import BaseLostError, PayloadError, WardroundError
from common.payload import Kind, Payload, PayloadSpec, State
from common.store import read_state, write_state
from common.wire import Coded, bytes_by_kind
from common.work import RoundContext
from tests.common.test_compress import (
    CODED,
    FEW,
    GROUPS,
    LIKE,
    MODEL,
    PLAIN,
    UPDATE,
    payloads,
    slow_ternary,
    tensors,
    travel,
)

CODECS_DOWN = {"stc": "ternary", "stc-golomb": "ternary-golomb"}


def make(codec="stc", p=0.25, like=LIKE, up="raw"):
    return Downlink(
        Compression(
            WireConfig(downlink_codec=codec, downlink_p=p, uplink_codec=up, uplink_p=0.5), like, GROUPS
        )
    )


class End:
    """A site's end: what it kept, and what it works with."""

    def __init__(self, down, specs=MODEL):
        self.compression, self.specs, self.kept, self.seen = down.compression, specs, State(), None

    def take(self, sent, number, *, note=True):
        came, parts = travel(sent)
        self.seen = received(came, lambda: self.kept)
        if note:
            self.kept = keep(self.compression, self.kept, self.seen, self.specs, number)
        return parts


def one_round(down, ends, model, number, *, stream="", answer=True):
    """Send a model to every end; returns what travelled, by site."""
    found = {}
    for site, end in ends.items():
        found[site] = down.sending(payloads(model), MODEL, number, site, stream)["model"]
        end.take({"model": found[site]}, number)
        if answer:
            down.arrived(number, site)
    down.over()
    return found


def is_change(payload):
    return isinstance(payload, Coded)


# ---- the recursion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS_DOWN)
def test_it_is_the_papers_recursion_and_both_ends_have_the_same_bits(codec):
    down = make(codec, p=0.2)
    end, slow, size = End(down), {}, {}
    for number in range(1, 7):
        W = tensors(30 + number)
        sent = one_round(down, {"alpha": end}, W, number)["alpha"]
        assert is_change(sent) == (number > 1)
        for name in CODED:
            flat = W[name].double().numpy().reshape(-1)
            R = slow.get(name)
            slow[name] = flat if R is None else R + slow_ternary(flat - R, 0.2)
            got = end.seen["model"].tensors[name]
            np.testing.assert_allclose(got.double().numpy().reshape(-1), slow[name], atol=3e-6)
            assert torch.equal(sent.tensors[name], got)
            if number > 1:
                size[name] = np.count_nonzero(CODECS[sent.codec].decode(sent.data)[name].numpy())
                assert size[name] == int(np.ceil(0.2 * flat.size))
        for name in PLAIN:
            assert torch.equal(end.seen["model"].tensors[name], W[name])
        assert end.seen["model"].meta == {}
        assert sent.codec == CODECS_DOWN[codec] if number > 1 else True


def test_what_is_left_out_is_sent_later_a_model_that_stands_still_is_reached():
    down = make(p=0.1)
    end, W = End(down), tensors(1)
    one_round(down, {"alpha": end}, tensors(2), 1)
    apart = []
    for number in range(2, 200):
        one_round(down, {"alpha": end}, W, number)
        apart.append(max(float((W[name] - end.seen["model"].tensors[name]).abs().max()) for name in CODED))
    assert apart[0] > 1
    assert apart[-1] < 1e-3


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6), p=st.floats(0.01, 1.0), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    absent=st.lists(st.booleans(), min_size=6, max_size=6),
)  # fmt: skip
def test_whoever_takes_part_in_whatever_rounds_has_the_same_bits(seed, p, scale, absent):
    down = make(p=p)
    always, sometimes = End(down), End(down)
    for number, away in enumerate(absent, start=1):
        ends = {"alpha": always} if away else {"alpha": always, "beta": sometimes}
        before = number > 1 and not away and not absent[number - 2]
        sent = one_round(down, ends, tensors(seed + number, scale), number)
        assert is_change(sent["alpha"]) == (number > 1)
        if not away:
            assert is_change(sent["beta"]) == before
            for name in CODED:
                one, two = (end.seen["model"].tensors[name].view(torch.int32) for end in (always, sometimes))
                assert torch.equal(one, two)


def test_a_change_is_small_and_a_model_is_as_large_as_raw():
    like = {"w": torch.zeros(100, 100)}
    down = make(p=0.01, like=like)
    end = End(down)
    sizes = []
    for number in (1, 2):
        W = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(number))}
        sent = down.sending(payloads(W), MODEL, number, "alpha", "")
        sizes.append(bytes_by_kind(end.take(sent, number))["model"])
        down.arrived(number, "alpha")
    assert sizes[0] == 40_000
    assert sizes[1] < 200


# ---- who is sent what ------------------------------------------------------------------------------------------------------


def test_only_who_answered_in_the_round_before_is_sent_a_change():
    down = make()
    ends = {"alpha": End(down), "beta": End(down)}
    one_round(down, ends, tensors(1), 1)
    silent = {"beta": ends["beta"]}
    one_round(down, {"alpha": ends["alpha"]}, tensors(2), 2)
    one_round(down, silent, tensors(2), 2, answer=False)  # its answer was lost: it has R_2, nobody knows
    sent = one_round(down, {**ends, "gamma": End(down)}, tensors(3), 3)
    assert {site: is_change(payload) for site, payload in sent.items()} == {
        "alpha": True,
        "beta": False,
        "gamma": False,
    }
    whole = sent["beta"].tensors
    assert not torch.equal(whole["w"], tensors(3)["w"])  # R, not W: all sites train from the same model
    assert all(torch.equal(whole[name], ends["alpha"].seen["model"].tensors[name]) for name in CODED)
    sent = one_round(down, ends, tensors(4), 4)
    assert all(map(is_change, sent.values()))


def test_asked_twice_in_a_round_a_site_is_sent_the_same_bytes():
    down = make()
    one_round(down, {"alpha": End(down)}, tensors(1), 1)
    first, again = (travel(down.sending(payloads(tensors(2)), MODEL, 2, "alpha", ""))[1] for _ in range(2))
    assert first == again


def test_an_answer_to_a_former_round_is_no_word_on_this_one():
    down = make()
    down.sending(payloads(tensors(1)), MODEL, 1, "alpha", "")
    down.arrived(2, "alpha")
    assert not is_change(down.sending(payloads(tensors(2)), MODEL, 2, "alpha", "")["model"])
    down.arrived(2, "alpha")
    down.arrived(2, "never-asked")
    assert is_change(down.sending(payloads(tensors(3)), MODEL, 3, "alpha", "")["model"])


def test_a_site_that_says_it_lost_its_model_is_sent_it_whole():
    down = make()
    end = End(down)
    one_round(down, {"alpha": end}, tensors(1), 1)
    end.kept = State()
    with pytest.raises(BaseLostError, match="change of the model of round 1, and the site holds none"):
        end.take(down.sending(payloads(tensors(2)), MODEL, 2, "alpha", ""), 2)
    down.lost("alpha")
    sent = down.sending(payloads(tensors(2)), MODEL, 2, "alpha", "")
    assert not is_change(sent["model"])
    end.take(sent, 2)
    down.arrived(2, "alpha")
    assert is_change(one_round(down, {"alpha": end}, tensors(3), 3)["alpha"])


def test_streams_are_models_of_their_own():
    down = make()
    ends = {site: End(down) for site in ("alpha", "beta")}
    for number in (1, 2, 3):
        for place, (site, end) in enumerate(ends.items()):
            end.take(down.sending(payloads(tensors(10 * place + number)), MODEL, number, site, site), number)
            down.arrived(number, site)
        down.over()
    alone = make()
    one = {"beta": End(alone)}
    for number in (1, 2, 3):
        one_round(alone, one, tensors(10 + number), number)
    for name in CODED:
        left, right, other = (
            end.seen["model"].tensors[name] for end in (ends["beta"], one["beta"], ends["alpha"])
        )
        assert torch.equal(left, right)
        assert not torch.equal(left, other)


def test_another_model_in_one_stream_is_refused_not_sent_wrongly():
    down = make()
    down.sending(payloads(tensors(1)), MODEL, 1, "alpha", "")
    down.sending(payloads(tensors(1)), MODEL, 1, "beta", "")  # equal, though not the same tensors
    with pytest.raises(PayloadError, match=r"Round 1: the method sends beta another 'model'.*stream"):
        down.sending(payloads(tensors(2)), MODEL, 1, "beta", "")


@pytest.mark.parametrize(
    "spec",
    [PayloadSpec("model", Kind.MODEL, like_model=False), PayloadSpec("model", Kind.FISHER_SKETCH), *UPDATE],
)
def test_what_is_no_model_travels_as_it_is(spec):
    down = make()
    found = {"model": Payload("model", spec.kind, tensors(1))}
    for number in (1, 2):
        assert down.sending(found, (spec,), number, "alpha", "")["model"] is found["model"]
        down.arrived(number, "alpha")
    assert down.state() == State()
    assert keep(down.compression, State(), found, (spec,), 1) == State()


def test_a_payload_that_does_not_come_in_a_round_keeps_its_r():
    down = make()
    end = End(down)
    one_round(down, {"alpha": end}, tensors(1), 1)
    assert down.sending({}, MODEL, 2, "alpha", "") == {}
    end.take({}, 2)
    down.arrived(2, "alpha")
    sent = one_round(down, {"alpha": end}, tensors(3), 3)["alpha"]
    assert sent.meta[BASE_ROUND] == 1
    assert is_change(sent)


@pytest.mark.parametrize("codec", ["raw", "bf16"])
def test_other_ways_down_hold_nothing(codec):
    down = make(codec)
    sent = down.sending(payloads(tensors(1)), MODEL, 1, "alpha", "")
    down.arrived(1, "alpha")
    assert sent["model"].codec == "bf16" if codec == "bf16" else sent["model"].tensors.keys() == LIKE.keys()
    assert down.state() == State()
    assert keep(down.compression, State(), received(travel(sent)[0]), MODEL, 1) == State()


# ---- the way up counts from W ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", ["raw", "bf16", "stc"])
def test_a_sites_change_counts_from_w_not_from_r(up):
    down = make(p=0.1, up=up)
    ends, end = down.compression, End(down)
    one_round(down, {"alpha": end}, tensors(1), 1)
    W = tensors(2)
    end.take(down.sending(payloads(W), MODEL, 2, "alpha", ""), 2)
    R = end.seen["model"].tensors
    w = {name: value + 0.125 if name in CODED else value for name, value in R.items()}
    going, _ = ends.up(payloads(w), MODEL, end.seen, State(), RoundContext("run", 2, 3, 7, "alpha"))
    taken = ends.taken(
        travel(going)[0], MODEL, payloads(W), who="alpha", reached=down.reached(2, "alpha", "")
    )
    for name in CODED:
        change = (taken["model"].tensors[name] - W[name]).reshape(-1)
        few = int(np.ceil(0.5 * change.numel())) if up == "stc" else change.numel()
        assert int((change.abs() > 0.1).sum()) == few
        assert torch.allclose(change[change.abs() > 0.01], torch.tensor(0.125), atol=1e-5)
        assert not torch.allclose(R[name], W[name], atol=0.1)


# ---- the coordinator's checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_restored_from_its_state_it_sends_the_same_bytes(tmp_path, stop):
    def rounds(down, ends, first, last):
        return [
            [travel({"model": sent})[1] for sent in one_round(down, ends, tensors(number), number).values()]
            for number in range(first, last + 1)
        ]

    whole, ends = make(), {}
    ends = {site: End(whole) for site in ("alpha", "beta")}
    expected = rounds(whole, ends, 1, 5)
    cut = make()
    ends = {site: End(cut) for site in ("alpha", "beta")}
    rounds(cut, ends, 1, stop)
    write_state(tmp_path / "state", cut.state())
    kept = {site: end.kept for site, end in ends.items()}
    one_round(cut, ends, tensors(stop + 1), stop + 1)  # answered, never closed
    again = make()
    again.restore(read_state(tmp_path / "state"))
    for site, end in ends.items():
        end.kept = kept[site]  # what `SiteStates.before` finds
    assert rounds(again, ends, stop + 1, 5) == expected[stop:]
    assert again.state().values == whole.state().values


def test_a_round_of_the_past_begins_anew():
    down = make()
    end = End(down)
    one_round(down, {"alpha": end}, tensors(1), 1)
    one_round(down, {"alpha": end}, tensors(2), 5)
    sent = down.sending(payloads(tensors(3)), MODEL, 2, "alpha", "")["model"]
    assert not is_change(sent)
    assert all(torch.equal(sent.tensors[name], tensors(3)[name]) for name in CODED)


@pytest.mark.parametrize(
    "note",
    ["{", "[]", '{"streams": 3}', '{"streams": [["model"]], "holds": {}}', '{"streams": [], "holds": 1}'],
)
def test_a_spoilt_note_of_a_checkpoint_is_refused(note):
    with pytest.raises(PayloadError, match="cannot be read"):
        make().restore(State(values={"downlink": note}))


def test_a_checkpoint_names_no_more_than_needed():
    down = make()
    one_round(down, {"alpha": End(down)}, tensors(1), 1)
    state = down.state()
    note = json.loads(state.values["downlink"])
    assert note["holds"] == {"alpha": {"model": 1}}
    assert note["streams"] == [["model", "", 1, digest({name: tensors(1)[name] for name in CODED})]]
    assert {name.partition("/")[2] for name in state.tensors} == set(CODED)  # one model, once


# ---- what is refused -------------------------------------------------------------------------------------------------------


def second(down=None):
    """A change of round 2, as it came, and the site's end before it."""
    down = down or make()
    end = End(down)
    one_round(down, {"alpha": end}, tensors(1), 1)
    return travel(down.sending(payloads(tensors(2)), MODEL, 2, "alpha", ""))[0], end


def test_a_wrong_base_is_never_changed_silently():
    came, end = second()
    for spoil in (
        lambda kept: kept.tensors["@model/w"].view(-1)[0].add_(1e-6),
        lambda kept: kept.tensors["@model/b"].view(torch.int32)[0].bitwise_xor_(1),
        lambda kept: kept.tensors.pop("@model/b"),
        lambda kept: kept.values.update({"@model": 3}),
        lambda kept: kept.values.pop("@model"),
    ):
        kept = State({name: value.clone() for name, value in end.kept.tensors.items()}, dict(end.kept.values))
        spoil(kept)
        with pytest.raises(BaseLostError, match="needs the whole model") as caught:
            received(came, lambda kept=kept: kept)
        assert (caught.value.code, isinstance(caught.value, WardroundError)) == ("base", True)
    assert "model" in received(came, lambda: end.kept)


@pytest.mark.parametrize("note", [BASE_ROUND, BASE_SHA256])
def test_a_change_without_its_notes_is_not_used(note):
    came, end = second()
    del came["model"].meta[note]
    with pytest.raises(BaseLostError):
        received(came, lambda: end.kept)


def test_what_does_not_need_it_does_not_read_the_sites_state():
    def fail():
        raise AssertionError("read")

    down = make()
    first = down.sending(payloads(tensors(1)), MODEL, 1, "alpha", "")
    assert "model" in received(travel(first)[0], fail)
    with pytest.raises(AssertionError, match="read"):
        received(second()[0], fail)


def test_a_tensor_coded_and_as_it_is_is_refused():
    came, end = second()
    came["model"].tensors["w"] = LIKE["w"]
    with pytest.raises(PayloadError, match="coordinator: payload 'model' has tensor 'w' coded and as it is"):
        received(came, lambda: end.kept)


def test_a_model_that_is_not_finite_is_refused_before_it_is_sent():
    down = make()
    one_round(down, {"alpha": End(down)}, tensors(1), 1)
    bad = tensors(2)
    bad["b"][3] = float("nan")
    before = digest(down._streams["model", ""].R)
    with pytest.raises(PayloadError, match=r"Payload 'model' cannot be compressed: tensor 'b'"):
        down.sending(payloads(bad), MODEL, 2, "alpha", "")
    assert digest(down._streams["model", ""].R) == before


@FEW
@given(st.data(), st.sampled_from(sorted(CODECS_DOWN)))
def test_forged_bytes_give_a_payload_error_or_a_model_of_the_right_shapes(data, codec):
    came, end = second(make(codec))
    before = came["model"].data[:-4]
    body = bytearray(before)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    right = data.draw(st.booleans())
    came["model"].data = bytes(body) + (
        zlib.crc32(body).to_bytes(4, "little") if right else came["model"].data[-4:]
    )
    message = ""
    try:
        values = received(came, lambda: end.kept)["model"].tensors
    except PayloadError as error:  # nothing else may come of it
        message = str(error)
    if message:
        assert message.startswith(f"coordinator: payload 'model': Codec '{CODECS_DOWN[codec]}'")
        return
    assert {name: (value.shape, value.dtype) for name, value in values.items()} == {
        name: (value.shape, value.dtype) for name, value in LIKE.items()
    }
    assert right or bytes(body) == before  # without a right checksum only what was not altered is taken
