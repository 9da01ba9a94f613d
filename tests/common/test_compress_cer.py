"""CER on the way up, against a dense solver: what travels, what is kept, γ over the rounds, and the neutral values."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.codecs import CODECS
from common.codecs.legacy import legacy_size
from common.compress import Compression
from common.config import WireConfig
from common.errors import PayloadError
from common.legacy import legacy_of
from common.payload import Kind, Payload, PayloadSpec, State
from common.squeeze import Change, gamma_at, squeezed
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
    norm64,
    payloads,
    tensors,
    travel,
)

pytestmark = pytest.mark.slow  # compiles CER's kernels

FORMS = {"cer": "piecewise", "cer-bf16": "piecewise-bf16", "cer-stc": "piecewise-ternary"}
KINDS = tuple(FORMS)


def make(codec, **options):
    return Compression(WireConfig(uplink_codec=codec, **{"uplink_p": 0.25, **options}), LIKE, GROUPS)


def answer(ends, values, base, kept, specs=MODEL, *, round_=1, rounds=4, most=0.0):
    """One answer from end to end: what travelled, what the site kept, what the server has."""
    ctx = RoundContext("run", round_, rounds, 7, "alpha")
    going, kept = ends.up(payloads(values, specs[0].kind), specs, payloads(base), kept, ctx, most=most)
    came, _ = travel(going)
    return going["model"], kept, ends.taken(came, specs, payloads(base), who="alpha")["model"].tensors


def slow_cer(g, gamma):
    """The minimiser of ½‖u - g‖² + γ‖Λu‖₁ through its dual box, by projected gradients with a dense Λ."""
    g = np.asarray(g, dtype=np.float64)
    d = len(g)
    L = np.eye(d) - np.diag(np.ones(d - 1), 1)
    s, before, speed = np.zeros(d), np.zeros(d), 1.0
    for _ in range(20_000):  # accelerated: the dual's curvature is at most 4
        ahead = (1 + math.sqrt(1 + 4 * speed**2)) / 2
        y = s + (speed - 1) / ahead * (s - before)
        before, speed = s, ahead
        s = np.clip(y + 0.25 * L @ (g - L.T @ y), -gamma, gamma)
        if np.abs(s - before).max() < 1e-13:
            break
    return g - L.T @ s


def peak(g):
    return float(np.abs(np.cumsum(np.asarray(g, dtype=np.float64))).max())


def change_of(values, base, name):
    return (values[name] - base[name]).double().numpy().reshape(-1)


# ---- what travels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["relative", "absolute"])
@pytest.mark.parametrize("specs", [MODEL, UPDATE], ids=["model", "update"])
def test_cer_is_the_minimiser_of_each_tensors_change_in_row_major_order(specs, scale):
    base = tensors(1) if specs is MODEL else tensors(0, 0.0)
    values = tensors(2, 0.1, base)
    gamma = 0.1 if scale == "relative" else 0.05
    _, kept, taken = answer(make("cer", gamma=gamma, gamma_scale=scale), values, base, State(), specs)
    assert not kept.tensors
    for name in CODED:
        g = change_of(values, base, name)
        expected = slow_cer(g, gamma * peak(g) if scale == "relative" else gamma)
        got = (taken[name] - base[name]).double().numpy().reshape(-1)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert len(np.unique(np.round(expected, 9))) < len(g)  # γ is large enough to join some


def test_the_order_is_that_of_memory_and_no_tensor_touches_another():
    base, values = tensors(0, 0.0), tensors(2)
    ends = make("cer", gamma=0.2)
    whole = answer(ends, values, base, State())[2]
    turned = dict(values) | {"w": values["w"].T.contiguous().reshape(5, 4)}
    assert not torch.equal(answer(ends, turned, base, State())[2]["w"], whole["w"])
    alone = dict(values) | {"b": torch.zeros(7)}
    assert torch.equal(answer(ends, alone, base, State())[2]["w"], whole["w"])


@pytest.mark.parametrize(("codec", "form"), FORMS.items())
def test_the_codec_is_the_runs_and_its_bytes_are_what_the_server_adds(codec, form):
    base = tensors(1)
    values = tensors(2, 0.1, base)
    going, _, taken = answer(make(codec, gamma=0.1), values, base, State())
    assert (going.codec, going.names) == (form, frozenset(CODED))
    change = CODECS[form].decode(going.data, {name: LIKE[name] for name in CODED})
    for name in CODED:
        assert torch.equal(taken[name], base[name] + change[name])
        assert torch.equal(going.tensors[name], taken[name])
    for name in PLAIN:
        assert torch.equal(taken[name], values[name])


def test_bf16_levels_are_the_rounded_ones():
    base = tensors(0, 0.0)
    exact, half = (
        answer(make(codec, gamma=0.1), tensors(2), base, State())[2] for codec in ("cer", "cer-bf16")
    )
    for name in CODED:
        assert torch.equal(half[name], exact[name].bfloat16().float())
        assert not torch.equal(half[name], exact[name])


def test_cer_saves_bytes_the_more_the_larger_gamma():
    like = {"w": torch.zeros(100, 100)}
    values = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(1))}
    sizes = []
    for gamma in (0.0, 0.01, 0.1, 1.0):
        ends = Compression(WireConfig(uplink_codec="cer", gamma=gamma), like, GROUPS)
        ctx = RoundContext("run", 1, 4, 7)
        sizes.append(
            bytes_by_kind(travel(ends.up(payloads(values), MODEL, payloads(like), State(), ctx)[0])[1])[
                "model"
            ]
        )
    assert sizes == sorted(sizes, reverse=True)
    assert (
        40_000 < sizes[0] < 40_100
    )  # every value a run: four bytes each, and where the runs start costs nothing
    assert sizes[1] < sizes[0] / 2
    assert sizes[3] < 60  # zeros: one run


# ---- what is kept ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "feedback"), list(itertools.product(KINDS, ("stc", "all"))))
def test_over_rounds_it_is_the_written_recursion(codec, feedback):
    """A = D + E; U = CER(A); T = C(U); E = U - T (stc), A - T (all), or nothing."""
    ends, kept = make(codec, gamma=0.1, feedback=feedback), State()
    zero = tensors(0, 0.0)
    E = {name: np.zeros(LIKE[name].numel()) for name in CODED}
    for round_ in (1, 2, 3):
        values = tensors(20 + round_, 0.1)
        _, kept, taken = answer(ends, values, zero, kept, UPDATE, round_=round_)
        for name in CODED:
            A = values[name].double().numpy().reshape(-1) + E[name]
            U = slow_cer(A, 0.1 * peak(A))
            T = taken[name].double().numpy().reshape(-1)
            if (
                codec == "cer-stc"
            ):  # places are compared on what was sent: of values that are nearly equal either may go
                k = math.ceil(0.25 * len(A))
                assert np.count_nonzero(T) == k
                mu = np.sort(np.abs(U))[-k:].mean()
                np.testing.assert_allclose(np.abs(T[T != 0]), mu, rtol=1e-5)
                assert np.abs(U[T != 0]).min() >= np.sort(np.abs(U))[-k] - 1e-6
            else:
                np.testing.assert_allclose(T, U, atol=1e-6, rtol=2**-8 if codec == "cer-bf16" else 0)
            E[name] = A - T if feedback == "all" else U - T if codec == "cer-stc" else 0.0 * A
            left = kept.part("model").get(name, torch.zeros(len(A))).double().numpy().reshape(-1)
            np.testing.assert_allclose(left, E[name], atol=2e-6)


@pytest.mark.parametrize("codec", KINDS)
def test_with_all_fed_back_nothing_is_lost(codec):
    ends, kept, given_, sent = make(codec, gamma=0.3, feedback="all"), State(), 0.0, 0.0
    zero = tensors(0, 0.0)
    for round_ in (1, 2, 3, 4):
        values = tensors(round_, 0.1)
        _, kept, taken = answer(ends, values, zero, kept, UPDATE, round_=round_)
        given_, sent = given_ + values["w"].double(), sent + taken["w"].double()
    left = kept.part("model")["w"].double()
    assert torch.allclose(sent + left, given_, atol=1e-6)
    assert float(left.abs().sum()) > 0.1


def test_in_the_papers_way_what_cer_removes_is_gone():
    zero = tensors(0, 0.0)
    first, kept, taken = answer(make("cer-stc", gamma=1.0), tensors(1), zero, State(), UPDATE)
    assert not any(bool(value.any()) for value in kept.part("model").values())
    assert not any(bool(taken[name].any()) for name in CODED)
    assert isinstance(first, Coded)


@pytest.mark.parametrize(("codec", "kept_too"), [("bf16", True), ("stc", True)])
def test_all_feeds_back_rounding_too(codec, kept_too):
    zero = tensors(0, 0.0)
    values = tensors(1, 0.1)
    kept = answer(make(codec, feedback="all"), values, zero, State(), UPDATE)[1].part("model")
    plain = answer(make(codec), values, zero, State(), UPDATE)[1].part("model")
    sent = answer(make(codec), values, zero, State(), UPDATE)[2]
    for name in CODED:
        assert torch.equal(kept[name], values[name] - sent[name])
        assert bool(kept[name].any()) == kept_too
        assert (name in plain) == (codec == "stc")


# ---- neutral values --------------------------------------------------------------------------------------------------------


def test_without_gamma_cer_is_the_raw_change_to_the_bit():
    base = tensors(1)
    values = tensors(2, 0.1, base)
    values["w"][0, 0] = base["w"][0, 0]
    _, kept, taken = answer(make("cer", gamma=0.0), values, base, State())
    assert not kept.tensors
    for name in CODED:
        expected = base[name] + (values[name] - base[name])
        assert torch.equal(taken[name].view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("feedback", ["stc", "all"])
def test_without_gamma_cer_stc_is_stc_to_the_bit(feedback):
    ours, theirs, kept, other = (
        make("cer-stc", gamma=0.0, feedback=feedback), make("stc", feedback=feedback), State(), State()
    )  # fmt: skip
    for round_ in (1, 2, 3):
        base = tensors(round_)
        values = tensors(10 + round_, 0.1, base)
        _, kept, one = answer(ours, values, base, kept, round_=round_)
        _, other, two = answer(theirs, values, base, other, round_=round_)
        for name in CODED:
            assert torch.equal(one[name], two[name])
            assert torch.equal(kept.part("model")[name], other.part("model")[name])


# ---- γ over the rounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.8] * 5),
        ("linear", [0.8, 0.6, 0.4, 0.2, 0.0]),
        ("sqrt", [0.8 / math.sqrt(t) for t in range(1, 6)]),
    ],
)
def test_schedules(schedule, expected):
    config = WireConfig(gamma=0.8, gamma_schedule=schedule)
    assert [gamma_at(config, t, 5) for t in range(1, 6)] == pytest.approx(expected, abs=1e-15)
    assert gamma_at(config, 1, 1) == 0.8
    for wrong in (0, 6):
        with pytest.raises(ValueError, match="from 1 to 5"):
            gamma_at(config, wrong, 5)


def test_the_schedule_is_that_of_the_round_that_is_answered():
    base, values = tensors(0, 0.0), tensors(2)
    ends = make("cer", gamma=0.2, gamma_schedule="linear")
    first, last = (answer(ends, values, base, State(), round_=round_)[2] for round_ in (1, 4))
    same = answer(make("cer", gamma=0.2), values, base, State(), round_=3)[2]
    for name in CODED:
        assert torch.equal(last[name], values[name])
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], values[name])


# ---- bounds and refusals ---------------------------------------------------------------------------------------------------


@FEW
@given(
    seed=st.integers(0, 10**6), codec=st.sampled_from(KINDS), gamma=st.sampled_from([0.0, 1e-3, 0.1, 2.0]),
    feedback=st.sampled_from(["stc", "all"]), most=st.floats(1e-6, 10.0), scale=st.sampled_from([1e-3, 1.0, 30.0]),
)  # fmt: skip
def test_what_leaves_is_within_the_hospitals_bound(seed, codec, gamma, feedback, most, scale):
    zero = tensors(0, 0.0)
    kept = State().having("model", {name: tensors(seed + 1, scale)[name] for name in CODED})
    ends = make(codec, gamma=gamma, feedback=feedback)
    _, after, taken = answer(ends, tensors(seed, scale), zero, kept, most=most)
    assert norm64(taken, zero) <= most * (1 + 1e-12)
    # what was scaled away is not kept for later (with "all" A - T is at most twice as long as A)
    assert norm64(after.part("model"), zero) <= (2 if feedback == "all" else 1) * most * (1 + 1e-6)


def test_without_a_bound_on_the_way_gamma_is_relative_to_what_is_scaled():
    zero, values = tensors(0, 0.0), tensors(1)
    values |= {name: torch.zeros_like(values[name]) for name in PLAIN}
    free = answer(make("cer", gamma=0.1), values, zero, State())[2]
    half = answer(make("cer", gamma=0.1), values, zero, State(), most=norm64(values, zero) / 2)[2]
    for name in CODED:
        assert torch.allclose(half[name], free[name] / 2, atol=1e-6)


@pytest.mark.parametrize("codec", KINDS)
def test_values_that_cannot_be_summed_are_refused_by_name(codec):
    change = Change({"w": torch.tensor([1.0, math.inf])}, {}, {})
    with pytest.raises(PayloadError, match=r"Tensor 'w' cannot be compressed\. .*finite"):
        squeezed(change, WireConfig(uplink_codec=codec, gamma=0.1), 0.1)


@pytest.mark.parametrize("codec", KINDS)
def test_bytes_altered_on_the_way_are_refused_with_the_site(codec):
    ends = make(codec, gamma=0.1)
    ctx = RoundContext("run", 1, 4, 7, "alpha")
    going, _ = ends.up(payloads(tensors(2)), MODEL, payloads(tensors(1)), State(), ctx)
    came, _ = travel(going)
    came["model"].data = came["model"].data[:-9] + b"x" + came["model"].data[-8:]
    with pytest.raises(
        PayloadError, match=f"^alpha: payload 'model': Codec '{going['model'].codec}'.*checksum"
    ):
        ends.taken(came, MODEL, payloads(tensors(1)), who="alpha")


# ---- pFedNet's own measure -------------------------------------------------------------------------------------------------


def test_legacy_measure_of_what_travelled():
    base = tensors(1)
    values = tensors(2, 0.1, base)
    going, _, _ = answer(make("cer", gamma=0.2), values, base, State())
    came, _ = travel({"model": going})
    change = {name: (going.tensors[name] - base[name]) for name in CODED}
    found = legacy_of(came["model"])
    assert found.values == sum(LIKE[name].numel() for name in CODED)
    exact = CODECS["piecewise"].decode(going.data)
    assert found == legacy_size(exact)
    for name in CODED:
        assert torch.allclose(exact[name], change[name], atol=1e-6)
    plain = Payload("model", Kind.MODEL, values)
    assert legacy_of(plain) == legacy_size({name: values[name] for name in ("w", "b", "norm.running_var")})


def test_a_payload_of_no_model_travels_as_it_is():
    spec = PayloadSpec("model", Kind.MODEL, from_received=False)
    found = payloads(tensors(1))
    ctx = RoundContext("run", 1, 4, 7)
    assert make("cer").up(found, (spec,), payloads(tensors(2)), State(), ctx)[0]["model"] is found["model"]
