"""Where things lie in the containers, and under which names they find each other. Imports nothing heavy.

Everything a container may know comes to it as a mounted folder; environment variables carry names and numbers only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConfigError

FLEET_NAME = "superlink"
"""The coordinator's name on the hospitals' networks."""
CONTROL_NAME = "superlink-control"
"""Its name on the internal network, which no hospital can resolve."""
FLEET_PORT, CONTROL_PORT, APPIO_PORT = 9092, 9093, 9091
RELAY_ADDRESS = "127.0.0.1:9094"

KEYS = Path("/keys")
KIT = Path("/kit")
STATE = Path("/state")
RUNS = Path("/runs")
NET = Path("/net")
DATA = Path("/data")
HOME = Path("/var/lib/wardround")
SITE_FILE = Path("/etc/wardround/site.toml")
SOCKET = Path("/run/wardround/worker.sock")
SCRATCH = Path("/tmp")
PREPARE = Path("/prepare")


@dataclass(frozen=True)
class Variables:
    """What the environment says.

    Args:
        values: The environment.
    """

    values: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def text(self, name: str, default: str = "") -> str:
        """Return a variable's text; the default where it is unset or empty."""
        return self.values.get(f"WARDROUND_{name}", "").strip() or default

    def number(self, name: str) -> int | None:
        """Return a variable's whole number, none where it is unset or empty.

        Raises:
            ConfigError: It is no whole number of 0 or more.
        """
        text = self.text(name)
        if not text:
            return None
        if not (text.isascii() and text.isdecimal()):
            raise ConfigError(f"WARDROUND_{name} must be a whole number of 0 or more, got '{text[:40]}'.")
        return int(text)

    def run(self) -> str:
        """Return the run's name.

        Raises:
            ConfigError: It cannot be a folder's name.
        """
        name = self.text("RUN", "trial")
        if (
            not all(letter.isascii() and (letter.isalnum() or letter in "-_.") for letter in name)
            or name[0] in "-."
        ):
            raise ConfigError(
                "WARDROUND_RUN cannot be a folder's name: use letters, digits, '-', '_' and '.', beginning with a "
                "letter or digit."
            )
        return name
