import io
import json
import re

from rich.console import Console

from common.events import EVENT_SCHEMA, EventLog
from ops.live import LiveView, panel
from ops.story import Story
from ops.story_events import add
from ops.story_reader import RunReader, read_story
from tests.ops.sample_events import START, Sample, eventful


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


def event(name, /, process="server", **fields):
    return {"v": EVENT_SCHEMA, "t": START, "process": process, "event": name, **fields}


def told(*events):
    story = Story()
    for one in events:
        add(story, one)
    return story


def logged(folder):
    console, file = plain(250)
    with LiveView(folder, console):
        pass
    return file.getvalue()


def test_the_panel_tells_of_retries_restarts_and_late_answers():
    story = told(
        event("trial.start", process="trial", sites=["a", "b"], rounds=3),
        event("process.start", process="trial", name="worker-a", site="a"),
        event("process.ready", process="trial", name="worker-a", site="a", seconds=1.0),
        event("run.start", rounds=3),
        event("run.resume", round=1, attempt=1),
        event("round.start", round=2, sites=["a", "b"]),
        event("site.asked", site="a", round=2),
        event("site.retry", site="a", round=2, code="transport", message="a: not there.", attempt=1),
        event("site.retry", site="a", round=2, code="transport", message="a: not there.", attempt=2),
        event("site.asked", site="a", round=2),
    )
    assert "not reached, asked again (2)" in shown(story, START + 1)
    assert "continued after round 1" in shown(story, START + 1)
    add(story, event("process.exit", process="trial", name="worker-a", site="a", code=-9, expected=False))
    assert "worker-a ended" in shown(story, START + 1)
    add(story, event("process.restart", process="trial", name="worker-a", site="a", why="exited", attempt=2))
    add(story, event("process.start", process="trial", name="worker-a", site="a"))
    text = shown(story, START + 1)
    assert "worker-a is started again (exited, attempt 2)" in text
    assert "ended by itself" not in text
    assert "0 of 1 process ready, 1 started again" in text
    assert "is started again" not in shown(story, START + 120)
    add(story, event("site.reply", site="a", round=2, cases=3))
    add(story, event("round.start", round=3, sites=["a", "b"]))
    add(story, event("site.asked", site="b", round=3))
    add(story, event("site.late", site="b", round=2, seconds=70.0))
    assert "its answer to round 2 came too late" in shown(story, START + 120)


def test_a_log_tells_every_attempt_in_its_place(tmp_path):
    text = logged(eventful().write(tmp_path / "run"))
    said = [
        "hospital-2 not reached, asked again (1): its SuperNode did not take the message.",
        "hospital-2 not reached, asked again (3)",
        "worker-hospital-2 ended by itself (exit code -9)",
        "worker-hospital-2 is started again (exited, attempt 1)",
        "hospital-2 takes part from round 5 with 5 cases",
        "round 5/12 in",
        "the checkpoint of round 5 is refused (payload): The checkpoint of round 5 is not whole.",
        "the run is continued after round 4",
        "run failed (quorum): Round 8",
        "trial failed (quorum): Round 8",
        "the run is continued after round 7",
        "hospital-3 answered round 9 too late; the answer is refused",
        "run completed in",
        "trial completed in",
    ]
    places = [text.find(line) for line in said]
    assert -1 not in places, said[places.index(-1)]
    assert places == sorted(places)
    assert text.count("round 5/12 in") == 2


def test_a_live_view_follows_from_one_attempt_into_the_next(tmp_path):
    twice = Sample(rounds=4, interrupted=((3, "failed"),)).write(tmp_path / "twice")
    folder = tmp_path / "grows"
    folder.mkdir()
    reader, verdicts = RunReader(folder), []
    lines = [
        (path.name, line)
        for path in twice.glob("events*.jsonl")
        for line in path.read_text().splitlines(True)
    ]
    for name, line in sorted(lines, key=lambda pair: (json.loads(pair[1])["t"], pair[0] != "events.jsonl")):
        with (folder / name).open("a") as file:
            file.write(line)
        reader.poll()
        verdict = reader.story.verdict
        state = None if verdict is None else verdict.ok
        if not verdicts or verdicts[-1] != state:
            verdicts.append(state)
    assert verdicts == [None, False, None, True]
    full = read_story(twice)
    assert reader.story.rounds == full.rounds
    assert reader.story.sites == full.sites
