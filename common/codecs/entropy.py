"""Entropy coding of gaps and signs with asymmetric numeral systems (ANS), by the library constriction.

A gap g ≥ 0 (unset places before a set one) is split into a token and raw bits: tokens 0 to 31 are the gaps themselves; from
32 on each octave [2^e, 2^(e+1)) has 16 tokens, each followed by the e - 4 low bits of g. Within a token gaps count as equally
likely, which for geometric gaps costs less than 0.001 bits each. Tokens are coded under one of two models:

    geometric   P(g) = (1-p)^g p with p = k/n: positions at random; nothing beside k and n is needed
    table       one byte a token, its count rounded to four significant bits: runs, clusters, whatever is not random

Both ends must have the same integer frequencies to the last one. So models are made by additions, multiplications and
divisions alone, which IEEE 754 defines to the bit (no `exp`, no `log`), and are handed to the library as whole numbers that
add up to what it distributes, so that it has nothing left to round.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from common.codecs.fields import CodecError, Reader, varint

GEOMETRIC, TABLE = 0, 1
PRECISION = 24  # bits of the library's probabilities
WEIGHT_BITS = 38  # of a weight before scaling: its product with 2^24 stays below 2^63
DIRECT_BITS, MANTISSA_BITS = 5, 4
DIRECT, STEPS = 1 << DIRECT_BITS, 1 << MANTISSA_BITS
LOW_BITS = 16  # raw bits go in portions, since the library's uniform model ends at 2^24
SEED_BITS = 31  # plain bits in the coder's first word: an empty coder would spend 24 bits on its first symbol, whatever it is
MAX_GAP = (1 << 31) - 1
TOKENS = DIRECT + (31 - DIRECT_BITS) * STEPS  # up to MAX_GAP

Ints = NDArray[np.int64]


def _layout() -> tuple[Ints, Ints]:
    starts, widths = list(range(DIRECT)), [0] * DIRECT
    for octave in range(DIRECT_BITS, 31):
        low = octave - MANTISSA_BITS
        starts += [(1 << octave) + (step << low) for step in range(STEPS)]
        widths += [low] * STEPS
    return np.array(starts, dtype=np.int64), np.array(widths, dtype=np.int64)


STARTS, WIDTHS = _layout()


def tokens_of(gaps: Ints) -> NDArray[np.int32]:
    """Return the token (k,) of each gap (k,), 0 ≤ g < 2^31."""
    # The exponent and the first four bits of the mantissa of a float64 are the octave and the step within it.
    high = gaps.astype(np.float64).view(np.int64) >> (52 - MANTISSA_BITS)
    high += DIRECT - ((1023 + DIRECT_BITS) << MANTISSA_BITS)
    return np.where(gaps < DIRECT, gaps, high).astype(np.int32)


def geometric_frequencies(n: int, k: int) -> Ints:
    """Return the frequencies of the tokens of geometric gaps with p = k/n.

    Args:
        n: Places, k < n < 2^31.
        k: Set places, ≥ 1.

    Returns:
        int64 (T,), T ≥ 2 the tokens up to that of gap n - k, each ≥ 1, of sum 2^24.
    """
    count = max(2, int(tokens_of(np.array([n - k]))[0]) + 1)
    q = (n - k) / n
    survival, power = [1.0], q  # P(g ≥ start of token), and q to the width of a token
    for octave in range(DIRECT_BITS - 1, 31):
        for _ in range(STEPS if octave >= DIRECT_BITS else DIRECT):
            survival.append(survival[-1] * power)
        power *= power if octave >= DIRECT_BITS else q  # widths are 1 (below 32), 2, 4, 8, ...
    weights = -np.diff(np.array(survival[: count + 1]))
    return _frequencies(np.floor(weights * float(1 << WEIGHT_BITS)).astype(np.int64))


def table_frequencies(table: NDArray[np.uint8]) -> Ints:
    """Return the frequencies that the bytes of a table (T,) stand for: (8 + m) 2^e for byte 8e + m + 1, 0 for byte 0.

    Returns:
        int64 (T,), each ≥ 1, of sum 2^24.
    """
    code = table.astype(np.int64) - 1
    return _frequencies(np.where(code < 0, 0, (8 + (code & 7)) << (np.maximum(code, 0) >> 3)))


def _frequencies(weights: Ints) -> Ints:
    """Scale whole numbers ≥ 0 to a sum of 2^24 with at least 1 for each; what rounding leaves goes to the largest."""
    share = (1 << PRECISION) - len(weights)
    total = max(1, int(weights.sum()))
    scaled = weights * share // total
    scaled[int(np.argmax(scaled))] += share - int(scaled.sum())
    return scaled + 1


def _table(counts: Ints) -> NDArray[np.uint8]:
    eight = counts * 8
    shift = np.maximum(np.frexp(eight.astype(np.float64))[1] - 4, 0)
    rounded = eight + ((np.int64(1) << shift) >> 1)
    shift = np.maximum(np.frexp(rounded.astype(np.float64))[1] - 4, 0)
    code = shift * 8 + ((rounded >> shift) & 7) + 1
    return np.where(counts == 0, 0, code).astype(np.uint8)


def _model(frequencies: Ints) -> Any:
    # The library gives each symbol 1 and shares out 2^24 - T in proportion: exactly these numbers.
    return constriction.stream.model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


def encode(gaps: Ints, n: int, signs: NDArray[np.bool_] | None) -> bytes:
    """Return gaps and signs as bytes: a model's number, its table if it has one, the ANS words without zero bytes at the end.

    Args:
        gaps: int64 (k,), ≥ 0, with sum + k ≤ n.
        n: Places, < 2^31.
        signs: Any number of bits that follow the gaps, one bit each, or None.
    """
    tokens = tokens_of(gaps)
    where, widths, wide = _raw(tokens)
    raw = gaps[where] - STARTS[tokens[where]]
    bits = np.zeros(0, dtype=np.int64) if signs is None else signs.astype(np.int64)
    values = np.concatenate((raw & ((1 << LOW_BITS) - 1), bits))
    plain, seeded = _plain(widths, len(bits))
    coder = constriction.stream.stack.AnsCoder(_seed(values[seeded:], plain[seeded:]))
    _push(coder, values[:seeded], plain[:seeded])
    _push(coder, raw[wide] >> LOW_BITS, widths[wide] - LOW_BITS)
    head = bytes([GEOMETRIC])
    if len(gaps):
        frequencies, head = _choose(np.bincount(tokens), n)
        coder.encode_reverse(tokens, _model(frequencies))
    return head + coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def decode(data: memoryview, n: int, k: int, signs: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Return the gaps (k,) and the bits (signs,) of `encode`.

    Memory is bounded by n, k and the number of signs, whatever the bytes are.

    Raises:
        CodecError: Bytes that `encode` cannot have written for these counts, as far as they show it.
    """
    reader = Reader(data)
    kind = reader.byte("the model's number")
    if kind == TABLE and k:
        count = reader.varint("tokens in the table", TOKENS)
        if count < 2:
            raise CodecError(f"expected a table of at least 2 tokens, got {count}")
        frequencies = table_frequencies(np.frombuffer(reader.take(count, "the table"), dtype=np.uint8))
    elif kind == GEOMETRIC:
        frequencies = geometric_frequencies(n, k) if k else np.zeros(0, dtype=np.int64)
    else:
        raise CodecError(f"expected model {GEOMETRIC} or {TABLE}, got {kind}")
    coder = _coder(bytes(reader.rest()))
    tokens = coder.decode(_model(frequencies), k) if k else np.zeros(0, dtype=np.int32)
    where, widths, wide = _raw(tokens)
    high = _pop(coder, widths[wide] - LOW_BITS)
    plain, seeded = _plain(widths, signs)
    values = np.concatenate((_pop(coder, plain[:seeded]), _unseed(coder, plain[seeded:])))
    raw = values[: len(where)]
    raw[wide] += high << LOW_BITS
    gaps = STARTS[tokens]
    gaps[where] += raw
    return gaps, values[len(where) :].astype(np.bool_)


