"""One-shot container: waits for the SuperLink and registers the sites' public keys, so that SuperNodes find themselves known."""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import CredentialError, WardroundError
from ops.containers import places
from ops.containers.superlink import tell
from ops.control import ControlClient, register, wait_for_link


def public_keys(keys: Path) -> dict[str, Path]:
    """Return the sites' public keys by alias.

    Raises:
        CredentialError: There is none.
    """
    found = {path.stem: path for path in sorted((keys / "sites").glob("*.pub"))}
    if not found:
        raise CredentialError("The coordinator has no site's public key: prepare the trial first.")
    return found


def control_client(keys: Path) -> ControlClient:
    """Return a client of the SuperLink's Control API on the internal network."""
    return ControlClient(f"{places.CONTROL_NAME}:{places.CONTROL_PORT}", keys / "ca.crt")


def main() -> int:
    """Register all sites."""
    try:
        keys = public_keys(places.KEYS)
        with control_client(places.KEYS) as control:
            wait_for_link(control)
            register(control, keys)
    except WardroundError as error:
        return tell(error)
    print(f"registered: {', '.join(keys)}", flush=True)  # noqa: T201 the container's log
    return 0


if __name__ == "__main__":
    sys.exit(main())
