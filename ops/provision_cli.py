"""`wardround provision`: the authority, the server's certificate and the startup kits of a project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from ops.provision import Provisioned


def provision_command(
    config: Annotated[Path, typer.Argument(metavar="PROJECT_TOML", help="The project's description.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="The project's folder: new, or its own.")
    ],
    renew: Annotated[
        bool, typer.Option("--renew", help="New server certificate by the same authority; kits stay valid.")
    ] = False,
    reissue: Annotated[
        list[str] | None,
        typer.Option("--reissue", metavar="ALIAS", help="Make this site's kit anew (repeatable)."),
    ] = None,
    with_keys: Annotated[
        bool,
        typer.Option(
            "--with-keys",
            help="Put a private key into each new kit. For trials; better every site makes its own.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Make a project's authority, its server's certificate, and a startup kit per site.

    Run it again after adding sites: what is there stays, only what is new is
    made. Kits hold no private key, unless --with-keys or keys = "central".

    [bold]project.toml[/bold]

      name = "liver-2026"
      validity_days = 365               # server's certificate
      authority_days = 1825             # authority and kits
      \\[coordinator]
      names = ["fl.example.org", "192.0.2.7"]
      port = 9092
      [\\[sites]]
      alias = "oak"                     # never a hospital's name
      contact = "IT desk, +49 ..."      # stays in this folder

    [bold]Examples[/bold]

      wardround provision project.toml --out liver-2026
      wardround provision project.toml --out liver-2026 --renew

    Then hand DIR/kits/ALIAS.tar.gz to each site, and keep DIR/authority off
    the network. The whole way: docs/deploy.md
    """
    from ops.provision import provision
    from ops.provision_project import read_config

    project = read_config(config)
    if with_keys:
        project = project.model_copy(update={"keys": "central"})
    done = provision(project, out, renew=renew, reissue=reissue or ())
    if as_json:
        typer.echo(json.dumps(_document(done), indent=2))
    else:
        _show(done, Console())


def _document(done: Provisioned) -> dict[str, Any]:
    return {
        "project": done.project.name,
        "server": done.project.server,
        "authority": done.project.authority,
        "authority_until": done.authority_until.isoformat(),
        "certificate": done.server,
        "certificate_until": done.server_until.isoformat(),
        "kits": {alias: done.project.sites[alias].kit for alias in done.made},
        "warnings": list(done.warnings),
    }


def _show(done: Provisioned, console: Console) -> None:
    from ops.kit import packed
    from ops.provision_files import spoken

    said = f"[bold]{escape(done.project.name)}[/bold]: sites call {escape(done.project.server)}\n"
    said += (
        f"authority  until {done.authority_until:%Y-%m-%d}, fingerprint {spoken(done.project.authority)}\n"
    )
    said += f"server     certificate {done.server}, until {done.server_until:%Y-%m-%d}"
    console.print(said, highlight=False, soft_wrap=True)
    for alias in done.made:
        path = escape(str(packed(done.folder / "kits" / alias)))
        said = f"kit        {alias}  {spoken(done.project.sites[alias].kit)}  {path}"
        console.print(said, highlight=False, soft_wrap=True)
    if not done.made:
        console.print("kits       none is new", highlight=False)
    for warning in done.warnings:
        console.print(f"[yellow]warning[/yellow]    {escape(warning)}", highlight=False, soft_wrap=True)
    if done.server == "renewed":
        console.print("Restart the SuperLink: it reads its certificate when it starts.", highlight=False)
