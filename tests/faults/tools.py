"""A federation that can be hurt: its processes by name, its events, and the ways to break it.

Only processes that this run started are ever touched: a process id is taken from the run's own `process.start` events
and used only while it is a descendant of the command that this test started.
"""

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from common.events import read_events
from tests.bench.environment import ROOT

WARDROUND = str(Path(sys.executable).parent / "wardround")
LOOK_SECONDS = 0.02
START_SECONDS = 120.0


class Hang(AssertionError):
    """Something did not happen within its deadline."""


class Ended(Exception):
    """The command ended while something was still waited for; `code` is its exit code."""

    def __init__(self, code, what):
        super().__init__(f"the command ended ({code}) before: {what}")
        self.code = code


class Run:
    """One run folder and the command that works on it now (`wardround trial` in a driver, or `wardround resume`).

    As a context manager it kills whatever is left of the command, however the test ends. `members` are all processes of
    it that were ever seen.
    """

    def __init__(self, out):
        self.out = Path(out)
        self.control = self.out.parent / "control"
        self.command = None
        self.commands = 0
        self.members = set()
        self.launched = 0.0
        self._seen = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill_machine()
        for member in self.members:
            with contextlib.suppress(psutil.Error):
                member.kill()

    # the command -----------------------------------------------------------------------------------------------

    def start(self, options, *, proxies=(), env=None, transport=""):
        """Start the trial in a process of its own."""
        spec = {
            "options": {**options, "out": str(self.out)}, "control": str(self.control), "proxies": list(proxies),
            "env": env or {}, "transport": transport,
        }  # fmt: skip
        self._launch([sys.executable, "-m", "tests.faults.drive", json.dumps(spec)])

    def resume(self):
        """Continue the run with the operator's own command."""
        self._launch([WARDROUND, "resume", str(self.out)])

    def _launch(self, argv):
        assert self.command is None or self.command.poll() is not None, "the former command still runs"
        self.commands += 1
        self.out.parent.mkdir(parents=True, exist_ok=True)
        # No GPU: the comparison is to the bit. COLUMNS: a sentence is not broken where a test looks for it.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "500"}
        self.launched = time.time()
        with self._said("out").open("wb") as out, self._said("err").open("wb") as err:
            self.command = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def _said(self, which):
        return self.out.parent / f"command-{self.commands}.{which}"

    def stderr(self):
        """Return what the newest command said on stderr."""
        return self._said("err").read_text(errors="replace")

    def end(self, seconds):
        """Wait for the command's end and return its exit code."""
        try:
            return self.command.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Hang(f"the command did not end within {seconds:.0f} s\n{self.last_words()}") from None

    def last_words(self):
        """Return the ends of what was written, for a failure's message."""
        texts = [f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(
            [self._said("out"), self._said("err"), *(self.out / "logs").glob("*.log")])]  # fmt: skip
        tail = [json.dumps(event)[:300] for event in self.events()[-12:]]
        return "\n".join([*texts, "--- events.jsonl", *tail])

    # what it says ----------------------------------------------------------------------------------------------

    def events(self, name="events.jsonl"):
        """Return all events of a file of the run; read again only when it has grown."""
        path = self.out / name
        size = path.stat().st_size if path.is_file() else 0
        if not size:
            return []
        if self._seen.get(name, (0, []))[0] != size:
            self._seen[name] = (size, list(read_events(path)))
        return self._seen[name][1]

    def named(self, event, name="events.jsonl"):
        """Return the events of one name."""
        return [item for item in self.events(name) if item["event"] == event]

    def told(self, event):
        """Return the events of one name of coordinator and supervisor together."""
        return [*self.named(event), *self.named(event, "events-trial.jsonl")]

    def until(self, check, what, seconds=START_SECONDS):
        """Wait until a check is true while the command runs, and return what it gave.

        Raises:
            Hang: It did not come true in time.
            Ended: The command ended first.
        """
        limit = time.monotonic() + seconds
        while not (found := check()):
            if self.command.poll() is not None:
                raise Ended(self.command.returncode, what)
            if time.monotonic() > limit:
                raise Hang(f"waited {seconds:.0f} s for: {what}\n{self.last_words()}")
            time.sleep(LOOK_SECONDS)
        return found

    def begun(self, number):
        """Return whether the newest command has begun a round or a later one."""
        starts = self.named("round.start")
        return any(item["round"] >= number and item["t"] >= self.launched for item in starts)

    def moment(self, chance, first, last, typical):
        """Wait for a random moment inside a random round and return the round.

        Args:
            chance: A seeded `random.Random`. first, last: The rounds to choose from. typical: Seconds of a round.
        """
        number = chance.randint(first, last)
        part = chance.uniform(0.1, 0.8)
        self.until(lambda: self.begun(number), f"round {number} begins")
        time.sleep(part * typical)
        return number

    # its processes ---------------------------------------------------------------------------------------------

    def family(self):
        """Return the living descendants of the command."""
        if self.command is None or self.command.poll() is not None:
            return []  # its id may be a stranger's by now
        try:
            members = psutil.Process(self.command.pid).children(recursive=True)
        except psutil.Error:
            return []
        self.members.update(members)
        return members

    def left_behind(self):
        """Return the processes of ended commands that still run."""
        return [member for member in self.members if alive(member)]

    def process(self, name):
        """Return the newest running process of a name; none if it does not run now."""
        started = [
            item["pid"] for item in self.named("process.start", "events-trial.jsonl") if item["name"] == name
        ]
        mine = {member.pid: member for member in self.family()}
        found = mine.get(started[-1]) if started else None
        return found if found is not None and alive(found) else None

    def server_app(self):
        """Return the running ServerApp, none if it does not run now."""
        return self._below("serverapp", lambda child: "flwr-serverapp" in " ".join(child.cmdline()))

    def relay(self, site):
        """Return the relay that is working on a message now: the launcher's first child is its poller, never a relay."""
        launcher = self.process(f"relay-{site}")
        with contextlib.suppress(psutil.Error):
            children = sorted(launcher.children() if launcher else (), key=lambda child: child.create_time())
            living = [child for child in children[1:] if alive(child)]
            return living[-1] if living else None
        return None

    def _below(self, name, check):
        top = self.process(name)
        with contextlib.suppress(psutil.Error):
            for child in top.children(recursive=True) if top else ():
                if alive(child) and check(child):
                    return child
        return None

    def kill(self, find, what):
        """Wait until a process is there, kill it hard, and return the moment (seconds since the epoch)."""
        victim = self.until(find, f"{what} runs", 30.0)
        victim.kill()  # psutil compares creation times: never a stranger with the same id
        return time.time()

    def keep_killing(self, name):
        """Kill every process of a name as soon as it runs, until the returned event is set."""
        over = threading.Event()

        def strike():
            while not over.wait(0.1) and self.command.poll() is None:
                victim = self.process(name)
                if victim is not None:
                    with contextlib.suppress(psutil.Error):
                        victim.kill()

        threading.Thread(target=strike, daemon=True).start()
        return over

    def kill_machine(self):
        """End the command and everything it started as a power cut does: all at once, nobody cleans up."""
        if self.command is None or self.command.poll() is not None:
            return time.time()
        members = [psutil.Process(self.command.pid)]
        members[0].suspend()  # it must not see its children die
        while fresh := [member for member in self.family() if member not in members]:
            for member in fresh:
                with contextlib.suppress(psutil.Error):
                    member.suspend()
            members += fresh
        when = time.time()
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.kill()
        self.command.wait(30)
        psutil.wait_procs(members, 30)
        return when

    def kill_command(self):
        """Kill the operator's command alone (`kill -9`), as a person does, and return the moment."""
        self.family()
        when = time.time()
        self.command.kill()
        self.command.wait(30)
        return when

    # its cables ------------------------------------------------------------------------------------------------

    def cut(self, site, seconds, *, hold=False):
        """Cut a site's cable and return the moment."""
        write_whole(self.control / f"cut-{site}", {"seconds": seconds, "hold": hold})
        self.until((self.control / f"cut-{site}.begun").is_file, f"the cable of {site} is cut", 10.0)
        return time.time()


