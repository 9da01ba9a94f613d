"""Becomes a command that can open no network socket: `python no_network.py COMMAND [ARGUMENT ...]`.

The containers of one pod share a network, and Kubernetes has no pod without one: what a NetworkPolicy denies is up to the cluster's
network plug-in. This asks the kernel instead. A seccomp filter (classic BPF, `man 2 seccomp`), which no-new-privileges lets any process
put on itself, stays with the command and all it starts, cannot be taken off, and adds to the runtime's own profile:

    socket(AF_UNIX, ...)   as before
    socket(any other)      EAFNOSUPPORT: IPv4, IPv6, netlink, packet, vsock
    io_uring_setup         ENOSYS: its requests open sockets past any filter
    another architecture   the process is killed: its calls have other numbers

Imports nothing of ours: it runs before anything else in the worker's container.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys
from typing import NoReturn

MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Machine -> (AUDIT_ARCH of its calls, number of `socket`); from linux/audit.h and asm/unistd.h."""
IO_URING_SETUP = 425
X32 = 0x40000000
"""Calls of the x32 interface have the architecture of x86-64 and numbers from here on; other machines have none there."""

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
FILTER_MODE = 2
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Byte offsets in `struct seccomp_data`; of the argument, its lower half on these little-endian machines."""


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def program(machine: str) -> bytes:
    """Return the filter for a machine, 8 bytes an instruction.

    Args:
        machine: As `platform.machine` names it.

    Raises:
        ValueError: A machine whose call numbers are not known here.
    """
    if machine not in MACHINES:
        raise ValueError(
            f"expected a machine of {', '.join(MACHINES)}, got {machine}: run the worker on one of them"
        )
    architecture, number = MACHINES[machine]
    # Code, operand, instructions to skip if true, if false. `man 2 seccomp` has the layout.
    steps = (
        (LOAD, ARCHITECTURE, 0, 0),
        (EQUAL, architecture, 1, 0),
        (RETURN, KILL, 0, 0),
        (LOAD, NUMBER, 0, 0),
        (AT_LEAST, X32, 6, 0),
        (EQUAL, IO_URING_SETUP, 5, 0),
        (EQUAL, number, 0, 2),
        (LOAD, FIRST_ARGUMENT, 0, 0),
        (EQUAL, socket.AF_UNIX, 0, 1),
        (RETURN, ALLOW, 0, 0),
        (RETURN, FAIL | errno.EAFNOSUPPORT, 0, 0),
        (RETURN, FAIL | errno.ENOSYS, 0, 0),
    )  # fmt: skip
    return b"".join(struct.pack("=HBBI", code, true, false, operand) for code, operand, true, false in steps)


def close_network(machine: str) -> None:
    """Take from this process, for good, what opens sockets other than Unix sockets.

    Args:
        machine: As `platform.machine` names it.

    Raises:
        ValueError: A machine whose call numbers are not known here.
        OSError: The kernel has no seccomp filters, or forbids them.
    """
    code = program(machine)
    filter_ = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, FILTER_MODE, ctypes.byref(filter_), 0, 0),
    ):
        if libc.prctl(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def open_families() -> list[str]:
    """Return the families of network sockets that this process can still open; of those that the kernel has."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_RAW):
            try:
                socket.socket(family, kind).close()
            except OSError:
                continue
            found.append(family.name)
            break
    return found


def main(arguments: list[str]) -> NoReturn:
    """Close the network, see that it is closed, and become the command."""
    if not arguments:
        sys.exit("no_network: expected a command and its arguments")
    try:
        close_network(platform.machine())
    except (ValueError, OSError) as error:
        sys.exit(f"no_network: the network cannot be closed, so the command is not started: {error}")
    if left := open_families():
        sys.exit(
            f"no_network: the filter has no effect here ({', '.join(left)}), so the command is not started"
        )
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
