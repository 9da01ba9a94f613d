"""Seeds and generators derived from what they are for, never from global state.

    seed = derive_seed("batches", run_seed, "hospital-1", 3)

The same words give the same seed in every process and on every machine, and different words give unrelated
seeds, so that nothing random depends on what ran before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: str | int) -> int:
    """Return a seed in 0 to 2^63 - 1 that depends on the parts, their order and their types alone.

    Args:
        parts: Words and whole numbers that say what the seed is for.

    Raises:
        TypeError: A part that is neither text nor a whole number; its text form might differ between machines.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise TypeError(f"A seed is derived from texts and whole numbers, got {type(part).__name__}.")
        text = str(part).encode()
        # type and length first, so that ("a", "bc") and ("ab", "c"), or 1 and "1", cannot meet
        digest.update(b"%c%d:" % (b"s" if isinstance(part, str) else b"i", len(text)))
        digest.update(text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def forked_torch_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run code that can only use torch's global generators (dropout, layer initialisation) with a seed of its own.

    The CPU's generator and, where given, that of one CUDA device are seeded on entry and put back on exit, also
    after an exception. Generators of other devices are left alone: `torch.manual_seed` would seed them, too.

    Args:
        seed: 0 to 2^63 - 1.
        device: Device that the code draws on beside the CPU; None or a CPU device means the CPU alone.
    """
    cuda = device is not None and device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if cuda and device else 0
    with torch.random.fork_rng(devices=[index] if cuda else [], device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        yield
