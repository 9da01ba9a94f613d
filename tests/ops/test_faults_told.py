"""What story, report, live view and closing tables say of runs in which something went wrong."""

import io
import json
import re
import shutil
from itertools import pairwise

import pytest
from rich.console import Console

from common.events import EVENT_SCHEMA
from ops.live import panel
from ops.plots_strip import strip
from ops.report import render, write_report
from ops.report_faults import absences, interruptions, missed, participation, repetitions, witnesses
from ops.report_view import badge, cards, facts
from ops.story import Story
from ops.story_events import add
from ops.story_reader import read_story
from ops.tables import print_closing
from ops.words import ordinal, ranges
from tests.ops.sample_events import HEADER, MODEL_BYTES, START, Sample, eventful

DOWN_BYTES = HEADER + 902 + MODEL_BYTES
UP_BYTES = HEADER + 96 + 412 + MODEL_BYTES
SITES = ("hospital-1", "hospital-2", "hospital-3")
GONE = ("worker", "hospital-2: the worker is not there.")


def event(name, when=START, /, process="server", **fields):
    return {"v": EVENT_SCHEMA, "t": when, "process": process, "event": name, **fields}


def told(*events):
    story = Story()
    for one in events:
        add(story, one)
    return story


def events_of(folder, name, **fields):
    lines = [
        json.loads(line) for path in folder.glob("events*.jsonl") for line in path.read_text().splitlines()
    ]
    found = [line for line in lines if line["event"] == name]
    return [line for line in found if all(line.get(key) == value for key, value in fields.items())]


def texts(table):
    return [[text for text, _ in row] for row in table.rows]


def live(story, now):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(panel(story, now))
    return console.file.getvalue()


