"""Piecewise-constant vectors, as the updates of pFedNet's CER are: where runs start, and the level of each.

Bytes: the number of runs m, the length of the code of the starts, that code, the levels. The first run starts at 0, so m - 1
starts among d - 1 places are coded (`positions.py`). The levels are a vector (m,) in a form of its own, which may be lossy
(float16, bf16) or ternary again: runs of 0, +μ and -μ, what STC makes of a piecewise-constant update.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.codecs.fields import CodecError, Reader, varint
from common.codecs.halves import decode_half, encode_half
from common.codecs.positions import Coder, decode_positions, encode_positions
from common.codecs.ternary import decode_ternary, encode_ternary

Levels = Literal["float32", "float16", "bf16", "ternary"]
Floats = NDArray[np.float32]

WIDTH: dict[Levels, int] = {"float32": 32, "float16": 16, "bf16": 16, "ternary": 1}


def run_starts(values: Floats) -> NDArray[np.int64]:
    """Return where runs of values equal in their bits start, int64 (m,): 0 first, none for no value."""
    bits = np.ascontiguousarray(values).view(np.int32)
    if not len(bits):
        return np.zeros(0, dtype=np.int64)
    return np.concatenate((np.zeros(1, dtype=np.int64), np.flatnonzero(bits[1:] != bits[:-1]) + 1))


def encode_piecewise(values: Floats, levels: Levels = "float32", *, coder: Coder = "entropy") -> bytes:
    """Return the bytes of a vector, as runs.

    A vector with hardly a run costs as many bytes as its values in the levels' form, and a few: where starts would cost more
    than the levels they save, each value is a run of its own.

    Args:
        values: Finite float32 (d,), d < 2^31.
        levels: Form of the levels; float32 and ternary come back to the bit.
        coder: Of starts and of ternary positions.

    Raises:
        CodecError: Values that are not finite, or that the form of the levels cannot hold.
    """
    if not np.isfinite(values).all():
        raise CodecError("expected finite values, got NaN or infinity; look at the training that made them")
    d = len(values)
    starts = run_starts(values)
    code = encode_positions(starts[1:] - 1, max(0, d - 1), coder=coder)
    if 8 * len(code) > WIDTH[levels] * (d - len(starts)):
        starts = np.arange(d)
        code = encode_positions(starts[1:] - 1, max(0, d - 1), coder=coder)
    body = _encode_levels(values[starts], levels, coder)
    return varint(len(starts)) + varint(len(code)) + code + body


def decode_piecewise(data: bytes | memoryview, d: int, levels: Levels = "float32") -> Floats:
    """Return the vector (d,) of `encode_piecewise`.

    Raises:
        CodecError: Bytes that are no such form for d values.
    """
    reader = Reader(data)
    m = reader.varint("the number of runs", d)
    if (m == 0) != (d == 0):
        raise CodecError(f"expected a run for {d} values, got {m}")
    code = reader.take(reader.varint("the length of the starts", reader.left()), "the starts")
    starts, _ = decode_positions(code, max(0, d - 1), max(0, m - 1))
    found = _decode_levels(reader.rest(), m, levels)
    lengths = np.diff(starts + 1, prepend=0, append=d) if d else starts
    return np.repeat(found, lengths)


def _encode_levels(values: Floats, levels: Levels, coder: Coder) -> bytes:
    if levels == "ternary":
        return encode_ternary(values, coder=coder)
    if levels == "float32":
        return values.astype("<f4").tobytes()
    return encode_half(values, levels)


def _decode_levels(data: memoryview, m: int, levels: Levels) -> Floats:
    if levels == "ternary":
        return decode_ternary(data, m)
    if levels != "float32":
        return decode_half(data, m, levels)
    if len(data) != 4 * m:
        raise CodecError(f"expected {4 * m} bytes for {m} levels, got {len(data)}")
    found = np.frombuffer(data, dtype="<f4").astype(np.float32)
    if not np.isfinite(found).all():
        raise CodecError("expected finite levels, got others")
    return found
