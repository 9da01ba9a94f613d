"""Runs and halves: what is lossless comes back to the bit, what is not within half a step; and pFedNet's own measure."""

import io
import math
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs.fields import CodecError
from common.codecs.halves import decode_half, encode_half
from common.codecs.legacy import legacy_size
from common.codecs.piecewise import decode_piecewise, encode_piecewise, run_starts
from common.codecs.positions import bound_bits
from common.codecs.ternary import compress, encode_ternary
from common.numerics.rng import generator

FEW = settings(max_examples=25, deadline=None)
LEVELS = ("float32", "float16", "bf16", "ternary")
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
LEVEL = st.one_of(FINITE, st.sampled_from([0.0, -0.0, 1.0]))


@st.composite
def stairs(draw, level=LEVEL):
    runs = draw(st.lists(st.tuples(level, st.integers(1, 30)), max_size=12))
    return np.repeat(np.array([level for level, _ in runs], dtype=np.float32), [length for _, length in runs])


@FEW
@given(stairs())
def test_runs_come_back_to_the_bit(values):
    assert decode_piecewise(encode_piecewise(values), len(values)).tobytes() == values.tobytes()


@FEW
@given(stairs())
def test_runs_start_where_bits_change(values):
    words = [values[at : at + 1].tobytes() for at in range(len(values))]
    assert run_starts(values).tolist() == [
        at for at in range(len(words)) if not at or words[at] != words[at - 1]
    ]


@FEW
@given(stairs(st.sampled_from([0.0, 0.25, -0.25])))
def test_ternary_runs_come_back_to_the_bit(values):
    assert (
        decode_piecewise(encode_piecewise(values, "ternary"), len(values), "ternary").tobytes()
        == values.tobytes()
    )


@FEW
@given(stairs(st.floats(-60000, 60000, width=32)))
def test_lossy_levels_are_the_values_rounded(values):
    for levels, dtype in (("float16", torch.float16), ("bf16", torch.bfloat16)):
        back = decode_piecewise(encode_piecewise(values, levels), len(values), levels)
        expected = torch.from_numpy(values).to(dtype).float().numpy()
        assert back.tobytes() == expected.tobytes()


