"""`wardround site approve, revoke, list, register`: whom the coordinator admits."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import ProcessError, WardroundError
from ops.kit_cli import AS_JSON

if TYPE_CHECKING:
    from ops.approve import Registered
    from ops.provision_project import Project

PROJECT = Annotated[
    Path,
    typer.Option(
        "--project", "-p", metavar="DIR", help="The project's folder, made by `wardround provision`."
    ),
]
CONTROL = Annotated[
    str, typer.Option("--control", metavar="HOST:PORT", help="The running SuperLink's Control API.")
]


def approve_command(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="The file that the site sent.")],
    project: PROJECT,
    fingerprint: Annotated[
        str,
        typer.Option("--fingerprint", help="The request's fingerprint as the site read it out by telephone."),
    ] = "",
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask: the fingerprint was compared already.")
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="The site's new key takes the place of its old one, which is revoked."
        ),
    ] = False,
    as_json: AS_JSON = False,
) -> None:
    """Admit a site with the key of its request.

    Checks the proof of possession, the alias, and that the request was made
    with this project's kit; shows the fingerprint; admits after it was
    compared by telephone. Doing it twice changes nothing.

    [bold]Why the telephone[/bold]

      Whoever carries the mails could replace kit or request. The fingerprint
      covers both. Call by a number that you know, and let the site read.

    [bold]Examples[/bold]

      wardround site approve oak-request.json --project liver-2026
      wardround site approve oak-request.json --project liver-2026 \\
        --fingerprint "3f2a 90c1 ..."

    Exit code: 0 admitted, 10 refused.
    """
    from ops.approve import approve

    if not fingerprint and not yes:
        if as_json:
            raise typer.BadParameter("--json asks nothing: give --fingerprint, or --yes if it was compared.")
        # what was compared is what is admitted, even if the file changes meanwhile
        fingerprint = _compared(request, project, replace=replace)
    done = approve(request, project, fingerprint=fingerprint, replace=replace)
    alias = done.request.alias
    if as_json:
        document = {"alias": alias, "news": done.news, "key": done.request.key_fingerprint}
        typer.echo(json.dumps({**document, "fingerprint": done.request.fingerprint}, indent=2))
        return
    words = {"admitted": "is admitted", "replaced": "is admitted with its new key; the old one is revoked"}
    Console().print(
        f"Site [bold]{alias}[/bold] {words.get(done.news, 'was admitted with this key before; nothing changed')}.\n"
        "A `wardround run` of this project lets it in by itself. Any other SuperLink that runs must be told: "
        f"wardround site register --project {escape(str(project))}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _compared(request: Path, project: Path, *, replace: bool) -> str:
    """Show a request's fingerprint, ask whether the site read it out, and return it; exit if not."""
    from ops.approve import check_request
    from ops.provision_files import spoken

    state, found = check_request(request, project, replace=replace)
    site = state.site(found.alias)
    said = f"site         {found.alias}\ncontact      {escape(site.contact) or '-'}"
    said += f"\nfingerprint  [bold]{spoken(found.fingerprint)}[/bold]"
    Console().print(said, highlight=False, soft_wrap=True)
    if not typer.confirm("Did the site read out exactly this, called by a number that you know?"):
        typer.echo("Not admitted. If it differs, ask the site to send the request again, another way.")
        raise typer.Exit(10)
    return found.fingerprint


