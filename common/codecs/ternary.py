"""Sparse ternary compression (STC; Sattler et al., arXiv 1903.02891, algorithm 1) and its bytes.

Of a tensor the k = ⌈p n⌉ values of largest magnitude are kept, as mean magnitude times sign; the rest is zero. What was left
out, the residual, is added to the next update by the caller (error feedback).

Bytes of a ternary tensor: k, the magnitude as float32, the positions and signs (`positions.py`).
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.codecs.fields import CodecError, Reader, varint
from common.codecs.positions import Coder, decode_positions, encode_positions

SIGN, MAGNITUDE = 0x80000000, 0x7FFFFFFF
INFINITY = 0x7F800000  # bits; at or above it a magnitude is not finite

Floats = NDArray[np.float32]


def kept(n: int, p: float) -> int:
    """Return k = ⌈p n⌉, with p taken as the decimal number it is written as (7 % of 100 is 7, not 8).

    Args:
        n: Values, ≥ 0.
        p: Share kept, in (0, 1].

    Raises:
        ValueError: p outside (0, 1].
    """
    if not 0 < p <= 1:  # also refuses NaN
        raise ValueError(f"The share p of values that are kept must be above 0 and at most 1, got {p}.")
    return math.ceil(Fraction(repr(float(p))) * n)


def compress(tensor: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return a tensor in ternary form, and what that leaves out.

    Exactly k = ⌈p n⌉ values are kept; of equal magnitudes the ones that come first. Zeros are never kept: where fewer than k
    values are not zero, those are all.

    Args:
        tensor: Finite float32 values A (accumulated update: new update plus the last residual), any shape.
        p: Share kept, in (0, 1].

    Returns:
        ternary: float32 like A: T = μ sign(A) where kept, 0 elsewhere; μ the mean of the kept |A|, in float64, then rounded.
        residual: float32 like A: A - T.

    Raises:
        ValueError: p outside (0, 1], a tensor that is not float32, or values that are not finite.
    """
    k = kept(tensor.numel(), p)
    if tensor.dtype != torch.float32:
        raise ValueError(f"STC takes float32, got {tensor.dtype}; convert it first.")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).numpy()
    ternary = np.zeros_like(flat)
    if len(flat):
        bits = flat.view(np.uint32)
        # Bits without the sign, as whole numbers, are in the order of the magnitudes, and quicker to compare.
        magnitude = (bits & np.uint32(MAGNITUDE)).view(np.int32)
        if int(magnitude.max()) >= INFINITY:
            raise ValueError(
                "STC takes finite values, got NaN or infinity; look at the learning rate of what made them."
            )
        where = _largest(magnitude, k)
        if len(where):
            mu = np.float32(magnitude[where].view(np.float32).mean(dtype=np.float64))
            ternary[where] = np.copysign(mu, flat[where])
            if mu == 0:  # a mean below the smallest float32: no sign is worth sending
                ternary[where] = 0.0
    return torch.from_numpy(ternary).reshape(tensor.shape), torch.from_numpy(flat - ternary).reshape(
        tensor.shape
    )


def _largest(magnitude: NDArray[np.int32], k: int) -> NDArray[np.int64]:
    """Return the places, growing, of the k largest values above 0; of equal ones the first."""
    n = len(magnitude)
    threshold = int(np.partition(magnitude, n - k)[n - k]) if k < n else 0
    if threshold <= 0:
        return np.flatnonzero(magnitude)
    where = np.flatnonzero(magnitude >= threshold)
    surplus = len(where) - k
    if surplus:
        equal = np.flatnonzero(magnitude[where] == threshold)
        where = np.delete(where, equal[len(equal) - surplus :])
    return where


def encode_ternary(values: Floats, *, coder: Coder = "entropy") -> bytes:
    """Return the bytes of values that are 0, +μ or -μ for one μ ≥ 0.

    Args:
        values: float32 (n,), n < 2^31. -0.0 counts as not zero, with μ = 0: what comes back is the same to the bit.
        coder: Of positions and signs.

    Raises:
        CodecError: Values of another form.
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    where = np.flatnonzero(bits)
    if not len(where):
        return varint(0)
    chosen = bits[where]
    magnitude = chosen & np.uint32(MAGNITUDE)
    mu = magnitude[0]
    if not (magnitude == mu).all():
        found = len(np.unique(magnitude[: 1 << 16]))
        raise CodecError(
            f"expected values 0, +mu and -mu with one mu, got {max(2, found)} or more magnitudes; compress it first"
        )
    if int(mu) >= INFINITY:
        raise CodecError("expected a finite magnitude, got NaN or infinity")
    signs = (chosen & np.uint32(SIGN)) != 0
    head = varint(len(where)) + np.array([mu], dtype="<u4").tobytes()
    return head + encode_positions(where, len(bits), signs, coder=coder)


def decode_ternary(data: bytes | memoryview, n: int) -> Floats:
    """Return the values (n,) of `encode_ternary`.

    Raises:
        CodecError: Bytes that are no such form for n values.
    """
    reader = Reader(data)
    k = reader.varint("the number of values kept", n)
    bits = np.zeros(n, dtype=np.uint32)
    if k:
        mu = int(np.frombuffer(reader.take(4, "the magnitude"), dtype="<u4")[0])
        if mu >= INFINITY:  # also a set sign
            raise CodecError("expected a finite magnitude without a sign, got another one")
        where, signs = decode_positions(reader.rest(), n, k, signs=True)
        bits[where] = np.uint32(mu) | (signs.astype(np.uint32) << np.uint32(31))
    reader.end("the values")
    return bits.view(np.float32)


def encode_mask(values: NDArray[np.bool_], *, coder: Coder = "entropy") -> bytes:
    """Return the bytes of a mask: how many are set, and where.

    Args:
        values: bool (n,), n < 2^31.
        coder: Of positions.
    """
    where = np.flatnonzero(values)
    return varint(len(where)) + encode_positions(where, len(values), coder=coder)


def decode_mask(data: bytes | memoryview, n: int) -> NDArray[np.bool_]:
    """Return the mask (n,) of `encode_mask`.

    Raises:
        CodecError: Bytes that are no such form for n values.
    """
    reader = Reader(data)
    k = reader.varint("the number of set values", n)
    values = np.zeros(n, dtype=np.bool_)
    values[decode_positions(reader.rest(), n, k)[0]] = True
    return values
