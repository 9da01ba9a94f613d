"""A supervisor over real processes, for tests."""

import os
import signal
import sys
import time
from types import SimpleNamespace

import psutil

from common.events import EventLog, read_events
from ops import processes
from ops.processes import Process, ProcessGroup
from ops.supervisor import LONGEST_WAIT, Supervisor

SLEEP = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


class World:
    """A supervisor over real processes, with a clock that can be put forward."""

    def __init__(self, folder, patch):
        self.folder, self.ahead, self.given_up = folder, 0.0, []
        self.log = EventLog(folder / "events.jsonl", "trial")
        self.group = ProcessGroup(self.log)
        # A process's start is taken from the same clock, so that it looks as long as the test says.
        patch.setattr(processes, "time", SimpleNamespace(monotonic=self.clock, sleep=time.sleep))
        self.supervisor = Supervisor(
            self.group,
            self.log,
            lambda charge, error: self.given_up.append((charge, error)),
            clock=self.clock,
        )

    def clock(self):
        return time.monotonic() + self.ahead

    def take(self, code, name="one", site="", **options):
        process = Process(name, [sys.executable, "-S", "-c", code], self.folder / f"{name}.log", site=site)
        self.supervisor.take(self.group.start(process), **options)
        return process

    def wait(self, seconds):
        """Put the clock forward and look."""
        self.ahead += seconds
        self.supervisor.poll()

    def ended(self, process):
        limit = time.monotonic() + 20
        while process.exit_code() is None:
            assert time.monotonic() < limit, "the process did not end"
            time.sleep(0.005)

    def end(self, process):
        """Kill it and let the supervisor see it."""
        os.kill(process.pid, signal.SIGKILL)
        self.ended(process)
        self.supervisor.poll()

    def until_given_up(self, process, most=20):
        for _ in range(most):
            self.ended(process)
            self.supervisor.poll()
            if self.given_up:
                return
            self.wait(LONGEST_WAIT)
        raise AssertionError("it was never given up")

    def events(self, *names):
        return [event for event in read_events(self.folder / "events.jsonl") if event["event"] in names]

    def restarts(self):
        return [
            (event["attempt"], event["why"], event["seconds"]) for event in self.events("process.restart")
        ]


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
