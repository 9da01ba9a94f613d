"""A coordinator over fakes, for tests: what it did, in order, and a clock of the test's own."""

from types import SimpleNamespace

import psutil

from common.errors import ProcessError
from common.events import EventLog, read_events
from ops import coordinator as module
from ops.coordinator import GONE_SECONDS, Coordinator, Sites
from tests.harness import table_config


class FakeProcess:
    def __init__(self, name, pid=0):
        self.name, self.pid, self.site, self.env, self.code = name, pid, "", {}, None

    def exit_code(self):
        return self.code

    def tail(self):
        return f"last line of {self.name}"


class FakeGroup:
    def __init__(self, world):
        self.world, self.processes = world, {}

    def start(self, process):
        former = self.processes.get(process.name)
        assert former is None or former.code is not None, "it runs already"
        self.processes[process.name] = process
        self.world.did.append(f"start {process.name}")

    def stop(self, name, seconds=10.0):
        assert seconds == 0.0
        process = self.processes[name]
        process.code = -15 if process.code is None else process.code
        if name == "serverapp":
            self.world.app = False
        self.world.did.append(f"stop {name}")

    def note_exit(self, process):
        self.world.did.append(f"noted {process.name}")

    def note_ready(self, process):
        self.world.did.append(f"ready {process.name}")


class FakeControl:
    def __init__(self, world):
        self.world, self.runs = world, 0

    def _call(self, what):
        if self.world.link.code is not None:
            raise ProcessError("Cannot: the SuperLink does not answer.")
        if what in self.world.broken:
            raise ProcessError("Cannot: the SuperLink answered INTERNAL.")
        self.world.did.append(what)

    def alive(self):
        return self.world.link.code is None and self.world.answers

    def register(self, key, *, site):
        self._call(f"register {site} {key}")

    def start_run(self, fab, overrides):
        assert fab == b"bundle"
        assert overrides == {"wardround": self.world.config.to_json()}
        self._call(f"run {self.runs + 1}")
        self.runs += 1
        return self.runs

    def stop_run(self, run):
        self._call(f"end run {run}")
        return True

    def close(self):
        self.world.did.append("closed")


class World:
    """A coordinator over fakes; time passes only when it sleeps or a test says so."""

    def __init__(self, folder, patch, transport="memory", env=None):
        self.out, self.did, self.now, self.app, self.answers, self.idled = (
            folder / "run-1",
            [],
            100.0,
            False,
            True,
            [],
        )
        self.broken, self.environment = set(), {}
        self.config = table_config()
        self.log = EventLog(folder / "events-trial.jsonl", "trial")
        self.trial = folder / "events-trial.jsonl"
        self.server = EventLog(self.out / "events.jsonl", "server")
        self.group = FakeGroup(self)
        patch.setattr(module, "superlink", self._superlink)
        patch.setattr(module, "server_superexec", self._superexec)
        patch.setattr(module, "ControlClient", lambda address, ca: FakeControl(self))
        patch.setattr(module, "bundle", lambda: b"bundle")
        patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        patch.setattr(module.psutil, "Process", lambda pid: SimpleNamespace(children=self._children))
        plan = SimpleNamespace(out=self.out, transport=transport, runtime="fast", config=self.config)
        sites = Sites(
            ["oak", "elm"], lambda: self.did.append("disconnect"), lambda: self.did.append("connect")
        )
        pki = SimpleNamespace(ca=None, site_public={"oak": "key-1", "elm": "key-2"})
        addresses = SimpleNamespace(control="control")
        self.coordinator = Coordinator(
            plan, addresses, pki, self.group, self.log, env=env or {}, idle=lambda: self.idled.append(self.now), sites=sites
        )  # fmt: skip

    def _superlink(self, addresses, pki, folder, *, database):
        assert folder == self.out / "logs"
        self.database = database
        self.link = FakeProcess("superlink")
        self.link.env = {"FLWR": "1"}
        return self.link

    def _superexec(self, addresses, pki, folder, *, env):
        self.environment = env
        return FakeProcess("serverapp", pid=7)

    def _children(self, recursive):
        assert recursive
        return [SimpleNamespace(status=lambda: psutil.STATUS_SLEEPING)] if self.app else []

    def sleep(self, seconds):
        self.now += seconds

    def start(self):
        self.coordinator.start_link()
        self.coordinator.start_app()
        return self

    def begun(self):
        """Start, and see the ServerApp run."""
        self.start()
        self.app = True
        assert self.tend() is None
        self.did.clear()
        return self

    def tend(self, after=0.25):
        self.now += after
        return self.coordinator.tend()

    def lose_app(self):
        """Let the ServerApp vanish, and wait until that is certain."""
        self.app = False
        assert self.tend() is None
        return self.tend(GONE_SECONDS + 0.1)

    def end(self, run=None, **fields):
        """Let the ServerApp of a run (the newest) say its last word."""
        self.server.emit("run.end", flower_run=str(run or self.coordinator.control.runs), **fields)

    def restarts(self):
        return [
            (event["name"], event["attempt"], event["why"], event["seconds"])
            for event in read_events(self.trial)
            if event["event"] == "process.restart"
        ]
