"""`wardround run`: the coordinator's command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ops.approve_cli import PROJECT
from ops.cli_options import EPOCHS, METHOD, OUT, ROUNDS, SEED, SETTINGS, TRANSPORT, typed_command

FEDERATION = Annotated[
    Path,
    typer.Option(
        "--federation",
        "-f",
        metavar="FILE",
        help="federation.json: what every site's data must look like, and settings.",
    ),
]


def run_command(
    project: PROJECT,
    federation: FEDERATION,
    method: METHOD = "fedavg",
    rounds: ROUNDS = None,
    local_epochs: EPOCHS = None,
    seed: SEED = 0,
    sites: Annotated[
        str | None,
        typer.Option(
            "--sites", "-s", metavar="ALIAS,ALIAS", help="Who takes part; all admitted if left out."
        ),
    ] = None,
    settings: SETTINGS = None,
    out: OUT = None,
    listen: Annotated[
        str,
        typer.Option(
            "--listen", metavar="HOST[:PORT]", help="Where sites connect; the port is the project's."
        ),
    ] = "0.0.0.0",
    control: Annotated[
        str,
        typer.Option("--control", metavar="HOST:PORT", help="Control API, on this machine's loopback alone."),
    ] = "127.0.0.1:9093",
    transport: TRANSPORT = "memory",
) -> None:
    """Run a project's federation from its coordinator; the hospitals connect by themselves.

    Starts the SuperLink on the project's port and the ServerApp, admits the
    approved keys, waits for the sites, runs the method, writes report.html,
    and stops what it started. No data is needed here. What is approved or
    revoked meanwhile (`wardround site approve, revoke`) counts within seconds.

    [bold]Before that[/bold]

      wardround provision project.toml --out liver-2026    kits
      wardround site approve oak-request.json --project liver-2026

    [bold]Examples[/bold]

      wardround run --project liver-2026 --federation federation.json
      wardround run --project liver-2026 --federation federation.json \\
        --method ditto --rounds 20 --sites oak,elm --set ready_timeout=3600

    [bold]A minimal federation.json[/bold] (docs/data.md has all keys)

      {"name": "liver", "data": {"task": "segmentation",
       "channels": \\["CT"], "labels": \\["background", "tumour"]}}

    Stopped or failed: `wardround resume RUN_FOLDER` goes on from the last
    complete round.
    """
    from ops.options import Options
    from ops.run import Place, run_project

    options = Options(
        method=method, sites=sites, rounds=rounds, local_epochs=local_epochs, seed=seed, out=out,
        settings=tuple(settings or ()),
    )  # fmt: skip
    place = Place(project, listen, control)
    raise typer.Exit(run_project(options, federation, place, transport=transport, command=typed_command()))
