"""What the dashboard makes of events: states, what is wrong since when, figures for Prometheus, and its bounds."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from ops import dashboard_runs
from ops.dashboard_metrics import metrics
from ops.dashboard_pages import spark
from ops.dashboard_rows import MOST_POINTS, summary
from ops.dashboard_runs import Board, Snapshot
from ops.dashboard_since import Since, troubles
from ops.story_reader import RunReader
from tests.ops.boards import Clock, settled, tell, written
from tests.ops.sample_events import eventful
from tests.ops.test_report import EVIL

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(,|$)')


def exposition(text):
    """Parse Prometheus' text format 0.0.4 strictly: {(name, labels): value}, and each family's type."""
    assert text.endswith("\n")
    assert "\r" not in text
    kinds, values, family = {}, {}, None
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            assert re.fullmatch(rf"# HELP {NAME} [^\n]+", line)
            family = line.split(" ")[2]
            assert family not in kinds  # all lines of a family stand together
            kinds[family] = None
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert (name, kinds[name]) == (family, None)
            assert kind in {"gauge", "counter"}
            assert (kind == "counter") == name.endswith("_total")
            kinds[name] = kind
        else:
            found = re.fullmatch(rf"({NAME})(?:\{{(.*)\}})? (\S+)", line)
            assert found, line
            assert found[1] == family
            rest, labels = found[2] or "", []
            while rest:
                pair = LABEL.match(rest)
                assert pair, line
                value = re.sub(r"\\(.)", lambda sign: {"n": "\n"}.get(sign[1], sign[1]), pair[2])
                labels.append((pair[1], value))
                rest = rest[pair.end() :]
            key = found[1], frozenset(labels)
            assert len(dict(labels)) == len(labels)
            assert key not in values
            values[key] = float(found[3])
    assert None not in kinds.values()
    return values, kinds


def read(folder):
    reader, since = RunReader(folder), Since()
    reader.poll(since.note)
    return reader.story, since


def row_of(folder, written=None):
    story, since = read(folder)
    return summary(folder.name, story, since, written)


def wrong(folder, now, silent=None):
    return troubles(*read(folder), now, silent, "runs/x")


def at(values, name, **labels):
    return values[name, frozenset(labels.items())]


def test_figures_for_prometheus_are_those_of_the_run(tmp_path):
    gone = ("worker", "hospital-2: not there.")
    _, last = written(
        tmp_path / "going",
        rounds=6,
        verdict="",
        stop_after=3,
        absent={(2, "hospital-2"): gone, (3, "hospital-2"): gone},
    )
    board = Board(tmp_path, clock=Clock(last + 30), least=0.0)
    values, kinds = exposition(metrics(board.snapshot(), last + 30, 300.0))
    story, _ = read(tmp_path / "going")
    run = {"run": "going"}
    assert at(values, "wardround_run_round", **run) == 3
    assert at(values, "wardround_run_rounds_planned", **run) == 6
    assert at(values, "wardround_run_rounds_completed", **run) == 3
    assert at(values, "wardround_run_last_event_timestamp_seconds", **run) == pytest.approx(last, abs=1e-3)
    assert at(values, "wardround_run_state", **run, state="running") == 1
    assert (
        sum(at(values, "wardround_run_state", **run, state=name) for name in ("ok", "failed", "silent")) == 0
    )
    assert at(values, "wardround_site_up", **run, site="hospital-1") == 1
    assert at(values, "wardround_site_up", **run, site="hospital-2") == 0
    assert at(values, "wardround_site_failures_total", **run, site="hospital-2") == 2
    assert at(values, "wardround_site_failures_total", **run, site="hospital-3") == 0
    assert at(values, "wardround_site_bytes_up_total", **run, site="hospital-1") == story.carried(
        "hospital-1", "up"
    )
    assert at(values, "wardround_site_bytes_down_total", **run, site="hospital-1") == story.carried(
        "hospital-1", "down"
    )
    answered = story.rounds[3].sites["hospital-3"].waited
    assert at(values, "wardround_site_last_round_seconds", **run, site="hospital-3") == answered
    mean = sum(story.series(alias, "personal")[2] for alias in ("hospital-1", "hospital-3")) / 2
    assert at(values, "wardround_run_figure", **run, figure="dice", model="personal") == pytest.approx(mean)
    assert kinds["wardround_site_bytes_up_total"] == "counter"


def test_labels_survive_what_a_site_may_call_itself(tmp_path):
    folder, last = written(tmp_path / "run", rounds=1, verdict="", stop_after=1)
    alias = EVIL + '\\"}\\n 1\n{x="'
    tell(folder, {"event": "site.asked", "site": alias, "round": 1, "t": last})
    seen = Board(tmp_path, clock=Clock(last)).snapshot()
    values, _ = exposition(metrics(seen, last, 300.0))
    assert at(values, "wardround_site_up", run="run", site=alias.replace("\n", " ")) == 0


def test_old_runs_and_unknown_figures_are_left_out(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    last = tell(folder, {"event": "site.asked", "site": "oak", "round": 1, "t": 1e9})
    board = Board(tmp_path, clock=Clock(last), least=0.0)
    values, _ = exposition(metrics(board.snapshot(), last, 300.0))
    names = {name for name, _ in values}
    assert "wardround_site_up" in names
    assert not names & {
        "wardround_run_rounds_planned",
        "wardround_run_figure",
        "wardround_site_bytes_up_total",
    }
    values, _ = exposition(metrics(board.snapshot(), last + 8 * 86_400, 300.0))
    assert {name for name, _ in values} == {
        "wardround_dashboard_runs", "wardround_dashboard_look_timestamp_seconds", "wardround_dashboard_folder_readable",
    }  # fmt: skip
    exposition(metrics(Snapshot(gone=True), 0.0, 1.0))


def test_counters_never_go_back_although_rounds_are_run_again(tmp_path):
    folder = tmp_path / "run"
    eventful().write(folder)
    lines = sorted(
        (json.loads(line)["t"], path.name, line)
        for path in folder.glob("events*")
        for line in path.read_text().splitlines(True)
    )
    for path in folder.glob("events*"):
        path.write_text("")
    reader, since, before = RunReader(folder), Since(), {}
    for place in range(0, len(lines), 150):
        for _, name, line in lines[place : place + 150]:
            with (folder / name).open("a") as file:
                file.write(line)
        reader.poll(since.note)
        seen = Snapshot((summary("run", reader.story, since, None),))
        values, kinds = exposition(metrics(seen, reader.story.latest, 300.0))
        now = {key: value for key, value in values.items() if kinds[key[0]] == "counter"}
        assert all(now.get(key, -1) >= value for key, value in before.items())
        before = now
    assert at(before, "wardround_site_failures_total", run="run", site="hospital-2") >= 4
    assert reader.story.replaced


def test_a_run_is_silent_once_its_events_stop_whatever_its_clock_says(tmp_path):
    folder, last = written(tmp_path / "run", rounds=3, verdict="", stop_after=1)
    row = row_of(folder)
    assert [row.state(last + age, 300.0) for age in (0.0, 299.0, 301.0)] == ["running", "running", "silent"]
    assert row.silent_since(last + 400, 300.0) == last
    assert row.seconds(last + 100, 300.0) == pytest.approx(row.seconds(last, 300.0) + 100)
    assert row.seconds(last + 4000, 300.0) == row.seconds(last, 300.0)  # it is not known to have gone on
    tell(folder, {"event": "checkpoint", "round": 1, "t": last + 1e6})
    assert row_of(folder, written=last).state(last + 301, 300.0) == "silent"  # an event from the future
    assert row_of(folder, written=last).age(last - 50) == 0.0


def test_a_verdict_of_the_server_waits_for_that_of_the_command_but_not_for_ever(tmp_path):
    folder, last = written(tmp_path / "run", rounds=1, verdict="", stop_after=1)
    tell(folder, {"event": "run.end", "verdict": "ok", "rounds": 1, "seconds": 3.0, "t": last})
    row = row_of(folder)
    assert (row.state(last, 300.0), row.state(last + 301, 300.0)) == ("running", "ok")
    tell(
        folder,
        {"event": "trial.end", "verdict": "failed", "code": "process", "message": "It broke.", "t": last + 1},
        process="trial",
    )
    row = row_of(folder)
    assert (row.state(last + 1, 300.0), row.message) == ("failed", "It broke.")


def test_what_is_wrong_names_site_time_and_remedy(tmp_path):
    gone = ("transport", "oak: could not be reached.")
    folder, last = written(
        tmp_path / "run",
        sites=("beech", "elm", "oak"),
        rounds=9,
        verdict="",
        stop_after=4,
        absent={(3, "oak"): gone, (4, "oak"): gone},
    )
    (found,) = wrong(folder, last)
    first = next(event["t"] for event in events(folder) if event["event"] == "site.failed")
    assert (found.site, found.code, found.since) == ("oak", "transport", first)
    assert found.what == "could not be reached. Missing for 2 rounds in a row."
    assert found.advice.startswith("Look at the site's SuperNode and relay logs")
    tell(
        folder,
        {"event": "process.exit", "name": "worker-elm", "site": "elm", "code": -9, "t": last + 1},
        {
            "event": "site.refused",
            "site": "ash",
            "code": "mismatch",
            "message": "ash: other labels.",
            "t": last + 2,
        },
        {"event": "warning", "site": "elm", "code": "base", "message": "elm: sent whole.", "t": last + 3},
        {"event": "warning", "site": "elm", "code": "base", "message": "elm: long ago.", "t": last - 4000},
    )
    found = wrong(folder, last + 5)
    told = [(one.grave, one.site, one.code, one.what, one.since) for one in found]
    assert told == [
        (True, "ash", "mismatch", "other labels.", last + 2),
        (True, "elm", "process", "worker-elm ended by itself (exit code -9).", last + 1),
        (False, "oak", "transport", "could not be reached. Missing for 2 rounds in a row.", first),
        (False, "elm", "base", "sent whole.", last + 3),
    ]
    assert all(one.advice for one in found)
    tell(
        folder,
        {"event": "site.reply", "site": "oak", "round": 5, "t": last + 6},
        {"event": "site.joined", "site": "ash", "t": last + 7},
    )
    assert {one.site for one in wrong(folder, last + 8)} == {"elm"}


def events(folder):
    return [
        json.loads(line) for path in sorted(folder.glob("events*")) for line in path.read_text().splitlines()
    ]


def test_who_keeps_the_others_waiting_and_who_never_came(tmp_path):
    folder, last = written(tmp_path / "run", rounds=9, verdict="", stop_after=1)
    asked = [
        {"event": "site.asked", "site": f"hospital-{number}", "round": 2, "t": last} for number in (1, 2, 3)
    ]
    came = [
        {"event": "site.reply", "site": f"hospital-{number}", "round": 2, "seconds": 5.0, "t": last + 5}
        for number in (1, 2)
    ]
    tell(
        folder,
        {"event": "round.start", "round": 2, "sites": ["hospital-1", "hospital-2", "hospital-3"], "t": last},
        *asked,
        *came,
    )
    assert wrong(folder, last + 100) == []
    (found,) = wrong(folder, last + 200)
    assert (found.site, found.since, found.grave) == ("hospital-3", last, False)
    assert found.what.startswith("All others wait for it in round 2; its last round took")
    retry = {
        "event": "site.retry",
        "site": "hospital-3",
        "round": 2,
        "code": "worker",
        "message": "hospital-3: no worker.",
        "attempt": 2,
    }
    tell(folder, {**retry, "t": last + 210})
    (found,) = wrong(folder, last + 220)
    assert (found.code, found.what, found.since) == (
        "worker",
        "Asked again 2 times in round 2. no worker.",
        last + 210,
    )
    (folder / "config.json").write_text(
        json.dumps({"config": {"sites": ["hospital-1", "yew"], "rounds": {"deadline": 3600.0}}})
    )
    found = {one.site: one for one in wrong(folder, last + 220)}
    assert found["yew"].what == "yew has not come yet."
    assert "key is registered" in found["yew"].advice


def test_silence_before_the_deadline_is_no_alarm_and_after_it_is(tmp_path):
    folder, last = written(tmp_path / "run", rounds=9, verdict="", stop_after=1)
    tell(
        folder, {"event": "round.start", "round": 2, "sites": ["hospital-1"], "t": last},
        {"event": "site.asked", "site": "hospital-1", "round": 2, "t": last},
    )  # fmt: skip
    (found,) = [one for one in wrong(folder, last + 1800, silent=last) if one.code == "silent"]
    assert not found.grave
    assert "round 2 waits for hospital-1." in found.what
    assert "deadline is in 30 min 00 s" in found.advice
    (found,) = [one for one in wrong(folder, last + 3900, silent=last) if one.code == "silent"]
    assert found.grave
    assert "deadline passed 5 min 00 s ago" in found.what
    assert (found.command, found.effect) == ("wardround resume runs/x", "continues after round 1")


def test_a_long_curve_keeps_its_ends_and_few_points(tmp_path):
    folder, _ = written(tmp_path / "run", rounds=150, sites=("oak",), method="fedavg")
    row = row_of(folder)
    assert len(row.series) == MOST_POINTS
    assert (row.series[0][0], row.series[-1][0]) == (0, 150)
    assert [number for number, _ in row.series] == sorted({number for number, _ in row.series})
    assert spark(row.series[:1]) == ""
    assert "nan" not in spark(((1, 0.5), (2, 0.5)))


def test_a_look_reads_for_a_while_and_goes_on_with_the_next(tmp_path, monkeypatch):
    for number in range(3):
        _, last = written(tmp_path / f"run-{number}", rounds=1)
    os.utime(tmp_path / "run-1" / "events.jsonl", (last + 9, last + 9))
    clock = Clock(last + 10)
    board = Board(tmp_path, clock=clock, least=1.0)
    ticks = iter([0.0, 0.0, 99.0, 99.0])
    monkeypatch.setattr(dashboard_runs.time, "monotonic", lambda: next(ticks, 200.0))
    seen = board.snapshot()
    states = {row.name: row.state(clock.now, 300.0) for row in seen.rows}
    assert states == {"run-1": "ok", "run-0": "unread", "run-2": "unread"}  # the newest first
    monkeypatch.undo()
    assert board.snapshot() is seen  # asked again within a second: nothing is looked at
    clock.now += 1.5
    assert {row.state(clock.now, 300.0) for row in board.snapshot().rows} == {"ok"}


def test_nothing_is_read_twice_and_stories_of_runs_that_rest_are_let_go(tmp_path, monkeypatch):
    for number in range(6):
        _, last = written(tmp_path / f"run-{number}", rounds=1)
    going, last = written(tmp_path / "going", rounds=3, verdict="", stop_after=1)
    last = tell(going, {"event": "checkpoint", "round": 1, "t": last + 100})
    read_of = []
    real = RunReader.poll

    def poll(self, each=None):
        read_of.append(self.folder.name)
        return real(self, each)

    monkeypatch.setattr(RunReader, "poll", poll)
    board = Board(tmp_path, clock=Clock(last), least=0.0)
    for _ in range(20):
        board.snapshot()
    assert sorted(read_of) == ["going", *(f"run-{number}" for number in range(6))]
    held = {name for name, run in board._runs.items() if run.told is not None}
    assert "going" in held
    assert len(held) <= 1 + dashboard_runs.MOST_RESTING
    with board.opened("run-0") as run:
        assert run.story.completed
    with board.opened("../run-0") as run:
        assert run is None
    monkeypatch.setattr(dashboard_runs, "MOST_RUNS", 3)
    seen = board.snapshot()
    assert (len(seen.rows), seen.older) == (3, 4)
    assert "going" in {row.name for row in seen.rows}
    monkeypatch.setattr(dashboard_runs, "MOST_BYTES", 10)
    tell(tmp_path / "going", {"event": "checkpoint", "round": 1, "t": last})
    row = next(row for row in board.snapshot().rows if row.name == "going")
    assert "larger than" in row.problem


def test_a_page_asked_while_another_reads_shows_what_was_seen_last(tmp_path):
    written(tmp_path / "run", rounds=1)
    last = settled(tmp_path / "run")
    board = Board(tmp_path, clock=Clock(last), least=0.0)
    seen = board.snapshot()
    with board.opened("run"):
        assert board.snapshot() is seen  # would wait for ever otherwise


def test_it_serves_until_it_is_told_to_stop(tmp_path):
    written(tmp_path / "run", rounds=1)
    code = (
        "import sys\nfrom pathlib import Path\nfrom ops.dashboard import serve\nfrom ops.dashboard_runs import Board\n"
        "serve(Board(Path(sys.argv[1])), '127.0.0.1', 0, ready=lambda address: print(address, flush=True))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        with urllib.request.urlopen(address + "healthz", timeout=20) as answer:
            assert json.load(answer)["runs"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.stdout.close()
