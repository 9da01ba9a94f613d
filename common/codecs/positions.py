"""Positions of k set places among n, with or without a sign each, in bytes close to the bound log2 C(n,k) (+ k).

Two coders, told apart by the first byte:

    entropy      asymmetric numeral systems over the gaps (`entropy.py`): within a few bytes of the bound
    golomb       Golomb-Rice, as in sparse ternary compression (Sattler et al., arXiv 1903.02891, algorithm 3): needs no
                 library at the other end, costs 0.3 to 2 % more

Above half density the unset places are coded instead; with none of them there is nothing to code. Golomb-Rice is written as all
unary parts, then all remainders, then the signs, rather than word by word: the same number of bits, and vector operations can
read it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.codecs import entropy
from common.codecs.fields import CodecError, Reader

Coder = Literal["entropy", "golomb"]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

GOLOMB = 2  # first byte; 0 and 1 are the models of `entropy`
MAX_PLACES = entropy.MAX_GAP
MAX_RICE = 31


def bound_bits(n: int, k: int, *, signs: bool = False) -> float:
    """Return log2 C(n, k), plus k for signs: fewest bits for positions at random, on average.

    Args:
        n: Places, ≥ 0.
        k: Set ones, 0 to n.
        signs: Whether each has an equiprobable sign.
    """
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways / math.log(2) + (k if signs else 0)


def rice_parameter(n: int, k: int) -> int:
    """Return Golomb-Rice's b = 1 + ⌊log2(log(φ - 1) / log(1 - k/n))⌋ with φ = (√5 + 1) / 2, at least 0.

    Args:
        n: Places, > k.
        k: Set ones, ≥ 1.
    """
    golden = (math.sqrt(5) + 1) / 2
    ratio = math.log(golden - 1) / math.log1p(-k / n)
    return min(MAX_RICE, max(0, 1 + math.floor(math.log2(ratio))))


def encode_positions(
    positions: Ints, n: int, signs: Bools | None = None, *, coder: Coder = "entropy"
) -> bytes:
    """Return positions, and signs, as bytes. How many there are is not in them.

    Args:
        positions: int64 (k,), strictly growing, in [0, n).
        n: Places, 0 to 2^31 - 1.
        signs: bool (k,), or None for positions without a sign.
        coder: Which coder.

    Returns:
        Nothing at all for no or all places without signs.

    Raises:
        ValueError: Positions or counts that do not fit, or an unknown coder.
    """
    _check(positions, n, signs)
    if coder not in ("entropy", "golomb"):
        raise ValueError(f"Positions are coded by 'entropy' or 'golomb', got {coder!r}.")
    coded = _complement(positions, n) if 2 * len(positions) > n else positions
    if not len(coded) and (signs is None or not len(signs)):
        return b""
    gaps = np.diff(coded, prepend=np.int64(-1)) - 1
    if coder == "entropy":
        return entropy.encode(gaps, n, signs)
    return _golomb(gaps, n, signs)


def decode_positions(data: bytes | memoryview, n: int, k: int, *, signs: bool = False) -> tuple[Ints, Bools]:
    """Return what `encode_positions` was given.

    Memory is at most about 60 bytes per place beside the data, whatever the bytes are.

    Args:
        data: All bytes of the code and no others.
        n: Places, 0 to 2^31 - 1.
        k: Set ones.
        signs: Whether each has a sign.

    Returns:
        positions: int64 (k,), strictly growing, in [0, n).
        signs: bool (k,), or (0,) without signs.

    Raises:
        CodecError: Counts that cannot be, or bytes that are no such code.
    """
    view = memoryview(data)
    if not 0 <= n <= MAX_PLACES or not 0 <= k <= n:
        raise CodecError(f"expected 0 to {MAX_PLACES} places and no more set ones, got {k} of {n}")
    coded, signed = min(k, n - k), k if signs else 0
    if not coded and not signed:
        if len(view):
            raise CodecError(f"expected no bytes for {k} positions of {n}, got {len(view)}")
        positions, bits = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
    else:
        golomb = len(view) > 0 and view[0] == GOLOMB
        gaps, bits = (_read_golomb if golomb else entropy.decode)(view, n, coded, signed)
        gaps += 1
        positions = np.cumsum(gaps) - 1
        if coded and positions[-1] >= n:
            raise CodecError(f"expected positions below {n}, got {int(positions[-1])}")
    return (_complement(positions, n) if coded < k else positions), bits


def _check(positions: Ints, n: int, signs: Bools | None) -> None:
    if positions.ndim != 1 or positions.dtype != np.int64:
        raise ValueError(f"Positions must be int64 (k,), got {positions.shape} of {positions.dtype}.")
    if not 0 <= n <= MAX_PLACES:
        raise ValueError(f"Places must be 0 to {MAX_PLACES}, got {n}; split the tensor.")
    if len(positions) and (positions[0] < 0 or positions[-1] >= n or (np.diff(positions) <= 0).any()):
        raise ValueError(f"Positions must grow strictly and lie in [0, {n}).")
    if signs is not None and (signs.shape != positions.shape or signs.dtype != np.bool_):
        raise ValueError(f"Signs must be bool {positions.shape}, got {signs.shape} of {signs.dtype}.")


def _complement(positions: Ints, n: int) -> Ints:
    rest = np.ones(n, dtype=np.bool_)
    rest[positions] = False
    return np.flatnonzero(rest)


def _golomb(gaps: Ints, n: int, signs: Bools | None) -> bytes:
    k = len(gaps)
    b = rice_parameter(n, k) if k else 0
    ends = np.cumsum((gaps >> b) + 1)  # a unary part is ⌊g / 2^b⌋ zeros and a one
    unary = int(ends[-1]) if k else 0
    bits = np.zeros(unary + k * b + (0 if signs is None else len(signs)), dtype=np.uint8)
    bits[ends - 1] = 1
    remainders = bits[unary : unary + k * b].reshape(k, b)
    for place in range(b):
        remainders[:, place] = (gaps >> (b - 1 - place)) & 1
    if signs is not None:
        bits[unary + k * b :] = signs
    return bytes([GOLOMB, b]) + np.packbits(bits).tobytes()


def _read_golomb(data: memoryview, n: int, k: int, signs: int) -> tuple[Ints, Any]:
    reader = Reader(data)
    reader.byte("the coder's number")
    b = reader.byte("Golomb's parameter")
    if b > MAX_RICE:
        raise CodecError(f"expected Golomb's parameter of at most {MAX_RICE}, got {b}")
    most = (k + ((n - k) >> b) + k * b + signs + 7) // 8
    if reader.left() > most:
        raise CodecError(f"expected at most {most} bytes for {k} positions of {n}, got {reader.left()}")
    bits = np.unpackbits(np.frombuffer(reader.rest(), dtype=np.uint8)).view(np.bool_)
    ends = np.flatnonzero(bits[: k + ((n - k) >> b)])[:k]
    if len(ends) < k:
        raise CodecError(f"expected {k} positions, got {len(ends)}")
    unary = int(ends[-1]) + 1 if k else 0
    used = unary + k * b + signs
    if len(bits) != (used + 7) // 8 * 8 or bits[used:].any():
        raise CodecError(f"expected {used} bits, filled up with zeros, got {len(bits)}")
    gaps = (np.diff(ends, prepend=-1).astype(np.int64) - 1) << b
    remainders = bits[unary : unary + k * b].reshape(k, b)
    for place in range(b):
        gaps += remainders[:, place].astype(np.int64) << (b - 1 - place)
    return gaps, bits[unary + k * b : used].copy()
