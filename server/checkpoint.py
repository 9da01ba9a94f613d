"""The coordinator's state on disk: one folder a round, written whole or not at all, the last two kept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from common.payload import State, Tensors
from common.store import read_state, write_state, write_tensors

KEEP = 2
_ROUND = re.compile(r"round-(\d{6})$")


class Checkpoints:
    """Checkpoints of one run folder.

    Args:
        folder: The run folder; `checkpoints/` and `models/` are made in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoints"
        self.models = folder / "models"

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_ROUND.match(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def write(self, round_: int, state: State) -> int:
        """Write the state after a round, drop older ones, and return its bytes."""
        size = write_state(self.folder / f"round-{round_:06d}", state)
        for old in self.rounds()[:-KEEP]:
            shutil.rmtree(self.folder / f"round-{old:06d}", ignore_errors=True)
        return size

    def read(self, round_: int) -> State:
        """Read the state after a round.

        Raises:
            PayloadError: Missing, incomplete or altered.
        """
        return read_state(self.folder / f"round-{round_:06d}")

    def save_model(self, name: str, model: Tensors, notes: dict[str, str]) -> int:
        """Write a model into `models/` and return its bytes."""
        return write_tensors(self.models / name, model, notes)
