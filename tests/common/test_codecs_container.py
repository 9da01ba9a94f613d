"""The container: round trip of every codec to the bit, its bytes, and every corruption refused by name and cheaply."""

import math
import random
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import CODECS, get_codec
from common.codecs.container import DEFAULT_LIMIT, FORMS, MAGIC, MAX_TENSORS, decode
from common.codecs.fields import varint
from common.codecs.ternary import compress
from common.errors import ConfigError, PayloadError
from common.numerics.rng import generator
from tests.common.strategies import NAMES, bits

FEW = settings(max_examples=20, deadline=None)
LOSSLESS = sorted(name for name, codec in CODECS.items() if codec.lossless)


def sample(codec="ternary"):
    """Tensors that the codec takes, with neighbours of other dtypes."""
    dense = torch.randn(6, 7, generator=generator("container"))
    if codec == "mask":
        return {
            "w": dense > 1,
            "w.u": (dense > 0).to(torch.uint8),
            "v": (dense < 2).float(),
            "e": torch.zeros(0, 3),
        }
    w = compress(dense, 0.2)[0] if "ternary" in codec else dense.repeat_interleave(3)
    rest = {
        "count": torch.tensor(7),
        "flag": torch.tensor([True, False]),
        "b": torch.ones(3, dtype=torch.bfloat16),
    }
    return {"layer.w": w, "layer.b": torch.zeros(4), "layer.n": torch.zeros(0, 3), **rest}


def signed(body):
    return bytes(body) + zlib.crc32(bytes(body)).to_bytes(4, "little")


def forged(heads, sections=b"", *, codec="ternary", count=None):
    """Bytes with a right checksum: tensors as (name, form, dtype, shape, nbytes), names sharing nothing."""
    body = MAGIC + bytes([1, len(codec)]) + codec.encode() + varint(len(heads) if count is None else count)
    for name, form, dtype, shape, nbytes in heads:
        body += b"\0" + varint(len(name)) + name + bytes([form, dtype, len(shape)])
        body += b"".join(varint(size) for size in shape) + varint(nbytes)
    return signed(body + sections)


def same(left, right):
    assert list(left) == list(right)
    assert {name: bits(tensor) for name, tensor in left.items()} == {
        name: bits(tensor) for name, tensor in right.items()
    }


# ---- round trip ------------------------------------------------------------------------------------------------------


def test_the_table_and_the_forms_are_the_same():
    assert CODECS.keys() == {*FORMS, "mask"}
    assert len({form.code for form in FORMS.values()} | {0, 3}) == len(FORMS) + 2
    assert all(name == codec.name and name.isascii() and codec.title for name, codec in CODECS.items())


def test_the_table_is_light():
    code = "import sys, common.codecs; print([m for m in ('torch', 'numpy', 'constriction') if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_an_unknown_codec_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'ternary'"):
        get_codec("ternery")


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_codecs_give_back_every_bit(name):
    tensors = sample(name)
    data = CODECS[name].encode(tensors)
    same(CODECS[name].decode(data), tensors)
    same(
        CODECS[name].decode(memoryview(data), {key: value.to("meta") for key, value in tensors.items()}),
        tensors,
    )
    assert CODECS[name].encode(tensors) == data


@pytest.mark.parametrize("name", sorted(CODECS.keys() - set(LOSSLESS)))
def test_lossy_codecs_give_back_the_rounded_values(name):
    tensors, half = sample(name), torch.float16 if "float16" in name else torch.bfloat16
    expected = {k: v.to(half).float() if v.dtype is torch.float32 else v for k, v in tensors.items()}
    same(CODECS[name].decode(CODECS[name].encode(tensors)), expected)


FLOATS = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0]), max_size=20
)


