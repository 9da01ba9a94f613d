"""`wardround site up, status, down`, and the preflight behind `wardround site check KIT_DIR`."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from common.errors import ProcessError, WardroundError
from ops.kit_cli import KIT
from ops.preflight import Finding, exit_code, show, show_verdict, split_sentence, to_document
from ops.preflight_run import Installation, preflight
from ops.site_run import Status, look, start, stop
from ops.words import size

KEYS = Annotated[
    Path | None,
    typer.Option(
        "--keys", metavar="DIR", envvar="WARDROUND_KEYS", show_envvar=False,
        help="Folder of the site's own key; KIT_DIR-keys if left out.",
    ),
]  # fmt: skip
CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="site.toml", envvar="WARDROUND_SITE_TOML", show_envvar=False,
        help="The site's own configuration; site.toml beside the kit if left out.",
    ),
]  # fmt: skip
DATA = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", envvar="WARDROUND_DATA", show_envvar=False,
        help="The data folder on this machine; data beside the kit if left out.",
    ),
]  # fmt: skip
GPU = Annotated[
    bool, typer.Option("--gpu", help="Give the worker an NVIDIA GPU (WARDROUND_GPU, 0 if unset).")
]
PROJECT = Annotated[
    str, typer.Option("--project-name", metavar="NAME", help="Compose project; wardround-ALIAS if left out.")
]


def run_preflight(place: Installation, console: Console | None, *, full: bool = False) -> list[Finding]:
    """Make every check of an installation and show what was found.

    Args:
        place: Where its parts lie.
        console: Gets a line a check as soon as it is made; nothing is shown without one.
        full: Also read every case.
    """
    findings = []
    for found in preflight(place, full=full):
        findings.append(found)
        if console is not None:
            show(found, console)
    if console is not None:
        show_verdict(findings, console)
    return findings


def preflight_document(place: Installation, findings: list[Finding]) -> str:
    """Return the findings as JSON that may be passed on: no path, no address of the hospital's own."""
    from ops.kit import read_list

    alias = ""
    with contextlib.suppress(WardroundError):  # the kit's own finding says what is wrong with it
        alias = read_list(place.kit).alias
    return json.dumps(to_document(alias, findings), indent=2, ensure_ascii=False) + "\n"


