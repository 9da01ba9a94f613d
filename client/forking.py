"""Forking from one thread: children that die with their parent, and a parent that leaves none behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from common.errors import ProcessError, WardroundError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
BROKEN = 70
"""Exit code of a child whose work raised something unforeseen."""

KERNEL_WATCHES = sys.platform == "linux"
_LIBC = ctypes.CDLL(None) if KERNEL_WATCHES else None
_PR_SET_PDEATHSIG = 1


class Parent:
    """A process with one thread that forks children and outlives them all."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.children: set[int] = set()

    def fork(self, work: Callable[[], None]) -> int:
        """Run a function in a forked process and return its id.

        The child ends with 0, with the code of the SystemExit or WardroundError that `work` raises, or with
        `BROKEN`. On Linux the kernel kills it when this process ends, however it ends.

        Raises:
            ProcessError: This process has other threads, whose locks a fork would freeze.
        """
        threads = _threads()
        if threads > 1:
            raise ProcessError(
                f"This process has {threads} threads and cannot fork safely: something it imported started them."
            )
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # else a child may run its parent's handler
        pid = os.fork()
        if pid == 0:
            self.children.clear()
            _become_child(self.pid, work)
        self.children.add(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return pid

    def wait(self, pid: int) -> tuple[int, resource.struct_rusage]:
        """Wait for a child and return (exit code, negative: by that signal; what it used)."""
        _, status, used = os.wait4(pid, 0)
        self.children.discard(pid)
        return os.waitstatus_to_exitcode(status), used

    def kill(self, pid: int) -> None:
        """Kill a child and collect it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        self.children.discard(pid)


def exit_on_stop_signals() -> None:
    """Make SIGTERM and SIGINT raise SystemExit(0)."""

    def leave(*_: object) -> NoReturn:
        sys.exit(0)

    for number in STOP_SIGNALS:
        signal.signal(number, leave)


def ignore_stop_signals() -> None:
    """Let nothing interrupt what follows but SIGKILL."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def runs(pid: int) -> bool:
    """Return whether there is a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _become_child(parent: int, work: Callable[[], None]) -> NoReturn:
    """Run a child's work and leave without the parent's cleanup."""
    code = BROKEN
    try:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the call
                os._exit(code)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except WardroundError as error:
        code = error.exit_code
        _complain(f"{error} {error.detail}")
    except BaseException as error:
        _complain(f"{type(error).__name__}: {error}")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _complain(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} process {os.getpid()}: {text.rstrip()}", file=sys.stderr)  # noqa: T201 its log


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1
