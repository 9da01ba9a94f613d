"""A hospital's network container: SuperNode and relay launcher, which meet on its loopback; no data, no torch.

Both live or neither: when one ends, the other is ended, and the container with them, so that the engine's restart policy starts
both anew with growing waits. (A SuperNode that gives up ends with 0, a launcher without its SuperNode waits for ever.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import ConfigError, ProcessError, WardroundError
from ops.containers import health, places
from ops.containers.superlink import tell
from ops.flower_commands import relay_launcher, supernode
from ops.pki import ALIAS, TrialPki, check_credentials
from ops.processes import Process, explain

LOOK_SECONDS = 0.2
SIGN_SECONDS = 15.0
PATIENCE_SECONDS = 600.0
"""How long the coordinator may be silent. A SuperNode reconnects by itself after an outage, and delivers what was trained
meanwhile; only one that hangs needs a restart."""
STOP_SECONDS = 8.0  # the engine's own patience is 10 s


def trial_credentials(alias: str, keys: Path) -> TrialPki:
    """Return a site's credentials in a folder with `ca.crt`, `key` and `secret`.

    Raises:
        CredentialError: What is wrong with them.
    """
    check_credentials(ca=keys / "ca.crt", site_key=keys / "key", site=alias)
    none = keys / "none"
    return TrialPki(
        keys,
        keys / "ca.crt",
        none,
        none,
        none,
        site_keys={alias: keys / "key"},
        site_secrets={alias: keys / "secret"},
    )


def identity(variables: places.Variables, keys: Path, kit: Path) -> tuple[str, str, TrialPki]:
    """Return (alias, the coordinator's Fleet address, credentials): from a startup kit if there is one.

    Args:
        variables: Without a kit, WARDROUND_SITE is the alias and WARDROUND_FLEET the address.
        keys: The site's key and secret; without a kit also the authority.
        kit: The unpacked kit.

    Raises:
        ConfigError: No alias, or one that cannot be used.
        CredentialError: What is wrong with the kit or the credentials.
    """
    if (kit / "kit.json").is_file():
        from ops.kit import verify_kit
        from ops.kit_request import site_credentials

        found = verify_kit(kit)
        return found.about.alias, found.about.server, site_credentials(found, keys)
    alias = variables.text("SITE")
    if not ALIAS.fullmatch(alias):
        raise ConfigError(
            "WARDROUND_SITE must be the site's alias: 1-32 lower-case letters, digits, '-' or '_'."
        )
    fleet = variables.text("FLEET", f"{places.FLEET_NAME}:{places.FLEET_PORT}")
    return alias, fleet, trial_credentials(alias, keys)


def commands(variables: places.Variables, keys: Path, net: Path, kit: Path = places.KIT) -> list[Process]:
    """Return the two commands of a site's network side.

    Args:
        variables: See `identity`.
        keys: The site's credentials.
        net: Gets the transport events.
        kit: The startup kit, if there is one.

    Raises:
        ConfigError: No alias, or one that cannot be used.
        CredentialError: What is wrong with the kit or the credentials.
    """
    alias, fleet, pki = identity(variables, keys, kit)
    node = {"site": alias, "worker": str(places.SOCKET)}
    events = net / f"events-{alias}-net.jsonl"
    return [
        relay_launcher(alias, pki, places.SCRATCH, clientappio=places.RELAY_ADDRESS),
        supernode(
            alias, pki, places.SCRATCH, fleet=fleet, clientappio=places.RELAY_ADDRESS, node_config=node, events=events
        ),
    ]  # fmt: skip


class Pair:
    """Processes that live together.

    Args:
        processes: What to start, in this order; their output is this process's.
        sign: Returns what is wrong, empty while there is a sign of life.
        patience: Seconds without one after which they are ended, to be started anew.
    """

    def __init__(
        self,
        processes: Sequence[Process],
        sign: Callable[[], str] = lambda: "",
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._processes = processes
        self._sign, self._patience = sign, patience
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._told = False

    def run(self) -> int:
        """Start all, wait for the first end, end the others, and return the exit code: never 0 unless told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            for process in self._processes:
                environment = {**os.environ, **process.env}
                self._running[process.name] = subprocess.Popen(process.argv, env=environment)
            ended = self._first_end()
        finally:
            self._end_all()
        if self._told or ended is None:
            return 0
        why, code = ended
        print(f"site-net: {why}; all of this container ends with it", flush=True)  # noqa: T201 the container's log
        return code if 0 < code < 128 else ProcessError.exit_code

    def _first_end(self) -> tuple[str, int] | None:
        """Return (why, exit code) of what ends them all, none if told to stop."""
        seen = looked = time.monotonic()
        while not self._told:
            for name, process in self._running.items():
                code = process.poll()
                if code is not None:
                    return f"'{name}' ended {explain(code)}", code
            now = time.monotonic()
            if now - looked >= min(SIGN_SECONDS, self._patience):
                looked, wrong = now, self._sign()
                seen = seen if wrong else now
                if now - seen >= self._patience:
                    return wrong, 0
            time.sleep(LOOK_SECONDS)
        return None

    def _end_all(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        limit = time.monotonic() + STOP_SECONDS
        for process in self._running.values():
            try:
                process.wait(max(limit - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _stop(self, *_: object) -> None:
        self._told = True


def main() -> int:
    """Run a site's network side."""
    try:
        return Pair(commands(places.Variables(), places.KEYS, places.NET), health.site_net).run()
    except WardroundError as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
