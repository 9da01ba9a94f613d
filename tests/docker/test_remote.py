"""A run on a SuperLink that others keep alive: every way it can break, on a scripted Control API and a clock by hand."""

import json

import pytest

from common.errors import ConfigError, CredentialError, ProcessError
from common.events import EventLog, read_events
from ops.control import RunStatus, register, wait_for_link
from ops.options import Options
from ops.plan import make_plan
from ops.remote import AWAY_SECONDS, HANGING_SECONDS, PENDING_SECONDS, RUN_FILE, RemoteRun, coordinator_plan
from tests.bench.environment import tiny_data

pytestmark = pytest.mark.slow  # plans runs, which imports all that computes


RUNNING, DONE, UNKNOWN = (
    RunStatus("running", "", ""),
    RunStatus("finished", "failed", ""),
    RunStatus("", "", ""),
)
KEYS = {"hospital-1": "one.pub", "hospital-2": "two.pub"}


class Link:
    """A SuperLink: what it knows, and whether it answers."""

    def __init__(self):
        self.up = True
        self.runs = {}
        self.keys = []
        self.stopped = []
        self.next = 100

    def alive(self):
        return self.up

    def register(self, key, *, site=""):
        self._check()
        self.keys.append(site)

    def start_run(self, fab, overrides):
        self._check()
        assert json.loads(overrides["wardround"])["method"] == "fedavg"
        self.next += 1
        self.runs[self.next] = RUNNING
        return self.next

    def run_status(self, run):
        self._check()
        return self.runs.get(run, UNKNOWN)

    def stop_run(self, run):
        self._check()
        if self.run_status(run).finished or run not in self.runs:
            return False
        self.runs[run] = DONE
        self.stopped.append(run)
        return True

    def _check(self):
        if not self.up:
            raise ProcessError("The SuperLink does not answer.")


class Bench:
    def __init__(self, plan, folder):
        self.now = 0.0
        self.link = Link()
        self.out = folder
        self.events = EventLog(folder / "events-trial.jsonl", "trial")
        self.server = EventLog(folder / "events.jsonl", "server")
        self.run = RemoteRun(
            plan, self.link, KEYS, self.events, clock=lambda: self.now, sleep=self.sleep
        )  # fmt: skip

    def sleep(self, seconds):
        self.now += seconds

    def tend(self, seconds=0.0):
        """Let time pass, looking once a second; return the end if there is one."""
        limit = self.now + seconds
        while (end := self.run.tend()) is None and self.now <= limit:
            self.now += 1.1
        return end

    def ends(self, verdict="ok", code=None, run=None):
        extra = {"code": code, "message": "why"} if code else {}
        run = str(run or self.link.next)
        self.server.emit("run.end", verdict=verdict, seconds=1.0, rounds=2, flower_run=run, **extra)

    def restarts(self):
        return [
            event["why"]
            for event in read_events(self.out / "events-trial.jsonl")
            if event["event"] == "process.restart"
        ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    out.mkdir()
    options = Options(rounds=2, settings=("width=4", "levels=2", "patch=16,16,16"))
    make_plan(options, tiny_data(tmp_path_factory.mktemp("data") / "tiny"), out, runtime="fast").write()
    return out


@pytest.fixture
def bench(written, tmp_path):
    (tmp_path / "config.json").write_bytes((written / "config.json").read_bytes())
    return Bench(coordinator_plan(tmp_path), tmp_path)


def test_a_coordinator_needs_no_folder_of_a_site(bench, tmp_path):
    plan = coordinator_plan(tmp_path)
    assert list(plan.sites) == ["hospital-1", "hospital-2", "hospital-3"]
    assert plan.config.rounds.rounds == 2
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="prepare"):
        coordinator_plan(tmp_path)


def test_keys_are_registered_the_run_is_submitted_and_its_verdict_returned(bench):
    bench.run.begin()
    assert bench.link.keys == list(KEYS)
    assert bench.tend(5) is None
    bench.ends()
    assert bench.run.watch()["verdict"] == "ok"
    assert not (bench.out / RUN_FILE).exists()
    assert bench.link.next == 101


def test_a_verdict_of_an_earlier_attempt_does_not_count(bench):
    bench.ends(run=7)
    bench.run.begin()
    bench.ends(run=8)
    assert bench.tend(10) is None


def test_the_runs_own_failure_is_the_verdict_at_once(bench):
    bench.run.begin()
    bench.ends("failed", "quorum")
    assert bench.tend()["code"] == "quorum"
    assert bench.restarts() == []


def test_a_run_whose_serverapp_vanished_is_submitted_again(bench):
    bench.run.begin()
    bench.link.runs[101] = DONE
    assert bench.tend(8) is None
    assert (bench.link.next, bench.restarts()) == (102, ["lost"])
    bench.ends()
    assert bench.tend()["verdict"] == "ok"


