"""`wardround dashboard`: the runs of a folder in a browser, from their event files; reads and never writes.

A few fixed addresses and the names of known runs are all that is answered: no path is made of what a request says. GET
and HEAD alone, every page under a content policy that loads nothing. The host that a request names must be an address
or a known name: a page elsewhere whose name was made to point here (DNS rebinding) gets nothing.

There is no login and no TLS: it listens on loopback unless told otherwise, and belongs behind whatever the institution
has for that.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from common.errors import ConfigError, ProcessError
from ops import dashboard_metrics as machine
from ops.dashboard_pages import Reports, overview, overview_policy
from ops.dashboard_runs import NAME, Board
from ops.ports import check_port

MOST_CONNECTIONS = 32
REQUEST_SECONDS = 15.0
MOST_DRAINED = 64 * 1024
RUNS = "/runs/"
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json; charset=utf-8", "text/plain; charset=utf-8"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Answer:
    """What is answered: status, kind, body, and the content policy that a page needs."""

    status: HTTPStatus
    kind: str
    body: str
    policy: str = ""


def told(status: HTTPStatus, sentence: str) -> Answer:
    """Return a plain sentence."""
    return Answer(status, TEXT, sentence + "\n")


class Site:
    """Answers addresses.

    Args:
        board: The runs.
        reports: Renders them.
    """

    def __init__(self, board: Board, reports: Reports | None = None) -> None:
        self.board = board
        self.reports = reports or Reports()

    def answer(self, target: str) -> Answer:
        """Return the answer to a request's target ("/runs/trial?refresh=0")."""
        try:
            parts = urlsplit(target)
        except ValueError:
            return told(HTTPStatus.BAD_REQUEST, "This is no address.")
        path, follow = parts.path, parts.query != "refresh=0"
        if path == "/":
            seen = self.board.snapshot()
            shown = overview(seen, self.board.clock(), self.board.silent_after, refresh=follow)
            return Answer(HTTPStatus.OK, HTML, shown.html, shown.policy)
        if path.startswith(RUNS):
            return self._run(path.removeprefix(RUNS), follow)
        if path == "/api/runs.json":
            seen = self.board.snapshot()
            return Answer(
                HTTPStatus.OK, JSON, machine.document(seen, self.board.clock(), self.board.silent_after)
            )
        if path == "/metrics":
            seen = self.board.snapshot()
            page = machine.metrics(seen, self.board.clock(), self.board.silent_after)
            return Answer(HTTPStatus.OK, machine.CONTENT_TYPE, page)
        if path == "/healthz":
            return self._health()
        return told(HTTPStatus.NOT_FOUND, "There is no such page. All runs: /")

    def _run(self, name: str, follow: bool) -> Answer:
        if NAME.fullmatch(name) is None:
            return told(HTTPStatus.NOT_FOUND, "There is no such run. All runs: /")
        seen = self.board.snapshot()
        row = next((item for item in seen.rows if item.name == name), None)
        if row is None:
            return told(HTTPStatus.NOT_FOUND, "There is no such run. All runs: /")
        try:
            with self.board.opened(name) as run:
                if run is None:
                    why = row.problem or "The run is gone, or its files cannot be read."
                    return told(HTTPStatus.SERVICE_UNAVAILABLE, f"{why} All runs: /")
                shown = self.reports.page(run, self.board.clock(), self.board.silent_after, refresh=follow)
        except TimeoutError:
            return told(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "Other reports are being made; ask again in a minute. All runs: /",
            )
        return Answer(HTTPStatus.OK, HTML, shown.html, shown.policy)

    def _health(self) -> Answer:
        seen = self.board.snapshot()
        newest = seen.newest
        age = None if newest is None else round(max(self.board.clock() - newest, 0.0), 3)
        status = HTTPStatus.SERVICE_UNAVAILABLE if seen.gone else HTTPStatus.OK
        words = "the runs folder cannot be read" if seen.gone else "ok"
        document = {"status": words, "runs": len(seen.rows), "newest_event_age_seconds": age}
        return Answer(status, JSON, json.dumps(document) + "\n")


