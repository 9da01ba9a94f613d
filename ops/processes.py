"""The processes of a trial: started together, watched, and gone together, however the trial ends.

Every process is the leader of a session of its own, so that Ctrl-C in the terminal reaches the operator's
command alone, which then stops the others in order. Two things make sure that nothing is left behind. The
kernel kills a process when the thread that started it ends (PR_SET_PDEATHSIG), so even `kill -9` of the
operator's command takes the trial with it. And a leader's exit is seen without collecting it, so its
process id cannot be given to a stranger before its whole session has been cleared away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from common.errors import ProcessError, WardroundError
from common.events import EventLog

TAIL_LINES = 15
STOP_SECONDS = 10.0

# 1 is PR_SET_PDEATHSIG, 9 SIGKILL; the parent may have died before the call.
_TIE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)
_MB = 1024 * 1024


@dataclass
class Process:
    """One process of a trial.

    Args:
        name: Its name in events, errors and tables, e.g. "supernode-oak".
        argv: Program and arguments.
        log: File that gets its stdout and stderr, appended; its folder is made.
        env: Variables set beside those of this process.
        site: Alias of the site it belongs to, if one.
        cwd: Working folder; this process's own if none.
    """

    name: str
    argv: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    site: str = ""
    cwd: Path | None = None
    expected: bool = field(default=False, init=False)
    reported: bool = field(default=False, init=False)
    started: float = field(default=0.0, init=False)
    _popen: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _code: int | None = field(default=None, init=False)
    _peak: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Start it.

        Raises:
            ProcessError: The program cannot be started.
            WardroundError: Called from another thread than the main one, whose end would kill the process.
        """
        if threading.current_thread() is not threading.main_thread():
            raise WardroundError("A process of the trial must be started from the main thread.")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **self.env}
        with self.log.open("ab") as output:
            try:
                if shutil.which(self.argv[0], path=environment.get("PATH")) is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                self._popen = subprocess.Popen(
                    _tied(self.argv),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd=self.cwd,
                    start_new_session=True,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise ProcessError(
                    f"Process '{self.name}' cannot be started: is everything installed in one environment?",
                    detail=f"{list(self.argv)[:1]}: {error}",
                    site=self.site,
                ) from error
        self.started = time.monotonic()
        self.expected = self.reported = False
        self._code = None

    @property
    def pid(self) -> int:
        """Its process id; 0 before it was started."""
        return self._popen.pid if self._popen is not None else 0

    @property
    def collected(self) -> bool:
        """Whether nothing of it is left, not even its id, which may be a stranger's by now."""
        return self._popen is None or self._code is not None

    def exit_code(self) -> int | None:
        """Return how it ended (negative: by that signal), or none while it runs."""
        if self._code is not None or self._popen is None:
            return self._code
        try:
            info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # somebody collected it: its id may be a stranger's by now
            self._code = self._popen.poll()
            return self._code
        if info is None:
            return None
        return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status

    def tail(self, lines: int = TAIL_LINES) -> str:
        """Return the last lines of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 64 * 1024))
                return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def terminate(self) -> None:
        """Ask it to end (SIGTERM) and expect that it does."""
        self.expected = True
        self._signal(signal.SIGTERM)

    def clear(self, others: Sequence[psutil.Process] = ()) -> None:
        """Kill whatever is left of it, its session and the given descendants, then collect it."""
        if self._popen is None or self.collected:
            return
        for other in {*others, *session_members({self.pid})}:
            try:
                other.kill()  # psutil compares creation times, so a reused id is safe
            except psutil.Error:
                continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # the leader is not collected yet, so the id is still its own
        self._popen.wait()
        self._code = self._popen.returncode

    def memory(self) -> tuple[float, float]:
        """Return (MB resident now, MB at most so far) of it and its descendants.

        Pages that forked processes share count once for each. The peak is the highest of the sums that were
        sampled and of the kernel's high-water mark of any one process.
        """
        total = 0.0
        if self._popen is not None and self.exit_code() is None:
            for member in _descendants(self.pid):
                try:
                    total += member.memory_info().rss / _MB
                except psutil.Error:
                    continue
                self._peak = max(self._peak, _high_water(member.pid))
        self._peak = max(self._peak, total)
        return total, self._peak

    def _signal(self, number: signal.Signals) -> None:
        if self._popen is not None and self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ProcessGroup:
    """All processes of a trial, in the order of their start; as a context manager it stops them on leaving.

    Args:
        events: Gets process.start, process.ready and process.exit.
    """

    def __init__(self, events: EventLog | None = None) -> None:
        self.processes: dict[str, Process] = {}
        self._events = events

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()

    def start(self, process: Process) -> Process:
        """Start a process and watch it. A name may be used again once its process has ended.

        Raises:
            ProcessError: It cannot be started, or one of that name still runs.
        """
        former = self.processes.pop(process.name, None)
        if former is not None:
            if former.exit_code() is None:
                self.processes[process.name] = former
                raise ProcessError(f"Process '{process.name}' is running already: stop it first.")
            self._finish([former], seconds=0.0)
        process.start()
        self.processes[process.name] = process
        self._emit("process.start", process, pid=process.pid)
        return process

    def poll(self) -> None:
        """Check that every process runs that was not told to end.

        Raises:
            ProcessError: The first that ended by itself, with the end of its log in `detail`.
        """
        for process in self.processes.values():
            code = process.exit_code()
            if code is None:
                continue
            self._report(process, code)
            if not process.expected:
                raise ProcessError(
                    f"Process '{process.name}' ended {explain(code)}; its log says why.",
                    detail=process.tail(),
                    site=process.site,
                )

    def wait_ready(
        self, names: str | Sequence[str], check: Callable[[], bool], timeout: float, interval: float = 0.1
    ) -> None:
        """Wait until a check is true, while all processes run.

        Args:
            names: The processes whose readiness the check shows.
            check: Called again and again; true when they are ready.
            timeout: Seconds to wait at most.
            interval: Seconds between two checks.

        Raises:
            ProcessError: A process ended, or the time is over; with the ends of the logs in `detail`.
        """
        waited = [self.processes[name] for name in ([names] if isinstance(names, str) else names)]
        deadline = time.monotonic() + timeout
        while not check():
            self.poll()
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"Not ready within {timeout:g} s: {', '.join(process.name for process in waited)}.",
                    detail="\n".join(f"--- {process.name}\n{process.tail()}" for process in waited),
                )
            time.sleep(interval)
        for process in waited:
            self.note_ready(process)

    def note_ready(self, process: Process) -> None:
        """Tell that a process answers."""
        self._emit("process.ready", process, seconds=time.monotonic() - process.started)

    def stop(self, name: str, seconds: float = STOP_SECONDS) -> None:
        """Stop one process: SIGTERM, then SIGKILL for what is left of it after `seconds`.

        One that had ended by itself is cleared away, and `poll` does not complain of it any more.
        """
        self._finish([self.processes[name]], seconds)
        self.processes[name].expected = True

    def stop_all(self, seconds: float = STOP_SECONDS) -> None:
        """Stop all processes, the last started first.

        SIGTERM to each, `seconds` for all of them to end with everything they started, then SIGKILL to what
        is left. Nothing of the trial runs when this returns; a second Ctrl-C skips the waiting.
        """
        self._finish(list(reversed(self.processes.values())), seconds)

    def note_exit(self, process: Process) -> None:
        """Tell that a process ended by itself, once."""
        code = process.exit_code()
        if code is not None:
            self._report(process, code)

    def memory(self) -> dict[str, tuple[float, float]]:
        """Return (MB now, MB at most) by name; see `Process.memory`."""
        return {name: process.memory() for name, process in self.processes.items()}

    def _finish(self, processes: Sequence[Process], seconds: float) -> None:
        processes = [process for process in processes if not process.collected]
        family = {process.pid: _descendants(process.pid) for process in processes}
        deadline = time.monotonic() + seconds
        try:
            for process in processes:
                if process.exit_code() is None:
                    process.terminate()
            told: set[psutil.Process] = set()
            while time.monotonic() < deadline:
                running = {process.pid for process in processes if process.exit_code() is None}
                orphans = {*session_members(family.keys() - running)}
                for orphan in orphans - told:  # their leader is gone and told them nothing
                    with contextlib.suppress(psutil.Error):
                        orphan.terminate()
                told |= orphans
                if not running and not orphans and not any(_alive(members) for members in family.values()):
                    break
                time.sleep(0.02)
        finally:
            for process in processes:
                process.clear(family[process.pid])
            for process in processes:
                code = process.exit_code()
                if code is not None:
                    self._report(process, code)

    def _report(self, process: Process, code: int) -> None:
        if not process.reported:
            process.reported = True
            self._emit("process.exit", process, code=code, expected=process.expected)

    def _emit(self, event: str, process: Process, **fields: object) -> None:
        if self._events is not None:
            self._events.emit(event, name=process.name, site=process.site or None, **fields)


def explain(code: int) -> str:
    """Return an exit code in words: "with code 10 (credential)", "by signal SIGTERM"."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        return f"by signal {name}" + (" (perhaps out of memory)" if -code == signal.SIGKILL else "")
    known = {kind.exit_code: kind.code for kind in WardroundError.__subclasses__()}
    return f"with code {code}" + (f" ({known[code]})" if code in known else "")


def session_members(leaders: Collection[int]) -> list[psutil.Process]:
    """Return the living processes of sessions, without their leaders."""
    members = []
    for pid in psutil.pids():
        try:
            if pid not in leaders and os.getsid(pid) in leaders:
                members.append(psutil.Process(pid))
        except (OSError, psutil.Error):
            continue
    return _alive(members)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.Error:
            continue
    return alive


def _high_water(pid: int) -> float:
    """Return the kernel's peak of a process's resident memory in MB, 0 where it does not tell."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    return 0.0


def _tied(argv: Sequence[str]) -> list[str]:
    """Return a command line that asks the kernel to kill it with its parent, then becomes the program.

    A function run between fork and exec would do without this detour, but it makes Python fork in earnest, and
    gRPC's threads, which this process has, do not survive that: the child sometimes aborts before its program begins.
    """
    if sys.platform != "linux":
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *argv]