@pytest.mark.parametrize("levels", LEVELS)
def test_size_is_near_the_bound(levels):
    d, m = 100_000, 500
    rng = np.random.default_rng(1)
    starts = np.concatenate([[0], np.sort(rng.choice(d - 1, m - 1, replace=False)) + 1])
    found = rng.standard_normal(m).astype(np.float32)
    if levels == "ternary":
        found = np.resize(np.array([0, 0.5, 0, -0.5], dtype=np.float32), m)
    values = np.repeat(found, np.diff(starts, append=d))
    floor = bound_bits(d - 1, m - 1)
    floor += (
        bound_bits(m, m // 2, signs=True) + 32
        if levels == "ternary"
        else m * (32 if levels == "float32" else 16)
    )
    assert 8 * len(encode_piecewise(values, levels)) <= 1.01 * floor + 32


def test_values_without_runs_cost_hardly_more_than_themselves():
    values = torch.randn(5000, generator=generator("no runs"))
    assert len(encode_piecewise(values.numpy())) <= 4 * 5000 + 8
    ternary = compress(values, 0.5)[0].numpy()
    code = encode_piecewise(ternary, "ternary")
    assert len(code) <= len(encode_ternary(ternary)) + 8
    assert decode_piecewise(code, 5000, "ternary").tobytes() == ternary.tobytes()


def test_stc_after_runs_is_cheaper_as_runs():
    levels = torch.randn(400, generator=generator("stairs"))
    ternary = compress(levels.repeat_interleave(100), 0.1)[0].numpy()
    assert len(np.unique(np.abs(ternary))) == 2
    assert (
        decode_piecewise(encode_piecewise(ternary, "ternary"), len(ternary), "ternary").tobytes()
        == ternary.tobytes()
    )
    assert 8 * len(encode_piecewise(ternary, "ternary")) < 0.1 * bound_bits(
        len(ternary), len(ternary) // 10, signs=True
    )


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(levels, bad):
    with pytest.raises(CodecError, match="finite"):
        encode_piecewise(np.array([1.0, bad], dtype=np.float32), levels)


@pytest.mark.parametrize("levels", LEVELS)
def test_runs_cut_or_lengthened_are_refused(levels):
    values = np.repeat(np.array([0.0, 1.0, 0.0, -1.0], dtype=np.float32), 100)
    code = encode_piecewise(values, levels)
    wrongs = [b"", code[:1], code + b"\0", b"\0" + code[1:], b"\x91\x03" + code[1:]]
    if levels != "ternary":  # an entropy code alone need not notice these: that is what the checksum is for
        wrongs += [code[:-1], code + b"\1", b"\x05" + code[1:], b"\x03" + code[1:]]
    for wrong in wrongs:
        with pytest.raises(CodecError):
            decode_piecewise(wrong, 400, levels)


def test_values_without_a_run_are_refused():
    with pytest.raises(CodecError, match="expected a run for 5 values"):
        decode_piecewise(b"\0\0", 5)


def test_levels_that_are_not_finite_are_refused():
    code = bytearray(encode_piecewise(np.ones(4, dtype=np.float32)))
    code[-4:] = b"\0\0\xc0\x7f"
    with pytest.raises(CodecError, match="finite"):
        decode_piecewise(bytes(code), 4)


@FEW
@given(st.binary(max_size=30), st.integers(0, 60), st.sampled_from(LEVELS))
def test_random_bytes_are_refused_or_values(data, d, levels):
    try:
        values = decode_piecewise(data, d, levels)
    except CodecError:
        return
    assert values.shape == (d,)
    assert np.isfinite(values).all()


# ---- halves ----------------------------------------------------------------------------------------------------------


@FEW
@given(st.lists(st.floats(-65504, 65504, width=32), max_size=20))
def test_float16_is_what_numpy_rounds_to(values):
    array = np.array(values, dtype=np.float32)
    code = encode_half(array, "float16")
    assert code == array.astype("<f2").tobytes()
    assert (
        decode_half(code, len(array), "float16").tobytes()
        == array.astype(np.float16).astype(np.float32).tobytes()
    )


def test_bf16_is_the_upper_half_of_float32():
    array = np.array([1.0, -2.5, 3.3895314e38, -0.0, 1.00390625], dtype=np.float32)
    code = encode_half(array, "bf16")
    assert code == bytes.fromhex("803f 20c0 7f7f 0080 803f")  # the last one is a tie: to even
    assert decode_half(code, 5, "bf16").tolist() == [1.0, -2.5, array[2], -0.0, 1.0]


@pytest.mark.parametrize(
    ("half", "value"), [("float16", 65520.0), ("bf16", 3.4e38), ("float16", math.nan), ("bf16", math.inf)]
)
def test_what_a_half_cannot_hold_is_refused(half, value):
    with pytest.raises(CodecError, match="got 1 that are not"):
        encode_half(np.array([0.0, value], dtype=np.float32), half)


@pytest.mark.parametrize("half", ["float16", "bf16"])
def test_halves_that_do_not_fit_are_refused(half):
    for data, word in ((b"\0\0\0", "4 bytes"), (b"\xff\xff\0\0", "finite")):
        with pytest.raises(CodecError, match=word):
            decode_half(data, 2, half)


# ---- pFedNet's measure -----------------------------------------------------------------------------------------------


def test_legacy_size_is_that_of_a_zip_archive_of_the_text():
    tensors = {
        "a": torch.randn(66_000, generator=generator("zip")).mul_(1e-3),
        "b": torch.tensor([0.0, -0.0, 1.0, 0.1, 1e-20]),
    }
    lines = "".join(f"{value!s}\n" for tensor in tensors.values() for value in tensor.numpy())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", compression=zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a.csv", lines)
        entry = opened.getinfo("a.csv")
    found = legacy_size(tensors)
    assert (found.values, found.text) == (66_005, entry.file_size)
    assert found.deflated == pytest.approx(entry.compress_size, rel=1e-3)
    assert found.ratio == entry.file_size / found.deflated
    assert found.ratio_of_float32 == 4 * 66_005 / found.deflated


def test_legacy_size_of_nothing():
    assert legacy_size({}).ratio == legacy_size({}).ratio_of_float32 == 1.0
