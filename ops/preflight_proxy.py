"""Which proxy is on the way to the coordinator, by the environment.

gRPC alone would read the lower-case variables only, and would send the SuperNode's call to its own relay through the
proxy, too. So the choice is made here, once, and handed to the container as one variable that is always set.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from common.errors import ConfigError
from ops.provision_files import join_address

PROXY_VARIABLES = ("WARDROUND_PROXY", "grpc_proxy", "https_proxy", "HTTPS_PROXY")
_WITH_PORT = re.compile(
    r"(?:\[(?P<inside>[^]]*)\]|(?P<name>[^:]*))(?::(?P<port>[0-9]{1,5}))?"
)  # not a bare IPv6 address
BYPASS_VARIABLES = ("no_grpc_proxy", "no_proxy", "NO_PROXY")


@dataclass(frozen=True)
class Proxy:
    """A proxy that forwards by CONNECT.

    Attributes:
        host: Its name or address.
        port: Its TCP port.
        login: "name:password", empty if none; never printed.
        variable: Environment variable that named it.
    """

    host: str
    port: int
    login: str = field(default="", repr=False)
    variable: str = ""

    @property
    def url(self) -> str:
        """The form that gRPC reads, with the login as it was given."""
        return f"http://{self.login + '@' if self.login else ''}{join_address(self.host, self.port)}"


def chosen_proxy(host: str, port: int, environ: Mapping[str, str]) -> Proxy | None:
    """Return the proxy that the environment names for a server, none if it is to be called directly.

    Args:
        host: The server.
        port: Its port.
        environ: The first of PROXY_VARIABLES that is not empty counts, and the first of BYPASS_VARIABLES. An explicit
            WARDROUND_PROXY is always used.

    Raises:
        ConfigError: A proxy that gRPC cannot use.
    """
    variable = next((name for name in PROXY_VARIABLES if environ.get(name, "").strip()), "")
    if not variable:
        return None
    bypass = next((environ[name] for name in BYPASS_VARIABLES if environ.get(name, "").strip()), "")
    if variable != PROXY_VARIABLES[0] and bypassed(host, port, bypass):
        return None
    return parse_proxy(environ[variable].strip(), variable)


def parse_proxy(text: str, variable: str) -> Proxy:
    """Return a proxy from http://[NAME:PASSWORD@]HOST:PORT; the scheme may be left out, the port is 80 then.

    Raises:
        ConfigError: Another scheme, no host, or no port; the text itself is not repeated, it may hold a password.
    """
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname or "", parts.port or 80
    except ValueError:
        host, port, parts = "", 0, urlsplit("")
    if parts.scheme != "http" or not host or not port:
        raise ConfigError(
            f"{variable} names no proxy that can be used: expected http://HOST:PORT (gRPC speaks plain HTTP with a proxy, "
            "and TLS with the coordinator through it). Correct the variable."
        )
    login = parts.netloc.rpartition("@")[0]
    return Proxy(host, port, login, variable)


def bypassed(host: str, port: int, entries: str) -> bool:
    """Return whether no_proxy exempts a server.

    Args:
        host: The server.
        port: Its port.
        entries: Divided by commas: `*`, a name (with everything below it), an address, a network, each of them
            perhaps with a port.
    """
    for entry in (part.strip().lower() for part in entries.split(",")):
        if not entry:
            continue
        if entry == "*":
            return True
        match = _WITH_PORT.fullmatch(entry)
        if match and match["port"] and int(match["port"]) != port:
            continue
        entry = (match["inside"] or match["name"]) if match else entry
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        bare = entry.removeprefix("*").lstrip(".")
        if bare and (host.lower() == bare or host.lower().endswith(f".{bare}")):
            return True
    return False
