"""Random numbers from explicit seeds only: same parts, same numbers, in every process and on every day."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: str | int) -> int:
    """Return a seed in [0, 2^63) from named parts, by SHA-256.

    Parts are told apart by type and length, so ("a", "bc") and ("ab", "c"), or 1 and "1", give different seeds.

    Raises:
        TypeError: A part that is neither text nor a whole number: its text form need not be the same everywhere.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise TypeError(f"A seed is derived from texts and whole numbers, got {type(part).__name__}.")
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

    The global state of the CPU, and of the CUDA device where one is given, is what it was before when the block ends,
    also by an error. Other devices are left alone, which `torch.manual_seed` would not do.

    Args:
        seed: 0 to 2^63 - 1.
        device: Device that the code draws on beside the CPU.
    """
    cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else [], device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
