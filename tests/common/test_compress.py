"""Compression of what travels, against a slow oracle: error feedback, bounds, what stays as it is, and what is refused."""

import contextlib
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import CODECS
from common.compress import Compression
from common.config import RunConfig, WireConfig
from common.downlink import Downlink, received
from common.errors import ConfigError, PayloadError
from common.method import MethodParams
from common.payload import Kind, Payload, PayloadSpec, State
from common.wire import ROUND, Coded, Envelope, bytes_by_kind, decode, encode
from common.work import Groups, RoundContext

LIKE = {
    "w": torch.zeros(5, 4),
    "b": torch.zeros(7),
    "norm.running_var": torch.zeros(3),
    "count": torch.zeros((), dtype=torch.int64),
    "double": torch.zeros(2, dtype=torch.float64),
}
CODED, PLAIN = ("w", "b"), ("norm.running_var", "count", "double")
GROUPS = Groups({"buffers": ("norm.running_var", "count")})
MODEL = (PayloadSpec("model", Kind.MODEL),)
UPDATE = (PayloadSpec("model", Kind.UPDATE),)
AT = RoundContext("run", 1, 3, 7, "alpha")
BOTH_WAYS = ("stc", "stc-golomb", "bf16", "float16")
FEW = settings(max_examples=40, deadline=None)


def make(up="raw", down="raw", p=0.25, like=LIKE):
    return Compression(WireConfig(uplink_codec=up, downlink_codec=down, uplink_p=p), like, GROUPS)


def tensors(seed, scale=1.0, base=None):
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, like in LIKE.items():
        value = torch.randn(like.shape, generator=rng, dtype=torch.float64) * scale
        if not like.dtype.is_floating_point:
            value = torch.tensor(seed)
        value = value.to(like.dtype)
        found[name] = value + base[name] if base is not None and like.dtype.is_floating_point else value
    return found


def payloads(values, kind=Kind.MODEL, **meta):
    return {"model": Payload("model", kind, values, meta)}


def travel(found):
    """Through wire bytes; returns what is there at the other end, and the message."""
    parts = encode(Envelope("run", 1, ROUND, "alpha", payloads=found))
    return decode(parts).payloads, parts


def answer(ends, values, base, kept, specs=MODEL, most=0.0, sent=None):
    """One answer from end to end: what the site kept, what the server has."""
    kind = specs[0].kind
    going, kept = ends.up(payloads(values, kind), specs, payloads(base), kept, AT, most=most)
    came, _ = travel(going)
    reached = Downlink(ends).reached(1, "alpha", "")
    return going, kept, ends.taken(came, specs, payloads(sent or base), who="alpha", reached=reached)


# ---- as it is --------------------------------------------------------------------------------------------------------


def test_raw_changes_nothing():
    ends, found, kept = make(), payloads(tensors(1)), State()
    assert ends.down(found, MODEL) is found
    assert ends.up(found, MODEL, payloads(tensors(2)), kept, AT) == (found, kept)
    assert ends.taken(found, MODEL, payloads(tensors(2)), who="alpha")["model"] is found["model"]
    assert received(found)["model"] is found["model"]


@pytest.mark.parametrize("codec", BOTH_WAYS)
def test_buffers_and_other_dtypes_travel_to_the_bit(codec):
    base = tensors(1)
    values = tensors(2, 0.1, base)
    values["norm.running_var"] = torch.tensor([1e-7, 1e9, 3e-30])
    _, _, taken = answer(make(codec), values, base, State())
    for name in PLAIN:
        assert torch.equal(taken["model"].tensors[name], values[name])
        assert taken["model"].tensors[name].dtype == LIKE[name].dtype
    assert list(taken["model"].tensors) == list(LIKE)


