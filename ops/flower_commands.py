"""The command lines of Flower's processes, ready to be started: what is fixed, what is free, and why.

Fixed everywhere: TLS and a registered key on the one port that leaves the machine; process isolation with a
secret of one's own, which closes the otherwise open app ports and lets a ServerApp outlive its SuperLink;
telemetry, update checks and the installation of packages at run time off; a Flower home per process;
programs from the environment that runs this one, whatever PATH says. Every address is explicit, because
Flower's defaults listen on all interfaces.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import ConfigError, ProcessError
from ops.pki import TrialPki
from ops.ports import LOOPBACK, free_ports
from ops.processes import Process

Runtime = Literal["fast", "stock"]
Transport = Literal["memory", "file"]
IN_MEMORY = ":flwr-in-memory:"
RELAY_APP = "client.relay:app"


@dataclass(frozen=True)
class Addresses:
    """Where a coordinator's three services listen, as HOST:PORT."""

    fleet: str
    control: str
    serverappio: str


def loopback_addresses() -> Addresses:
    """Return addresses on reserved loopback ports.

    Raises:
        ProcessError: The machine has no free ports.
    """
    return Addresses(*(f"{LOOPBACK}:{port}" for port in free_ports(3)))


def superlink(
    addresses: Addresses,
    pki: TrialPki,
    folder: Path,
    *,
    database: Path | None = None,
    appio_tls: bool = False,
) -> Process:
    """Return the SuperLink: Fleet port for the sites, Control and ServerAppIo for this machine.

    Args:
        addresses: Where it listens.
        pki: The coordinator's certificate, key and app secret.
        folder: Gets its Flower home and its log.
        database: SQLite file that survives a restart; none keeps everything in memory, which is faster and has
            no limit of its own on the size of a message.
        appio_tls: ServerAppIo speaks TLS, for a ServerApp that does not share this machine's loopback.

    Raises:
        ProcessError: Flower is not installed beside this Python.
    """
    argv = [
        _program("flower-superlink"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(pki.server_secret)),
        *("--fleet-api-address", addresses.fleet),
        *("--control-api-address", addresses.control),
        *("--serverappio-api-address", addresses.serverappio),
        *("--ssl-ca-certfile", str(pki.ca)),
        *("--ssl-certfile", str(pki.server_cert), "--ssl-keyfile", str(pki.server_key)),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--database", str(database) if database is not None else IN_MEMORY),
    ]
    if appio_tls:
        argv += ["--appio-ssl-ca-certfile", str(pki.ca), "--appio-ssl-certfile", str(pki.server_cert)]
        argv += ["--appio-ssl-keyfile", str(pki.server_key)]
    # Flower logs every question of every site; the last lines of its log are for what went wrong.
    return _process("superlink", argv, folder, env={"FLWR_LOG_LEVEL": "WARNING"})


def server_superexec(
    addresses: Addresses,
    pki: TrialPki,
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    appio_tls: bool = False,
) -> Process:
    """Return the launcher of the ServerApp at the coordinator.

    Args:
        addresses: Of the SuperLink.
        pki: Has the secret shared with the SuperLink.
        folder: Gets its Flower home and its log, which is the ServerApp's, too.
        env: Variables for it and the ServerApp it starts.
        appio_tls: The SuperLink's ServerAppIo speaks TLS; its authority is that of `pki`.

    Raises:
        ProcessError: Flower is not installed beside this Python.
    """
    ca = pki.ca if appio_tls else None
    argv = _superexec("serverapp", addresses.serverappio, pki.server_secret, ca)
    return _process("serverapp", argv, folder, env=env)


