"""A project: what its leader writes (project.toml), and what provisioning keeps (project.json).

project.json is the one truth about who is admitted. The public keys in `coordinator/sites/` are copies of it, made anew
whenever they are used, so a crash between two files cannot leave a revoked key admitted.
"""

from __future__ import annotations

import datetime
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AwareDatetime, Field, field_validator, model_validator

from common.config import Strict, checked
from common.errors import ConfigError, MismatchError, nearest
from ops.kit import Keys
from ops.kit_request import key_fingerprint
from ops.pki import ALIAS, TrialPki, check_credentials
from ops.provision_files import check_host, join_address, private_folder, read_limited, write, writing

SCHEMA = 1
STATE = "project.json"
_UNREADABLE = (
    "The project's folder or its project.json cannot be read by this user. Run this as its owner, or give it the folder "
    "(a container's user is 10001: `sudo chown -R 10001 DIR`)."
)
Event = Literal["provision", "kit", "approve", "replace", "revoke", "renew"]


class Coordinator(Strict):
    """How sites reach the coordinator."""

    names: tuple[str, ...] = Field(
        min_length=1, max_length=50, description="host names and addresses; the first is what kits call"
    )
    port: int = Field(default=9092, ge=1, le=65535, description="the one port that hospitals reach (Fleet)")

    @field_validator("names")
    @classmethod
    def _hosts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(check_host(name) for name in names))


class SiteEntry(Strict):
    """A site that takes part."""

    alias: str = Field(
        pattern=rf"^{ALIAS.pattern}$",
        description="1-32 lower-case letters, digits, '-' or '_'; never a hospital's name",
    )
    contact: str = Field(default="", max_length=200, description="whom to call; stays with the coordinator")


class ProjectConfig(Strict):
    """project.toml."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,47}$", description="letters, digits, blanks, '.', '_', '-'"
    )
    coordinator: Coordinator
    sites: tuple[SiteEntry, ...] = Field(min_length=1, max_length=1000)
    keys: Keys = Field(
        default="site", description="site: each makes its own key; central: kits hold keys (trials)"
    )
    validity_days: int = Field(default=365, ge=1, le=825, description="of the server's certificate")
    authority_days: int = Field(default=1825, ge=1, le=7300, description="of the authority, and of the kits")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        aliases = [site.alias for site in self.sites]
        doubled = sorted({alias for alias in aliases if aliases.count(alias) > 1})
        if doubled:
            raise ValueError(f"two sites have the alias '{doubled[0]}'")
        if self.authority_days < self.validity_days:
            raise ValueError("the authority must last at least as long as the server's certificate")
        return self


class LogEntry(Strict):
    """A line of the project's log: what was done when, to whom, why."""

    time: AwareDatetime
    event: Event
    alias: str = ""
    fingerprint: str = ""
    reason: str = ""


class SiteRecord(Strict):
    """What is known of a site.

    Attributes:
        contact: Whom to call.
        keys: Who makes its key.
        kit: Fingerprint of its newest kit.
        server: HOST:PORT that this kit calls.
        public_key: The admitted key (OpenSSH, without comment); empty if none is.
    """

    contact: str = ""
    keys: Keys
    kit: str
    server: str
    public_key: str = ""


class Project(Strict):
    """project.json.

    Attributes:
        schema_version: Of the file's form.
        name: The project's name.
        names: Names that sites may call the coordinator by.
        port: Fleet port.
        authority: SHA-256 of the authority's certificate (DER).
        sites: Record by alias.
        log: Everything that was done, oldest first.
    """

    schema_version: Literal[1] = 1
    name: str
    names: tuple[str, ...]
    port: int
    authority: str
    sites: dict[str, SiteRecord] = Field(default_factory=dict)
    log: tuple[LogEntry, ...] = ()

    @property
    def server(self) -> str:
        """HOST:PORT that new kits call."""
        return join_address(self.names[0], self.port)

    @property
    def revoked(self) -> dict[str, LogEntry]:
        """Why and when a key was revoked or replaced, by the key's fingerprint."""
        return {entry.fingerprint: entry for entry in self.log if entry.event in ("revoke", "replace")}

    def site(self, alias: str) -> SiteRecord:
        """Return a site's record.

        Raises:
            ConfigError: The project has no such site.
        """
        if alias not in self.sites:
            raise ConfigError(f"The project has no site '{alias[:64]}'. {nearest(alias[:64], self.sites)}")
        return self.sites[alias]

    def with_site(self, alias: str, record: SiteRecord) -> Project:
        """Return a copy in which a site's record is this one."""
        return self.model_copy(update={"sites": {**self.sites, alias: record}})

    def noted(self, event: Event, alias: str = "", fingerprint: str = "", reason: str = "") -> Project:
        """Return a copy with one more line in the log."""
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        entry = LogEntry(time=now, event=event, alias=alias, fingerprint=fingerprint, reason=reason)
        return self.model_copy(update={"log": (*self.log, entry)})


