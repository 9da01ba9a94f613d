"""`wardround site verify, request, commands`: what a hospital does with its startup kit."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from common.errors import ConfigError, CredentialError
from ops.flower_commands import Addresses, relay_launcher, superlink, supernode
from ops.pki import TrialPki
from ops.processes import Process

KIT = Annotated[
    Path, typer.Argument(metavar="KIT_DIR", help="The unpacked kit: the folder that holds kit.json.")
]
KEYS = Annotated[
    Path | None,
    typer.Option("--keys", metavar="DIR", help="Folder of the site's own key; KIT_DIR-keys if left out."),
]
AS_JSON = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]


def verify(
    kit: KIT,
    server: Annotated[
        str, typer.Option("--server", metavar="HOST[:PORT]", help="How this site will call the coordinator.")
    ] = "",
    alias: Annotated[str, typer.Option("--alias", help="The site that the kit must be for.")] = "",
    fingerprint: Annotated[
        str,
        typer.Option(
            "--fingerprint", help="The kit's fingerprint as the coordinator read it out by telephone."
        ),
    ] = "",
    as_json: AS_JSON = False,
) -> None:
    """Check a startup kit before anything is started with it.

    Finds a kit that was altered or is not whole, holds extra files or keys, is
    out of date, or is for another site, server or version. Writes nothing and
    calls nobody.

    [bold]Examples[/bold]

      wardround site verify oak
      wardround site verify oak --alias oak --server fl.example.org:9092
      wardround site verify oak --fingerprint "3f2a 90c1 ..."

    Exit code: 0 in order, 5 another schema version, 10 not in order.
    """
    from ops.kit import verify_kit
    from ops.provision_files import spoken

    found = verify_kit(kit, alias=alias, server=server, fingerprint=fingerprint)
    about = found.about
    if as_json:
        document = {"fingerprint": found.fingerprint, **about.model_dump(mode="json")}
        typer.echo(json.dumps(document, indent=2))
        return
    keys = (
        "the site makes its own"
        if about.keys == "site"
        else "[yellow]in the kit[/yellow] (made by the coordinator)"
    )
    said = "[bold green]in order[/bold green]"
    said += f"\nproject      {escape(about.project)}\nsite         {about.alias}\nserver       {escape(about.server)}"
    said += f"\nnames        {escape(', '.join(about.names))}\nkey          {keys}"
    said += f"\nmade         {about.created:%Y-%m-%d}, ends {about.expires:%Y-%m-%d}"
    said += f"\nfingerprint  [bold]{spoken(found.fingerprint)}[/bold]"
    Console().print(said, highlight=False, soft_wrap=True)


def request(
    kit: KIT,
    keys: KEYS = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="The request; ALIAS-request.json beside the kit if left out."
        ),
    ] = None,
    as_json: AS_JSON = False,
) -> None:
    """Make this hospital's own key, and the request for its admission.

    The private key (KIT_DIR-keys/key, mode 0600) never leaves this machine.
    The request holds the public key, the alias and the kit's fingerprint,
    signed with the new key; nothing in it is secret. Send it, then read out
    its fingerprint by telephone. A key that is there is used again.

    [bold]Examples[/bold]

      wardround site request oak
      wardround site request oak --keys /etc/wardround/keys --out oak.json
    """
    from ops.kit_request import make_request
    from ops.provision_files import spoken

    made = make_request(kit, keys=keys, out=out)
    if as_json:
        document = {
            "alias": made.request.alias,
            "fingerprint": made.request.fingerprint,
            "new_key": made.new_key,
        }
        typer.echo(json.dumps({**document, "request": str(made.path), "keys": str(made.keys)}, indent=2))
        return
    said = f"{'new' if made.new_key else 'known'} key in {escape(str(made.keys))} (stays here)\n"
    said += f"request in {escape(str(made.path))} (send this to the coordinator)\n"
    said += f"fingerprint to be read out by telephone  [bold]{spoken(made.request.fingerprint)}[/bold]"
    Console().print(said, highlight=False, soft_wrap=True)


def commands(
    kit: Annotated[
        Path | None, typer.Argument(metavar="[KIT_DIR]", help="The unpacked kit.", show_default=False)
    ] = None,
    keys: KEYS = None,
    config: Annotated[
        Path, typer.Option("--config", metavar="site.toml", help="The site's own configuration.")
    ] = Path("site.toml"),
    appio: Annotated[
        str,
        typer.Option("--appio", metavar="HOST:PORT", help="Where SuperNode and relay meet, on this machine."),
    ] = "127.0.0.1:9094",
    project: Annotated[
        Path | None,
        typer.Option("--project", metavar="DIR", help="The SuperLink's command of this project instead."),
    ] = None,
    listen: Annotated[
        str,
        typer.Option("--listen", help="With --project: address that the SuperLink's Fleet port listens on."),
    ] = "0.0.0.0",
    control: Annotated[
        str, typer.Option("--control", metavar="HOST:PORT", help="With --project: its Control API.")
    ] = "127.0.0.1:9093",
    state: Annotated[
        Path, typer.Option("--state", metavar="DIR", help="Gets each process's Flower home.")
    ] = Path("state"),
) -> None:
    """Write out the command lines of a site's processes, or of a project's SuperLink.

    Checks the kit, the key and site.toml first. Each line can be put into a
    service manager that starts it again when it ends. Nothing is started.

    [bold]Examples[/bold]

      wardround site commands oak --keys oak-keys --config site.toml
      wardround site commands --project liver-2026
    """
    if (kit is None) == (project is None):
        raise typer.BadParameter("give either a kit's folder or --project.")
    if project is not None:
        processes = [_superlink(project, listen, control, state)]
    else:
        assert kit is not None
        processes = _site(kit, keys, config, appio, state)
    for process in processes:
        typer.echo(f"# {process.name}\n{command_line(process)}")


def command_line(process: Process) -> str:
    """Return a process's command for a shell; variables first, PATH with what is there already behind."""
    variables = []
    for name, value in process.env.items():
        if name == "PATH":
            variables.append(f'PATH={shlex.quote(value.split(os.pathsep)[0])}:"$PATH"')
        else:
            variables.append(f"{name}={shlex.quote(value)}")
    return " ".join(["env", *variables, shlex.join(process.argv)])


