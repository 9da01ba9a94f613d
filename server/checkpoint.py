"""The coordinator's state on disk: one folder a round, written whole or not at all, the last two kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import ConfigError, PayloadError, WardroundError
from common.payload import State, Tensors
from common.store import (
    keep_rounds,
    read_state,
    saved_rounds,
    state_folder,
    write_bytes,
    write_state,
    write_tensors,
)

KEEP = 2
WIRE = "wire:"  # no namespace of a method's state has a colon


class Checkpoints:
    """Checkpoints of one run folder.

    Args:
        folder: The run folder; `checkpoints/` and `models/` are made in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoints"
        self.models = folder / "models"

    def begun(self) -> bool:
        """Return whether the run was begun before."""
        return (self.folder / "run.json").exists()

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, ascending."""
        return saved_rounds(self.folder)

    def newest(
        self, config: str, refused: Callable[[int, WardroundError], None]
    ) -> tuple[int, State | None, int]:
        """Return (round, state, attempt) of the newest checkpoint that can be read, and count the attempt.

        Args:
            config: The run's configuration as canonical JSON; the first call writes it beside the checkpoints.
            refused: Told of a checkpoint that cannot be read.

        Returns:
            Round 0 and no state where the run has completed none; attempt 0 where it begins.

        Raises:
            ConfigError: The checkpoints are of another configuration.
            PayloadError: There are checkpoints, and none can be read.
        """
        note = self._note()
        known = note.get("config", config)
        if known != config:
            raise ConfigError(
                f"The run was started with another configuration ({_difference(known, config)}); a run keeps its own. "
                "Restore config.json, or start a new run."
            )
        attempt = int(note.get("attempts", -1)) + 1
        write_bytes(
            self.folder / "run.json", json.dumps({"config": config, "attempts": attempt}, indent=1).encode()
        )
        rounds = self.rounds()
        for number in reversed(rounds):
            try:
                return number, self.read(number), attempt
            except WardroundError as error:
                refused(number, error)
        if rounds:
            raise PayloadError(
                f"None of the checkpoints (rounds {', '.join(map(str, rounds))}) can be read: they are altered or cut. "
                "Restore the run folder from a backup, or start a new run."
            )
        return 0, None, attempt

    def _note(self) -> dict[str, Any]:
        try:
            note = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise PayloadError(
                "The note beside the checkpoints (run.json) cannot be read. Restore the run folder from a backup, or "
                "start a new run.", detail=str(error),
            ) from error  # fmt: skip
        return note if isinstance(note, dict) else {}

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


def joined(state: State, wire: State) -> State:
    """Return a method's state with what compression must know after a round, each name of it under a prefix."""
    tensors = {WIRE + name: tensor for name, tensor in wire.tensors.items()}
    values = {WIRE + name: value for name, value in wire.values.items()}
    return State(state.tensors | tensors, state.values | values)


def parted(whole: State) -> tuple[State, State]:
    """Return the method's state and compression's out of a checkpoint."""
    state, wire = State(), State()
    for name, tensor in whole.tensors.items():
        own = name.startswith(WIRE)
        (wire if own else state).tensors[name.removeprefix(WIRE) if own else name] = tensor
    for name, value in whole.values.items():
        own = name.startswith(WIRE)
        (wire if own else state).values[name.removeprefix(WIRE) if own else name] = value
    return state, wire


def _difference(known: str, config: str) -> str:
    """Return the first setting in which two configurations differ."""
    before, after = _flat(json.loads(known)), _flat(json.loads(config))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            return f"{key} was {before.get(key)}, is {after.get(key)}"
    return "spelling"


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: str(value)[:80]}
    flat: dict[str, str] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
