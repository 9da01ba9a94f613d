"""`wardround dashboard`: the runs of a folder in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

RUNS = Annotated[Path, typer.Argument(metavar="[RUNS_DIR]", help="The folder that holds the run folders.")]
LISTEN = Annotated[
    str, typer.Option("--listen", metavar="ADDRESS:PORT", help="Where to listen; port 0 takes a free one.")
]
NAMES = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        metavar="HOST",
        help="A name by which browsers call it beside localhost, e.g. that of a proxy before it; may be repeated.",
    ),
]
SILENT = Annotated[
    float,
    typer.Option(
        "--silent-after", metavar="MINUTES", min=0.1, help="Minutes without an event until a run is silent."
    ),
]


def dashboard(
    runs: RUNS = Path("runs"),
    listen: LISTEN = "127.0.0.1:8080",
    name: NAMES = None,
    silent_after: SILENT = 5.0,
) -> None:
    """Show all runs of a folder in the browser, from their event files.

    Follows runs that go on; reads, never writes.

    [bold]Pages[/bold]

      /                 all runs: state, round, who takes part, figure, bytes, last event

      /runs/NAME        what is wrong now, which site, since when, what to do; then the report

      /metrics          for Prometheus

      /api/runs.json    the same as /, for programs

      /healthz          ok, and the newest event's age

    There is no login and no TLS. Reach it from elsewhere by
    `ssh -L 8080:127.0.0.1:8080 COORDINATOR`, or put a proxy with a login
    before it and give the proxy's name with --name.

    [bold]Example[/bold]

      wardround dashboard runs --listen 127.0.0.1:9000 --silent-after 30

    Ctrl-C ends the dashboard, not the runs.
    """
    from ops.dashboard import is_loopback, serve, split_address
    from ops.dashboard_runs import Board

    console = Console()
    host, port = split_address(listen)

    def ready(address: str) -> None:
        told = f"The dashboard answers at {address}; Ctrl-C ends it, not the runs."
        if not is_loopback(host):
            told += "\nIt has no login and no TLS: whoever reaches this address sees all runs."
        console.print(Text(told), soft_wrap=True)

    serve(Board(runs, silent_after=60.0 * silent_after), host, port, name or (), ready)
