"""Health checks of the containers: `python -m ops.containers.health NAME` (worker, superlink, serverapp, site-net, dashboards).

Each asks what its neighbours depend on, not whether a process exists: the worker's health service, a TLS handshake
under the right name on each of the SuperLink's ports, the coordinator's answers to a site's SuperNode, the dashboard's
own word that it reads its folder. Ends with 0 or 1 and says in one line what it found.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ops.containers import places

CALL_SECONDS = 5.0
DASHBOARD_SECONDS = 10.0  # it may be reading a long run for the first time
QUIET_SECONDS = 60.0
"""A SuperNode that is connected hears from the coordinator at least every 15 s (heartbeats), and notes it at least
every 10 s; longer than this without a new byte means that it is cut off."""
CLOCK_SECONDS = 1.0
"""The kernel's time of a start and the clock's may differ by so much."""
TAIL_BYTES = 16 * 1024


def worker(path: Path = places.SOCKET) -> str:
    """Return what is wrong with the worker, empty if it serves.

    Args:
        path: Its Unix socket.
    """
    if not path.exists():  # before the imports: a worker that starts needs the CPU more
        return "the worker has not opened its socket"
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        with grpc.insecure_channel(f"unix:{path}") as channel:
            request = health_pb2.HealthCheckRequest()
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        return (
            f"the worker does not answer ({error.code().name if isinstance(error, grpc.Call) else 'no call'})"
        )
    return (
        "" if answer.status == health_pb2.HealthCheckResponse.SERVING else "the worker says it does not serve"
    )


def tls(host: str, port: int, ca: Path) -> str:
    """Return what is wrong with a TLS port, empty if it shows a certificate of the authority for this name.

    Args:
        host: Name it is called by.
        port: TCP port.
        ca: The authority (PEM).
    """
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, port), timeout=CALL_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return ""
    except (OSError, ssl.SSLError) as error:
        return f"{host}:{port} does not answer as it should ({type(error).__name__})"


def superlink(ca: Path = places.KEYS / "ca.crt") -> str:
    """Return what is wrong with the SuperLink's three ports, empty if nothing is."""
    ports = (
        ("localhost", places.FLEET_PORT),
        (places.CONTROL_NAME, places.CONTROL_PORT),
        (places.CONTROL_NAME, places.APPIO_PORT),
    )
    return "; ".join(found for host, port in ports if (found := tls(host, port, ca)))


def serverapp(ca: Path = places.KEYS / "ca.crt") -> str:
    """Return what keeps the ServerApp's launcher from its SuperLink, empty if nothing does."""
    return tls(places.CONTROL_NAME, places.APPIO_PORT, ca)


def begun() -> float:
    """Return when this container was started (seconds since the epoch)."""
    import psutil

    # In a Kubernetes pod process 1 is the pod's, and older than a container that was started again.
    own = [
        process.info["create_time"]
        for process in psutil.process_iter(["cmdline", "create_time"])
        if "ops.containers.site_net" in (process.info["cmdline"] or ())
    ]
    return float(min(own)) if own else psutil.Process(1).create_time()


def heard_at(folder: Path, start: float) -> float | None:
    """Return when the coordinator was heard last since a start, none if it was not (seconds since the epoch).

    Args:
        folder: Has the transport events; a volume may keep those of an earlier alias, so the newest file counts.
        start: The events outlive a container that is started again and again because the coordinator refuses its key:
            what was heard before does not count.
    """
    file = max(folder.glob("events-*-net.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    if file is None:
        return None
    return last_heard(event for event in tail(file) if float(event.get("t", 0.0)) >= start - CLOCK_SECONDS)


def site_net(
    folder: Path = places.NET, now: Callable[[], float] = time.time, since: Callable[[], float] = begun
) -> str:
    """Return what is wrong with a site's connection, empty if the coordinator was heard lately.

    Args:
        folder: Has the transport events of the SuperNode.
        now: Seconds since the epoch.
        since: The same; what was heard before does not count.
    """
    if not any(folder.glob("events-*-net.jsonl")):
        return "the SuperNode has not been connected yet"
    heard = heard_at(folder, since())
    if heard is None:
        return "the coordinator has not answered yet"
    silent = now() - heard
    return f"the coordinator was heard {silent:.0f} s ago" if silent > QUIET_SECONDS else ""


def last_heard(events: Iterable[Mapping[str, Any]]) -> float | None:
    """Return when the count of received bytes grew last (seconds since the epoch), none if it never did.

    Args:
        events: In the order they were written; the count begins anew with every SuperNode.
    """
    heard, before = None, 0
    for event in events:
        if event.get("event") != "transport":
            continue
        down = int(event.get("down", 0))
        if down != before and down > 0:
            heard = float(event.get("t", 0.0))
        before = down
    return heard


def tail(path: Path) -> list[dict[str, Any]]:
    """Return the events at the end of a file; a line that is not whole is passed over."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # the first was cut by the seek, the last may be under way
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def dashboard(port: int | None = None) -> str:
    """Return what is wrong with the dashboard, empty if it answers and reads its folder.

    Args:
        port: On this machine's loopback; as the environment says if left out.
    """
    import http.client

    from ops.containers import dashboards  # not above: the other checks shall start light

    where = dashboards.port(places.Variables()) if port is None else port
    calling = http.client.HTTPConnection("127.0.0.1", where, timeout=DASHBOARD_SECONDS)
    try:
        calling.request("GET", "/healthz")
        answer = calling.getresponse()
        document = json.loads(answer.read(TAIL_BYTES))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"the dashboard does not answer as it should ({type(error).__name__})"
    finally:
        calling.close()
    status = document.get("status") if isinstance(document, dict) else None
    return "" if answer.status == 200 and status == "ok" else f"the dashboard says: {str(status)[:80]}"


CHECKS: dict[str, Callable[[], str]] = {
    "worker": worker,
    "superlink": superlink,
    "serverapp": serverapp,
    "site-net": site_net,
    "dashboards": dashboard,
}


def main(arguments: list[str] | None = None) -> int:
    """Check what the first argument names."""
    names = sys.argv[1:] if arguments is None else arguments
    if len(names) != 1 or names[0] not in CHECKS:
        print(f"expected one of {', '.join(CHECKS)}")  # noqa: T201 what `docker inspect` shows
        return 2
    found = CHECKS[names[0]]()
    print(found or "in order")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
