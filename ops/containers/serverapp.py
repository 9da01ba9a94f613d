"""The ServerApp's container: becomes `flower-superexec`, which starts a ServerApp for every run of the SuperLink.

It has the run folders, and neither data nor the keys that would let it speak for the SuperLink or a site.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import CredentialError, WardroundError
from ops.containers import places
from ops.containers.superlink import become, credentials, tell
from ops.flower_commands import Addresses, server_superexec
from ops.processes import Process


def command(variables: places.Variables, keys: Path, runs: Path) -> Process:
    """Return the launcher's command.

    Args:
        variables: WARDROUND_RUN names the run, WARDROUND_RUNTIME is "fast" or "stock".
        keys: Has `ca.crt` and the secret shared with the SuperLink.
        runs: Has a folder per run.

    Raises:
        ConfigError: A name that cannot be a folder's.
        CredentialError: The keys were not mounted.
    """
    pki = credentials(keys)
    if not pki.ca.is_file() or not pki.server_secret.is_file():
        raise CredentialError(
            "The ServerApp's keys are not there: expected ca.crt and secret in its key folder."
        )
    run = variables.run()
    appio = f"{places.CONTROL_NAME}:{places.APPIO_PORT}"
    env = {
        "WARDROUND_RUN_DIR": str(runs / run),
        "WARDROUND_RUN_ID": run,
        "WARDROUND_RUNTIME": variables.text("RUNTIME", "fast"),
    }
    if threads := variables.number("THREADS"):
        env["OMP_NUM_THREADS"] = str(threads)
    return server_superexec(Addresses("", "", appio), pki, places.SCRATCH, env=env, appio_tls=True)


def main() -> int:
    """Become the launcher; returns only if that is not possible."""
    try:
        become(command(places.Variables(), places.KEYS, places.RUNS))
    except WardroundError as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
