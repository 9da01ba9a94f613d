"""The way to the coordinator's Fleet port, looked at as the SuperNode will go it: name, connection, proxy, TLS.

The SuperNode's gRPC goes through a proxy by CONNECT and then speaks TLS with the coordinator itself, so a proxy that
forwards sees nothing, and one that looks inside shows a certificate of its own authority and is refused. Which proxy is
decided here and handed to the container (WARDROUND_PROXY), so that what was checked is what runs.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from cryptography import x509

from common.errors import CredentialError, ProcessError
from ops.preflight import Finding, fail, ok, skipped, warn
from ops.preflight_proxy import Proxy
from ops.provision_files import join_address

SECONDS = 10.0
"""Patience of each step."""
_MOST_REPLY = 16 * 1024  # bytes of a proxy's answer
_NOT_YET, _EXPIRED, _NAME, _ADDRESS = 9, 10, 62, 64  # OpenSSL's codes, X509_V_ERR_...
_AUTHORITY = (
    2,
    7,
    18,
    19,
    20,
    21,
    24,
    30,
)  # no issuer found, self-signed, signature or key identity of another
Resolver = Callable[..., list[Any]]


@dataclass(frozen=True)
class Route:
    """How the coordinator is called.

    Attributes:
        host: Its name or address, as the kit has it.
        port: Of the Fleet API.
        proxy: On the way, if any.
    """

    host: str
    port: int
    proxy: Proxy | None = None

    @property
    def server(self) -> str:
        """HOST:PORT."""
        return join_address(self.host, self.port)


class ProxyRefused(OSError):
    """A proxy answered, but did not open the way."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status} {said}")
        self.status = status


def check_name(route: Route, *, resolver: Resolver = socket.getaddrinfo, seconds: float = SECONDS) -> Finding:
    """Look up the coordinator's name, or the proxy's where there is one (then the proxy looks up the other)."""
    host = route.proxy.host if route.proxy else route.host
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return ok(
            "name", "The proxy's address needs no look-up." if route.proxy else f"{host} is an address."
        )
    whose = "The proxy's name" if route.proxy else f"The coordinator's name {route.host}"
    here = host if route.proxy else ""
    answer = _looked_up(host, resolver, seconds)
    if isinstance(answer, list) and answer:
        if route.proxy:
            return ok(
                "name", f"{whose} is known; it looks up {route.host} itself.", f"{host}: {', '.join(answer)}"
            )
        return ok("name", f"{route.host} is {', '.join(answer)}.")
    why = "was not looked up in time" if answer is None else "is not known here"
    return fail(
        "name", f"{whose} {why}.",
        "Let this machine's DNS resolve it, or ask the coordinator for a kit that calls an address.",
        f"{here}: {answer}" if here and answer else here or str(answer or ""),
    )  # fmt: skip


def _looked_up(host: str, resolver: Resolver, seconds: float) -> list[str] | OSError | None:
    """Return addresses, the error, or none after the patience: the system's look-up itself knows no limit."""
    found: list[list[str] | OSError] = []

    def look() -> None:
        try:
            rows = resolver(host, None, type=socket.SOCK_STREAM)
            found.append([*dict.fromkeys(str(row[4][0]) for row in rows)])
        except (OSError, UnicodeError) as error:
            found.append(error if isinstance(error, OSError) else OSError(str(error)))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def connect(route: Route, seconds: float = SECONDS) -> socket.socket:
    """Return a connection to the coordinator's port, through the proxy if there is one.

    Raises:
        ProxyRefused: The proxy answered something else than 2xx.
        OSError: No connection.
    """
    at = (route.proxy.host, route.proxy.port) if route.proxy else (route.host, route.port)
    plain = socket.create_connection(at, timeout=seconds)
    try:
        if route.proxy:
            _through(plain, route, route.proxy)
    except BaseException:
        plain.close()
        raise
    return plain


