"""A site's state of a run, on the hospital's own volume: the last two rounds, so that a resume finds its partner."""

from __future__ import annotations

from pathlib import Path

from common.payload import State
from common.store import keep_rounds, read_state, saved_rounds, state_folder, write_state

KEEP = 2


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
            PayloadError: The saved state is incomplete or altered.
        """
        older = [number for number in self.rounds() if number < round_]
        return read_state(state_folder(self.folder, older[-1])) if older else None

    def write(self, round_: int, state: State) -> None:
        """Save the state after a round; states of later rounds (of an abandoned continuation) and old ones go."""
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
