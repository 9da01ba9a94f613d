"""The SuperLink's container: becomes `flower-superlink`, each port bound to the network it is for.

Fleet listens on every network. Control and ServerAppIo listen on the internal network's address alone, which is the one that
this container's own name there resolves to; on a hospital's network nothing answers on their ports.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from common.errors import VERDICT, ConfigError, ProcessError, WardroundError
from ops.containers import places
from ops.flower_commands import Addresses, superlink
from ops.pki import TrialPki, check_credentials
from ops.processes import Process

RESOLVE_SECONDS = 30.0


def credentials(keys: Path = places.KEYS) -> TrialPki:
    """Return the coordinator's credentials in a mounted folder."""
    return TrialPki(
        keys, keys / "ca.crt", keys / "server.crt", keys / "server.key", server_secret=keys / "secret"
    )


def own_address(name: str, seconds: float = RESOLVE_SECONDS) -> str:
    """Return this container's address on the network where it has a name.

    Raises:
        ProcessError: The name does not resolve, or not to one address alone.
    """
    limit = time.monotonic() + seconds
    while True:
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)}
        except OSError as error:
            if time.monotonic() > limit:
                raise ProcessError(
                    "The SuperLink's name on the internal network does not resolve. Give its service that alias there.",
                    detail=f"{name}: {error}",
                ) from error
            time.sleep(0.5)
            continue
        if len(found) != 1:
            raise ProcessError(
                "The SuperLink's name on the internal network stands for several addresses: expected that of one network.",
                detail=f"{name}: {sorted(found)}",
            )
        return found.pop()


def database(state: Path, ca: Path) -> Path:
    """Return the database for this authority; those of others, whose keys nobody has any more, are deleted."""
    name = f"superlink-{hashlib.sha256(ca.read_bytes()).hexdigest()[:16]}.db"
    for path in state.glob("superlink-*.db*"):
        if not path.name.startswith(name):
            path.unlink()
    return state / name


def command(variables: places.Variables, control: str, keys: Path, state: Path) -> Process:
    """Return the SuperLink's command.

    Args:
        variables: WARDROUND_TRANSPORT is "file" (messages survive a restart) or "memory" (models of any size).
        control: Address for Control and ServerAppIo.
        keys: The coordinator's credentials.
        state: Gets the database.

    Raises:
        ConfigError: Another transport.
        CredentialError: What is wrong with the credentials.
    """
    transport = variables.text("TRANSPORT", "file")
    if transport not in ("file", "memory"):
        raise ConfigError(f"WARDROUND_TRANSPORT must be 'file' or 'memory', got '{transport[:40]}'.")
    pki = credentials(keys)
    names = [places.FLEET_NAME, places.CONTROL_NAME]
    check_credentials(ca=pki.ca, cert=pki.server_cert, key=pki.server_key, names=names)
    addresses = Addresses(
        f"0.0.0.0:{places.FLEET_PORT}", f"{control}:{places.CONTROL_PORT}", f"{control}:{places.APPIO_PORT}"
    )
    file = database(state, pki.ca) if transport == "file" else None
    return superlink(addresses, pki, places.SCRATCH, database=file, appio_tls=True)


def become(process: Process) -> NoReturn:
    """Replace this process by another one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(process.argv[0], list(process.argv), {**os.environ, **process.env})


def tell(error: WardroundError) -> int:
    """Print why a container ends, and return its exit code."""
    print(f"{VERDICT}{error}{f' [{error.detail}]' if error.detail else ''}", file=sys.stderr, flush=True)  # noqa: T201
    return error.exit_code


def main() -> int:
    """Become the SuperLink; returns only if that is not possible."""
    try:
        control = own_address(places.CONTROL_NAME)
        become(command(places.Variables(), control, places.KEYS, places.STATE))
    except WardroundError as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
