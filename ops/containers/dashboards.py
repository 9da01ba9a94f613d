"""The dashboard's container: shows the run folders in the runs volume, which it may only read.

It listens on all of its container's addresses; the composition publishes the port on the machine's loopback alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import ConfigError, WardroundError
from ops.containers import places
from ops.containers.superlink import tell

NAME = "dashboards"
"""The service's name, under which a monitoring system on its network calls it."""
PORT = 8080
EVERYWHERE = "0.0.0.0"


def port(variables: places.Variables) -> int:
    """Return the port to listen on.

    Raises:
        ConfigError: It is none.
    """
    found = variables.number("DASHBOARD_PORT")
    if found is not None and not 1 <= found <= 65535:
        raise ConfigError(f"WARDROUND_DASHBOARD_PORT must be a port from 1 to 65535, got {found}.")
    return found or PORT


def silent_after(variables: places.Variables) -> float | None:
    """Return the seconds without an event after which a run is silent; None for the dashboard's own default.

    Raises:
        ConfigError: It is no whole number of minutes, or 0.
    """
    minutes = variables.number("DASHBOARD_SILENT_MINUTES")
    if minutes == 0:
        raise ConfigError("WARDROUND_DASHBOARD_SILENT_MINUTES must be 1 or more, got 0.")
    return None if minutes is None else 60.0 * minutes


def run(variables: places.Variables, runs: Path) -> None:
    """Show the runs until told to stop.

    Args:
        variables: WARDROUND_DASHBOARD_PORT, _NAMES (further names it is called by, separated by spaces) and
            _SILENT_MINUTES.
        runs: The runs volume.

    Raises:
        ConfigError: A variable that cannot be used, or no runs volume.
        ProcessError: The port cannot be had.
    """
    where, silent = port(variables), silent_after(variables)
    from ops.dashboard import serve
    from ops.dashboard_runs import SILENT_SECONDS, Board

    board = Board(runs, silent_after=silent or SILENT_SECONDS)
    names = [NAME, *variables.text("DASHBOARD_NAMES").split()]
    ready = f"dashboards: listens on port {where} of this container; the composition publishes it on loopback alone"
    serve(board, EVERYWHERE, where, names, lambda address: print(ready, flush=True))  # noqa: T201 the container's log


def main() -> int:
    """Show the runs volume."""
    try:
        run(places.Variables(), places.RUNS)
    except WardroundError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
