"""Options that several commands share, said the same way in each."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

METHOD = Annotated[
    str, typer.Option("--method", "-m", help="Registered method; `wardround methods` lists them.")
]
ROUNDS = Annotated[
    int | None,
    typer.Option("--rounds", "-r", min=1, help="Rounds; the data's preset (federation.json) if left out."),
]
EPOCHS = Annotated[int | None, typer.Option("--local-epochs", "-e", min=1, help="Local epochs per round.")]
SEED = Annotated[int, typer.Option("--seed", min=0, help="Every random choice derives from it.")]
OUT = Annotated[
    Path | None, typer.Option("--out", "-o", help="Run folder (new or empty); runs/TIME-METHOD if left out.")
]
SETTINGS = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="key=value, repeatable: --set lr=0.003 --set mu=0.1 --set quorum=0.67. `wardround settings` lists the keys.",
    ),
]
TRANSPORT = Annotated[
    Literal["memory", "file"],
    typer.Option(
        "--transport",
        help="Where the SuperLink keeps messages: in memory, for models of any size; or in a file, which a "
        "SuperLink that is restarted reads again (models up to about 100 MB).",
    ),
]


def typed_command() -> str:
    """Return the command line as it was typed."""
    return "wardround " + shlex.join(sys.argv[1:])
