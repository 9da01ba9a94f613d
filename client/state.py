"""A site's state of a run, on the hospital's own volume: the last two rounds, so that a resume finds its partner."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from common.payload import State
from common.store import read_state, write_state

KEEP = 2
_ROUND = re.compile(r"round-(\d{6})$")


class SiteStates:
    """States of one run by round, newest `KEEP` kept.

    Args:
        folder: The run's own folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rounds(self) -> list[int]:
        """Return the rounds that have a state, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_ROUND.match(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def before(self, round_: int) -> State | None:
        """Return the newest state older than a round (a site may have sat out some), or None.

        Raises:
            PayloadError: The saved state is incomplete or altered.
        """
        older = [number for number in self.rounds() if number < round_]
        return read_state(self._path(older[-1])) if older else None

    def write(self, round_: int, state: State) -> None:
        """Save the state after a round; states of later rounds (of an abandoned continuation) and old ones go."""
        write_state(self._path(round_), state)
        numbers = self.rounds()
        older = [number for number in numbers if number <= round_]
        for number in [*older[:-KEEP], *(number for number in numbers if number > round_)]:
            shutil.rmtree(self._path(number), ignore_errors=True)

    def _path(self, round_: int) -> Path:
        return self.folder / f"round-{round_:06d}"


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