def _superlink(project: Path, listen: str, control: str, state: Path) -> Process:
    from ops.provision_files import check_host, join_address
    from ops.provision_project import coordinator_credentials, read_project

    pki = coordinator_credentials(project.absolute())
    fleet = join_address(check_host(listen), read_project(project).port)
    return superlink(Addresses(fleet, control, "127.0.0.1:9091"), pki, state.absolute())


def _site(kit: Path, keys: Path | None, config: Path, appio: str, state: Path) -> list[Process]:
    from client.site_config import read_site_config
    from ops.kit import verify_kit
    from ops.kit_request import site_credentials

    found, own = verify_kit(kit.absolute()), read_site_config(config)
    about = found.about
    if own.alias != about.alias:
        raise CredentialError(
            f"The site's configuration is for '{own.alias}', the kit for '{about.alias}': use the two of one site."
        )
    if not own.socket.is_absolute():
        raise ConfigError(
            "The socket in the site's configuration is no absolute path: give one, e.g. /run/wardround/w.sock."
        )
    pki: TrialPki = site_credentials(found, keys.absolute() if keys is not None else None)
    folder = state.absolute()
    argv = [sys.executable, "-P", "-m", "client.worker", str(config.absolute())]
    node = {"site": about.alias, "worker": str(own.socket)}
    return [
        Process(
            f"worker-{about.alias}",
            argv,
            folder / "worker.log",
            env={"PYTHONUNBUFFERED": "1"},
            site=about.alias,
        ),
        relay_launcher(about.alias, pki, folder, clientappio=appio),
        supernode(about.alias, pki, folder, fleet=about.server, clientappio=appio, node_config=node),
    ]
