"""Loopback ports for the processes of a trial: reserved while the trial lives, checked before they are used.

A port is reserved by a socket that is bound with SO_REUSEADDR and never listens. While it is held the
kernel gives the port to nobody who asks for "any free port" (another trial, an outgoing connection), but a
server that binds the port by its number with SO_REUSEADDR set, as gRPC does, may still have it. So the
reservation stays in place for the whole trial, and the kernel ends it with the process that made it,
however that process dies: no lock file can go stale.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil

from common.errors import ProcessError

LOOPBACK = "127.0.0.1"

_held: dict[int, socket.socket] = {}
_lock = threading.Lock()


def free_ports(count: int) -> list[int]:
    """Reserve ports on loopback for this process and return them.

    They stay reserved until `release_ports` is called or this process ends.

    Args:
        count: How many ports (0 or more).

    Raises:
        ProcessError: The machine has not that many free ports.
    """
    taken: list[socket.socket] = []
    try:
        for _ in range(count):
            holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            taken.append(holder)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((LOOPBACK, 0))
    except OSError as error:
        for holder in taken:
            holder.close()
        raise ProcessError(
            f"Expected {count} free ports on {LOOPBACK}, got {max(len(taken) - 1, 0)}: "
            "end other programs that hold ports, or raise the limit of open files.",
            detail=str(error),
        ) from error
    with _lock:
        for holder in taken:
            _held[holder.getsockname()[1]] = holder
    return [holder.getsockname()[1] for holder in taken]


def release_ports(ports: list[int] | None = None) -> None:
    """Give reserved ports back.

    Args:
        ports: Which ones; none means all that this process holds. Ports that are not held are passed over.
    """
    with _lock:
        for port in list(_held) if ports is None else ports:
            holder = _held.pop(port, None)
            if holder is not None:
                holder.close()


def check_port(host: str, port: int) -> None:
    """Check that a server could bind an address now.

    Args:
        host: Address of one of this machine's interfaces, e.g. "127.0.0.1" or "0.0.0.0".
        port: 1-65535.

    Raises:
        ProcessError: Naming the port, the process id that holds it where that is knowable, and what to do.
    """
    if not 1 <= port <= 65535:
        raise ProcessError(f"Port {port} does not exist: expected a number from 1 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise ProcessError(
                f"Port {port} needs administrator rights: choose one above 1023.", detail=str(error)
            ) from error
        except OSError as error:
            who, detail = _holder(port)
            raise ProcessError(
                f"Port {port} on {host} cannot be bound, {who}. End that program, or choose another port.",
                detail=f"{error}; {detail}",
            ) from error


@contextmanager
def alone_at(*ports: int) -> Iterator[None]:
    """Keep other commands of this machine that ask for the same from ports, as long as this is entered.

    `check_port` alone does not: two SuperLinks that are started in the same seconds both find a port free, and gRPC then
    lets them share it. An abstract Unix socket stands for each port; the kernel lets go of it with the process.

    Args:
        ports: TCP ports.

    Raises:
        ProcessError: Another command has one of them.
    """
    with ExitStack() as held:
        for port in ports:
            holder = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                holder.bind(f"\0wardround-port-{port}")
            except OSError as error:
                raise ProcessError(
                    f"Another command of this machine starts or runs a SuperLink on port {port}. Wait for its end, or choose "
                    "another port.", detail=str(error),
                ) from error  # fmt: skip
        yield


def _holder(port: int) -> tuple[str, str]:
    """Return (safe half sentence, private detail) on who listens on a port."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error as error:  # other systems want administrator rights for this
        return "and what holds it cannot be seen", type(error).__name__
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or not connection.laddr or connection.laddr.port != port:
            continue
        if connection.pid is None:
            return "it is held by a process of another user", ""
        try:
            command = " ".join(psutil.Process(connection.pid).cmdline())
        except psutil.Error:
            command = "ended meanwhile"
        return f"it is held by process {connection.pid}", command
    return "and no listening process was found on it", ""