@pytest.mark.parametrize(
    "spec",
    [
        PayloadSpec("model", Kind.MODEL, like_model=False),
        PayloadSpec("model", Kind.FISHER_SKETCH),
        PayloadSpec("other", Kind.MODEL),
    ],
)
def test_other_payloads_travel_as_they_are(spec):
    ends = make("stc", "bf16")
    found = {spec.name: Payload(spec.name, spec.kind, tensors(1))}
    going, kept = ends.up(found, (spec,), payloads(tensors(2)), State(), AT)
    assert going[spec.name] is found[spec.name]
    assert not kept.tensors
    down = ends.down(found, (spec,))
    assert (down[spec.name] is found[spec.name]) == (spec.name == "model")


def test_a_network_without_float32_travels_as_it_is():
    ends = make("stc", "bf16", like={"double": LIKE["double"]})
    found = payloads({"double": torch.ones(2, dtype=torch.float64)})
    assert ends.down(found, MODEL)["model"] is found["model"]
    assert ends.up(found, MODEL, found, State(), AT)[0]["model"] is found["model"]


# ---- sparse ternary, with error feedback -------------------------------------------------------------------------------


def slow_ternary(values, p):
    """Algorithm 1 of STC, one value at a time, in float64: k largest magnitudes, the first of equal ones."""
    flat = [float(value) for value in values.reshape(-1)]
    k = min(math.ceil(round(p * len(flat), 9)), sum(value != 0 for value in flat))
    order = sorted(range(len(flat)), key=lambda place: (-abs(flat[place]), place))[:k]
    mu = float(np.float32(sum(abs(flat[place]) for place in order) / k)) if k else 0.0
    return np.array([math.copysign(mu, flat[place]) if place in order else 0.0 for place in range(len(flat))])


@pytest.mark.parametrize("codec", ["stc", "stc-golomb"])
@pytest.mark.parametrize("specs", [MODEL, UPDATE], ids=["model", "update"])
def test_stc_is_the_papers_recursion_over_rounds(codec, specs):
    ends, kept = make(codec, p=0.2), State()
    left = {name: np.zeros(LIKE[name].numel()) for name in CODED}
    for round_ in range(5):
        base = tensors(10 + round_)
        values = tensors(20 + round_, 0.1, base if specs is MODEL else None)
        _, kept, taken = answer(ends, values, base, kept, specs)
        for name in CODED:
            start = base[name] if specs is MODEL else torch.zeros_like(base[name])
            A = (values[name] - start).double().numpy().reshape(-1) + left[name]
            T = slow_ternary(A, 0.2)
            left[name] = A - T
            got = (taken["model"].tensors[name].double() - start.double()).numpy().reshape(-1)
            np.testing.assert_allclose(got, T, atol=3e-7)
            np.testing.assert_allclose(
                kept.part("model")[name].double().numpy().reshape(-1), left[name], atol=1e-6
            )
            assert np.count_nonzero(T) == math.ceil(0.2 * LIKE[name].numel())


def test_nothing_is_lost_what_is_not_sent_is_kept():
    ends, kept, sent, given_ = make("stc", p=0.1), State(), 0.0, 0.0
    zero = tensors(0, 0.0)
    for round_ in range(8):
        values = tensors(round_, 0.1)
        _, kept, taken = answer(ends, values, zero, kept, UPDATE)
        given_ = given_ + values["w"].double()
        sent = sent + taken["model"].tensors["w"].double()
    assert torch.allclose(sent + kept.part("model")["w"].double(), given_, atol=1e-6)
    assert (
        float(kept.part("model")["w"].abs().sum()) > 0.1
    )  # the test would show a residual that is forgotten


def test_each_payload_has_a_residual_of_its_own_and_keeps_it_when_it_does_not_come():
    specs = (*UPDATE, PayloadSpec("second", Kind.UPDATE, optional=True))
    both = {name: Payload(name, Kind.UPDATE, tensors(seed)) for seed, name in enumerate(("model", "second"))}
    ends = make("stc", p=0.1)
    _, kept = ends.up(both, specs, {}, State(), AT)
    _, alone = ends.up({"second": both["second"]}, specs[1:], {}, State(), AT)
    assert torch.equal(kept.part("second")["w"], alone.part("second")["w"])
    assert not torch.equal(kept.part("model")["w"], kept.part("second")["w"])
    going, after = ends.up({"model": both["model"]}, specs, {}, kept, AT)
    assert set(going) == {"model"}
    assert torch.equal(after.part("second")["w"], kept.part("second")["w"])
    assert not torch.equal(after.part("model")["w"], kept.part("model")["w"])