class Names:
    """The hosts that a request may name.

    Args:
        names: Names by which the dashboard is called beside localhost, e.g. that of a proxy before it.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {"localhost", *(name.lower().rstrip(".") for name in names)}

    def fits(self, host: str) -> bool:
        """Tell whether a Host header names an address, localhost or a known name.

        An address cannot be rebound: only a name's answer can be changed under a page that was loaded by it.
        """
        name = host.strip()
        if name.startswith("["):
            name, closed, rest = name[1:].partition("]")
            if not closed or not _port_or_nothing(rest):
                return False
            return _is_address(name)
        name, colon, port = name.partition(":")
        if not _port_or_nothing(colon + port):
            return False
        return name.lower().rstrip(".") in self._names or _is_address(name)


def _port_or_nothing(text: str) -> bool:
    return not text or (text[0] == ":" and text[1:].isascii() and text[1:].isdecimal())


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class Handler(BaseHTTPRequestHandler):
    """One request; the connection ends with its answer."""

    server: Server
    server_version, sys_version = "wardround", ""
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        """Answer."""
        self._reply(self._answer(), body=True)

    def do_HEAD(self) -> None:
        """Answer without the body."""
        self._reply(self._answer(), body=False)

    def _answer(self) -> Answer:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1:
            return told(HTTPStatus.BAD_REQUEST, "Expected one Host header.")
        if not self.server.names.fits(hosts[0]):
            sentence = (
                "This dashboard is not known by that name. Call it by its address or localhost, or start it with "
                "--name and the name it shall have."
            )
            return told(HTTPStatus.MISDIRECTED_REQUEST, sentence)
        try:
            return self.server.site.answer(self.path)
        except Exception as error:  # one page that breaks must not take the others with it
            # The class alone: a foreign exception's text may carry what was in a file.
            sys.stderr.write(f"dashboard: a page cannot be made ({type(error).__name__})\n")
            return told(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "This page cannot be made; the dashboard's own output says why. `wardround watch RUN_DIR` shows the "
                "run on a terminal.",
            )

    def _reply(self, answer: Answer, *, body: bool) -> None:
        data = answer.body.encode("utf-8", errors="backslashreplace")
        with contextlib.suppress(OSError):  # who asked is gone
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Security-Policy", answer.policy or overview_policy())
            for name, value in HEADERS.items():
                self.send_header(name, value)
            if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
                self.send_header("Allow", "GET, HEAD")
            self.end_headers()
            if body:
                self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the base class refuses: a method that is not served, a line that is no request."""
        self.close_connection = True
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._drain()
            answer = told(HTTPStatus.METHOD_NOT_ALLOWED, "The dashboard only shows: expected GET or HEAD.")
        else:
            answer = told(HTTPStatus(code), "This request cannot be answered.")
        self._reply(answer, body=self.command != "HEAD")

    def _drain(self) -> None:
        """Read what was sent with a refused request, so that its sender gets to read the answer."""
        length = self.headers.get("Content-Length", "") if getattr(self, "headers", None) else ""
        if length.isascii() and length.isdecimal() and len(length) < 12:
            with contextlib.suppress(OSError):
                self.rfile.read(min(int(length), MOST_DRAINED))

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: who looks at what is nobody's business, and a scrape every 15 s fills logs."""


class Server(ThreadingHTTPServer):
    """Serves the dashboard.

    Args:
        host: Address of one of this machine's interfaces.
        port: 0 takes any free one.
        site: Answers.
        names: Hosts that may be named.

    Raises:
        ProcessError: The port cannot be had.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, site: Site, names: Names) -> None:
        self.site, self.names = site, names
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if port:
            check_port(host, port)
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise ProcessError(
                f"The dashboard cannot listen on {host}, port {port}. Give another address with --listen HOST:PORT.",
                detail=str(error),
            ) from error

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        host, port = self.server_address[0], self.server_address[1]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{shown}:{port}/"

    def server_bind(self) -> None:
        """Bind, without asking the network for this machine's name as the base class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless too many are at it."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for the next one."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell the class of what went wrong with a connection, unless who asked is just gone."""
        error = sys.exception()
        if not isinstance(error, OSError):
            sys.stderr.write(f"dashboard: a request broke ({type(error).__name__})\n")


def split_address(text: str) -> tuple[str, int]:
    """Return (host, port) of "127.0.0.1:8080", "localhost:8080" or "[::1]:8080".

    Raises:
        ConfigError: It is none of these.
    """
    host, colon, port = text.strip().rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    fits = colon and _is_address(inner) and (":" in inner) == (inner != host)
    if not fits or not (port.isascii() and port.isdecimal()) or not 0 <= int(port) <= 65535:
        raise ConfigError(
            f"--listen must be ADDRESS:PORT, e.g. 127.0.0.1:8080 or [::1]:8080, got '{text[:60]}'. Names by which "
            "others call the dashboard are given with --name."
        )
    return inner, int(port)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    return ipaddress.ip_address(host).is_loopback


def serve(
    board: Board, host: str, port: int, names: Iterable[str] = (), ready: Callable[[str], None] = print
) -> None:
    """Serve a folder's runs until told to stop (Ctrl-C, SIGTERM); to be called in the main thread.

    Args:
        board: The runs.
        host: Address of one of this machine's interfaces.
        port: 0 takes any free one.
        names: Names by which browsers may call it beside localhost.
        ready: Called with its address (http://...) once it listens.

    Raises:
        ProcessError: The port cannot be had.
    """
    with Server(host, port, Site(board), Names(names)) as server:
        ready(server.address)
        with _ending_on_signals(server):
            server.serve_forever()


@contextlib.contextmanager
def _ending_on_signals(server: Server) -> Iterator[None]:
    def stop(*_: object) -> None:
        threading.Thread(
            target=server.shutdown, daemon=True
        ).start()  # it waits for the loop that this interrupts

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
