"""Provisioning: a project's authority, its server's certificate, and a startup kit for every site.

    DIR/project.json      who is in, who is admitted with which key, and the log of it all
    DIR/authority/        ca.key signs certificates and kits: keep it off the network, needed for this command only
    DIR/coordinator/      what the SuperLink needs: ca.crt, server.crt, server.key, secret, admitted keys in sites/
    DIR/kits/             a folder and a .tar.gz per site

Running it again adds what is new and leaves what is there. All private files have mode 0600 in folders of mode 0700.
"""

from __future__ import annotations

import datetime
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import common
from common.errors import ConfigError, CredentialError
from ops.kit import (
    CA,
    KEY,
    PUBLIC_KEY,
    SECRET,
    KitList,
    authority_fingerprint,
    packed,
    verify_kit,
    write_kit,
)
from ops.kit_compose import compose_files
from ops.kit_request import key_fingerprint
from ops.kit_texts import readme, site_toml
from ops.pki import LOCAL_NAMES, check_credentials
from ops.pki_issue import Authority, issue_server, new_authority, new_site_key
from ops.provision_files import (
    check_host,
    locked,
    private_folder,
    read_limited,
    split_address,
    write,
    writing,
)
from ops.provision_project import STATE, Project, ProjectConfig, SiteRecord, read_project, save

SERVER_WARNING = datetime.timedelta(days=30)
AUTHORITY_WARNING = datetime.timedelta(days=90)


@dataclass(frozen=True)
class Provisioned:
    """What `provision` found and did.

    Attributes:
        folder: The project's folder.
        project: Its state.
        made: Aliases whose kit was made now.
        server: "made", "renewed" or "kept".
        server_until: End of the server's certificate.
        authority_until: End of the authority's certificate, and of the kits.
        warnings: Sentences for the leader.
    """

    folder: Path
    project: Project
    made: tuple[str, ...]
    server: str
    server_until: datetime.datetime
    authority_until: datetime.datetime
    warnings: tuple[str, ...] = field(default=())


def provision(
    config: ProjectConfig, folder: Path, *, renew: bool = False, reissue: Sequence[str] = ()
) -> Provisioned:
    """Make what is missing of a project, and nothing anew that is there.

    Args:
        config: The project.
        folder: Where it lies or will lie.
        renew: Issue a new server certificate by the same authority; kits stay valid.
        reissue: Aliases whose kit is made anew; the old one is no longer accepted in requests.

    Raises:
        ConfigError: The folder holds something else, or another project; changed names without `renew`; a change
            that would leave kits without a coordinator.
        CredentialError: The authority's key is missing or damaged, or the authority expired.
        StorageError: The volume cannot be written.
    """
    first = not (folder / STATE).exists()
    if (
        first
        and folder.exists()
        and (not folder.is_dir() or any(path.name != ".lock" for path in folder.iterdir()))
    ):
        raise ConfigError(
            "The folder holds something else than a project: give a new one, or the project's own.",
            detail=str(folder),
        )
    with writing():
        private_folder(folder)
    with locked(folder):
        if first:
            _found(config, folder)
        project = _updated(config, read_project(folder), renew=renew, reissue=reissue)
        wanted = [
            site.alias for site in config.sites if site.alias not in project.sites or site.alias in reissue
        ]
        authority = load_authority(folder) if renew or wanted else None
        if renew and authority is not None:
            _issue(config, authority, folder)
            project = project.noted("renew")
        _check_server(project, folder)
        save(project, folder)
        for alias in wanted:
            assert authority is not None
            project = _with_kit(project, alias, config, authority, folder, reissue=alias in reissue)
            save(project, folder)
    return _summary(config, project, folder, wanted, "made" if first else "renewed" if renew else "kept")