def test_a_doubtful_failure_is_tried_again_and_then_believed(bench):
    bench.run.begin()
    for _ in range(5):
        bench.ends("failed", "internal")
        bench.link.runs[bench.link.next] = DONE
        end = bench.tend(40)
        if end is not None:
            break
    assert end["code"] == "internal"
    assert bench.restarts() == ["failed"] * 4


def test_a_whole_round_clears_the_count(bench):
    bench.run.begin()
    for _ in range(8):
        bench.server.emit("checkpoint", round=1, seconds=0.1, bytes=1)
        bench.link.runs[bench.link.next] = DONE
        assert bench.tend(8) is None
    assert bench.restarts() == ["lost"] * 8


def test_without_a_whole_round_it_gives_up(bench):
    bench.run.begin()
    for _ in range(5):
        bench.link.runs[bench.link.next] = DONE
        assert bench.tend(40) is None
    bench.link.runs[bench.link.next] = DONE
    with pytest.raises(ProcessError, match="in a row"):
        bench.tend(40)


def test_a_superlink_that_is_away_for_a_while_is_waited_for(bench):
    bench.run.begin()
    bench.link.up = False
    assert bench.tend(AWAY_SECONDS / 2) is None
    bench.link.up = True
    assert bench.tend(5) is None
    assert (bench.link.next, bench.restarts()) == (101, [])
    bench.link.up = False
    with pytest.raises(ProcessError, match="has not answered"):
        bench.tend(AWAY_SECONDS + 5)


def test_a_superlink_that_forgot_everything_is_told_again(bench):
    bench.run.begin()
    bench.link.runs.clear()
    bench.link.keys.clear()
    bench.tend(3)
    assert bench.link.keys == list(KEYS)
    assert (bench.link.next, bench.restarts()) == (102, ["lost"])


def test_a_superlink_that_goes_away_between_two_calls_is_waited_for(bench):
    bench.run.begin()
    bench.link.runs[101] = DONE
    start, bench.link.start_run = bench.link.start_run, lambda *_: bench.link._check()
    bench.sleep(2)
    bench.run.tend()
    stop, bench.link.stop_run = bench.link.stop_run, lambda run: setattr(bench.link, "up", False)
    bench.sleep(10)
    assert bench.run.tend() is None
    bench.link.start_run, bench.link.stop_run, bench.link.up = start, stop, True
    bench.tend(30)
    assert bench.link.next == 102


def test_a_serverapp_that_hangs_after_its_last_word_is_stopped(bench):
    bench.run.begin()
    bench.ends("failed", "internal")
    assert bench.tend(HANGING_SECONDS - 5) is None
    assert bench.link.stopped == []
    assert bench.tend(10) is None
    assert bench.link.stopped == [101]


def test_nothing_that_starts_a_serverapp_is_said(bench):
    bench.run.begin()
    bench.link.runs[101] = RunStatus("pending", "", "")
    with pytest.raises(ProcessError, match="No ServerApp was started"):
        bench.tend(PENDING_SECONDS + 5)


def test_a_command_started_again_takes_up_the_run_under_way(bench):
    bench.run.begin()
    second = RemoteRun(
        coordinator_plan(bench.out),
        bench.link,
        KEYS,
        bench.events,
        clock=lambda: bench.now,
        sleep=bench.sleep,
    )
    second.begin()
    assert bench.link.next == 101
    bench.ends()
    assert second.tend()["verdict"] == "ok"
    bench.link.runs[101] = DONE
    third = RemoteRun(coordinator_plan(bench.out), bench.link, KEYS, bench.events, sleep=bench.sleep)
    third.begin()
    assert bench.link.next == 102  # one that has ended is not taken up


def test_stopping_stops_the_run_and_survives_a_superlink_that_is_gone(bench):
    bench.run.begin()
    bench.link.up = False
    bench.run.stop()
    bench.link.up = True
    bench.run.stop()
    assert bench.link.stopped == [101]
    assert not (bench.out / RUN_FILE).exists()


def test_a_superlink_of_another_authority_is_said_and_not_waited_for_long(monkeypatch):
    monkeypatch.setattr("ops.control.DOUBT_SECONDS", 0.0)
    link = Link()
    link.alive = lambda: (_ for _ in ()).throw(CredentialError("another authority"))
    with pytest.raises(CredentialError):
        wait_for_link(link, pause=lambda seconds: None)
    link.alive = lambda: False
    with pytest.raises(ProcessError, match="did not answer"):
        wait_for_link(link, pause=lambda seconds: None, seconds=0.0)
    register(link, KEYS)
    assert link.keys == list(KEYS)
