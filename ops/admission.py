"""Who is admitted to a project, for a run that goes on: the keys at its start, and what changes meanwhile.

The project's folder is only read, so it may be mounted so; copies of the admitted public keys lie in the run folder. An
approval or a revocation on the coordinator's machine reaches the run by the project's file, within seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from common.config import RunConfig
from common.errors import ConfigError, WardroundError
from ops.pki import TrialPki, check_credentials
from ops.provision_files import private_folder, read_limited, write, writing
from ops.provision_project import STATE, Project, read_project
from server.roster import needed_sites

LOOK_SECONDS = 2.0
BLIND_LOOKS = 3


def credentials(folder: Path, home: Path) -> TrialPki:
    """Return a project's credentials in the form that the SuperLink's command takes; the project is only read.

    Args:
        folder: The project.
        home: Gets the admitted public keys (`sites/ALIAS.pub`), of the run's folder.

    Raises:
        ConfigError: No project there.
        CredentialError: A credential is missing, out of date, or does not fit the others.
        StorageError: The run's folder cannot be written.
    """
    project, of = read_project(folder), folder / "coordinator"
    check_server(folder, project)
    return TrialPki(
        of, of / "ca.crt", of / "server.crt", of / "server.key", of / "secret", site_public=copy_keys(project, home),
    )  # fmt: skip


def check_server(folder: Path, project: Project) -> None:
    """Check a project's certificates, its server's key and its secret.

    Raises:
        CredentialError: One is missing, out of date, or does not fit the others.
    """
    of = folder / "coordinator"
    check_credentials(
        ca=of / "ca.crt", cert=of / "server.crt", key=of / "server.key", names=list(project.names)
    )
    read_limited(of / "secret", "The secret of the coordinator's processes")


def copy_keys(project: Project, home: Path) -> dict[str, Path]:
    """Write the admitted public keys into a folder of the run, and return the file by alias.

    Raises:
        StorageError: It cannot be written.
    """
    with writing():
        sites = private_folder(home / "sites")
    admitted = {alias: site.public_key for alias, site in sorted(project.sites.items()) if site.public_key}
    return {
        alias: write(sites / f"{alias}.pub", f"{key} {alias}\n".encode()) for alias, key in admitted.items()
    }


def choose_admitted(project: Project, wanted: str | None) -> list[str]:
    """Return the sites that take part: all that are admitted, or those named.

    Args:
        project: The project.
        wanted: "oak,elm"; all where none.

    Raises:
        ConfigError: None is admitted, one that is named is unknown, or is not admitted.
    """
    admitted = sorted(alias for alias, site in project.sites.items() if site.public_key)
    remedy = "Approve its request with `wardround site approve REQUEST --project DIR`"
    if wanted is None:
        if not admitted:
            raise ConfigError(
                f"No site of project '{project.name}' is admitted yet, so nobody could connect. {remedy}."
            )
        return admitted
    named = [part.strip() for part in wanted.split(",") if part.strip()]
    if not named:
        raise ConfigError(
            "--sites names nobody: expected aliases, e.g. --sites oak,elm; leave it out for all."
        )
    for alias in named:
        project.site(alias)
    missing = [alias for alias in dict.fromkeys(named) if alias not in admitted]
    if missing:
        raise ConfigError(f"Not admitted: {', '.join(missing)}. {remedy}, or leave it out of --sites.")
    return list(dict.fromkeys(named))


def check_still_admitted(project: Project, config: RunConfig) -> None:
    """Check that enough of a run's sites are still admitted to continue it; it goes on without the others.

    Raises:
        ConfigError: Fewer than its quorum.
    """
    gone = [
        alias for alias in config.sites if alias not in project.sites or not project.sites[alias].public_key
    ]
    left, needed = len(config.sites) - len(gone), max(needed_sites(config, len(config.sites)), 1)
    if left < needed:
        raise ConfigError(
            f"Not admitted any more: {', '.join(gone)}. {left} of the run's {len(config.sites)} sites are left, it needs "
            f"{needed} (quorum). Approve new keys with `wardround site approve`, or begin another run."
        )


class Watch:
    """Sees that the project's file changed.

    Args:
        folder: The project.
        clock: Seconds, monotonic.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._looked = clock()
        self._seen = self._mark()
        self._failed = 0

    def changed(self) -> Project | None:
        """Return the project if its file changed since the last time, looked at every few seconds.

        One that cannot be read (a share that is away, a backup being laid back, a file of another user) is looked at again:
        nobody's admission changes by it.
        """
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return None
        self._looked = now
        mark = self._mark()
        if mark == self._seen:
            self._failed = 0
            return None
        try:
            project = read_project(self._folder)
        except WardroundError:
            self._failed += 1
            return None
        self._seen, self._failed = mark, 0
        return project

    @property
    def blind(self) -> bool:
        """Whether the project could not be read the last few times, so that a revocation would not be seen."""
        return self._failed >= BLIND_LOOKS

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._folder / STATE)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
