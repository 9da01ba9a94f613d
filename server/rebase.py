"""A cycle in which a site that lost the model it should hold is asked again in the same round, with the whole model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common.errors import BaseLostError
from server.cycle import Cycle


class WholeAgain(Cycle):
    """A cycle that asks a site again at once where it answers `BaseLostError`: once, whatever `rounds.retries` says.

    Nothing is wrong with such a site or with the way to it, so it is not waited for and no quorum is asked. What it is
    sent then is the caller's (`message`): the whole model, which needs nothing that the site could have lost.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._whole: set[str] = set()

    def _failed(self, site: str, trouble: tuple[str, str], miss: Callable[[str, str, str], None]) -> None:
        if trouble[0] != BaseLostError.code or site in self._whole:
            super()._failed(site, trouble, miss)
            return
        self._whole.add(site)
        watched = self._waiting[site]
        watched.trouble = trouble
        watched.attempts += 1
        watched.again = time.monotonic()