def supernode(
    site: str,
    pki: TrialPki,
    folder: Path,
    *,
    fleet: str,
    clientappio: str,
    node_config: Mapping[str, str],
    runtime: Runtime = "fast",
    events: Path | None = None,
) -> Process:
    """Return the SuperNode of a site.

    Args:
        site: Alias; the process is named "supernode-ALIAS".
        pki: Has the authority, the site's key and its app secret.
        folder: Gets its Flower home and its log.
        fleet: The coordinator's Fleet address, by a name of its certificate.
        clientappio: Where it serves its relay, on loopback.
        node_config: What the relay is told, e.g. {"site": "oak", "worker": "/run/oak.sock"}.
        runtime: "fast" runs `client.supernode` (short polls, counted bytes), "stock" Flower's own program.
        events: Gets the transport events (fast only).

    Raises:
        ConfigError: A value of `node_config` that cannot be written there.
        ProcessError: Flower is not installed beside this Python.
    """
    argv = [_program("flower-supernode")] if runtime == "stock" else _module("client.supernode")
    argv += [
        *("--isolation", "process", "--superexec-auth-secret-file", str(pki.site_secrets[site])),
        *("--superlink", fleet, "--root-certificates", str(pki.ca)),
        *("--auth-supernode-private-key", str(pki.site_keys[site])),
        *("--clientappio-api-address", clientappio),
        *("--node-config", node_config_text(node_config)),
    ]
    if runtime == "fast":
        argv += ["--wardround-site", site]
        argv += ["--wardround-events", str(events)] if events is not None else []
    return _process(f"supernode-{site}", argv, folder, site=site)


def relay_launcher(
    site: str,
    pki: TrialPki,
    folder: Path,
    *,
    clientappio: str,
    runtime: Runtime = "fast",
    app: str = RELAY_APP,
    env: Mapping[str, str] | None = None,
) -> Process:
    """Return what starts a site's relay for every message.

    Args:
        site: Alias; the process is named "relay-ALIAS". pki: Has the secret shared with the SuperNode.
        folder: Gets its Flower home and its log, which is the relay's, too. clientappio: Where the
        SuperNode serves it. runtime: "fast" runs `client.forkexec` (forks a relay that has imported
        everything already, and runs the
            installed app only), "stock" Flower's own launcher.
        app: MODULE:ATTRIBUTE of the installed ClientApp (fast only; stock takes it from the bundle).
        env: More variables.

    Raises:
        ProcessError: Flower is not installed beside this Python.
    """
    if runtime == "stock":
        argv = _superexec("clientapp", clientappio, pki.site_secrets[site])
    else:
        argv = [
            *_module("client.forkexec"),
            *("--clientappio-address", clientappio, "--app", app),
            *("--superexec-auth-secret-file", str(pki.site_secrets[site])),
        ]
    return _process(f"relay-{site}", argv, folder, site=site, env=env)


def node_config_text(values: Mapping[str, str]) -> str:
    """Return the text of `--node-config` for string values.

    Raises:
        ConfigError: A key that is no identifier, or a value with a quote or a line break.
    """
    for key, value in values.items():
        if not key.replace("-", "_").isidentifier():
            raise ConfigError(
                f"'{key}' cannot be a key of the SuperNode's configuration: use letters and '-'."
            )
        if not value.isprintable() or "'" in value:
            raise ConfigError(
                f"The SuperNode's setting '{key}' has a quote or a line break, which Flower cannot take: "
                "choose a path without.",
                detail=repr(value),
            )
    return " ".join(f"{key}='{value}'" for key, value in values.items())


def flower_env(home: Path) -> dict[str, str]:
    """Return the variables every Flower process gets.

    Args:
        home: Its own Flower home (unpacked bundles, configuration).
    """
    programs = str(Path(sys.executable).parent)
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": programs
        + os.pathsep
        + os.environ.get("PATH", ""),  # launchers find their apps' programs by PATH
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",  # none of these processes computes
        "OPENBLAS_NUM_THREADS": "1",
    }


def _process(
    name: str, argv: list[str], folder: Path, *, site: str = "", env: Mapping[str, str] | None = None
) -> Process:
    variables = {**flower_env((folder / "flwr" / name).absolute()), **(env or {})}
    return Process(name, argv, folder / f"{name}.log", env=variables, site=site)


def _superexec(plugin: str, appio: str, secret: Path, ca: Path | None = None) -> list[str]:
    # Without TLS it is for loopback only; both ways every call is signed with the secret.
    safety = ["--insecure"] if ca is None else ["--root-certificates", str(ca)]
    return [
        _program("flower-superexec"),
        *safety,
        *("--plugin-type", plugin, "--appio-api-address", appio),
        *("--superexec-auth-secret-file", str(secret)),
    ]


def _module(name: str) -> list[str]:
    return [
        sys.executable,
        "-P",
        "-m",
        name,
    ]  # -P: nothing is imported from the folder it happens to start in


def _program(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise ProcessError(
            f"'{name}' is not installed beside this Python: install wardround and Flower in one environment.",
            detail=str(path),
        )
    return str(path)