def _through(plain: socket.socket, route: Route, proxy: Proxy) -> None:
    lines = [f"CONNECT {route.server} HTTP/1.1", f"Host: {route.server}"]
    if proxy.login:
        login = base64.b64encode(unquote(proxy.login).encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {login}")
    plain.sendall("\r\n".join([*lines, "", ""]).encode())
    reply = b""
    while not reply.endswith(b"\r\n\r\n"):
        byte = plain.recv(1)  # one at a time: what follows the empty line belongs to TLS
        reply += byte
        if not byte or len(reply) > _MOST_REPLY:
            raise ProxyRefused(0, "no answer of a proxy")
    words = reply.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    status = int(words[1]) if len(words) > 1 and words[0].startswith("HTTP/") and words[1].isdecimal() else 0
    if not 200 <= status < 300:
        raise ProxyRefused(status, words[2][:80] if len(words) > 2 else "")


def check_connection(route: Route, *, seconds: float = SECONDS) -> Finding:
    """Open a TCP connection to the Fleet port, through the proxy if there is one."""
    began = time.monotonic()
    here = _here(route)
    try:
        connect(route, seconds).close()
    except ProxyRefused as error:
        return _proxy_refusal(route, error, here)
    except OSError as error:
        return _no_connection(route, error, here, seconds)
    way = f", through a proxy ({route.proxy.variable})" if route.proxy else ""
    return ok(
        "connection", f"{route.server} answers in {1000 * (time.monotonic() - began):.0f} ms{way}.", here
    )


def _here(route: Route) -> str:
    return f"proxy {join_address(route.proxy.host, route.proxy.port)}" if route.proxy else ""


def _proxy_refusal(route: Route, error: ProxyRefused, here: str) -> Finding:
    if error.status == 407:
        found, remedy = (
            "wants a name and a password",
            "Put them into the variable: http://NAME:PASSWORD@HOST:PORT.",
        )
    elif error.status:
        found = f"does not open a way to {route.server} (status {error.status})"
        remedy = (
            f"Let whoever runs the proxy allow CONNECT to {route.server}, or name the server in no_proxy."
        )
    else:
        found, remedy = (
            "does not answer as a proxy does",
            "Correct the variable, or name the server in no_proxy.",
        )
    which = route.proxy.variable if route.proxy else ""
    if error.status in (502, 503, 504):  # it lets us through, and nobody answered there
        return warn(
            "connection",
            f"The proxy ({which}) cannot reach {route.server} (status {error.status}): most often no run is under way.",
            "Ask the coordinator whether a run is under way; the site connects by itself when one begins. If one is: let "
            f"whoever runs the proxy allow CONNECT to {route.server}.", f"{here}: {error}",
        )  # fmt: skip
    return fail("connection", f"The proxy ({which}) {found}.", remedy, f"{here}: {error}")


def _no_connection(route: Route, error: OSError, here: str, seconds: float) -> Finding:
    what = f"The proxy ({route.proxy.variable})" if route.proxy else route.server
    if isinstance(error, ConnectionRefusedError) and not route.proxy:
        return warn(
            "connection", f"{what} refuses the connection: no run is under way there, or a firewall says no.",
            f"Ask the coordinator whether a run is under way; the site connects by itself when one begins. If one is: allow "
            f"connections out of this machine to {route.server} (TCP).", str(error),
        )  # fmt: skip
    if isinstance(error, ConnectionRefusedError):
        found = f"{what} refuses the connection: nothing listens there."
    elif isinstance(error, TimeoutError):
        found = f"{what} did not answer within {seconds:.0f} s: most often a firewall that drops the packets."
    elif isinstance(error, socket.gaierror):
        found = f"{what} cannot be called: its name is not known here."
    else:
        found = f"{what} cannot be reached."
    remedy = f"Allow connections out of this machine to {route.server} (TCP), and ask the coordinator whether it runs."
    if route.proxy:
        remedy = "Correct the variable, or ask whoever runs the proxy; a server that needs none goes into no_proxy."
    return fail("connection", found, remedy, "; ".join(part for part in (here, str(error)) if part))


@dataclass(frozen=True)
class Handshake:
    """What a TLS handshake showed.

    Attributes:
        finding: For the report.
        begins: Of the certificate that was accepted (seconds since the epoch), none if none was.
    """

    finding: Finding
    begins: float | None = None


def check_tls(route: Route, ca: bytes, *, seconds: float = SECONDS) -> Handshake:
    """Do the SuperNode's TLS handshake: the kit's authority, the kit's name, HTTP/2.

    Args:
        route: How the coordinator is called.
        ca: The kit's ca.crt (PEM).
        seconds: Patience of each step.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.decode("ascii"))
    context.set_alpn_protocols(["h2"])
    try:
        with (
            connect(route, seconds) as plain,
            context.wrap_socket(plain, server_hostname=route.host) as secure,
        ):
            return _accepted(route, secure)
    except ssl.SSLCertVerificationError as error:
        return Handshake(_refused(route, error, shown_certificate(route, seconds)))
    except (ssl.SSLError, ConnectionError, TimeoutError) as error:
        return Handshake(_no_tls(route, error, seconds))
    except OSError as error:  # the connection's own finding has said why
        return Handshake(skipped("tls", f"No connection to {route.server} ({type(error).__name__})."))


def _accepted(route: Route, secure: ssl.SSLSocket) -> Handshake:
    certificate: Mapping[str, Any] = secure.getpeercert() or {}
    begins = float(ssl.cert_time_to_seconds(certificate["notBefore"]))
    end = float(ssl.cert_time_to_seconds(certificate["notAfter"]))
    until = time.strftime("%Y-%m-%d", time.gmtime(end))
    if secure.selected_alpn_protocol() != "h2":
        found = f"{route.server} shows the coordinator's certificate, but does not speak HTTP/2."
        remedy = (
            "Ask the coordinator whether this is the Fleet port, or whether a balancer before it ends HTTP/2."
        )
        return Handshake(fail("tls", found, remedy), begins)
    said = f"{secure.version()}, HTTP/2, certificate of the kit's authority for {route.host}, until {until}."
    if end - time.time() < 14 * 86400:
        soon = warn(
            "tls", said, "The certificate ends soon: ask the coordinator to renew it; the kit stays valid."
        )
        return Handshake(soon, begins)
    return Handshake(ok("tls", said), begins)


def shown_certificate(route: Route, seconds: float = SECONDS) -> x509.Certificate | None:
    """Return the certificate that the other end shows, whoever signed it; nothing is sent to it but the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            connect(route, seconds) as plain,
            context.wrap_socket(plain, server_hostname=route.host) as secure,
        ):
            shown = secure.getpeercert(binary_form=True)
            return x509.load_der_x509_certificate(shown) if shown else None
    except (OSError, ValueError):
        return None