def closing(folder):
    console = Console(width=200, file=io.StringIO(), record=True)
    print_closing(folder, console)
    return console.export_text()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return Sample(rounds=5, interrupted=((3, "killed"),)).write(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def missing(tmp_path_factory):
    return Sample(
        rounds=6, absent={(number, "hospital-2"): GONE for number in (2, 3, 4)},
        again={(2, "hospital-2"): 3, (6, "hospital-1"): 1}, joined={5: "hospital-2"},
    ).write(tmp_path_factory.mktemp("missing"))  # fmt: skip


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    return Sample(rounds=4, interrupted=((3, "failed"),)).write(tmp_path_factory.mktemp("twice"))


@pytest.fixture
def undrawn(monkeypatch):
    """A page's words without its four charts, which take most of its time and are looked at in test_report.py."""
    monkeypatch.setattr("ops.report.charts", lambda story: [])


def test_a_killed_and_continued_run_is_one_run(killed):
    story = read_story(killed)
    assert story.verdict.ok
    assert story.ended
    assert [item.number for item in story.completed] == [1, 2, 3, 4, 5]
    assert [(item.number, item.again) for item in story.cycles if item.again] == [(3, 1)]
    assert [attempt.verdict is None for attempt in story.attempts] == [True, False]
    assert [item.round for item in story.resumes] == [2]
    first, last = events_of(killed, "site.reply", site="hospital-1", round=3)
    assert first["loss"] != last["loss"] == story.rounds[3].sites["hospital-1"].loss
    old, new = events_of(killed, "metric", site="hospital-1", round=2, model="global")
    assert (
        old["values"] != new["values"] == story.sites["hospital-1"].figures[2, "validation", "global"].values
    )
    assert story.series("hospital-1", "global").keys() == {0, 1, 2, 3, 4, 5}


def test_the_bytes_of_a_round_count_once_in_it_and_both_in_the_sum(killed):
    story = read_story(killed)
    place = story.rounds[3].sites["hospital-1"]
    assert (place.moved("down"), place.moved("up")) == (DOWN_BYTES, UP_BYTES)
    for alias in SITES:
        for way in ("down", "up"):
            carried = sum(e["total"] for e in events_of(killed, "bytes", site=alias, direction=way))
            assert story.messages(alias, way) == sum(story.kinds(alias, way).values()) == carried
    assert (
        story.messages("hospital-1", "down") == 7 * DOWN_BYTES
    )  # 5 rounds, the end, and round 3 before the kill
    assert story.messages("hospital-2", "up") == 5 * UP_BYTES + HEADER + 96 + 412
    counts = [e["down"] for e in events_of(killed, "transport", site="hospital-2")]
    falls = [before for before, after in pairwise(counts) if after < before]
    assert len(falls) == 1
    assert story.carried("hospital-2", "down") == falls[0] + counts[-1]
    assert story.framing("hospital-2", "down") > 0


def test_seconds_are_those_of_the_attempts_not_of_the_night_between(killed, twice):
    story = read_story(killed)
    (end,) = events_of(killed, "trial.end")
    begun = [e["t"] for e in events_of(killed, "trial.phase", phase="data")]
    before = [
        line["t"]
        for path in killed.glob("events*.jsonl")
        for line in map(json.loads, path.read_text().splitlines())
        if line["t"] < begun[1]
    ]
    assert story.seconds == pytest.approx(max(before) - begun[0] + end["seconds"])
    assert story.latest - story.begun > 3_600 > story.seconds
    assert story.elapsed(story.latest) == pytest.approx(story.seconds, abs=0.01)

    both = [e["seconds"] for e in events_of(twice, "trial.end")]
    assert len(both) == 2
    assert read_story(twice).seconds == pytest.approx(sum(both))
    servers = [e["seconds"] for e in events_of(twice, "run.end")]
    wall = next(card for card in cards(read_story(twice)) if card.title == "Wall time")
    assert wall.note.startswith("sum of 2 attempts; of it ")
    assert read_story(twice).server_seconds == pytest.approx(sum(servers))


def test_a_continued_run_cut_after_any_line_is_told_as_it_stood(killed, tmp_path):
    """After each server line: never a round of an attempt that is gone, and no figure of a round that is run again."""
    lines = (killed / "events.jsonl").read_text().splitlines()
    story, whole, resumed, numbers = Story(), 0, False, []
    for line in map(json.loads, lines):
        add(story, line)
        if line["event"] == "run.resume":
            whole, resumed = line["round"], True
            assert list(story.rounds) == [1, 2]
            assert all(number < 2 for number, _, _ in story.sites["hospital-1"].figures)
        whole = line["round"] if line["event"] == "round.end" and not line["closing"] else whole
        numbers = [item.number for item in story.completed]
        assert numbers == list(range(1, whole + 1))
    assert resumed
    assert numbers == [1, 2, 3, 4, 5]


def test_an_attempt_whose_begin_was_cut_still_takes_the_place_of_the_one_before(killed, tmp_path):
    for lost in ("run.start", "run.resume", "round.start"):
        folder = shutil.copytree(killed, tmp_path / lost)
        path = folder / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        places = [place for place, line in enumerate(lines) if json.loads(line)["event"] == lost]
        if lost == "round.start":
            places = [p for p in places if json.loads(lines[p])["round"] == 3][:1]
        lines[places[-1]] = lines[places[-1]][:30] + "\n"
        path.write_text("".join(lines))
        story = read_story(folder)
        assert story.unreadable == 1
        assert story.rounds[3].sites["hospital-1"].moved("up") == UP_BYTES, lost
        assert story.messages("hospital-1", "up") == read_story(killed).messages("hospital-1", "up")
        assert [item.number for item in story.completed] == [1, 2, 3, 4, 5]


def test_the_verdict_is_the_last_attempt_s(twice, tmp_path):
    story = read_story(twice)
    assert badge(story)[:2] == ("ok", "completed")
    assert [attempt.verdict.ok for attempt in story.attempts] == [False, True]
    assert ("Attempts", "2, continued after round 2") in facts(story)
    assert not story.resumable

    going = shutil.copytree(twice, tmp_path / "going")
    for path in going.glob("events*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        cut = events_of(twice, "run.start")[1]["t"]
        path.write_text("".join(line for line in lines if json.loads(line)["t"] < cut))
    story = read_story(going)
    assert story.verdict is None
    assert not story.ended
    assert [item.number for item in story.completed] == [1, 2]  # the third missed its quorum
    text = live(story, story.latest + 1)
    assert "failed" not in text.splitlines()[1]
    assert "last event" not in text
    assert re.search(r"running|waiting for the sites", text)
    assert "continue: wardround resume" in closing(going)


def test_a_round_that_misses_its_quorum_in_the_middle_leaves_no_trace_in_the_result(twice):
    story = read_story(twice)
    assert [item.number for item in story.completed] == [1, 2, 3, 4]
    assert story.rounds[3].again == 1
    assert not story.rounds[3].missing
    assert missed(story) == []
    assert not absences(story).rows


def test_a_closing_evaluation_that_is_done_twice_counts_once():
    def end(values, missing=()):
        there = [alias for alias in "ab" if alias not in missing]
        yield event("round.start", round=2, sites=["a", "b"], closing=True)
        for alias in there:
            yield event("bytes", site=alias, round=2, direction="up", kinds={"metrics": 5}, total=5)
            yield event(
                "metric", site=alias, round=1, split="test", model="global", values={"dice": values}, primary="dice"
            )  # fmt: skip
        for alias in missing:
            yield event("site.failed", site=alias, round=2, code="deadline", message=f"{alias}: too late.")
        yield event("round.end", round=2, sites=there, missing=list(missing), cases={}, closing=True)

    one = [event("run.start", rounds=1), event("round.start", round=1, sites=["a", "b"])]
    one.append(event("round.end", round=1, sites=["a", "b"], missing=[], cases={"a": 1, "b": 1}))
    failed = event("run.end", verdict="failed", rounds=1, code="quorum", message="Too few.")
    again = [event("run.start", START + 9), event("run.resume", START + 9, round=1, attempt=1)]
    story = told(*one, *end(0.5), failed, *again, *end(0.75, missing=["b"]))
    assert [item.number for item in story.cycles] == [1, 2]
    assert story.finals("global") == {"a": 0.75}  # what b said in the first one is not the result
    assert story.messages("a", "up") == 10
    assert missed(story) == ["b missed the closing evaluation: deadline"]


def test_who_took_part_says_why_not_and_how_often_again(missing, undrawn):
    story = read_story(missing)
    assert texts(participation(story)) == [
        ["1", "6", "5", "4", ""],
        ["2", "6", "worker ↻3", "4", ""],
        ["rounds 3\N{EN DASH}4", "6", "worker", "4", ""],
        ["5", "6", "5", "4", "joined: hospital-2"],
        ["6", "6 ↻1", "5", "4", ""],
        ["closing evaluation", "evaluated", "evaluated", "evaluated", ""],
    ]
    assert participation(story).tips[1, 2] == GONE[1]
    assert "did not take the message" in participation(story).tips[4, 1]
    assert [row[:4] for row in texts(absences(story))] == [["2\N{EN DASH}4", "hospital-2", *GONE]]
    assert [row[:4] for row in texts(repetitions(story))] == [
        ["2", "hospital-2", "transport", "3"], ["6", "hospital-1", "transport", "1"]
    ]  # fmt: skip
    assert missed(story) == ["hospital-2 missed 3 of 6 rounds: worker"]
    text = closing(missing)
    assert "hospital-2 missed 3 of 6 rounds: worker" in text
    assert "wardround resume" not in text
    html = write_report(missing).read_text()
    assert f'title="{GONE[1]}"' in html
    assert "<h2>Interruptions</h2>" not in html


def test_several_reasons_are_counted():
    lines = []
    for number, code in enumerate(["worker", "deadline", "worker", ""], start=1):
        lines.append(event("round.start", round=number, sites=["a", "beech"] if number < 4 else ["a"]))
        if code:
            lines.append(
                event("site.failed", site="beech", round=number, code=code, message=f"beech: {number}.")
            )
        lines.append(
            event("round.end", round=number, sites=["a"], missing=["beech"] if code else [], cases={"a": 3})
        )
    story = told(*lines)
    assert missed(story) == [
        "beech missed 3 of 3 rounds: worker 2, deadline 1"
    ]  # in the fourth it was not asked
    assert texts(participation(story))[3][:3] == ["4", "3", "not asked"]


def test_three_hundred_rounds_stay_short(tmp_path):
    story = Story()
    for number in range(1, 301):
        gone = 4 <= number <= 120
        add(story, event("round.start", round=number, sites=["a", "b"]))
        if gone:
            add(story, event("site.failed", site="b", round=number, code="worker", message="b: not there."))
        cases = {"a": 3} if gone else {"a": 3, "b": 2}
        add(
            story,
            event(
                "round.end",
                round=number,
                sites=list(cases),
                missing=["b"] if gone else [],
                cases=cases,
                seconds=1.0,
            ),
        )
    dash = "\N{EN DASH}"
    assert texts(participation(story)) == [
        [f"rounds 1{dash}3", "3", "2"], [f"rounds 4{dash}120", "3", "worker"], [f"rounds 121{dash}300", "3", "2"]
    ]  # fmt: skip
    assert [row[0] for row in texts(absences(story))] == [f"4{dash}120"]
    picture = strip(story)
    assert len(picture.svg) < 40_000
    assert [key.label for key in picture.legend] == ["contributed", "missing"]
    assert "<details>" in render(story, tmp_path)  # 300 rows of seconds are folded away


def test_the_strip_is_there_only_when_there_is_something_to_see(missing, killed, tmp_path):
    quiet = read_story(Sample(rounds=2).write(tmp_path / "quiet"))
    assert strip(quiet) is None
    assert strip(Story()) is None
    seen = strip(read_story(missing))
    assert [key.label for key in seen.legend] == ["contributed", "contributed, asked again", "missing"]
    assert "var(--miss)" in seen.svg
    again = strip(read_story(killed))
    assert again.legend[-1].line
    assert strip(read_story(killed)).svg == again.svg


def test_interruptions_stand_in_the_order_of_time(tmp_path, undrawn):
    folder = eventful().write(tmp_path / "run")
    story = read_story(folder)
    assert [item.number for item in story.completed] == list(range(1, 13))
    assert {item.number: item.again for item in story.cycles if item.again} == {5: 1, 6: 1, 8: 1}
    rows = texts(interruptions(story))
    assert [(what, site) for _, what, site, _ in rows] == [
        ("worker-hospital-2 started again", "hospital-2"),
        ("attempt 1 ended", ""),
        ("the checkpoint of round 5 refused", ""),
        ("continued after round 4", ""),
        ("attempt 2 ended", ""),
        ("continued after round 7", ""),
    ]
    assert rows == sorted(rows, key=lambda row: row[0])
    assert rows[0][3] == "It had ended by itself; attempt 1; waited 1.00 s."
    assert rows[1][3].startswith("Cut off")
    assert rows[4][3] == "Failed (quorum): Round 8: 1 sites contributed, 3 are needed."
    assert [row[0] for row in texts(repetitions(story)) if row[2] == "late"] == ["9"]
    html = write_report(folder).read_text()
    assert html.count("run again after an interruption") == 3
    assert "answered too late: hospital-3" in html


def test_a_lost_quorum_stands_at_the_top_with_the_command_to_continue(tmp_path, undrawn):
    absent = {(3, alias): ("transport", f"{alias}: gone.") for alias in SITES[1:]}
    sample = Sample(rounds=4, absent=absent, verdict="failed", stop_after=3)
    folder = sample.write(tmp_path / "runs" / "20260101-120000-ditto")
    header = write_report(folder).read_text().partition("</header>")[0]
    assert "too few hospitals took part (quorum)" in header
    assert "<code>wardround resume runs/20260101-120000-ditto</code> continues after round 2" in header
    assert str(tmp_path) not in header
    assert f"\nThen continue: wardround resume {folder} (continues after round 2)\n" in closing(folder)
    odd = sample.write(tmp_path / "a run")
    assert "<code>wardround resume &#39;a run&#39;</code>" in write_report(odd).read_text()


def test_a_run_that_never_began_has_nothing_to_continue(tmp_path):
    folder = tmp_path / "early"
    folder.mkdir()
    line = event("trial.end", process="trial", verdict="failed", code="config", message="No such key.")
    (folder / "events-trial.jsonl").write_text(json.dumps(line) + "\n")
    assert "resume" not in closing(folder)
    assert "resume" not in write_report(folder).read_text()
    began = event("run.start"), event("round.start", round=1, sites=["a"])
    first = told(event("trial.start", process="trial", sites=["a"]), *began)
    assert "begins again with round 1" in render(first, tmp_path)
    assert "wardround resume" not in render(
        told(*began), tmp_path
    )  # a coordinator alone: no trial to continue


def test_the_last_ledger_head_of_each_site_is_noted(killed):
    story = read_story(killed)
    replies = events_of(killed, "site.reply", site="hospital-1")
    assert texts(witnesses(story))[0] == ["hospital-1", "6", replies[-1]["ledger"]]
    for bad in ("12:abc", "x" * 70, 3, f"1:{'0' * 64}\n", f"{'9' * 16}:{'0' * 64}"):
        add(story, event("site.reply", site="hospital-1", round=7, ledger=bad))
    assert texts(witnesses(story))[0][2] == replies[-1]["ledger"]
    assert not witnesses(told(event("site.reply", site="a", round=1))).rows


def test_words():
    assert ranges([7, 2, 3, 4, 4]) == "2\N{EN DASH}4, 7"
    assert ranges([]) == ""
    assert [ordinal(value) for value in (1, 2, 3, 4, 11, 12, 21, 112)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "21st", "112th"
    ]  # fmt: skip
