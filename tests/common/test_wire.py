"""Envelopes: what goes in comes out to the bit, and whatever is not whole is refused by name, never by accident."""

import dataclasses
import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common.errors import MismatchError, PayloadError, WardroundError
from common.payload import Kind, Payload
from common.proto import wardround_pb2 as pb
from common.wire import (
    DTYPES,
    ROUND,
    Envelope,
    MetricSet,
    bytes_by_kind,
    decode,
    encode,
    encode_payload,
    read_header,
)
from tests.common.strategies import bits, envelopes, plain

FEW = settings(max_examples=20, deadline=None)
MANY = settings(max_examples=50, deadline=None)


def message() -> Envelope:
    weights = {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "flag": torch.tensor([True, False]),
        "n": torch.tensor(7),
    }
    return Envelope(
        "run", 3, ROUND, "alpha", rounds=5, config='{"seed":1}', cases=12, loss=0.5, device="cpu",
        payloads={
            "model": Payload("model", Kind.MODEL, weights, {"alpha": 0.5, "on": True, "steps": 3, "word": "x"}),
            "mask": Payload("mask", Kind.SENSITIVITY_MASK, {"m": torch.zeros(3, dtype=torch.uint8)}),
        },
        metrics=[MetricSet(2, "validation", "global", 4, {"dice": (3.0, 4.0)}, "dice")],
        summary='{"site":"alpha"}', seconds={"train": 1.5, "evaluate": 0.25},
    )  # fmt: skip


def forge(change, *, blob=None) -> dict[str, bytes]:
    """Return the message's parts with its header changed (and one blob, whose checksum is then made right)."""
    parts = encode(message())
    header = pb.Header.FromString(parts["head"])
    if blob is not None:
        parts["p.model"] = blob
        head = next(head for head in header.payloads if head.name == "model")
        head.nbytes, head.sha256 = len(blob), hashlib.sha256(blob).digest()
    change(header, next(head for head in header.payloads if head.name == "model"))
    return parts | {"head": header.SerializeToString()}


def no_change(header, model):
    pass


# ---- round trip ------------------------------------------------------------------------------------------------------


@MANY
@given(envelopes())
def test_an_envelope_comes_back_to_the_bit(envelope):
    back = decode(encode(envelope))
    for field in dataclasses.fields(Envelope):
        sent, got = getattr(envelope, field.name), getattr(back, field.name)
        if field.name == "payloads":
            assert {name: plain(item) for name, item in sent.items()} == {
                name: plain(item) for name, item in got.items()
            }
        elif field.name == "metrics":
            assert [
                repr(dataclasses.replace(item, sums=dict(sorted(item.sums.items())))) for item in sent
            ] == [repr(item) for item in got]
        elif field.name == "seconds":
            assert repr(sorted(sent.items())) == repr(sorted(got.items()))
        else:
            assert repr(sent) == repr(got)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3)])
def test_every_dtype_and_shape_travels(dtype, shape):
    tensor = (torch.arange(6)[: max(1, torch.Size(shape).numel())] % 2).to(dtype)
    tensor = tensor[: torch.Size(shape).numel()].reshape(shape)
    sent = Payload("p", Kind.UPDATE, {"x": tensor})
    got = decode(encode(Envelope("r", 1, ROUND, "a", payloads={"p": sent}))).payloads["p"].tensors["x"]
    assert bits(got) == bits(tensor)
    assert got.is_contiguous()


def test_bfloat16_travels_with_its_special_values():
    values = torch.tensor([float("nan"), float("inf"), -0.0, 3.140625, 1e-40], dtype=torch.bfloat16)
    _, blob = encode_payload(Payload("p", Kind.UPDATE, {"x": values}))
    assert len(blob) == 10
    got = decode(
        encode(Envelope("r", 1, ROUND, "a", payloads={"p": Payload("p", Kind.UPDATE, {"x": values})}))
    )
    assert bits(got.payloads["p"].tensors["x"]) == bits(values)


