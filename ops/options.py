"""What the operator typed. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT = "default"


@dataclass
class Options:
    """What the operator typed; None where nothing was typed."""

    method: str = "fedavg"
    data: str = DEFAULT
    task: str | None = None
    sites: str | None = None
    rounds: int | None = None
    local_epochs: int | None = None
    seed: int = 0
    out: Path | None = None
    settings: Sequence[str] = ()