def read_config(path: Path) -> ProjectConfig:
    """Read a project.toml.

    Raises:
        ConfigError: Missing, not TOML, unknown keys (with the nearest known one), values out of range.
    """
    try:
        mapping = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The project's file cannot be read ({error.strerror}): give a project.toml; `wardround provision --help` "
            "shows one.", detail=str(path),
        ) from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "The project's file is not valid TOML in UTF-8. Correct the line.", detail=f"{path}: {error}"
        ) from error
    return checked(ProjectConfig, mapping)


def read_project(folder: Path) -> Project:
    """Read a project's state.

    Raises:
        ConfigError: No project there, or its file was damaged.
        MismatchError: Written by another version.
    """
    try:
        there = (folder / STATE).is_file()
    except OSError as error:
        raise ConfigError(_UNREADABLE, detail=str(error)) from error
    if not there:
        raise ConfigError(
            "There is no project in this folder: give the one that `wardround provision --out` wrote.",
            detail=str(folder),
        )
    try:
        document: Any = json.loads(_state_bytes(folder))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "The project's state (project.json) is damaged: bring it back from your backup.",
            detail=str(error),
        ) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA or isinstance(version, bool):
        raise MismatchError(
            f"The project's state has another schema version than {SCHEMA}: use the version of wardround that wrote it."
        )
    return checked(Project, document, "project.json: ")


def _state_bytes(folder: Path) -> bytes:
    try:
        return (folder / STATE).read_bytes()  # grows with its log: no limit
    except OSError as error:
        raise ConfigError(_UNREADABLE, detail=str(error)) from error


def save(project: Project, folder: Path) -> None:
    """Write a project's state, then the copies of the admitted keys.

    Raises:
        StorageError: The volume cannot be written.
    """
    write(folder / STATE, (json.dumps(project.model_dump(mode="json"), indent=2) + "\n").encode())
    copy_keys(project, folder)


def copy_keys(project: Project, folder: Path) -> dict[str, Path]:
    """Make `coordinator/sites/` hold the admitted keys and nothing else.

    Returns:
        Public key's file by alias.

    Raises:
        StorageError: The volume cannot be written.
    """
    admitted = {alias: site.public_key for alias, site in sorted(project.sites.items()) if site.public_key}
    with writing():
        home = private_folder(folder / "coordinator" / "sites")
        for path in home.iterdir():
            if path.name.removesuffix(".pub") not in admitted and path.is_file():
                path.unlink()
    return {
        alias: write(home / f"{alias}.pub", f"{key} {alias}\n".encode()) for alias, key in admitted.items()
    }


def coordinator_credentials(folder: Path) -> TrialPki:
    """Return a project's credentials in the form that the SuperLink's command and the Control API's client take.

    Raises:
        ConfigError: No project there.
        CredentialError: A credential is missing, out of date, or does not fit the others.
        StorageError: The volume cannot be written.
    """
    project = read_project(folder)
    home = folder / "coordinator"
    pki = TrialPki(
        home, home / "ca.crt", home / "server.crt", home / "server.key", home / "secret",
        site_public=copy_keys(project, folder),
    )  # fmt: skip
    check_credentials(ca=pki.ca, cert=pki.server_cert, key=pki.server_key, names=project.names)
    read_limited(pki.server_secret, "The secret of the coordinator's processes")
    return pki


def key_of(project: Project, fingerprint: str) -> str:
    """Return the alias that is admitted with a key, or an empty string."""
    for alias, site in project.sites.items():
        if site.public_key and key_fingerprint(site.public_key) == fingerprint:
            return alias
    return ""