def up(
    kit: KIT,
    keys: KEYS = None,
    config: CONFIG = None,
    data: DATA = None,
    gpu: GPU = False,
    project: PROJECT = "",
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check", help="Start without the preflight. The kit itself is verified all the same."
        ),
    ] = False,
) -> None:
    """Check the installation, start its two containers, and wait until both are well.

    Needs: the kit, the site's key (wardround site request), site.toml and the
    data beside it, Docker, the images. If a check fails, nothing is started.
    Run again after a change of site.toml or the kit: only what it concerns is
    started anew.

    [bold]Examples[/bold]

      oak/ oak-keys/ site.toml data/ side by side:  wardround site up oak
      data elsewhere, with a GPU:                   wardround site up oak \\
                                                      --data /srv/liver --gpu
      images from a registry:  WARDROUND_IMAGES=reg.example.org/fl \\
                                 wardround site up oak

    Exit code: 0 both are well; else that of the first check that failed; 9 if
    they were started and are not well.
    """
    from ops.kit import verify_kit

    console = Console()
    place = Installation(kit, keys, config, data, gpu)
    if not no_check:
        code = exit_code(run_preflight(place, console))
        if code:
            console.print("Nothing was started.", highlight=False)
            raise typer.Exit(code)
    verified = verify_kit(kit.absolute())
    name = project or _project(verified.about.alias)
    code = start(place, verified, name)
    status = look(name)
    show_status(verified.about.alias, name, status, console)
    same = f" --project-name {name}" if project else ""
    if code or not status.healthy:
        said = "[bold red]not well yet[/bold red]: the containers go on trying. Look again: "
        console.print(
            f"{said}wardround site status {escape(str(kit))}{same}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(ProcessError.exit_code)
    said = "[bold green]running[/bold green]; starts again with the engine. Later: "
    console.print(f"{said}wardround site status {escape(str(kit))}{same}", highlight=False, soft_wrap=True)
    ledger = f"docker compose --project-name {name} exec worker wardround ledger show /var/lib/wardround"
    console.print(f"What came in and what left: {ledger}", highlight=False, soft_wrap=True)


def status(
    kit: KIT,
    project: PROJECT = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show on one screen how a site is: containers, coordinator, last rounds, last refusal.

    Asks the engine and the two containers; changes nothing.

    [bold]Examples[/bold]

      wardround site status oak
      wardround site status oak --json

    Exit code: 0 both containers are healthy, 9 not.
    """
    alias, name = _named(kit, project)
    found = look(name)
    if as_json:
        document = {"site": alias, "project": name, "healthy": found.healthy, **asdict(found)}
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        show_status(alias, name, found, Console())
    if not found.healthy:
        raise typer.Exit(ProcessError.exit_code)


def down(
    kit: KIT,
    project: PROJECT = "",
    volumes: Annotated[
        bool, typer.Option("--volumes", help="Also delete state, personal models and ledger; asks first.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --volumes: do not ask.")] = False,
) -> None:
    """Stop a site's containers; state, personal models and ledger stay.

    [bold]Examples[/bold]

      wardround site down oak
      wardround site down oak --volumes      when the project is over

    Exit code: 0 stopped, 9 not.
    """
    from ops.kit import read_list
    from ops.kit_compose import image_names

    alias, name = _named(kit, project)
    console = Console()
    if volumes and not yes:
        image = image_names(read_list(kit), os.environ)["worker"]
        console.print(_LOST.format(name=name, alias=alias, image=image), highlight=False, soft_wrap=True)
        if not typer.confirm(f"Delete the volumes of {alias}?", default=False):
            console.print("Nothing was stopped and nothing deleted.", highlight=False)
            raise typer.Exit(ProcessError.exit_code)
    code = stop(kit, name, volumes=volumes)
    if code:
        raise ProcessError("docker could not stop the site: see what it said above, then run this again.")
    kept = "its volumes are deleted" if volumes else "state, personal models and ledger stay"
    console.print(f"{alias} is stopped; {kept}.", highlight=False)


_LOST = """\
This deletes for ever, on this machine:
  {name}_home   state between rounds, this hospital's personal models, its log, and the ledger:
                the record of all that came in and left. The law may demand that you keep it: copy it first, with
                docker run --rm --network none --user 0 -v {name}_home:/from:ro -v "$PWD":/to {image} cp -a /from /to/{alias}-home
  {name}_net    counts of the bytes on the network.
The kit, the key, site.toml and the data are not touched."""


def show_status(alias: str, project: str, status: Status, console: Console) -> None:
    """Print a site's state on one screen.

    Args:
        alias: The site.
        project: Compose project.
        status: What was found.
        console: Where to.
    """

    def line(what: str, said: str, colour: str = "none") -> None:
        console.print(f"  {what:<12} [{colour}]{escape(said)}[/{colour}]", highlight=False, soft_wrap=True)

    word = "[bold green]healthy[/bold green]" if status.healthy else "[bold red]not healthy[/bold red]"
    console.print(f"[bold]{alias}[/bold] ({project}): {word}", highlight=False)
    for container in status.containers:
        ended = f", ended with {container.exit_code}" if container.exit_code else ""
        said = container.status or {"absent": "not started"}.get(container.state, container.state)
        line(container.service, said + ended, "green" if container.healthy else "red")
    if status.heard is not None:
        line("coordinator", f"heard {status.heard:.0f} s ago", "red" if status.silence else "green")
    else:
        line("coordinator", status.silence or "not known: site-net does not run", "red")
    for row in status.rounds:
        number = "outside rounds" if row.round is None else f"round {row.round}"
        refused = f", {row.refused} part(s) refused" if row.refused else ""
        moved = f"{size(row.received)} in, {size(row.released)} out{refused}"
        line("ledger", f"{row.time[:19]}Z  run {row.run}, {number}: {moved}")
    if status.ledger:
        line("ledger", status.ledger, "yellow")
    if status.refusal is not None:
        time, reason = status.refusal
        line("refused", f"{time[:19]}Z  {reason}", "yellow")
    well = {container.service for container in status.containers if container.healthy}
    for service, time, sentence in status.said:
        found, remedy = split_sentence(sentence)
        if service in well:  # over, and still worth knowing
            line("earlier", f"{service}, {time}: {found}", "dim")
            continue
        line("last error", f"{service}, {time}: {found}", "yellow")
        if remedy:
            line("", f"-> {remedy}")


def _named(kit: Path, project: str) -> tuple[str, str]:
    """Return (alias, compose project); a kit that has expired will do."""
    from ops.kit import read_list

    alias = read_list(kit).alias
    return alias, project or _project(alias)


def _project(alias: str) -> str:
    from ops.kit_compose import project_name

    return project_name(alias)
