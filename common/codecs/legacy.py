"""The size by which pFedNet's public code measures its compression, as a measure only: nothing here travels.

There an update is flattened to one column of decimal numbers, one line each, and its file is put into a zip archive; the "size"
is the DEFLATE stream of the file and the "ratio" that over the size of the *text*. A float32 takes about 12 bytes as text
and 4 in memory, so that such a ratio is about three times one against float32. It is here to compare with published
figures, and for nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

BLOCK = 1 << 16


@dataclass(frozen=True)
class LegacySize:
    """Bytes of an update by the public code's measure.

    Attributes:
        values: Numbers in the update.
        text: Bytes of the decimal text.
        deflated: Bytes of its DEFLATE stream, without an archive's headers.
    """

    values: int
    text: int
    deflated: int

    @property
    def ratio(self) -> float:
        """Text over deflated, as published; 1 for nothing."""
        return self.text / self.deflated if self.text else 1.0

    @property
    def ratio_of_float32(self) -> float:
        """Four bytes a value over deflated: what a reader takes such a ratio to be; 1 for nothing."""
        return 4 * self.values / self.deflated if self.values else 1.0


def legacy_size(tensors: Mapping[str, Tensor]) -> LegacySize:
    """Measure an update as pFedNet's public code does: all its tensors in one column, in their order.

    Args:
        tensors: float32 (or float64) tensors; each value is written with the fewest digits that read back as itself.
    """
    deflate = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS)
    values = text = deflated = 0
    for lines in _lines(tensors.values()):
        values += lines.count(b"\n")
        text += len(lines)
        deflated += len(deflate.compress(lines))
    return LegacySize(values, text, deflated + len(deflate.flush()))


def _lines(tensors: Iterable[Tensor]) -> Iterable[bytes]:
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).numpy()
        for start in range(0, len(flat), BLOCK):
            block = flat[start : start + BLOCK]
            # numpy's own `str` of a scalar is what the public code writes; each distinct value is formatted once
            bits, back = np.unique(block.view(f"i{block.itemsize}"), return_inverse=True)
            words = [str(value) for value in bits.view(block.dtype)]
            yield "".join(f"{words[place]}\n" for place in back.tolist()).encode()
