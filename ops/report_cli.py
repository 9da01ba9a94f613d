"""`wardround report` and `wardround watch`: a run folder as a page, and live."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

RUN = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="A run folder: the one that `wardround trial` named.")
]
REFRESH_SECONDS = 0.25


def report(
    run: RUN,
    tables: Annotated[bool, typer.Option("--tables", help="Also print the closing tables.")] = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="RUN_DIR",
            help="Show each hospital's figure beside that of another run over the same data; may be repeated.",
        ),
    ] = None,
) -> None:
    """Build report.html again from a run's event files; also of a run that still goes on, or was cut off.

    RUN_DIR is the folder that `wardround trial` named: runs/TIME-METHOD, or what --out said.

    Example, a personal method beside local training and FedAvg: wardround report RUN --against LOCAL --against FEDAVG
    """
    from ops.report import write_report
    from ops.tables import print_closing

    console = Console()
    path = write_report(run, against or ())
    if tables:
        print_closing(run, console)
    else:
        console.print(Text(str(path)), soft_wrap=True)


def watch(
    run: RUN,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands now and end.")] = False,
) -> None:
    """Follow a run until its end, from any terminal. Ctrl-C ends the watching, not the run.

    RUN_DIR is the folder that `wardround trial` named: runs/TIME-METHOD, or what --out said.

    Exit code 1 if the run failed.
    """
    from ops.live import LiveView
    from ops.story_reader import check_run_folder
    from ops.tables import print_closing

    check_run_folder(run)
    console = Console()
    try:
        with LiveView(run, console) as view:
            while not view.story.ended and not once:
                time.sleep(REFRESH_SECONDS)
                view.refresh()
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    print_closing(run, console)
    verdict = view.story.verdict
    raise typer.Exit(1 if verdict is not None and not verdict.ok else 0)
