"""The coordinator of a project as one container: SuperLink, ServerApp and the command that conducts the run.

    python -m ops.containers.coordinator            the run that the environment names
    python -m ops.containers.coordinator health     a TLS handshake on the Fleet port, under the project's name

The Fleet port listens on all of the container's addresses; Control and ServerAppIo on its loopback, where nothing else can
reach them. The project's folder and federation.json are mounted read-only: the engine's machine approves and revokes, the run
sees it. An interrupted run goes on when the container is started again; one that is complete is shown.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError, WardroundError
from ops.containers import places
from ops.containers.health import tls

if TYPE_CHECKING:
    from rich.console import Console

    from ops.options import Options
    from ops.run import Place

PROJECT = Path("/project")
FEDERATION = Path("/federation.json")
AUTHORITY_KEY = Path("authority/ca.key")


def place_of(variables: places.Variables, project: Path) -> Place:
    """Return where the coordinator runs: in a container always the same port, published as the project's.

    Args:
        variables: WARDROUND_PORT is the port that is published; not compared where it is unset.
        project: The project's folder.

    Raises:
        ConfigError: Another port is published than the one that the kits call.
    """
    from ops.provision_project import read_project
    from ops.run import Place

    published, called = variables.number("PORT"), read_project(project).port
    if published is not None and published != called:
        raise ConfigError(
            f"The sites' kits call port {called}, but port {published} is published. Set WARDROUND_PORT={called}."
        )
    return Place(project, f"0.0.0.0:{places.FLEET_PORT}", f"127.0.0.1:{places.CONTROL_PORT}")


def run(variables: places.Variables, console: Console, *, project: Path, federation: Path, runs: Path) -> int:
    """Run what the environment names; go on with it where it was interrupted, show it where it is complete.

    Args:
        variables: As `options_of`; WARDROUND_RUN names the run and its folder, WARDROUND_TRANSPORT is "memory" or "file".
        console: The terminal.
        project: The project's folder.
        federation: The federation.json.
        runs: Has a folder per run.

    Returns:
        0 if the run ended well, else the exit code of what went wrong.

    Raises:
        WardroundError: What is wrong, before anything is started or written.
    """
    from ops.containers.wanted import options_of
    from ops.run import resume_project_run, run_project

    transport = variables.text("TRANSPORT", "memory")
    if transport not in ("file", "memory"):
        raise ConfigError(f"WARDROUND_TRANSPORT must be 'file' or 'memory', got '{transport[:40]}'.")
    if os.access(project / AUTHORITY_KEY, os.R_OK):
        console.print(
            "warning: the authority's private key lies in the project's folder, which this container can read. Move "
            "authority/ca.key to where the network is not.", soft_wrap=True,
        )  # fmt: skip
    out, place = runs / variables.run(), place_of(variables, project)
    options = options_of(variables, out)
    if (out / "config.json").is_file():
        same_run(options, federation, out, project)
        return resume_project_run(out, place=place, console=console)
    command = f"WARDROUND_RUN={out.name} docker compose --profile coordinator up"
    return run_project(options, federation, place, transport=transport, command=command, console=console)  # type: ignore[arg-type]


def same_run(options: Options, federation: Path, out: Path, project: Path) -> None:
    """Check that what is asked for is what the run folder holds.

    Raises:
        ConfigError: Another configuration under the same name.
        DataError: No federation.json.
    """
    from ops.plan import make_run_plan
    from ops.provision_project import read_project
    from ops.remote import coordinator_plan

    known = coordinator_plan(out).config
    # Who was approved or revoked since does not make it another run; whether enough are left is looked at next.
    named = list(dict.fromkeys(part.strip() for part in (options.sites or "").split(",") if part.strip()))
    sites = list(known.sites) if set(named) in (set(), set(known.sites)) else named
    asked = make_run_plan(replace(options, sites=None), federation, sites, out).config
    if asked.to_json() != known.to_json():
        raise ConfigError(
            f"Run '{out.name}' exists with another configuration. Choose another name: WARDROUND_RUN=NAME."
        )
    authority = json.loads((out / "config.json").read_text(encoding="utf-8")).get("authority")
    if authority not in (None, read_project(project).authority):
        raise ConfigError(
            f"Run '{out.name}' is of another project (another authority). Choose another name: WARDROUND_RUN=NAME."
        )


def health(project: Path = PROJECT, host: str = "localhost", port: int = places.FLEET_PORT) -> str:
    """Return what is wrong with the Fleet port, empty if it shows a certificate of the project's authority.

    Args:
        project: The project's folder.
        host: How the port is called from here; every server certificate of a project has the loopback names.
        port: The Fleet port.
    """
    return tls(host, port, project / "coordinator" / "ca.crt")


def main(arguments: list[str] | None = None) -> int:
    """Run the coordinator, or check its health."""
    words = sys.argv[1:] if arguments is None else arguments
    if words == ["health"]:  # before the imports: it is asked every few seconds
        found = health()
        print(found or "in order")  # noqa: T201 what `docker inspect` shows
        return 1 if found else 0
    from rich.console import Console

    from ops.containers.superlink import tell

    try:
        return run(places.Variables(), Console(), project=PROJECT, federation=FEDERATION, runs=places.RUNS)
    except WardroundError as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
