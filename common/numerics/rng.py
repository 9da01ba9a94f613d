"""Random numbers from explicit seeds only: same parts, same numbers, in every process and on every day."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: str | int) -> int:
    """Return a seed in [0, 2^63) from named parts, by SHA-256.

    Parts are told apart by type and length, so ("a", "bc") and ("ab", "c"), or 1 and "1", give different seeds.
    """
    digest = hashlib.sha256()
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`."""
    made = torch.Generator()
    made.manual_seed(derive_seed(*parts))
    return made


@contextmanager
def forked_torch_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run code that can only draw from torch's global generators (layer initialisation, dropout) with a seed.

    The global state is what it was before when the block ends.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=True):
        torch.manual_seed(seed)
        yield
