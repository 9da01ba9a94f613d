"""The table of codecs: how named tensors become few bytes. Light to import: no torch and no numpy until one is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """One way to write named tensors as bytes. Its name is in the bytes, in `PayloadHead.codec` and in configurations.

    Attributes:
        name: Unique.
        title: What it is, for a person.
        lossless: True if every tensor it accepts comes back to the bit. (What it cannot hold, it refuses.)
        takes: Which float32 tensors it accepts; other dtypes travel as they are.
    """

    name: str
    title: str
    lossless: bool
    takes: str

    def encode(self, tensors: Mapping[str, Tensor]) -> bytes:
        """Return tensors as self-describing bytes with a checksum.

        Raises:
            PayloadError: As `common.codecs.container.encode`.
        """
        from common.codecs import container

        return container.encode(self.name, tensors)

    def decode(
        self, data: bytes | memoryview, template: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors; with a template they have exactly its names, shapes and dtypes.

        Raises:
            PayloadError: As `common.codecs.container.decode`.
        """
        from common.codecs import container

        return container.decode(self.name, data, template)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("bf16", "bfloat16", False, "finite values"),
        Codec("float16", "float16", False, "finite values up to 65504"),
        Codec("mask", "0 and 1, entropy coded", True, "0 and 1, of any dtype"),
        Codec("piecewise", "runs of one value, levels in float32", True, "finite values"),
        Codec("piecewise-bf16", "runs of one value, levels in bfloat16", False, "finite values"),
        Codec(
            "piecewise-float16", "runs of one value, levels in float16", False, "finite values up to 65504"
        ),
        Codec(
            "piecewise-ternary", "runs of one value, levels 0, +mu, -mu", True, "0, +mu and -mu per tensor"
        ),
        Codec("ternary", "0, +mu, -mu (STC), entropy coded", True, "0, +mu and -mu per tensor"),
        Codec("ternary-golomb", "0, +mu, -mu (STC), Golomb-Rice coded", True, "0, +mu and -mu per tensor"),
    )
}


def get_codec(name: str) -> Codec:
    """Return a registered codec.

    Raises:
        ConfigError: Unknown name, with the nearest known one.
    """
    if name not in CODECS:
        raise ConfigError(f"Unknown codec '{name}'. {nearest(name, CODECS)}")
    return CODECS[name]
