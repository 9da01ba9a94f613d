"""float32 as float16 or bfloat16: half the bytes, rounded to the nearest, ties to even."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from common.codecs.fields import CodecError

Half = Literal["float16", "bf16"]
Floats = NDArray[np.float32]

DTYPES: dict[Half, torch.dtype] = {"float16": torch.float16, "bf16": torch.bfloat16}
LARGEST: dict[Half, str] = {"float16": "65504", "bf16": "3.39e38"}


def encode_half(values: Floats, half: Half) -> bytes:
    """Return values in two bytes each, little-endian.

    Args:
        values: Finite float32 (n,).
        half: float16 keeps 11 bits of mantissa, up to 65504, with steps of 6e-8 near zero; bf16 keeps 8 bits and float32's range.

    Raises:
        CodecError: A value that is not finite, or beyond the range of the half.
    """
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(DTYPES[half])
    bad = int((~torch.isfinite(rounded)).sum())
    if bad:
        raise CodecError(
            f"expected finite values up to {LARGEST[half]}, got {bad} that are not; use a wider codec or look at the training"
        )
    return rounded.view(torch.int16).numpy().astype("<i2").tobytes()


def decode_half(data: bytes | memoryview, n: int, half: Half) -> Floats:
    """Return the values (n,) of `encode_half`, as float32.

    Raises:
        CodecError: Another number of bytes, or a value that is not finite.
    """
    if len(data) != 2 * n:
        raise CodecError(f"expected {2 * n} bytes for {n} values of {half}, got {len(data)}")
    coded = torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.int16))
    values = coded.view(DTYPES[half]).to(torch.float32)
    if not torch.isfinite(values).all():
        raise CodecError(f"expected finite values of {half}, got others")
    return values.numpy()