def _refused(route: Route, error: ssl.SSLCertVerificationError, shown: x509.Certificate | None) -> Finding:
    """Say why a certificate was refused."""
    code, detail = error.verify_code, error.verify_message
    dates = f"{shown.not_valid_before_utc:%Y-%m-%d} to {shown.not_valid_after_utc:%Y-%m-%d}" if shown else ""
    if code in (_NAME, _ADDRESS):
        found = f"The certificate is of the kit's authority, but not for {route.host}."
        remedy = "Ask the coordinator for a certificate with this name (provision --renew), or for a new kit."
        detail = f"for {_names(shown)}" if shown else detail
    elif code == _EXPIRED:
        found = (
            f"The coordinator's certificate has expired ({dates})." if dates else "A certificate has expired."
        )
        remedy = (
            "Compare this machine's clock; if it is right, let the coordinator renew (provision --renew)."
        )
    elif code == _NOT_YET:
        found = (
            f"The coordinator's certificate is not valid yet ({dates})."
            if dates
            else "A certificate is not valid yet."
        )
        remedy = "Set this machine's clock (a time server); if it is right, ask the coordinator."
    elif code in _AUTHORITY:
        found = "The certificate is of another authority than the kit's."
        whose = "the proxy" if route.proxy else "a firewall or proxy on the way"
        remedy = (
            f"If its issuer is the hospital's, {whose} opens TLS: exempt {route.server} from inspection. Else do not go on, "
            "and call the coordinator by a number that you know."
        )
        detail = f"issued by {shown.issuer.rfc4514_string()}" if shown else detail
    else:
        found, remedy = (
            "The certificate is not accepted.",
            "Ask the coordinator to check it (`wardround site list`).",
        )
    return fail("tls", found, remedy, detail, CredentialError)


def _no_tls(route: Route, error: OSError, seconds: float) -> Finding:
    reason = getattr(error, "reason", "") or type(error).__name__
    if isinstance(error, TimeoutError):
        found = f"{route.server} takes connections, but began no TLS within {seconds:.0f} s."
    elif isinstance(error, ConnectionRefusedError):
        found = f"{route.server} refuses the connection."
    elif isinstance(error, ConnectionError | ssl.SSLEOFError | ssl.SSLZeroReturnError):
        found = f"{route.server} ends the connection during the TLS handshake."
    elif reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
        found = f"{route.server} does not speak TLS."
    else:
        found = f"The TLS handshake with {route.server} failed."
    remedy = "Ask the coordinator whether its Fleet port runs there with TLS; a firewall may also answer in its place."
    return fail("tls", found, remedy, str(reason), ProcessError)


def _names(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "no name"
    known = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return ", ".join(known)
