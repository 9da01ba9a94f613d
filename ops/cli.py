"""`wardround`: the operator's command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from common.errors import WardroundError
from ops.cli_options import EPOCHS, METHOD, OUT, ROUNDS, SEED, SETTINGS, TRANSPORT, typed_command
from ops.failure import print_failure
from ops.options import DEFAULT, Options

app = typer.Typer(
    name="wardround",
    help="Federated learning for personalised medical imaging: the model goes from hospital to hospital, the patients stay.\n\n"
    "Start with: wardround trial",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()

DATA = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="Data root (one folder per site), or 'default': simulated hospitals on the MNI152 brain.",
    ),
]
TASK = Annotated[
    str | None,
    typer.Option("--task", help="segmentation, classification or tabular; only checked, the data says it."),
]
SITES = Annotated[str | None, typer.Option("--sites", "-s", help="How many sites, or which (alias,alias).")]
DEVICE = Annotated[str, typer.Option("--device", help="Where workers compute: auto, cpu, cuda, cuda:N.")]


def _options(method, data, task, sites, rounds, local_epochs, seed, out, settings) -> Options:  # type: ignore[no-untyped-def]  # noqa: ANN001
    return Options(method, data, task, sites, rounds, local_epochs, seed, out, tuple(settings or ()))


@app.command()
def trial(
    method: METHOD = "fedavg",
    data: DATA = DEFAULT,
    task: TASK = None,
    sites: SITES = None,
    rounds: ROUNDS = None,
    local_epochs: EPOCHS = None,
    seed: SEED = 0,
    out: OUT = None,
    settings: SETTINGS = None,
    runtime: Annotated[
        Literal["fast", "stock"],
        typer.Option("--runtime", help="Pre-forked relays and short polls, or Flower's own parts."),
    ] = "fast",
    device: DEVICE = "auto",
    transport: TRANSPORT = "memory",
    threads: Annotated[
        int,
        typer.Option("--threads", min=0, help="CPU threads per worker; 0 shares the cores among the sites."),
    ] = 0,
) -> None:
    """Run a federation of hospital processes on this machine: TLS, authenticated sites, one command.

    Makes keys and certificates, prepares and checks the data, starts SuperLink, SuperNodes, relays and one worker per
    hospital, runs the method, writes report.html, and stops everything it started.

    [bold]Examples[/bold]

      wardround trial                                    simulated hospitals

      wardround trial --method ditto --set lam=0.5       a model for each one

      wardround trial --data data/vessels --rounds 20    four real sites
    """
    from ops.trial import run_trial

    options = _options(method, data, task, sites, rounds, local_epochs, seed, out, settings)
    code = run_trial(
        options, runtime=runtime, transport=transport, device=device, threads=threads, command=typed_command()
    )
    raise typer.Exit(code)


@app.command()
def simulate(
    method: METHOD = "fedavg",
    data: DATA = DEFAULT,
    task: TASK = None,
    sites: SITES = None,
    rounds: ROUNDS = None,
    local_epochs: EPOCHS = None,
    seed: SEED = 0,
    out: OUT = None,
    settings: SETTINGS = None,
    device: DEVICE = "auto",
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="CPU threads of the worker; 0 takes torch's choice.")
    ] = 0,
) -> None:
    """Run the same apps in Flower's simulation runtime: many sites, one machine, no TLS.

    Same options, same run folder, same figures as `wardround trial` for the same seed.
    """
    from ops.trial import run_simulated

    options = _options(method, data, task, sites, rounds, local_epochs, seed, out, settings)
    raise typer.Exit(run_simulated(options, device=device, threads=threads, command=typed_command()))


@app.command()
def resume(
    run: Annotated[
        Path,
        typer.Argument(help="Run folder of a run, trial or simulation, e.g. runs/20260101-120000-fedavg."),
    ],
    project: Annotated[
        Path | None,
        typer.Option(
            "--project",
            "-p",
            metavar="DIR",
            help="Of `wardround run`: the project's folder, if it was moved.",
        ),
    ] = None,
) -> None:
    """Continue a run that was killed, stopped or failed, from its last complete round.

    The final models are those of an uninterrupted run, to the bit. A round that was under way is done again. Everything
    is started anew: keys, SuperLink, SuperNodes, workers; data and settings are those of the run. A run of a project
    (`wardround run`) starts the coordinator's side, and the sites connect again by themselves.

    [bold]Example[/bold]

      wardround resume runs/20260101-120000-fedavg
    """
    from ops.run import read_note, resume_project_run
    from ops.trial import resume_run

    if project is not None or read_note(run) is not None:
        raise typer.Exit(resume_project_run(run, project=project))
    raise typer.Exit(resume_run(run))


@app.command()
def methods() -> None:
    """List the methods with their parameters, ranges and defaults."""
    from common.methods import METHODS

    table = Table(
        "Method", "What it does", "Parameters (--set name=value)", title="Registered methods", show_lines=True
    )
    for method in METHODS.values():
        rows = [
            f"[bold]{name}[/bold] = {field.get_default()}  {field.description}"
            for name, field in method.params.model_fields.items()
        ]
        table.add_row(method.name, method.title, "\n".join(rows) or "-")
    console.print(table)


@app.command()
def settings(method: METHOD = "fedavg") -> None:
    """List every key that --set knows, with its default and meaning."""
    from pydantic import BaseModel

    from common.config import RunConfig
    from common.methods import get_method

    table = Table("Key", "Default", "Meaning", title="Settings (--set key=value)")
    for name, field in get_method(method).params.model_fields.items():
        table.add_row(f"params.{name}", str(field.get_default()), field.description or "")
    for section, outer in RunConfig.model_fields.items():
        kind = outer.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, field in kind.model_fields.items():
                table.add_row(f"{section}.{name}", str(field.get_default()), field.description or "")
    console.print(table)


@app.command()
def version() -> None:
    """Print the versions of wardround and of what it stands on."""
    from ops.plan import versions

    for name, number in versions().items():
        console.print(f"{name} {number}", highlight=False)


def _mount() -> None:
    if app.registered_groups:  # main may be called more than once in a process
        return
    from ops.dashboard_cli import dashboard
    from ops.data_cli import data_app
    from ops.ledger_cli import ledger_app
    from ops.provision_cli import provision_command
    from ops.report_cli import report, watch
    from ops.run_cli import run_command
    from ops.site_cli import site_app

    app.add_typer(data_app, name="data")
    app.add_typer(site_app, name="site")
    app.add_typer(ledger_app, name="ledger")
    app.command("provision")(provision_command)
    app.command("run")(run_command)
    app.command("report")(report)
    app.command("watch")(watch)
    app.command("dashboard")(dashboard)


def main(argv: list[str] | None = None) -> None:
    """Entry point: one clear sentence and an exit code for every error that is ours."""
    _mount()
    try:
        app(args=argv, standalone_mode=True)
    except WardroundError as error:
        print_failure(error.code, error.message, error.detail)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