@FEW
@given(st.dictionaries(NAMES, FLOATS, max_size=3), st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.booleans())
def test_any_tensors_come_back_to_the_bit(vectors, p, turned):
    dense = {
        name: torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1) for name, values in vectors.items()
    }
    ternary = {name: compress(tensor, p)[0] for name, tensor in dense.items()}
    mask = {name: tensor != 0 if turned else (tensor > 0).float() for name, tensor in dense.items()}
    for tensors, names in (
        (dense, ["piecewise"]),
        (ternary, ["ternary", "ternary-golomb", "piecewise-ternary"]),
        (mask, ["mask"]),
    ):
        for name in names:
            same(CODECS[name].decode(CODECS[name].encode(tensors), tensors), tensors)


def test_the_bytes_are_those_of_the_document():
    tensors = {"a.w": torch.tensor([[0.0, 0.5], [-0.5, 0.0]]), "a.x": torch.tensor(258, dtype=torch.int16)}
    data = CODECS["ternary-golomb"].encode(tensors)
    head = b"WRDC" + b"\x01" + b"\x0eternary-golomb" + b"\x02"
    # name shares 0 bytes, adds 3; form 2, float32, 2 dimensions of 2; 8 bytes
    head += b"\x00\x03a.w" + b"\x02\x00\x02" + b"\x02\x02" + b"\x08"
    head += b"\x02\x01x" + b"\x00\x06\x00" + b"\x02"
    # k 2, mu 0.5, Golomb, b 0; gaps 1 and 0 in unary 01 1, signs 0 1
    body = b"\x02" + b"\x00\x00\x00\x3f" + b"\x02\x00" + bytes([0b01101000]) + b"\x02\x01"
    assert data == signed(head + body)


def test_decoded_tensors_own_their_memory():
    for name in CODECS:
        data = CODECS[name].encode(sample(name))
        for tensor in CODECS[name].decode(data).values():
            if tensor.numel():
                tensor.fill_(1)
        CODECS[name].decode(data)


def test_what_is_not_contiguous_travels_as_its_values():
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "t": base.t(),
        "step": base[::2, 1],
        "wide": torch.ones(1).expand(3),
        "g": base.clone().requires_grad_(),
    }
    same(CODECS["piecewise"].decode(CODECS["piecewise"].encode(tensors)), tensors)


def test_names_that_start_alike_are_stored_once():
    long = {f"encoder.block.{at}.{what}": torch.zeros(3) for at in range(20) for what in ("weight", "bias")}
    assert len(CODECS["ternary"].encode(long)) < 20 + 40 * 15
    same(CODECS["ternary"].decode(CODECS["ternary"].encode(long)), long)


@pytest.mark.parametrize(
    ("codec", "tensor", "word"),
    [
        ("ternary", torch.tensor([1.0, 2.0]), "compress it first"),
        ("mask", torch.tensor([0, 2]), "0 and 1"),
        ("mask", torch.tensor([-0.0]), "0 and 1"),
        ("piecewise", torch.tensor([math.nan]), "finite"),
        ("float16", torch.tensor([1e5]), "65504"),
        ("ternary", torch.tensor([math.inf], dtype=torch.float64), "finite"),
        ("ternary", torch.zeros(2, dtype=torch.complex64), "cannot travel"),
        ("ternary", torch.empty(2**31, device="meta"), "split it"),
        ("mask", torch.empty([1] * 65), "dimensions"),
    ],
)
def test_what_a_codec_cannot_hold_is_refused_by_name(codec, tensor, word):
    with pytest.raises(PayloadError, match=rf"Codec '{codec}', tensor 'bad': .*{word}"):
        CODECS[codec].encode({"bad": tensor})


@pytest.mark.parametrize("name", ["x" * 1025, "\ud800"])
def test_a_name_that_cannot_travel_is_refused(name):
    with pytest.raises(PayloadError, match="name"):
        CODECS["ternary"].encode({name: torch.zeros(1)})


# ---- every corruption ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CODECS))
def test_every_truncation_and_every_byte_after_the_end_is_refused(name):
    data = CODECS[name].encode(sample(name))
    for cut in range(len(data)):
        with pytest.raises(PayloadError, match=f"Codec '{name}'"):
            CODECS[name].decode(data[:cut])
    for more in (b"\0", b"\1", data, data[-4:]):
        with pytest.raises(PayloadError, match=f"Codec '{name}'"):
            CODECS[name].decode(data + more)


