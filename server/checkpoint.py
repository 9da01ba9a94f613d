"""The coordinator's state on disk: one folder a round, written whole or not at all, the last two kept."""

from __future__ import annotations

from pathlib import Path

from common.payload import State, Tensors
from common.store import keep_rounds, read_state, saved_rounds, state_folder, write_state, write_tensors

KEEP = 2


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
        return saved_rounds(self.folder)

    def write(self, round_: int, state: State) -> int:
        """Write the state after a round, drop older ones and those of an abandoned continuation, and return its bytes."""
        size = write_state(state_folder(self.folder, round_), state)
        keep_rounds(self.folder, round_, KEEP)
        return size

    def read(self, round_: int) -> State:
        """Read the state after a round.

        Raises:
            PayloadError: Missing, incomplete or altered.
        """
        return read_state(state_folder(self.folder, round_))

    def save_model(self, name: str, model: Tensors, notes: dict[str, str]) -> int:
        """Write a model into `models/` and return its bytes."""
        return write_tensors(self.models / name, model, notes)
