"""Admission at the coordinator: approve a site's request, revoke its key, tell the running SuperLink.

Who is admitted stands in project.json. A SuperLink holds its own list, which it keeps in memory unless it was given a
database: `register_all` brings it up to date after every start and every change and finds the keys that it should not know,
`forget` takes those away. A SuperLink that `wardround run` started is kept up to date by that command alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w
from cryptography.hazmat.primitives import serialization

from common.errors import ConfigError, CredentialError
from ops.kit_request import SiteRequest, key_fingerprint, read_request
from ops.provision_files import locked, private_folder, same_fingerprint, split_address, write, writing
from ops.provision_project import Project, coordinator_credentials, key_of, read_project, save

if TYPE_CHECKING:
    from ops.control import ControlClient

CONNECTION = "wardround"
LONGEST_REASON = 500


@dataclass(frozen=True)
class Approval:
    """What `approve` did.

    Attributes:
        project: The state after it.
        request: What was approved.
        news: "admitted", "replaced", or "known" if nothing changed.
    """

    project: Project
    request: SiteRequest
    news: str


@dataclass(frozen=True)
class Registered:
    """What a running SuperLink knows.

    Attributes:
        nodes: Flower's node id by alias.
        online: Aliases that are connected now.
        foreign: Node ids whose key is not admitted (or no longer), with the alias where the log has it.
    """

    nodes: dict[str, int]
    online: tuple[str, ...]
    foreign: dict[int, str]


def check_request(path: Path, folder: Path, *, replace: bool = False) -> tuple[Project, SiteRequest]:
    """Check everything about a request that can be checked without a telephone.

    Args:
        path: The request file.
        folder: The project.
        replace: Whether another key of this site may give way.

    Raises:
        ConfigError: No project there, or a site it does not have.
        CredentialError: Altered, without proof of possession, of another project or kit, a revoked key, another site's
            key, or a second key without `replace`.
        MismatchError: Another schema version.
    """
    project, request = read_project(folder), read_request(path)
    alias = request.alias
    if request.project != project.name:
        raise CredentialError(
            f"The request is for another project than '{project.name}': give the right --project, or ask the site which "
            "kit it used."
        )
    site = project.site(alias)
    if site.keys == "central":
        raise CredentialError(
            f"The kit of site '{alias}' holds a key made here, so it makes no requests: make it a kit without one first "
            '(keys = "site" in project.toml, then --reissue).', site=alias,
        )  # fmt: skip
    if request.kit != site.kit:
        raise CredentialError(
            f"Site '{alias}' made its request with another kit than the one that was made here last: an older one, or a "
            "forged one. Compare the kit's fingerprint by telephone; let the site use the newest kit.", site=alias,
        )  # fmt: skip
    fingerprint = request.key_fingerprint
    if fingerprint in project.revoked:
        entry = project.revoked[fingerprint]
        raise CredentialError(
            f"The key in the request of site '{alias}' was revoked on {entry.time:%Y-%m-%d} and stays so: let the site "
            "make a new key (`wardround site request KIT --keys NEW-FOLDER`).", site=alias,
        )  # fmt: skip
    owner = key_of(project, fingerprint)
    if owner not in ("", alias):
        raise CredentialError(
            f"The key in the request of site '{alias}' is already that of site '{owner}': each site makes its own.",
            site=alias,
        )
    if site.public_key and site.public_key != request.public_key and not replace:
        raise CredentialError(
            f"Site '{alias}' is admitted with another key. If the site itself tells you by telephone that it made a new "
            "one, approve with --replace; else somebody tries to take its place.", site=alias,
        )  # fmt: skip
    return project, request


def approve(path: Path, folder: Path, *, fingerprint: str = "", replace: bool = False) -> Approval:
    """Admit a site with the key of its request; doing it twice changes nothing.

    Args:
        path: The request file.
        folder: The project.
        fingerprint: What the site read out; the caller has compared it otherwise if empty.
        replace: Whether another key of this site gives way. It is noted as revoked.

    Raises:
        ConfigError: No project there, a site it does not have, or a fingerprint that is too short.
        CredentialError: As `check_request`; or the fingerprint differs.
        MismatchError: Another schema version.
        StorageError: The volume cannot be written.
    """
    read_project(folder)  # a lock is only laid into a project
    with locked(folder):
        project, request = check_request(path, folder, replace=replace)
        if fingerprint and not same_fingerprint(fingerprint, request.fingerprint):
            raise CredentialError(
                f"The request's fingerprint is not the one that site '{request.alias}' read out: it was replaced on its "
                "way, or is an older one. Ask the site to send it again, another way.", site=request.alias,
            )  # fmt: skip
        site = project.site(request.alias)
        if site.public_key == request.public_key:
            save(project, folder)
            return Approval(project, request, "known")
        news = "replaced" if site.public_key else "admitted"
        if site.public_key:
            project = project.noted(
                "replace", request.alias, key_fingerprint(site.public_key), "a new key was approved"
            )
        project = project.with_site(request.alias, site.model_copy(update={"public_key": request.public_key}))
        project = project.noted("approve", request.alias, request.key_fingerprint)
        save(project, folder)
    return Approval(project, request, news)


def revoke(alias: str, folder: Path, reason: str) -> Project:
    """Take a site's admission away, for this key for ever, and note why.

    Args:
        alias: The site.
        folder: The project.
        reason: For the project's log (1 to 500 characters, one line).

    Raises:
        ConfigError: No project there, no such site, no reason, or the site is not admitted.
        StorageError: The volume cannot be written.
    """
    reason = reason.strip()
    if not reason or len(reason) > LONGEST_REASON or not reason.isprintable():
        raise ConfigError(f"A reason is one line of 1 to {LONGEST_REASON} characters: say why with --reason.")
    read_project(folder)
    with locked(folder):
        project = read_project(folder)
        site = project.site(alias)
        if not site.public_key:
            raise ConfigError(f"Site '{alias}' is not admitted, so there is nothing to revoke.")
        gone = key_fingerprint(site.public_key)
        project = project.with_site(alias, site.model_copy(update={"public_key": ""}))
        project = project.noted("revoke", alias, gone, reason)
        save(project, folder)
    return project


def register_all(folder: Path, client: ControlClient) -> Registered:
    """Register every admitted key at a running SuperLink, and find the keys that it should not know.

    Args:
        folder: The project.
        client: Connected to its Control API.

    Raises:
        ConfigError: No project there.
        CredentialError: The project's credentials are not in order, or somebody else answers.
        ProcessError: The SuperLink does not answer.
    """
    pki = coordinator_credentials(folder)
    nodes = {alias: client.register(path, site=alias) for alias, path in pki.site_public.items()}
    listed = client.nodes()
    online = tuple(
        alias for alias, node in nodes.items() if any(n.online and n.node_id == node for n in listed)
    )
    log = read_project(folder).revoked
    foreign = {}
    for node in listed:
        if node.node_id not in nodes.values():
            entry = log.get(key_fingerprint(_openssh(node.public_key)))
            foreign[node.node_id] = entry.alias if entry is not None else ""
    return Registered(nodes, online, foreign)


def forget(client: ControlClient, nodes: Iterable[int]) -> None:
    """Let a running SuperLink forget nodes: their keys' next calls are refused.

    Args:
        client: Connected to its Control API.
        nodes: Node ids, as `Registered.foreign` has them.

    Raises:
        CredentialError: Somebody else answers.
        ProcessError: The SuperLink does not answer, or goes on knowing one of them.
    """
    for node in nodes:
        client.unregister(node)


def unregister_command(folder: Path, node: int | str) -> str:
    """Return the command that makes the running SuperLink forget a key, for a shell on the coordinator's machine.

    Args:
        folder: The project; `write_connection` has told Flower where its SuperLink is.
        node: Flower's node id.
    """
    home = shlex.quote(str((folder / "coordinator" / "flwr").absolute()))
    return f"FLWR_HOME={home} flwr supernode unregister {node} {CONNECTION}"


def write_connection(folder: Path, control: str) -> None:
    """Write Flower's connection to the project's SuperLink, so that `flwr` commands reach it by name.

    Args:
        folder: The project.
        control: HOST:PORT of the Control API.

    Raises:
        ConfigError: Not an address with a port.
        StorageError: The volume cannot be written.
    """
    if split_address(control)[1] is None:
        raise ConfigError("The Control API's address has a port: give HOST:PORT, e.g. 127.0.0.1:9093.")
    home = folder / "coordinator" / "flwr"
    ca = str((folder / "coordinator" / "ca.crt").absolute())
    document = {
        "superlink": {"default": CONNECTION, CONNECTION: {"address": control, "root-certificates": ca}}
    }
    with writing():
        private_folder(home)
    write(home / "config.toml", tomli_w.dumps(document).encode())


def _openssh(pem: bytes) -> str:
    """Return a key as requests write it, from how Flower lists it."""
    key = serialization.load_pem_public_key(pem)
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