def _raw(tokens: NDArray[np.int32]) -> tuple[Ints, Ints, Ints]:
    """Return which gaps have raw bits, how many, and which of these have more than a low portion."""
    where = np.flatnonzero(tokens >= DIRECT)
    widths = WIDTHS[tokens[where]]
    return where, widths, np.flatnonzero(widths > LOW_BITS)


def _plain(widths: Ints, signs: int) -> tuple[Ints, int]:
    """Return the widths of what is equally likely, low portions and signs, and where the part in the first word begins."""
    plain = np.concatenate((np.minimum(widths, LOW_BITS), np.ones(signs, dtype=np.int64)))
    return plain, len(plain) - int((np.cumsum(plain[: -SEED_BITS - 1 : -1]) <= SEED_BITS).sum())


def _seed(values: Ints, widths: Ints) -> NDArray[np.uint32]:
    """Return the coder's first word: a one and the values, the first of them highest; no word for no value."""
    word = 1
    for value, width in zip(values.tolist(), widths.tolist(), strict=True):
        word = word << width | value
    return np.array([word] if len(values) else [], dtype=np.uint32)


def _unseed(coder: Any, widths: Ints) -> Ints:
    """Return the values of the first word, which is all that must be left of a code."""
    left = coder.get_compressed().tolist()
    word = left[0] if len(left) == 1 else 1
    if len(left) != (len(widths) > 0) or word.bit_length() != int(widths.sum()) + 1:
        raise CodecError("expected a code that ends with its last value, got more or less of it")
    values = np.zeros(len(widths), dtype=np.int64)
    for place in reversed(range(len(widths))):
        values[place] = word & ((1 << int(widths[place])) - 1)
        word >>= int(widths[place])
    return values


def _choose(counts: Ints, n: int) -> tuple[Ints, bytes]:
    """Return the frequencies that make the tokens shorter, table included, and the bytes that name them."""
    used = np.flatnonzero(counts)
    geometric = geometric_frequencies(n, int(counts.sum()))
    table = _table(np.pad(counts, (0, max(0, 2 - len(counts)))))
    named = table_frequencies(table)
    gain = float((counts[used] * (np.log2(named[used]) - np.log2(geometric[used]))).sum())
    head = bytes([TABLE]) + varint(len(table)) + table.tobytes()
    return (named, head) if gain > 8 * (len(head) - 1) else (geometric, bytes([GEOMETRIC]))


def _push(coder: Any, values: Ints, widths: Ints) -> None:
    if len(values):
        sizes = (np.int64(1) << widths).astype(np.int32)
        coder.encode_reverse(values.astype(np.int32), constriction.stream.model.Uniform(), sizes)


def _pop(coder: Any, widths: Ints) -> Ints:
    if not len(widths):
        return np.zeros(0, dtype=np.int64)
    sizes = (np.int64(1) << widths).astype(np.int32)
    values: Ints = coder.decode(constriction.stream.model.Uniform(), sizes).astype(np.int64)
    return values


def _coder(code: bytes) -> Any:
    if code.endswith(b"\0"):
        raise CodecError("expected a code without zero bytes at its end, got some")
    words = np.frombuffer(code + bytes(-len(code) % 4), dtype="<u4").astype(np.uint32)
    return constriction.stream.stack.AnsCoder(words)
