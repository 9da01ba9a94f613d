import io
import json
import re

from rich.console import Console

from common.events import EVENT_SCHEMA, EventLog
from ops.live import LiveView, panel
from ops.story_reader import read_story
from tests.ops.sample_events import START, Sample


def plain(width=200):
    file = io.StringIO()
    return Console(file=file, width=width), file


def shown(story, now, width=160):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(panel(story, now))
    return console.file.getvalue()


def row(text, site):
    return next(line for line in text.splitlines() if re.match(rf"│? *{site}\b", line))


def test_a_growing_log_gives_each_line_once(tmp_path):
    console, file = plain()
    log = EventLog(tmp_path / "events.jsonl", "server", run="r")
    with LiveView(tmp_path, console) as view:
        assert file.getvalue() == ""
        log.emit("run.start", method="fedavg", rounds=2, parameters=10)
        log.emit("round.start", round=1, sites=["a", "b"], closing=False)
        view.refresh()
        view.refresh()
        assert file.getvalue().count("run of fedavg: 2 rounds") == 1
        log.emit(
            "metric",
            site="a",
            round=0,
            split="validation",
            model="global",
            cases=2,
            values={"dice": 0.25},
            primary="dice",
        )
        log.emit("site.failed", site="b", round=1, code="worker", message="b: the worker is not there.")
        before = file.getvalue()
        with (tmp_path / "events.jsonl").open("ab", buffering=0) as raw:
            end = {
                "v": EVENT_SCHEMA,
                "t": START,
                "event": "round.end",
                "round": 1,
                "seconds": 4.25,
                "overhead": 0.5,
            }
            end |= {"sites": ["a"], "missing": ["b"], "cases": {"a": 3}, "closing": False, "loss": 0.75}
            line = json.dumps(end).encode() + b"\n"
            raw.write(line[:40])
            view.refresh()
            assert "round 1/2" not in file.getvalue()
            raw.write(line[40:])
        view.refresh()
    log.close()
    new = file.getvalue()[len(before) :]
    assert "b failed (worker): the worker is not there." in new
    assert (
        "round 1/2 in 4.25 s (overhead 0.50 s), loss 0.7500 · Dice of the initial model (global): a 0.250, b –"
        " · missing: b (worker)" in new
    )


def test_a_log_has_no_control_characters(tmp_path):
    run = Sample(rounds=2).write(tmp_path / "run")
    evil = {
        "v": 1,
        "t": START,
        "event": "warning",
        "site": "hospital-1",
        "code": "x",
        "message": "a\x1b]0;title\x07[red]b",
    }
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(evil) + "\n")
    console, file = plain()
    with LiveView(run, console):
        pass
    text = file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert "[red]b" in text  # markup of others is text
    assert text.count("\n") == len(text.splitlines())
    for number in (1, 2):
        assert re.search(rf"round {number}/2 in .*hospital-1 \S+/\S+, hospital-2", text)
    assert "closing evaluation in" in text
    assert "run completed in" in text


def test_the_panel_shows_each_site(tmp_path):
    lost = {(2, "hospital-2"): ("deadline", "hospital-2: too late.")}
    run = Sample(rounds=4, absent=lost, stop_after=2, verdict="").write(tmp_path / "run")
    story = read_story(run)
    text = shown(story, story.latest + 1)
    assert "running" in text
    assert "11 of 11 processes ready" in text
    assert "round 2 of 4 done" in text
    for alias in story.sites:
        figure = story.series(alias, "personal")
        assert f"{figure[max(figure)]:.3f} r{max(figure)}" in row(text, alias)
    assert "failed: deadline" in row(text, "hospital-2")
    assert row(text, "hospital-1").rstrip(" │").endswith("ok")
    assert "last event" not in text
    assert "last event 2 min 00 s ago" in shown(story, story.latest + 120)


def test_the_panel_follows_steps_and_broken_processes(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", "trial")
    log.emit("trial.phase", phase="ready")
    log.emit("trial.start", method="fedavg", sites=["a"], rounds=3, runtime="fast")
    log.emit("process.start", name="worker-a", site="a", pid=1)
    log.emit("process.start", name="superlink", pid=2)
    log.emit("process.ready", name="superlink", seconds=1.0)
    log.emit("phase", site="a", round=1, phase="train")
    log.emit("phase", site="a", phase="train", step=12, steps=40)
    with LiveView(tmp_path, Console(file=io.StringIO(), width=140), live=False) as view:
        story = view.story
        begun = story.sites["a"].activity.since
        text = shown(story, begun + 7)
        assert "waiting for worker-a" in text
        assert re.search(r"training +12/40 +7\.00 s", row(text, "a"))
        log.emit("process.exit", name="worker-a", site="a", code=-9, expected=False)
        view.refresh()
    log.close()
    text = shown(story, begun + 8)
    assert "worker-a ended by itself (exit code -9)" in text
    assert "worker-a ended" in row(text, "a")


def test_a_terminal_is_redrawn_in_place_and_left_clean(tmp_path):
    run = Sample(rounds=2).write(tmp_path / "run")
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, height=40)
    now = [START]
    with LiveView(run, console, live=True, clock=lambda: now[0]) as view:
        drawn = len(file.getvalue())
        assert drawn
        view.refresh()
        assert len(file.getvalue()) == drawn  # nothing new, nothing written
        now[0] += 1.0
        view.refresh()
        assert len(file.getvalue()) > drawn  # the clock of the first line goes on
    assert "\x1b[?25h" in file.getvalue()  # the cursor is back


def test_a_folder_that_fills_later_is_followed(tmp_path):
    console, file = plain()
    run = tmp_path / "later"
    with LiveView(run, console) as view:
        view.refresh()
        Sample(rounds=1).write(run)
        view.refresh()
        assert view.story.ended
    assert "trial completed in" in file.getvalue()
