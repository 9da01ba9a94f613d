"""Which site each of Flower's nodes is: told by the coordinator, which registered their keys.

A node shows by its key who it is, and says an alias that its own configuration gives. Flower tells the ServerApp only the
node's number. So the coordinator's command, which knows whose key it registered under which number, writes that down in the
run folder, and the roster holds every node to it. The file is read again whenever it changed: a SuperLink that is started
anew gives new numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from common.errors import StorageError
from common.store import write_bytes

NODES_FILE = "nodes.json"


def write_nodes(folder: Path, nodes: Mapping[int, str]) -> None:
    """Write which site each node is, whole or not at all.

    Args:
        folder: The run folder.
        nodes: Alias by Flower's node id.

    Raises:
        StorageError: The volume cannot be written.
    """
    text = json.dumps({str(node): alias for node, alias in nodes.items()}, indent=2) + "\n"
    write_bytes(folder / NODES_FILE, text.encode())


class Admitted:
    """Reads the list, again whenever it changed.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NODES_FILE
        self._seen: tuple[int, int, int] | None = None
        self._nodes: dict[int, str] | None = None

    def __call__(self) -> dict[int, str] | None:
        """Return the alias by node id; None where no coordinator wrote a list, so that nothing can be compared.

        Raises:
            StorageError: There is a list, and it cannot be read. Nobody is taken in unseen then.
        """
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            if self._seen is None:
                return None
            raise StorageError("The list of the sites' nodes (nodes.json) is gone. Resume the run.") from None
        except OSError as error:
            raise _unreadable(error) from error
        now = (found.st_mtime_ns, found.st_size, found.st_ino)
        if now != self._seen:
            try:
                document = json.loads(self._path.read_text(encoding="utf-8"))
                self._nodes = {int(node): str(alias) for node, alias in document.items()}
            except (OSError, ValueError, AttributeError) as error:
                raise _unreadable(error) from error
            self._seen = now
        return self._nodes


def _unreadable(error: Exception) -> StorageError:
    return StorageError(
        "The list of the sites' nodes (nodes.json in the run folder) cannot be read. Resume the run: it is written anew.",
        detail=str(error),
    )
