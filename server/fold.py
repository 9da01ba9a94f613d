"""Folding replies in the fixed order of the sites, whatever order they arrive in.

Floating-point sums depend on their order. A reply is therefore folded when its turn has come: when every site before it
has answered or failed. One that arrives early waits on disk, not in memory, so a round needs one reply's memory however
many sites there are, and the same replies give the same bytes whoever was faster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from common.frames import Parts, from_frames, to_frames
from common.proto.wardround_pb2 import Frame

IN_MEMORY = 32 << 20  # early replies up to this size wait in memory, larger ones in a temporary file


class OrderedFold:
    """Calls `fold(site, parts)` in the order of the sites.

    Args:
        order: Aliases of the sites that were asked, in their fixed order.
        fold: Takes one reply; called once per site that answered.
        folder: Where early replies wait.
        hold: Let all replies wait until `release`, so that one may still be left out when all are known.
    """

    def __init__(
        self,
        order: Sequence[str],
        fold: Callable[[str, Parts], None],
        folder: Path | None = None,
        *,
        hold: bool = False,
    ) -> None:
        self._order = list(order)
        self._fold = fold
        self._folder = folder
        self._hold = hold
        self._early: dict[str, tempfile.SpooledTemporaryFile[bytes] | None] = {}
        self._next = 0

    def put(self, site: str, parts: Parts) -> None:
        """Take a site's reply."""
        if not self._hold and self._next < len(self._order) and self._order[self._next] == site:
            self._fold(site, parts)
            self._next += 1
            self._drain()
        else:
            self._early[site] = self._spool(parts)

    def skip(self, site: str) -> None:
        """Note that a site does not contribute to this round; a reply of it that waits is dropped."""
        waiting = self._early.get(site)
        if waiting is not None:
            waiting.close()
        self._early[site] = None
        if not self._hold:
            self._drain()

    def release(self) -> None:
        """Fold what was held."""
        self._hold = False
        self._drain()

    def _drain(self) -> None:
        while self._next < len(self._order) and self._order[self._next] in self._early:
            site = self._order[self._next]
            file = self._early.pop(site)
            if file is not None:
                with file:
                    self._fold(site, _read(file))
            self._next += 1

    def close(self) -> None:
        """Drop what still waits."""
        for file in self._early.values():
            if file is not None:
                file.close()
        self._early.clear()

    def _spool(self, parts: Parts) -> tempfile.SpooledTemporaryFile[bytes]:
        folder = str(self._folder) if self._folder else None
        file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=folder)  # noqa: SIM115 closed when folded
        for frame in to_frames(parts):
            data = frame.SerializeToString()
            file.write(len(data).to_bytes(8, "little"))
            file.write(data)
        return file


def _read(file: tempfile.SpooledTemporaryFile[bytes]) -> Parts:
    file.seek(0)

    def frames() -> object:
        while size := file.read(8):
            yield Frame.FromString(file.read(int.from_bytes(size, "little")))

    return from_frames(frames())  # type: ignore[arg-type]