@pytest.mark.parametrize("name", ["ternary", "piecewise-bf16", "mask"])
def test_every_flipped_bit_is_refused(name):
    data = CODECS[name].encode(sample(name))
    for place in range(8 * len(data)):
        spoiled = bytearray(data)
        spoiled[place // 8] ^= 1 << place % 8
        with pytest.raises(PayloadError, match="send it again"):
            CODECS[name].decode(bytes(spoiled))


def spoil(good, rng, *, start):
    """Replace, insert or remove a few bytes at up to three places from `start` on."""
    spoiled = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(start, len(spoiled))
        spoiled[at : at + rng.randint(0, 3)] = bytes(
            rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)]) for _ in range(rng.randint(0, 3))
        )
    return bytes(spoiled)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_random_damage_is_refused(name):
    good, rng = CODECS[name].encode(sample(name)), random.Random(f"damage {name}")
    for _ in range(100):
        spoiled = spoil(good, rng, start=0)
        if spoiled != good:
            with pytest.raises(PayloadError):
                CODECS[name].decode(spoiled)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_damage_with_a_right_checksum_raises_nothing_else(name):
    template, rng = sample(name), random.Random(f"forged {name}")
    good, through = CODECS[name].encode(template)[:-4], 0
    for turn in range(200):
        # half of the damage in the sections, where there is no plausible header to fail first
        spoiled = spoil(good, rng, start=4 if turn % 2 else len(good) - 40)
        like, limit = (None, 10_000) if turn % 4 < 2 else (template, 0)
        try:
            back = decode(name, signed(spoiled), like, limit=limit)
        except PayloadError as error:
            sentence = str(error)
        else:
            sentence, through = "", through + 1
            assert sum(tensor.numel() for tensor in back.values()) <= 10_000
            assert all(torch.isfinite(tensor).all() for tensor in back.values() if tensor.is_floating_point())
            assert like is None or all(back[key].shape == like[key].shape for key in like)
        assert len(sentence) < 500
        assert not sentence or sentence.isprintable()
    assert 0 < through < 150  # the damage gets past the header, and most of it not further


