"""A site's state of a run, on the hospital's own volume: the last rounds, so that a resume finds its partner."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import PayloadError
from common.payload import State
from common.store import keep_rounds, read_state, saved_rounds, state_folder, write_bytes, write_state

FIRST = "first.json"
KEEP = 3
"""The coordinator keeps two checkpoints. If the newer one is spoilt while the site is a round ahead, the older one's
partner is the third from the end."""


class SiteStates:
    """States of one run by round, newest `KEEP` kept.

    Args:
        folder: The run's own folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rounds(self) -> list[int]:
        """Return the rounds that have a state, ascending."""
        return saved_rounds(self.folder)

    def before(self, round_: int) -> State | None:
        """Return the newest state older than a round (a site may have sat out some), or None.

        Raises:
            PayloadError: The saved state is incomplete or altered, or what a round before this one left is gone.
        """
        rounds = self.rounds()
        older = [number for number in rounds if number < round_]
        if older:
            return read_state(state_folder(self.folder, older[-1]))
        if rounds and self._first() < round_:
            raise PayloadError(
                f"The site's state before round {round_} is gone: it has kept rounds {rounds[0]} to {rounds[-1]}. "
                "Beginning anew would give another result. Continue from a later checkpoint, or start a new run."
            )
        return None

    def _first(self) -> int:
        """Return the round in which the site first took part."""
        try:
            return int(json.loads((self.folder / FIRST).read_text(encoding="utf-8"))["round"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PayloadError(
                "The note on the site's first round is missing or cannot be read; the run cannot be continued here.",
                detail=str(error),
            ) from error

    def write(self, round_: int, state: State) -> None:
        """Save the state after a round; states of later rounds (of an abandoned continuation) and old ones go.

        Raises:
            StorageError: The volume is full or cannot be written; what was there stays.
        """
        if not any(number < round_ for number in self.rounds()):
            write_bytes(self.folder / FIRST, json.dumps({"round": round_}).encode())
        write_state(state_folder(self.folder, round_), state)
        keep_rounds(self.folder, round_, KEEP)


def join_states(**parts: State) -> State:
    """Put several states into one, each under its own prefix."""
    whole = State()
    for prefix, part in parts.items():
        whole.tensors.update({f"{prefix}:{name}": tensor for name, tensor in part.tensors.items()})
        whole.values.update({f"{prefix}:{name}": value for name, value in part.values.items()})
    return whole


def split_state(whole: State, prefix: str) -> State:
    """Take one state out of a joined one."""
    start = f"{prefix}:"
    return State(
        {name[len(start) :]: tensor for name, tensor in whole.tensors.items() if name.startswith(start)},
        {name[len(start) :]: value for name, value in whole.values.items() if name.startswith(start)},
    )
