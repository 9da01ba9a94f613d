"""STC against a slow definition of it, its error feedback, and its bytes and those of masks, back to the bit."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs.fields import CodecError
from common.codecs.positions import bound_bits
from common.codecs.ternary import (
    compress,
    decode_mask,
    decode_ternary,
    encode_mask,
    encode_ternary,
    kept,
)
from common.numerics.rng import generator

FEW = settings(max_examples=30, deadline=None)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHARES = st.sampled_from([0.0025, 0.01, 0.04, 0.1, 0.2, 0.5, 1 / 3, 1.0])
VECTORS = st.one_of(
    st.lists(FINITE, max_size=30),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -1e-45]), max_size=30),
)


def slow(values, p):
    """STC by sorting in plain Python: magnitude down, then place up; zeros never."""
    k = math.ceil(Fraction(repr(p)) * len(values))
    order = sorted(range(len(values)), key=lambda at: (-abs(values[at]), at))[:k]
    order = [at for at in order if values[at] != 0]
    mu = np.float32(math.fsum(abs(values[at]) for at in order) / len(order)) if order else np.float32(0)
    out = np.zeros(len(values), dtype=np.float32)
    for at in order:
        out[at] = math.copysign(mu, values[at]) if mu else 0.0
    return out


@FEW
@given(VECTORS, SHARES)
def test_compress_is_stc(values, p):
    tensor = torch.tensor(values, dtype=torch.float32)
    ternary, residual = compress(tensor, p)
    expected = slow(values, p)
    assert (ternary.numpy() != 0).tolist() == (expected != 0).tolist()
    np.testing.assert_array_max_ulp(ternary.numpy(), expected, 1)  # the mean is summed in another order
    assert len(np.unique(np.abs(ternary.numpy()[ternary.numpy() != 0]))) <= 1
    assert torch.equal(residual, tensor - ternary)
    assert not (ternary.numpy().view(np.uint32) == 0x80000000).any()


@pytest.mark.parametrize(
    ("n", "p", "k"), [(100, 0.07, 7), (10, 0.1, 1), (1, 1e-6, 1), (0, 0.5, 0), (3, 1 / 3, 1), (5, 1.0, 5), (401, 0.0025, 2)]
)  # fmt: skip
def test_the_number_kept_is_the_decimal_share_rounded_up(n, p, k):
    assert kept(n, p) == k


@pytest.mark.parametrize("p", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(p):
    with pytest.raises(ValueError, match="share p"):
        compress(torch.ones(3), p)


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (torch.tensor([1.0, float("nan")]), "finite"),
        (torch.tensor([-float("inf")]), "finite"),
        (torch.ones(2, dtype=torch.float64), "float32"),
    ],
)
def test_what_stc_cannot_take_is_refused(tensor, word):
    with pytest.raises(ValueError, match=word):
        compress(tensor, 0.5)


def test_ties_go_to_the_first_and_exactly_k_are_kept():
    tensor = torch.full((10, 10), -3.0)
    tensor[0, 0] = 5
    ternary, residual = compress(tensor, 0.04)
    assert ternary.reshape(-1)[:4].tolist() == [3.5, -3.5, -3.5, -3.5]
    assert int((ternary != 0).sum()) == 4
    assert torch.equal(ternary + residual, tensor)


def test_shape_and_input_are_kept():
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    before = base.clone()
    ternary, residual = compress(base.t(), 0.25)
    assert ternary.shape == residual.shape == (4, 3)
    assert torch.equal(base, before)
    assert ternary[3].tolist() == [0.0, 0.0, 10.0] or int((ternary != 0).sum()) == 3
    assert torch.equal(compress(torch.tensor(-2.0), 0.1)[0], torch.tensor(-2.0))


def test_with_error_feedback_the_sum_of_what_is_sent_follows_the_sum_of_updates():
    update = torch.randn(2000, generator=generator("stc"))
    residual = torch.zeros(2000)
    sent = torch.zeros(2000, dtype=torch.float64)
    errors = []
    for turn in range(1, 201):
        ternary, residual = compress(update + residual, 0.05)
        sent += ternary
        errors.append(float((sent / turn - update).norm() / update.norm()))
    assert errors[-1] < 0.1 < 0.5 < errors[0]
    assert errors[-1] < errors[50] < errors[10]


# ---- bytes -----------------------------------------------------------------------------------------------------------


@FEW
@given(VECTORS, SHARES, st.sampled_from(["entropy", "golomb"]))
def test_ternary_values_come_back_to_the_bit(values, p, coder):
    ternary = compress(torch.tensor(values, dtype=torch.float32), p)[0].numpy()
    code = encode_ternary(ternary, coder=coder)
    assert decode_ternary(code, len(ternary)).tobytes() == ternary.tobytes()


@pytest.mark.parametrize(
    "values", [[], [0.0], [-0.0], [0.0, -0.0, -0.0], [7.0] * 9, [-1e-45, 0.0], [3.4e38, -3.4e38]]
)
def test_the_corners_come_back_to_the_bit(values):
    array = np.array(values, dtype=np.float32)
    for coder in ("entropy", "golomb"):
        assert decode_ternary(encode_ternary(array, coder=coder), len(array)).tobytes() == array.tobytes()


def test_nothing_kept_takes_one_byte():
    assert encode_ternary(np.zeros(100_000, dtype=np.float32)) == b"\0"


@pytest.mark.parametrize("p", [0.2, 0.1, 0.04, 0.01])
def test_a_tensor_with_its_counts_is_within_one_per_cent(p):
    n = 200_000
    ternary = compress(torch.randn(n, generator=generator("size", str(p))), p)[0].numpy()
    assert 8 * len(encode_ternary(ternary)) <= 1.01 * (bound_bits(n, kept(n, p), signs=True) + 32)


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, -0.0], [float("nan")], [float("inf"), 0.0]])
def test_values_that_are_not_ternary_are_refused(values):
    with pytest.raises(CodecError, match="magnitude"):
        encode_ternary(np.array(values, dtype=np.float32))


@pytest.mark.parametrize("mu", [0x7F800000, 0x7FC00000, 0xBF800000])
def test_a_magnitude_that_is_none_is_refused(mu):
    code = bytearray(encode_ternary(np.array([1.0, 0.0, -1.0], dtype=np.float32)))
    code[1:5] = mu.to_bytes(4, "little")
    with pytest.raises(CodecError, match="magnitude"):
        decode_ternary(bytes(code), 3)


@FEW
@given(st.binary(max_size=30), st.integers(0, 200))
def test_random_bytes_are_refused_or_of_the_form(data, n):
    for decode in (decode_ternary, decode_mask):
        try:
            values = decode(data, n)
        except CodecError:
            continue
        assert len(values) == n
        assert np.isfinite(values).all()


# ---- masks -----------------------------------------------------------------------------------------------------------


@FEW
@given(st.lists(st.booleans(), max_size=200))
def test_masks_come_back(values):
    mask = np.array(values, dtype=bool)
    for coder in ("entropy", "golomb"):
        assert (decode_mask(encode_mask(mask, coder=coder), len(mask)) == mask).all()


@pytest.mark.parametrize("n", [0, 1, 1_000_000])
def test_empty_and_full_masks_take_few_bytes(n):
    for mask in (np.zeros(n, dtype=bool), np.ones(n, dtype=bool)):
        code = encode_mask(mask)
        assert len(code) <= 3
        assert (decode_mask(code, n) == mask).all()


def test_a_mask_and_its_complement_take_the_same_bytes():
    mask = np.random.default_rng(3).random(50_000) < 0.1
    assert abs(len(encode_mask(mask)) - len(encode_mask(~mask))) <= 1