def test_bytes_are_raw_little_endian_values_tensor_after_tensor():
    head, blob = encode_payload(
        Payload("p", Kind.MODEL, {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor(258, dtype=torch.int16)})
    )
    assert blob == bytes.fromhex("0000803f000000c0") + b"\x02\x01"
    assert [(item.name, item.dtype, list(item.shape), item.offset, item.nbytes) for item in head.tensors] == [
        ("b", "float32", [2], 0, 8),
        ("a", "int16", [], 8, 2),
    ]
    assert (head.codec, head.nbytes, head.sha256) == ("raw", 10, hashlib.sha256(blob).digest())


def test_what_is_not_contiguous_or_needs_a_gradient_travels_as_its_values():
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    sent = {
        "t": base.t(),
        "step": base[::2, 1],
        "grad": base.clone().requires_grad_(),
        "wide": torch.ones(1).expand(3),
    }
    got = (
        decode(encode(Envelope("r", 1, ROUND, "a", payloads={"p": Payload("p", Kind.MODEL, sent)})))
        .payloads["p"]
        .tensors
    )
    assert {name: bits(tensor) for name, tensor in got.items()} == {
        name: bits(tensor) for name, tensor in sent.items()
    }


def test_decoded_tensors_own_their_memory():
    parts = encode(message())
    before = dict(parts)
    first = decode(parts).payloads["model"].tensors["w"]
    first.fill_(99)
    assert parts == before
    assert decode(parts).payloads["model"].tensors["w"][0, 0] == 0


@FEW
@given(envelopes())
def test_same_envelope_same_bytes_whatever_the_order_of_its_dictionaries(envelope):
    def backwards(mapping):
        return dict(reversed(mapping.items()))

    turned = dataclasses.replace(
        envelope,
        seconds=backwards(envelope.seconds),
        payloads={
            name: dataclasses.replace(item, meta=backwards(item.meta))
            for name, item in reversed(envelope.payloads.items())
        },
        metrics=[dataclasses.replace(item, sums=backwards(item.sums)) for item in envelope.metrics],
    )
    assert list(encode(turned).items()) == list(encode(envelope).items())


@FEW
@given(envelopes())
def test_bytes_by_kind_account_for_every_byte(envelope):
    parts = encode(envelope)
    kinds = bytes_by_kind(parts)
    assert sum(kinds.values()) == sum(map(len, parts.values()))
    assert kinds["header"] == len(parts["head"])
    assert kinds.keys() <= {"header", "config", "metrics", "summary", *Kind}


def test_bytes_by_kind_join_payloads_of_one_kind():
    two = {name: Payload(name, Kind.UPDATE, {"x": torch.zeros(5)}) for name in ("a", "b")}
    assert bytes_by_kind(encode(Envelope("r", 1, ROUND, "a", payloads=two)))["update"] == 40


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        torch.zeros(2, dtype=torch.uint16),
    ],
)
def test_a_dtype_without_a_name_on_the_wire_is_refused_where_it_starts(value):
    with pytest.raises(PayloadError, match="cannot travel"):
        encode_payload(Payload("p", Kind.MODEL, {"x": value}))


@pytest.mark.parametrize("note", [None, [1], 2**63, -(2**63) - 1])
def test_a_note_that_is_no_scalar_is_refused_where_it_starts(note):
    with pytest.raises(PayloadError, match="note 'x'"):
        encode_payload(Payload("p", Kind.MODEL, {}, {"x": note}))


# ---- every corruption ------------------------------------------------------------------------------------------------


@MANY
@given(st.data())
def test_no_flipped_byte_of_a_payload_goes_through(data):
    parts = encode(message())
    name = data.draw(st.sampled_from(["p.model", "p.mask"]))
    blob = bytearray(parts[name])
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PayloadError, match="checksum"):
        decode(parts | {name: bytes(blob)})