def write_whole(path, document):
    """Write a file that is never seen half."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(document))
    os.replace(beside, path)


def alive(process):
    """Return whether a process runs: an uncollected one does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def chance(seed):
    """Return the seeded source of random moments."""
    return random.Random(f"faults/{seed}")


@contextlib.contextmanager
def slow_down(process, factor, period=0.2):
    """Let a process run for 1/factor of the time only."""
    over = threading.Event()

    def pulse():
        try:
            while not over.is_set():
                process.suspend()
                over.wait(period * (1 - 1 / factor))
                process.resume()
                over.wait(period / factor)
        except psutil.Error:
            return

    thread = threading.Thread(target=pulse, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)
        with contextlib.suppress(psutil.Error):
            process.resume()


def disk_full(process, size=1024):
    """Let every write of a process beyond `size` bytes of a file fail, as on a full volume (EFBIG)."""
    process.rlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def disk_free(process):
    """Give a process its disk back; a process that has ended meanwhile needs nothing."""
    with contextlib.suppress(psutil.Error):
        process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def checkpoints(out):
    """Return the checkpoint folders, oldest first."""
    return sorted((Path(out) / "checkpoints").glob("round-*"))


def corrupt(checkpoint, seed):
    """Flip a few seeded bytes of a checkpoint's tensors in place; its size stays."""
    path = Path(checkpoint) / "state.safetensors"
    data = bytearray(path.read_bytes())
    for place in chance(seed).sample(range(len(data)), 8):
        data[place] ^= 0xFF
    path.write_bytes(data)