def load_authority(folder: Path) -> Authority:
    """Return a project's authority with its key.

    Raises:
        CredentialError: Not there, damaged, not a pair, or expired.
    """
    home = folder / "authority"
    certificate = load_certificate(home / CA, "The authority's certificate")
    content = read_limited(home / "ca.key", "The authority's key (bring it back from where you keep it)")
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError) as error:
        raise CredentialError(
            "The authority's key is damaged, or protected by a passphrase: bring back the file that was made.",
            detail=str(error),
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CredentialError(
            "The authority's key does not match its certificate: bring back the one that was made."
        )
    if certificate.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise CredentialError(
            f"The project's authority expired on {certificate.not_valid_after_utc:%Y-%m-%d}, and all kits with it: "
            "provision a new folder and hand out new kits."
        )
    return Authority(certificate, key)


def load_certificate(path: Path, what: str) -> x509.Certificate:
    """Return a certificate.

    Raises:
        CredentialError: Unreadable, or not a certificate.
    """
    try:
        return x509.load_pem_x509_certificate(read_limited(path, what))
    except ValueError as error:
        raise CredentialError(
            f"{what} is not a certificate in PEM form.", detail=f"{path}: {error}"
        ) from error


def expiry_warnings(server: datetime.datetime, authority: datetime.datetime) -> list[str]:
    """Return sentences about certificates that end soon."""
    now = datetime.datetime.now(datetime.UTC)
    warnings = []
    if authority - now < AUTHORITY_WARNING:
        verb = "ended" if authority < now else "ends"
        warnings.append(
            f"The authority {verb} on {authority:%Y-%m-%d}, and every kit with it: provision a new folder in time, and "
            "hand out new kits."
        )
    if server - now < SERVER_WARNING:
        verb = "ended" if server < now else "ends"
        warnings.append(
            f"The server's certificate {verb} on {server:%Y-%m-%d}: run `wardround provision` with --renew, then restart "
            "the SuperLink."
        )
    return warnings


def _found(config: ProjectConfig, folder: Path) -> None:
    """Make the authority, the coordinator's folder and a project without sites."""
    authority = new_authority(f"wardround {config.name}", config.authority_days)
    with writing():
        for name in ("authority", "coordinator", "kits"):
            private_folder(folder / name)
    write(folder / "authority" / "ca.key", authority.key_pem)
    write(folder / "authority" / CA, authority.pem)
    write(folder / "coordinator" / CA, authority.pem)
    write(folder / "coordinator" / "secret", secrets.token_bytes(32))
    _issue(config, authority, folder)
    names = config.coordinator
    fingerprint = authority_fingerprint(authority.certificate)
    project = Project(name=config.name, names=names.names, port=names.port, authority=fingerprint)
    save(project.noted("provision", fingerprint=fingerprint), folder)


def _issue(config: ProjectConfig, authority: Authority, folder: Path) -> None:
    """Issue the server's certificate. Loopback names are for the Control API, which stays on the machine."""
    names = [*dict.fromkeys((*config.coordinator.names, *LOCAL_NAMES))]
    certificate, key = issue_server(authority, names, config.validity_days)
    write(folder / "coordinator" / "server.key", key)
    write(folder / "coordinator" / "server.crt", certificate)


def _updated(config: ProjectConfig, project: Project, *, renew: bool, reissue: Sequence[str]) -> Project:
    """Return the project with what project.toml says now, if that leaves every kit a coordinator."""
    if config.name != project.name:
        raise ConfigError(
            f"The folder is that of project '{project.name}', the file describes '{config.name}': give each its own folder."
        )
    known = {site.alias for site in config.sites}
    for alias in reissue:
        if alias not in known:
            raise ConfigError(f"--reissue: project.toml has no site '{alias[:64]}'.")
    names, port = config.coordinator.names, config.coordinator.port
    if names != project.names and not renew:
        raise ConfigError(
            "The coordinator's names in project.toml are not those of its certificate: add --renew for a new certificate, "
            "or correct the names."
        )
    lost = []
    for alias, site in project.sites.items():
        host, at = split_address(site.server)
        if (alias in known or site.public_key) and alias not in reissue and (host not in names or at != port):
            lost.append(alias)
    if lost:
        raise ConfigError(
            f"The kits of {', '.join(lost)} call {project.sites[lost[0]].server}, which project.toml no longer has: keep "
            "that name and port, or make new kits with --reissue."
        )
    contacts = {site.alias: site.contact for site in config.sites}
    sites = {
        alias: site.model_copy(update={"contact": contacts.get(alias, site.contact)})
        for alias, site in project.sites.items()
    }
    return project.model_copy(update={"names": names, "port": port, "sites": sites})


def _check_server(project: Project, folder: Path) -> None:
    """Check the coordinator's credentials; a certificate that has just ended is a warning's matter, not a fault."""
    home = folder / "coordinator"
    certificate = load_certificate(home / "server.crt", "The server's certificate")
    moment = min(datetime.datetime.now(datetime.UTC), certificate.not_valid_after_utc)
    check_credentials(
        ca=home / CA, cert=home / "server.crt", key=home / "server.key", names=[check_host(n) for n in project.names],
        now=moment,
    )  # fmt: skip


def _with_kit(
    project: Project, alias: str, config: ProjectConfig, authority: Authority, folder: Path, *, reissue: bool
) -> Project:
    """Make a site's kit and return the project that knows it."""
    home = folder / "kits" / alias
    old = project.sites.get(alias)
    if reissue and old is not None:
        if old.public_key and (config.keys == "central" or old.keys == "central"):
            raise ConfigError(
                f"Site '{alias}' is admitted with a key: a new kit with a new key would lock it out without a word. First "
                f"`wardround site revoke {alias}`."
            )
        with writing():
            shutil.rmtree(home, ignore_errors=True)
            packed(home).unlink(missing_ok=True)
    about = _about(project, alias, config, authority)
    if home.exists():  # an earlier command was killed after it had made the kit
        kit = verify_kit(home, alias=alias)
        if kit.about.authority != about.authority:
            raise ConfigError(f"There is a kit of site '{alias}' that is not of this project: move it away.")
        about, fingerprint = kit.about, kit.fingerprint
    else:
        contents = {CA: authority.pem, "README.md": readme(about), "site.toml": site_toml(about)}
        contents |= compose_files(about)
        if about.keys == "central":
            private, public = new_site_key(alias)
            contents |= {KEY: private, PUBLIC_KEY: public, SECRET: secrets.token_bytes(32)}
        fingerprint = write_kit(about, contents, authority, home)
    key = " ".join((home / PUBLIC_KEY).read_text().split()[:2]) if about.keys == "central" else ""
    contact = next(site.contact for site in config.sites if site.alias == alias)
    admitted = key or (old.public_key if old is not None else "")
    record = SiteRecord(
        contact=contact, keys=about.keys, kit=fingerprint, server=about.server, public_key=admitted
    )
    project = project.with_site(alias, record).noted("kit", alias, fingerprint)
    if key:
        project = project.noted("approve", alias, key_fingerprint(key), "made centrally, in the kit")
    return project


def _about(project: Project, alias: str, config: ProjectConfig, authority: Authority) -> KitList:
    return KitList(
        schema_version=1, software=common.__version__, project=project.name, alias=alias, keys=config.keys,
        server=project.server, names=project.names,
        created=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        expires=authority.certificate.not_valid_after_utc,
        authority=authority_fingerprint(authority.certificate), files={},
    )  # fmt: skip


def _summary(
    config: ProjectConfig, project: Project, folder: Path, made: Sequence[str], server: str
) -> Provisioned:
    until = load_certificate(
        folder / "coordinator" / "server.crt", "The server's certificate"
    ).not_valid_after_utc
    authority = load_certificate(
        folder / "coordinator" / CA, "The authority's certificate"
    ).not_valid_after_utc
    warnings = expiry_warnings(until, authority)
    listed = {site.alias for site in config.sites}
    gone = sorted(alias for alias, site in project.sites.items() if site.public_key and alias not in listed)
    if gone:
        warnings.append(
            f"project.toml no longer has {', '.join(gone)}, which keep their place: `wardround site revoke` takes a key away."
        )
    central = [alias for alias in made if project.sites[alias].keys == "central"]
    if central:
        warnings.append(
            "The new kits hold private keys: hand them over in person or encrypted, then delete the kits folder here. For "
            'patients\' data let every site make its own key (keys = "site").'
        )
    return Provisioned(folder, project, tuple(made), server, until, authority, tuple(warnings))