def revoke_command(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The site.")],
    project: PROJECT,
    reason: Annotated[str, typer.Option("--reason", help="Why; noted in the project's log with the date.")],
    control: CONTROL = "127.0.0.1:9093",
    as_json: AS_JSON = False,
) -> None:
    """Take a site's admission away: a key that was stolen, a hospital that leaves.

    The key is refused for ever, the site can come back with a new one. A
    SuperLink that answers at --control forgets the key at once; a `wardround
    run` of this project does so by itself within seconds.

    [bold]Example[/bold]

      wardround site revoke oak --project liver-2026 --reason "laptop stolen"
    """
    from ops.approve import revoke

    done = revoke(alias, project, reason)
    entry = done.log[-1]
    removed = _forget_at(project, control, alias)
    if as_json:
        document = {**entry.model_dump(mode="json"), "superlink": removed.word}
        typer.echo(json.dumps(document, indent=2))
        return
    Console().print(
        f"Site [bold]{escape(alias)}[/bold] is revoked ({entry.time:%Y-%m-%d %H:%M} UTC).\n{escape(removed.sentence)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


class Told(NamedTuple):
    """What became of telling a running SuperLink that a key was revoked.

    Attributes:
        word: "forgot", "unknown" (it did not know the key) or "silent".
        sentence: For people.
    """

    word: str
    sentence: str


def _forget_at(project: Path, control: str, alias: str) -> Told:
    """Let the SuperLink at an address forget a site's revoked keys; that none answers changes nothing of the revocation."""
    from ops.approve import forget, register_all
    from ops.control import ControlClient

    try:
        with ControlClient(control, project / "coordinator" / "ca.crt") as client:
            foreign = register_all(project, client).foreign
            gone = [node for node, whose in foreign.items() if whose == alias]
            forget(client, gone)
    except WardroundError as error:
        command = f"wardround site register --project {project} --control HOST:PORT"
        return Told(
            "silent",
            f"No SuperLink of this project was told at {control} ({error.code}): {error.message}\n"
            "A `wardround run` forgets the key by itself within seconds. Any other SuperLink that runs, or keeps its state\n"
            f"in a database, still knows it until you run:  {command}",
        )
    if gone:
        return Told("forgot", f"The SuperLink at {control} has forgotten the key; its next call is refused.")
    return Told("unknown", f"The SuperLink at {control} did not know the key (any more).")


def register_command(project: PROJECT, control: CONTROL = "127.0.0.1:9093", as_json: AS_JSON = False) -> None:
    """Tell a running SuperLink which sites are admitted; it forgets all others.

    After every start of a SuperLink of your own, every approval and every
    revocation. Doing it twice changes nothing. A `wardround run` needs none of
    it: it follows the project by itself.

    [bold]Example[/bold]

      wardround site register --project liver-2026 --control 127.0.0.1:9093

    Exit code: 0 all as it should be, 10 the SuperLink goes on knowing keys that
    are not admitted (Flower's commands that remove them are printed).
    """
    from ops.approve import forget, register_all, unregister_command, write_connection
    from ops.control import ControlClient

    write_connection(project, control)
    with ControlClient(control, project / "coordinator" / "ca.crt") as client:
        done = register_all(project, client)
        gone = []
        for node in done.foreign:
            with contextlib.suppress(ProcessError):  # what stays is named below, with Flower's own command
                forget(client, [node])
                gone.append(node)
    left = {node: unregister_command(project, node) for node in done.foreign if node not in gone}
    if as_json:
        foreign = [{"node": n, "alias": done.foreign[n], "command": left[n]} for n in left]
        removed = [{"node": n, "alias": done.foreign[n]} for n in gone]
        sites = {alias: {"node": node, "online": alias in done.online} for alias, node in done.nodes.items()}
        typer.echo(json.dumps({"sites": sites, "removed": removed, "not_admitted": foreign}, indent=2))
    else:
        _show_registered(done, gone, left)
    if left:
        raise typer.Exit(10)


def _show_registered(done: Registered, gone: list[int], left: dict[int, str]) -> None:
    console = Console()
    for alias, node in done.nodes.items():
        console.print(
            f"{alias}  registered, {'online' if alias in done.online else 'not connected'}  (node {node})"
        )
    for node, alias in done.foreign.items():
        whose = f"a revoked key of site {alias}" if alias else "a key that is not admitted"
        if node in gone:
            console.print(f"[bold]has forgotten {whose}[/bold]  (node {node})", highlight=False)
        elif node in left:
            said = f"[bold red]knows {whose}[/bold red]; remove it with:\n  {escape(left[node])}"
            console.print(said, highlight=False, soft_wrap=True)


def list_command(project: PROJECT, as_json: AS_JSON = False) -> None:
    """Show a project's sites, certificates and log.

    [bold]Example[/bold]

      wardround site list --project liver-2026
    """
    from ops.provision import expiry_warnings, load_certificate
    from ops.provision_project import read_project

    state = read_project(project)
    home = project / "coordinator"
    server = load_certificate(home / "server.crt", "The server's certificate").not_valid_after_utc
    authority = load_certificate(home / "ca.crt", "The authority's certificate").not_valid_after_utc
    if as_json:
        document: dict[str, Any] = state.model_dump(mode="json")
        document |= {"certificate_until": server.isoformat(), "authority_until": authority.isoformat()}
        typer.echo(json.dumps(document, indent=2))
        return
    console = Console()
    said = (
        f"[bold]{escape(state.name)}[/bold]: sites call {escape(state.server)}; server's certificate until "
    )
    said += f"{server:%Y-%m-%d}, authority until {authority:%Y-%m-%d}"
    console.print(said, highlight=False, soft_wrap=True)
    for warning in expiry_warnings(server, authority):
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", highlight=False, soft_wrap=True)
    _show(state, console)


def _show(state: Project, console: Console) -> None:
    from ops.kit_request import key_fingerprint
    from ops.provision_files import spoken

    sites = Table("Site", "Admitted", "Key", "Kit", "Contact", box=SIMPLE_HEAD)
    for alias, site in sorted(state.sites.items()):
        key = spoken(key_fingerprint(site.public_key))[:9] if site.public_key else "-"
        admitted = "[green]yes[/green]" if site.public_key else "no"
        kit = spoken(site.kit)[:9] + (" [yellow]with key[/yellow]" if site.keys == "central" else "")
        sites.add_row(alias, admitted, key, kit, escape(site.contact) or "-")
    console.print(sites)
    log = Table("Time (UTC)", "What", "Site", "Fingerprint", "Reason", box=SIMPLE_HEAD)
    for entry in state.log:
        fingerprint = spoken(entry.fingerprint)[:9] if entry.fingerprint else "-"
        when = f"{entry.time:%Y-%m-%d %H:%M}"
        log.add_row(when, entry.event, entry.alias or "-", fingerprint, escape(entry.reason) or "-")
    console.print(log)