@pytest.mark.parametrize("cut", [b"", None, "short", "long"])
def test_bytes_missing_or_surplus_are_refused(cut):
    parts = encode(message())
    blob = parts.pop("p.model")
    if cut is not None:
        parts["p.model"] = {"short": blob[:-1], "long": blob + b"\0"}.get(cut, cut)
    with pytest.raises(PayloadError, match="Payload 'model'"):
        decode(parts)


def test_a_surplus_part_is_refused():
    with pytest.raises(PayloadError, match=r"does not name: \['p.more'\]"):
        decode(encode(message()) | {"p.more": b""})


BROKEN = {
    "payload twice": lambda header, model: header.payloads.append(model),
    "tensor twice": lambda header, model: (
        model.tensors.add(name="w", dtype="float32", shape=[0], offset=model.nbytes) and None
    ),
    "offset gap": lambda header, model: setattr(model.tensors[1], "offset", model.tensors[1].offset + 1),
    "offset overlap": lambda header, model: setattr(model.tensors[1], "offset", 0),
    "offset huge": lambda header, model: setattr(model.tensors[0], "offset", 2**64 - 1),
    "tensor left out": lambda header, model: model.tensors.pop(),
    "first tensor left out": lambda header, model: model.tensors.pop(0),
    "no tensor named": lambda header, model: model.ClearField("tensors"),
    "shape larger": lambda header, model: model.tensors[0].shape.append(2),
    "shape smaller": lambda header, model: model.tensors[0].shape.pop(),
    "shape zero": lambda header, model: model.tensors[0].shape.append(0),
    "nbytes other": lambda header, model: setattr(model.tensors[0], "nbytes", 20),
    "nbytes huge": lambda header, model: setattr(model.tensors[0], "nbytes", 2**64 - 1),
    "dtype wider": lambda header, model: setattr(model.tensors[0], "dtype", "float64"),
    "dtype unknown": lambda header, model: setattr(model.tensors[0], "dtype", "float12"),
    "dtype with prefix": lambda header, model: setattr(model.tensors[0], "dtype", "torch.float32"),
    "dtype of an object": lambda header, model: setattr(model.tensors[0], "dtype", "object"),
    "kind unknown": lambda header, model: setattr(model, "kind", "patients"),
    "kind empty": lambda header, model: setattr(model, "kind", ""),
    "codec unknown": lambda header, model: setattr(model, "codec", "pickle"),
    "codec empty": lambda header, model: setattr(model, "codec", ""),
    "payload size": lambda header, model: setattr(model, "nbytes", model.nbytes + 1),
    "checksum other": lambda header, model: setattr(model, "sha256", bytes(32)),
    "checksum empty": lambda header, model: setattr(model, "sha256", b""),
    "payload renamed": lambda header, model: setattr(model, "name", "other"),
    "note without a value": lambda header, model: model.meta["empty"].Clear(),
    "shape overflows": lambda header, model: model.tensors[0].shape.extend([2**63, 2**63]),
    "shape wraps to its size": lambda header, model: model.tensors[0].shape.extend([2**32, 2**32]),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_header_that_does_not_fit_its_bytes_is_refused(change):
    with pytest.raises(PayloadError):
        decode(forge(change))


@pytest.mark.parametrize(
    "shape", [[0, 2**63], [2**64 - 1, 0], [0, 2**62, 2**62], [0] + [2**40] * 3, [1] * 65, [1] * 5000]
)
def test_a_shape_beyond_all_measure_is_refused_even_of_no_value(shape):
    def change(header, model):
        model.tensors.insert(
            0, pb.TensorHead(name="big", dtype="float32", shape=shape, nbytes=0 if 0 in shape else 4)
        )

    with pytest.raises(PayloadError, match="'big'"):
        decode(forge(change))


def test_bytes_that_are_no_booleans_are_refused():
    blob = bytearray(encode(message())["p.model"])
    assert blob[24:26] == b"\1\0"
    blob[24] = 2
    with pytest.raises(PayloadError, match="no booleans"):
        decode(forge(no_change, blob=bytes(blob)))


def test_another_schema_version_names_both_versions():
    def change(header, model):
        header.schema, header.software = 99, "9.9"

    with pytest.raises(
        MismatchError, match=rf"schema 99 \(software 9.9\) met schema 1 \(software {common.__version__}\)"
    ):
        decode(forge(change))


@pytest.mark.parametrize("name", ["head", "metrics"])
def test_parts_that_cannot_be_parsed_are_refused(name):
    with pytest.raises(PayloadError, match="cannot be parsed"):
        decode(encode(message()) | {name: b"\xff\xff\xff"})


@pytest.mark.parametrize("name", ["config", "summary"])
def test_text_that_is_no_utf8_is_refused(name):
    with pytest.raises(PayloadError, match=f"Part '{name}' is not text"):
        decode(encode(message()) | {name: b"\xff"})


def test_a_message_without_a_header_is_refused():
    with pytest.raises(PayloadError, match="no header"):
        read_header({})


def test_the_other_ends_words_are_cut_and_cannot_steer_a_terminal():
    nasty = "\x1b[2J\n" + "x" * 5000

    def change(header, model):
        model.kind = nasty

    for parts in (
        forge(change),
        encode(message()) | {nasty: b""},
        forge(lambda header, model: header.MergeFrom(pb.Header(schema=2, software=nasty))),
    ):
        with pytest.raises(WardroundError) as caught:
            decode(parts)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


# ---- fuzz: random bytes raise nothing but wardround's own errors -----------------------------------------------------

PART_NAMES = st.sampled_from(["head", "config", "metrics", "summary", "p.model", "p."]) | st.text(max_size=4)


@MANY
@given(st.dictionaries(PART_NAMES, st.binary(max_size=60), max_size=5))
def test_random_parts_raise_nothing_else(parts):
    with pytest.raises(WardroundError):
        decode(parts)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_spoiled_message_raises_nothing_else_and_keeps_its_payloads(data):
    parts = encode(message())
    name = data.draw(st.sampled_from(sorted(parts)))
    spoiled = bytearray(parts[name])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(spoiled)))
        spoiled[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        back = decode(parts | {name: bytes(spoiled)})
    except WardroundError:
        return
    for payload in back.payloads.values():  # what is let through is made of the checked bytes alone
        assert sum(tensor.numel() * tensor.itemsize for tensor in payload.tensors.values()) in {34, 3, 0}


HEADS = st.builds(
    pb.PayloadHead,
    name=st.sampled_from(["model", "x"]),
    kind=st.sampled_from(["model", "update", "?"]),
    codec=st.sampled_from(["raw", "raw", "zip"]),
    tensors=st.lists(
        st.builds(
            pb.TensorHead,
            name=st.sampled_from("abc"),
            dtype=st.sampled_from(["float32", "uint8", "bool", "bfloat16", "str"]),
            shape=st.lists(st.sampled_from([0, 1, 2, 4, 2**31, 2**62, 2**64 - 1]), max_size=4),
            offset=st.sampled_from([0, 0, 4, 8, 2**64 - 1]),
            nbytes=st.sampled_from([0, 1, 4, 8, 2**64 - 1]),
        ),
        max_size=3,
    ),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(HEADS, max_size=2), st.sampled_from([0, 1, 4, 8]))
def test_a_lying_header_raises_nothing_else(heads, size):
    blob = bytes(size)
    header = pb.Header(schema=1, payloads=heads)
    for head in header.payloads:
        head.nbytes, head.sha256 = size, hashlib.sha256(blob).digest()
    parts = {"head": header.SerializeToString(), **{f"p.{head.name}": blob for head in heads}}
    try:
        back = decode(parts)
    except WardroundError:
        return
    for payload in back.payloads.values():
        assert sum(tensor.numel() * tensor.itemsize for tensor in payload.tensors.values()) == size