LIES = {
    "absurd size": ([(b"w", 1, 0, (10**18,), 1)], b"\0"),
    "absurd sizes": ([(b"w", 1, 0, (2**31 - 1, 2**31 - 1), 1)], b"\0"),
    "overflowing sizes": ([(b"w", 1, 0, (2**40, 2**40, 2**40, 0), 1)], b"\0"),
    "size above the limit": ([(b"w", 1, 0, (DEFAULT_LIMIT + 1,), 1)], b"\0"),
    "sizes above the limit": (
        [(bytes([97 + at]), 1, 0, (DEFAULT_LIMIT // 8,), 1) for at in range(9)],
        b"\0" * 9,
    ),
    "too many dimensions": ([(b"w", 1, 0, (1,) * 65, 1)], b"\0"),
    "more kept than there are": ([(b"w", 1, 0, (3,), 2)], b"\x04\0"),
    "section too long": ([(b"w", 1, 0, (3,), 9)], b"\0"),
    "section too short": ([(b"w", 1, 0, (3,), 0)], b"\0"),
    "section of the wrong length": ([(b"w", 1, 0, (3,), 2)], b"\0\0"),
    "raw of the wrong length": ([(b"w", 0, 4, (3,), 8)], b"\0" * 8),
    "raw flags that are none": ([(b"w", 0, 9, (1,), 1)], b"\2"),
    "raw not finite": ([(b"w", 0, 1, (1,), 8)], b"\0" * 6 + b"\xf8\x7f"),
    "unknown dtype": ([(b"w", 0, 10, (1,), 1)], b"\0"),
    "unknown form": ([(b"w", 99, 0, (1,), 1)], b"\0"),
    "form of another codec": ([(b"w", 8, 0, (1,), 2)], b"\0\0"),
    "float32 as it is": ([(b"w", 0, 0, (1,), 4)], b"\0" * 4),
    "name that is no text": ([(b"\xff", 1, 0, (1,), 1)], b"\0"),
    "name twice": ([(b"", 1, 0, (1,), 1)] * 2, b"\0\0"),
    "name not shared": ([(b"ww", 1, 0, (1,), 1), (b"wv", 1, 0, (1,), 1)], b"\0\0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_and_costs_nothing(lie):
    heads, sections = LIES[lie]
    data = forged(heads, sections)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match="Codec 'ternary'"):
            CODECS["ternary"].decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_more_values_than_positions_can_count_are_refused_whatever_the_limit():
    data, like = forged([(b"w", 1, 0, (2**31,), 1)], b"\0"), {"w": torch.empty(2**31, device="meta")}
    for template in (None, like):
        with pytest.raises(PayloadError, match="at most 2147483647 values"):
            decode("ternary", data, template, limit=2**40)


def test_a_forged_header_without_a_lie_is_read():
    back = CODECS["ternary"].decode(
        forged([(b"w", 1, 0, (2, 3), 1), (b"n", 0, 4, (), 8)], b"\0" + b"\7" + bytes(7))
    )
    same(back, {"w": torch.zeros(2, 3), "n": torch.tensor(7)})


def test_more_tensors_than_a_model_has_are_refused():
    data = forged([(f"{at}".encode(), 1, 0, (0,), 1) for at in range(30)], b"\0" * 30)
    with pytest.raises(PayloadError, match="the number of tensors of at most 2, got 30"):
        CODECS["ternary"].decode(data, {"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(PayloadError, match=f"at most {MAX_TENSORS}"):
        CODECS["ternary"].decode(forged([], count=MAX_TENSORS + 1))


def test_memory_of_the_worst_bytes_is_in_proportion_to_the_values():
    n, peaks = 200_000, {}
    full, rng = n // 2, np.random.default_rng(0)
    for at, (codec, form, section) in enumerate(
        [
            ("ternary", 1, varint(full) + b"\0\0\x80?" + b"\0" + rng.bytes(200_000)),
            ("ternary", 1, varint(full) + b"\0\0\x80?" + b"\1\2\0\1" + b"\1"),
            ("ternary", 1, varint(n) + b"\0\0\x80?" + b"\2\0" + b"\xff" * 200_000),
            ("ternary", 1, varint(full) + b"\0\0\x80?" + b"\2\x1f" + b"\xff" * 500_000),
            ("piecewise", 4, varint(n) + varint(0) + rng.bytes(400_000)),
        ]
    ):
        data = forged([(b"w", form, 0, (n,), len(section))], section, codec=codec)
        tracemalloc.start()
        with pytest.raises(PayloadError):
            decode(codec, data, limit=n)
        peaks[at] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(peaks.values()) < 100 * n, peaks


def test_another_version_and_another_codec_are_named():
    data = CODECS["ternary"].encode(sample())
    with pytest.raises(PayloadError, match=r"version 1, got 2 \(install the same version"):
        CODECS["ternary"].decode(signed(data[:4] + b"\2" + data[5:-4]))
    with pytest.raises(
        PayloadError, match="Codec 'mask': expected bytes of this codec, got those of 'ternary'"
    ):
        CODECS["mask"].decode(data)
    with pytest.raises(PayloadError, match="that a codec wrote"):
        CODECS["ternary"].decode(b"")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda like: like.pop("layer.b"), "at most 5"),
        (lambda like: like.update(more=torch.zeros(1)), r"missing \['more'\]"),
        (lambda like: like.update({"more": like.pop("flag")}), r"missing \['more'\], unexpected \['flag'\]"),
        (lambda like: like.update({"layer.b": torch.zeros(5)}), r"'layer.b' as torch.float32 \(5,\)"),
        (lambda like: like.update({"layer.b": torch.zeros(4, dtype=torch.int32)}), "torch.int32"),
    ],
)
def test_tensors_unlike_the_template_are_refused(change, word):
    data, like = CODECS["ternary"].encode(sample()), sample()
    change(like)
    with pytest.raises(PayloadError, match=word):
        CODECS["ternary"].decode(data, like)