# ---- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_up_in_half_precision_rounds_the_change_not_the_model(codec, dtype):
    base = tensors(1)
    values = tensors(2, 1e-4, base)
    going, kept, taken = answer(make(codec), values, base, State())
    assert not kept.tensors
    for name in CODED:
        change = (values[name] - base[name]).to(dtype).float()
        assert torch.equal(taken["model"].tensors[name], base[name] + change)
        assert torch.equal(going["model"].tensors[name], taken["model"].tensors[name])
        assert not torch.equal(taken["model"].tensors[name], base[name])


@pytest.mark.parametrize(("codec", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_down_in_half_precision(codec, dtype):
    ends, model = make(down=codec), tensors(1)
    came, parts = travel(ends.down(payloads(model, note=0.5), MODEL))
    seen = received(came)["model"]
    assert seen.meta == {"note": 0.5}
    for name in CODED:
        assert torch.equal(seen.tensors[name], model[name].to(dtype).float())
        assert not torch.equal(seen.tensors[name], model[name])
    for name in PLAIN:
        assert torch.equal(seen.tensors[name], model[name])
    assert bytes_by_kind(parts)["model"] == len(parts["p.model"])


@pytest.mark.parametrize("up", ["raw", "bf16", "stc"])
def test_updates_smaller_than_a_step_of_the_way_down_are_not_lost(up):
    """From 1, bfloat16's next values are 1 ± 2^-7: without the server's own W the model would stand still for ever."""
    ends, kept = make(up, "bf16", p=1.0), State()
    model = {name: torch.ones_like(value) for name, value in LIKE.items()}
    step = 2.0**-12
    for _ in range(64):
        came, _ = travel(ends.down(payloads(model), MODEL))
        seen = received(came)["model"].tensors
        values = {name: value + step if name in CODED else value.clone() for name, value in seen.items()}
        _, kept, taken = answer(ends, values, seen, kept, sent=model)
        model = taken["model"].tensors
    for name in CODED:
        assert torch.allclose(model[name], torch.tensor(1 + 64 * step), rtol=1e-6)


def test_values_beyond_the_half_are_refused_by_name():
    large = tensors(1)
    large["b"][3] = 1e5
    with pytest.raises(PayloadError, match=r"Payload 'model'.*tensor 'b'.*65504"):
        make(down="float16").down(payloads(large), MODEL)
    for most in (0.0, 1e6):
        with pytest.raises(
            PayloadError, match=r"Tensor 'b' cannot be compressed.*beyond the range of float16"
        ):
            make("float16").up(payloads(large), MODEL, payloads(tensors(2)), State(), AT, most=most)


# ---- the hospital's bound ----------------------------------------------------------------------------------------------


def norm64(values, base):
    total = [
        float(difference) ** 2
        for name, value in values.items()
        if value.is_floating_point()
        for difference in (value.double() - base[name].double()).reshape(-1)
    ]
    return math.sqrt(math.fsum(total))


@FEW
@given(
    seed=st.integers(0, 10**6), codec=st.sampled_from(BOTH_WAYS), p=st.floats(0.01, 1.0), most=st.floats(1e-6, 10.0),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)  # fmt: skip
def test_what_leaves_is_within_the_bound_whatever_the_codec_rounds(seed, codec, p, most, scale):
    zero = tensors(0, 0.0)  # at zero the server's W + T has no rounding of its own: T itself is measured
    kept = State().having("model", {name: tensors(seed + 1, scale)[name] for name in CODED})
    _, after, taken = answer(
        make(codec, p=p), tensors(seed, scale), zero, kept if "stc" in codec else State(), most=most
    )
    assert norm64(taken["model"].tensors, zero) <= most * (1 + 1e-12)
    assert norm64(after.part("model"), zero) <= most * (
        1 + 1e-6
    )  # what was scaled away is not kept for later


def test_within_the_bound_nothing_is_scaled():
    base = tensors(1)
    values = tensors(2, 0.1, base)
    free = answer(make("stc"), values, base, State())
    bound = answer(make("stc"), values, base, State(), most=1e3)
    for name in LIKE:
        assert torch.equal(free[2]["model"].tensors[name], bound[2]["model"].tensors[name])


def test_a_bound_uses_nearly_all_of_itself():
    zero = tensors(0, 0.0)
    _, _, taken = answer(make("bf16"), tensors(1), zero, State(), most=0.5)
    assert 0.495 < norm64(taken["model"].tensors, zero) <= 0.5


# ---- what is refused ---------------------------------------------------------------------------------------------------


def coming(codec="stc"):
    going, _ = make(codec).up(payloads(tensors(2)), MODEL, payloads(tensors(1)), State(), AT)
    return travel(going)[0]


def taken(found, codec="stc"):
    return make(codec).taken(found, MODEL, payloads(tensors(1)), who="alpha")


@pytest.mark.parametrize(
    ("sent", "asked"), [("stc", "raw"), ("stc", "bf16"), ("bf16", "stc"), ("raw", "stc"), ("raw", "float16")]
)
def test_another_codec_than_the_runs_is_refused_with_both_names(sent, asked):
    with pytest.raises(
        PayloadError, match=r"^alpha: payload 'model' is coded as '.*configuration asks for"
    ) as caught:
        taken(coming(sent), asked)
    assert caught.value.site == "alpha"
    assert {"stc": "ternary"}.get(sent, sent) in str(caught.value)
    assert {"stc": "ternary"}.get(asked, asked) in str(caught.value)


def test_a_payload_that_nobody_promised_is_refused_when_coded():
    found = coming()
    with pytest.raises(PayloadError, match="alpha: payload 'model' is coded as 'ternary'"):
        make("stc").taken(found, (), payloads(tensors(1)), who="alpha")


def flipped(data):
    return data[:-10] + bytes([data[-10] ^ 1]) + data[-9:]


OTHER = {"w": torch.zeros(4, 5), "b": torch.zeros(7)}
HUGE = {"w": torch.zeros(1 << 24), "b": torch.zeros(7)}
BAD = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "flipped": flipped,
    "more": lambda data: data + b"\0",
    "no container": lambda data: b"x" * len(data),
    "another codec": lambda data: CODECS["bf16"].encode({name: LIKE[name] for name in CODED}),
    "another shape": lambda data: CODECS["ternary"].encode(OTHER),
    "a tensor less": lambda data: CODECS["ternary"].encode({"w": LIKE["w"]}),
    "few bytes for much memory": lambda data: CODECS["ternary"].encode(HUGE),
}


@pytest.mark.parametrize("name", BAD)
def test_bytes_that_are_not_of_the_codec_are_refused_with_the_site(name):
    found = coming()
    found["model"].data = BAD[name](found["model"].data)
    with pytest.raises(PayloadError, match=r"^alpha: payload 'model': Codec 'ternary'") as caught:
        taken(found)
    assert caught.value.site == "alpha"


@FEW
@given(st.data(), st.sampled_from(BOTH_WAYS))
def test_forged_bytes_give_a_payload_error_or_a_model_of_the_right_shapes(data, codec):
    found = coming(codec)
    body = bytearray(found["model"].data[:-4])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    found["model"].data = bytes(body) + zlib.crc32(body).to_bytes(
        4, "little"
    )  # the checksum is right: it is no accident
    with contextlib.suppress(PayloadError):  # nothing else may come of it
        values = taken(found, codec)["model"].tensors
        assert {name: (value.shape, value.dtype) for name, value in values.items()} == {
            name: (value.shape, value.dtype) for name, value in LIKE.items()
        }


def test_a_tensor_coded_and_as_it_is_is_refused():
    found = coming()
    found["model"].tensors["w"] = LIKE["w"]
    with pytest.raises(PayloadError, match="alpha: payload 'model' has tensor 'w' coded and as it is"):
        taken(found)


def test_down_comes_only_what_cannot_ask_for_much_memory():
    with pytest.raises(PayloadError, match="coded as 'piecewise-ternary', which does not come down"):
        received({"model": Coded("model", Kind.MODEL, codec="piecewise-ternary", data=b"")})
    with pytest.raises(PayloadError, match="coordinator: payload 'model': Codec 'bf16'"):
        received({"model": Coded("model", Kind.MODEL, codec="bf16", data=b"nothing")})
    both = Coded(
        "model", Kind.MODEL, {"w": LIKE["w"]}, codec="bf16", data=CODECS["bf16"].encode({"w": LIKE["w"]})
    )
    with pytest.raises(PayloadError, match="tensor 'w' coded and as it is"):
        received({"model": both})


def test_what_cannot_be_told_is_refused_not_computed_with():
    infinite = tensors(2)
    infinite["w"][0, 0] = 3e38
    base = tensors(1)
    base["w"][0, 0] = -3e38
    with pytest.raises(PayloadError, match=r"'w' cannot be compressed\. .*finite"):
        make("stc").up(payloads(infinite), MODEL, payloads(base), State(), AT)
    with pytest.raises(PayloadError, match="beyond the range of bf16"):
        make("bf16").up(payloads(infinite), MODEL, payloads(base), State(), AT)


# ---- on the wire, and in the configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", BOTH_WAYS)
def test_a_coded_payload_goes_through_the_wire_twice_and_is_the_same(codec):
    came = coming(codec)
    again, parts = travel(came)
    assert again["model"].data == came["model"].data
    assert again["model"].codec == came["model"].codec
    assert again["model"].tensors.keys() == set(PLAIN)
    assert travel(again)[1] == parts


def test_stc_is_smaller_than_half_precision_and_that_than_raw():
    like = {"w": torch.zeros(100, 100)}
    base, values = ({"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(s))} for s in (1, 2))
    sizes = {}
    for codec in ("raw", "bf16", "stc"):
        going, _ = make(codec, p=0.01, like=like).up(payloads(values), MODEL, payloads(base), State(), AT)
        sizes[codec] = bytes_by_kind(travel(going)[1])["model"]
    assert sizes["raw"] == 40_000
    assert 20_000 <= sizes["bf16"] < 20_100
    assert sizes["stc"] < 200  # 100 of 10000 signed places: 0.0908 bit a value are 114 bytes, and names


def test_settings():
    config = RunConfig().with_settings(
        {"uplink-codec": "stc", "uplink-p": "0.5", "downlink-codec": "bf16"}, MethodParams
    )
    assert config.wire == WireConfig(uplink_codec="stc", uplink_p=0.5, downlink_codec="bf16")
    assert RunConfig().wire == WireConfig(uplink_codec="raw", downlink_codec="raw")


@pytest.mark.parametrize(
    ("wire", "sentence"),
    [
        ({"downlink_codec": "cer"}, r"wire\.downlink_codec.*'stc'"),
        ({"downlink_p": 0}, r"wire\.downlink_p.*greater than 0"),
        ({"gamma": -1}, r"wire\.gamma.*greater than or equal to 0"),
        ({"gamma_scale": "peak"}, r"wire\.gamma_scale.*'relative'"),
        ({"gamma_schedule": "cosine"}, r"wire\.gamma_schedule.*'sqrt'"),
        ({"feedback": True}, r"wire\.feedback.*'all'"),
        ({"uplink_codec": "zip"}, r"wire\.uplink_codec.*'stc'"),
        ({"uplink_p": 0}, r"wire\.uplink_p.*greater than 0"),
        ({"uplink_p": 1.5}, r"wire\.uplink_p.*less than or equal to 1"),
        ({"uplink_q": 1}, r"Unknown key 'wire\.uplink_q'.*uplink_p"),
    ],
)
def test_settings_out_of_range_are_refused(wire, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RunConfig.from_mapping({"wire": wire})
