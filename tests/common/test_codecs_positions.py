"""Positions and signs: back to the bit, as the format says to the bit, near the bound, and nothing else gets through."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import entropy
from common.codecs.fields import CodecError, Reader, varint
from common.codecs.positions import (
    MAX_PLACES,
    bound_bits,
    decode_positions,
    encode_positions,
    rice_parameter,
)

FEW = settings(max_examples=25, deadline=None)
MANY = settings(max_examples=60, deadline=None)
SHARES = (0.2, 0.1, 0.04, 0.01, 1 / 400)
CODERS = ("entropy", "golomb")


def at_random(n, k, seed):
    rng = np.random.default_rng(seed)
    where = np.sort(rng.choice(n, size=k, replace=False)).astype(np.int64)
    return where, rng.integers(0, 2, k).astype(bool)


@st.composite
def placed(draw):
    n = draw(st.one_of(st.integers(0, 40), st.integers(0, 5000), st.sampled_from([1 << 20, MAX_PLACES])))
    where = sorted(draw(st.sets(st.integers(0, n - 1), max_size=60))) if n else []
    if n < 5000 and draw(st.booleans()):
        where = sorted(set(range(n)) - set(where))
    where = np.array(where, dtype=np.int64)
    seed = draw(st.integers(0, 9))
    signs = np.random.default_rng(seed).integers(0, 2, len(where)).astype(bool)
    return where, n, signs if draw(st.booleans()) else None


# ---- slow oracles ----------------------------------------------------------------------------------------------------


class Stack:
    """ANS as in the library's papers, with plain integers: a 64-bit state over 32-bit words, probabilities of 24 bits."""

    def __init__(self, code):
        code = code + bytes(-len(code) % 4)
        self.words = [int.from_bytes(code[at : at + 4], "little") for at in range(0, len(code), 4)]
        self.state = 0
        self.refill()

    def refill(self):
        while self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()

    def pop(self, frequencies):
        point, left = self.state & 0xFFFFFF, 0
        for symbol, frequency in enumerate(frequencies):
            if point < left + frequency:
                self.state = (self.state >> 24) * frequency + point - left
                self.refill()
                return symbol
            left += frequency
        raise AssertionError("frequencies that do not add up")

    def bits(self, width):
        size = 1 << width
        return self.pop([(1 << 24) // size] * size) if width < 12 else self.wide(width)

    def wide(self, width):
        step = 1 << 24 - width
        symbol, rest = divmod(self.state & 0xFFFFFF, step)
        self.state = (self.state >> 24) * step + rest
        self.refill()
        return symbol


def slow_entropy(code, n, k, signs):
    """Read the format of docs/wire.md without numpy and without the library."""
    reader = Reader(code)
    if reader.byte("kind"):
        table = bytes(reader.take(reader.varint("T", 1000), "table"))
        weights = [(8 + (b - 1) % 8) << ((b - 1) // 8) if b else 0 for b in table]
    else:
        starts, power, survival = [*range(33)], (n - k) / n, [1.0]
        for _ in range(32):
            survival.append(survival[-1] * power)
        width = 2
        while starts[-1] <= n - k:
            power *= power
            for _ in range(16):
                starts.append(starts[-1] + width)
                survival.append(survival[-1] * power)
            width *= 2
        count = max(2, sum(start <= n - k for start in starts))
        weights = [math.floor((survival[t] - survival[t + 1]) * 2.0**38) for t in range(count)]
    share = 2**24 - len(weights)
    scaled = [weight * share // max(1, sum(weights)) for weight in weights]
    scaled[scaled.index(max(scaled))] += share - sum(scaled)
    stack = Stack(bytes(reader.rest()))
    tokens = [stack.pop([f + 1 for f in scaled]) for _ in range(k)]
    widths = [0 if t < 32 else 1 + (t - 32) // 16 for t in tokens]
    gaps = [t if t < 32 else (16 + t % 16) << w for t, w in zip(tokens, widths, strict=True)]
    high = [stack.bits(width - 16) << 16 if width > 16 else 0 for width in widths]
    plain = [min(width, 16) for width in widths if width] + [1] * signs
    first = next(at for at in range(len(plain) + 1) if sum(plain[at:]) <= 31)
    values = [stack.bits(width) for width in plain[:first]]
    assert stack.words == []
    text = f"{stack.state:b}"[1:]
    assert len(text) == sum(plain[first:])
    for width in plain[first:]:
        values.append(int(text[:width], 2))
        text = text[width:]
    for at, width in enumerate(widths):
        gaps[at] += high[at] + (values.pop(0) if width else 0)
    signs = values
    return np.cumsum([gap + 1 for gap in gaps]) - 1, np.array(signs, dtype=bool)


def slow_golomb(code, k, signs):
    text = "".join(f"{byte:08b}" for byte in code[2:])
    b, gaps = code[1], []
    for _ in range(k):
        quotient = text.index("1")
        gaps.append(quotient << b)
        text = text[quotient + 1 :]
    gaps = [gap + int(text[b * at : b * at + b] or "0", 2) for at, gap in enumerate(gaps)]
    text = text[b * k :]
    assert set(text[signs:]) <= {"0"}
    assert len(text) - signs < 8
    return np.cumsum([gap + 1 for gap in gaps]) - 1, np.array([c == "1" for c in text[:signs]], dtype=bool)


@pytest.mark.parametrize(
    ("n", "k"), [(1000, 200), (1000, 10), (30, 1), (2, 1), (3_000_000, 40), (MAX_PLACES, 9)]
)
def test_a_slow_reader_of_the_format_finds_the_same(n, k):
    rng = np.random.default_rng(n + k)
    where = np.unique(rng.integers(0, n, k)) if n > 10_000 else at_random(n, k, 0)[0]
    signs = rng.integers(0, 2, len(where)).astype(bool)
    for coder, slow in (
        ("entropy", lambda code: slow_entropy(code, n, len(where), len(where))),
        ("golomb", lambda code: slow_golomb(code, len(where), len(where))),
    ):
        found = slow(encode_positions(where, n, signs, coder=coder))
        assert (found[0] == where).all()
        assert (found[1] == signs).all()


def test_a_slow_reader_reads_a_table_too():
    where = np.concatenate([np.arange(start, start + 50, dtype=np.int64) for start in range(7, 90_000, 900)])
    code = encode_positions(where, 100_000)
    assert code[0] == entropy.TABLE
    assert (slow_entropy(code, 100_000, len(where), 0)[0] == where).all()


# ---- round trip ------------------------------------------------------------------------------------------------------


@FEW
@given(placed(), st.sampled_from(CODERS))
def test_positions_and_signs_come_back(case, coder):
    where, n, signs = case
    code = encode_positions(where, n, signs, coder=coder)
    back, found = decode_positions(code, n, len(where), signs=signs is not None)
    assert back.dtype == np.int64
    assert (back == where).all()
    assert (found == (signs if signs is not None else np.zeros(0, dtype=bool))).all()
    assert encode_positions(where, n, signs, coder=coder) == code


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("n", [0, 1, 2, 10_000])
def test_no_place_and_every_place_take_no_bytes(coder, n):
    for k in {0, n}:
        assert encode_positions(np.arange(k), n, coder=coder) == b""
        assert (decode_positions(b"", n, k)[0] == np.arange(k)).all()


# ---- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("p", SHARES)
def test_entropy_coding_is_within_one_per_cent_of_the_bound(p, seed):
    n = 100_000
    where, signs = at_random(n, math.ceil(p * n), seed)
    size = 8 * len(encode_positions(where, n, signs))
    assert size <= 1.01 * bound_bits(n, len(where), signs=True)


@pytest.mark.parametrize(
    ("p", "bits"), [(0.2, 0.93875), (0.1, 0.57558), (0.04, 0.28340), (0.01, 0.09108), (1 / 400, 0.02778)]
)
def test_golomb_takes_the_bits_that_theory_says(p, bits):
    n = 400_000
    where, signs = at_random(n, math.ceil(p * n), 0)
    measured = 8 * len(encode_positions(where, n, signs, coder="golomb")) / n
    assert measured == pytest.approx(bits, rel=0.004)
    assert measured * n >= bound_bits(n, len(where), signs=True)


@pytest.mark.parametrize(
    ("p", "b"), [(0.2, 2), (0.1, 3), (0.04, 4), (0.01, 6), (1 / 400, 8), (0.001, 9), (0.5, 0), (0.9, 0)]
)
def test_golombs_parameter(p, b):
    assert rice_parameter(1_000_000, round(p * 1_000_000)) == b


@FEW
@given(st.integers(2, 3000), st.floats(0.001, 0.5))
def test_golombs_parameter_is_best_for_geometric_gaps(n, p):
    k = max(1, int(p * n))

    def mean(b):  # bits of a position, methods: b + 1 / (1 - (1-p)^(2^b))
        return b - 1 / math.expm1(2.0**b * math.log1p(-k / n))

    best = min(range(31), key=mean)
    assert mean(rice_parameter(n, k)) <= mean(best) * 1.001


@pytest.mark.parametrize("p", [0.5, 0.37, 0.05, 0.01, 0.9, 0.99])
def test_masks_are_within_two_per_cent_of_their_entropy(p):
    n = 10_000
    where, _ = at_random(n, int(p * n), 5)
    entropy_bits = -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert 8 * len(encode_positions(where, n)) <= 1.02 * entropy_bits


def test_clusters_are_cheaper_than_chance():
    where = np.concatenate(
        [np.arange(start, start + 50, dtype=np.int64) for start in range(0, 100_000, 1000)]
    )
    assert 8 * len(encode_positions(where, 100_000)) < 0.1 * bound_bits(100_000, len(where))


def test_bound_is_the_logarithm_of_the_number_of_ways():
    assert bound_bits(50, 20) == pytest.approx(math.log2(math.comb(50, 20)), rel=1e-12)
    assert bound_bits(50, 20, signs=True) == pytest.approx(math.log2(math.comb(50, 20)) + 20, rel=1e-12)


# ---- models ----------------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(2, MAX_PLACES), st.floats(0, 0.5))
def test_frequencies_are_whole_and_fill_the_range(n, p):
    k = max(1, int(n * p))
    frequencies = entropy.geometric_frequencies(n, k)
    assert frequencies.sum() == 1 << 24
    assert frequencies.min() >= 1
    assert len(frequencies) > entropy.tokens_of(np.array([n - k]))[0]


@pytest.mark.parametrize("p", [0.5, 0.1, 0.001])
def test_frequencies_are_those_of_geometric_gaps(p):
    frequencies = entropy.geometric_frequencies(10**9, int(p * 10**9)) / 2**24
    ends = np.append(entropy.STARTS[1:], 1 << 31)[: len(frequencies)]
    exact = np.exp(entropy.STARTS[: len(frequencies)] * np.log1p(-p)) - np.exp(ends * np.log1p(-p))
    assert np.abs(frequencies - exact).max() < len(frequencies) * 2.0**-24


@FEW
@given(st.integers(0, MAX_PLACES))
def test_every_gap_has_one_token(gap):
    token = int(entropy.tokens_of(np.array([gap]))[0])
    assert entropy.STARTS[token] <= gap < entropy.STARTS[token] + (1 << entropy.WIDTHS[token])


@pytest.mark.parametrize(
    "table", [[0, 0], [0, 1], [1, 1], [255, 255, 255], [1] + [255] * 447, [255] + [0] * 447]
)
def test_any_table_gives_frequencies(table):
    frequencies = entropy.table_frequencies(np.array(table, dtype=np.uint8))
    assert frequencies.sum() == 1 << 24
    assert frequencies.min() >= 1


def test_a_table_keeps_counts_within_a_sixteenth():
    counts = np.concatenate([np.arange(0, 5000), [2**30, 2**31 - 1]])
    table = entropy._table(counts).astype(int) - 1
    weights = np.where(table < 0, 0, (8 + table % 8) << np.maximum(table, 0) // 8)
    assert (np.abs(weights - 8 * counts) <= counts / 2).all()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "n", "signs"),
    [
        ([1, 1], 5, None),
        ([2, 1], 5, None),
        ([-1], 5, None),
        ([5], 5, None),
        ([0], MAX_PLACES + 1, None),
        ([0], 5, [True, False]),
        ([[0]], 5, None),
    ],
)
def test_positions_that_are_none_are_refused(where, n, signs):
    signs = None if signs is None else np.array(signs)
    with pytest.raises(ValueError, match=r"Positions|Places|Signs"):
        encode_positions(np.array(where, dtype=np.int64), n, signs)


def test_an_unknown_coder_is_refused():
    with pytest.raises(ValueError, match="'huffman'"):
        encode_positions(np.array([1]), 5, coder="huffman")


@pytest.mark.parametrize("coder", CODERS)
def test_a_code_cut_or_lengthened_is_refused(coder):
    where, signs = at_random(1000, 50, 1)
    code = encode_positions(where, 1000, signs, coder=coder)
    for wrong in (code[:-1], code[:2], code[:1], b"", code + b"\0", code + b"\1", b"\7" + code[1:]):
        with pytest.raises(CodecError):
            decode_positions(wrong, 1000, 50, signs=True)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (b"\2\0\x69", "filled up with zeros"),
        (b"\2\3\xf8", "below 4"),
        (b"\2\x20\xf8", "parameter"),
        (b"\2\0\0", "2 positions"),
    ],
)
def test_a_golomb_code_that_is_none_is_refused(code, word):
    assert decode_positions(b"\2\0\x68", 4, 2, signs=True)[0].tolist() == [1, 2]
    with pytest.raises(CodecError, match=word):
        decode_positions(code, 4, 2, signs=code[1] == 0)


@pytest.mark.parametrize(("n", "k"), [(5, 6), (-1, 0), (MAX_PLACES + 1, 1), (10**18, 1), (5, -1)])
def test_counts_that_cannot_be_are_refused_before_anything_is_made(n, k):
    with pytest.raises(CodecError, match="places"):
        decode_positions(b"\0\1", n, k)


@MANY
@given(st.binary(max_size=40), st.integers(0, 300), st.integers(0, 300), st.booleans())
def test_random_bytes_are_refused_or_positions(data, n, k, signs):
    try:
        where, bits = decode_positions(data, n, k, signs=signs)
    except CodecError:
        return
    assert len(where) == k
    assert len(bits) == (k if signs else 0)
    assert k == 0 or (np.diff(where, prepend=-1).min() > 0 and where[-1] < n)


# ---- fields ----------------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(0, 2**63 - 1))
def test_whole_numbers_come_back(value):
    reader = Reader(varint(value))
    assert reader.varint("x", 2**63) == value
    reader.end("x")


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 9 + b"\x01", b"\x7f"])
def test_numbers_cut_padded_or_too_large_are_refused(data):
    with pytest.raises(CodecError):
        Reader(data).varint("x", 100)


@pytest.mark.parametrize("value", [-1, 2**63])
def test_numbers_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="63"):
        varint(value)
