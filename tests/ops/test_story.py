import functools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.events import EVENT_SCHEMA, EVENTS, EventLog
from ops.events_doc import PAGE, render
from ops.live import line_of, panel
from ops.report_faults import (
    absences,
    interruptions,
    missed,
    participation,
    repetitions,
    round_times,
    witnesses,
)
from ops.story import Story
from ops.story_events import add
from ops.story_reader import RunReader, Tail, cleaned, read_story
from tests.ops.sample_events import MODEL_BYTES, START, Sample

LOST = {(3, "hospital-2"): ("worker", "hospital-2: the worker is not there.")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Sample(rounds=4, absent=LOST).write(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def lines(whole):
    return {path.name: path.read_text().splitlines() for path in whole.glob("events*.jsonl")}


def event(name, **fields):
    return {"v": EVENT_SCHEMA, "t": START, "process": "server", "event": name, **fields}


def written(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in lines.items():
        (folder / name).write_text("".join(line + "\n" for line in content))
    return folder


@functools.cache
def parsed(line):
    return json.loads(line)


def of(lines, name, **fields):
    found = [parsed(line) for content in lines.values() for line in content]
    return [
        e for e in found if e["event"] == name and all(e.get(key) == value for key, value in fields.items())
    ]


def test_a_whole_run_is_told_as_its_events_say(whole, lines):
    story = read_story(whole)
    assert (story.method, story.runtime, story.seed, story.planned) == ("ditto", "fast", 0, 4)
    assert list(story.sites) == ["hospital-1", "hospital-2", "hospital-3"]
    assert story.verdict.ok
    assert story.ended
    assert [item.number for item in story.completed] == [1, 2, 3, 4]
    assert story.rounds[5].closing
    (reply,) = of(lines, "site.reply", site="hospital-3", round=2)
    place = story.rounds[2].sites["hospital-3"]
    assert (place.local, place.phases, place.cases, place.loss) == (
        reply["local"], reply["phases"], reply["cases"], reply["loss"],
    )  # fmt: skip
    (end,) = of(lines, "round.end", round=2)
    assert (story.rounds[2].seconds, story.rounds[2].overhead) == (end["seconds"], end["overhead"])
    assert place.moved("up") == MODEL_BYTES + 9_873 + 96 + 412
    assert story.own_model == "personal"
    assert story.final_place() == ("test", 4)
    (test,) = of(lines, "metric", site="hospital-1", split="test", model="personal")
    assert story.finals("personal")["hospital-1"] == test["values"]["dice"]
    assert story.series("hospital-1", "global").keys() == {0, 1, 2, 3, 4}
    assert story.worst("personal") == min(story.finals("personal").items(), key=lambda item: item[1])
    assert story.processes["worker-hospital-1"].peak == max(
        e["peak"]
        for e in of(lines, "memory")
        if e["name"] == "worker-hospital-1" or e.get("site") == "hospital-1"
    )
    assert story.sites["hospital-1"].slices == 4
    assert set(story.models) == {
        "global.safetensors",
        *(f"personal-{alias}.safetensors" for alias in story.sites),
    }


def test_a_missing_site_has_its_round_its_code_and_its_sentence(whole):
    story = read_story(whole)
    assert {n: list(item.missing) for n, item in story.rounds.items() if item.missing} == {3: ["hospital-2"]}
    why = story.rounds[3].missing["hospital-2"]
    assert (why.code, why.message) == LOST[3, "hospital-2"]
    assert story.rounds[3].sites["hospital-2"].moved("up") is None
    assert "hospital-2" not in story.rounds[3].cases
    assert 2 not in story.series("hospital-2", "global")


def test_the_parts_sum_up_to_the_wire(whole):
    story = read_story(whole)
    for alias in story.sites:
        for direction in ("down", "up"):
            parts = sum(story.kinds(alias, direction).values()) + story.framing(alias, direction)
            assert parts == story.carried(alias, direction) > 0
    for direction in ("down", "up"):
        assert story.total(direction, wire=True) > story.total(direction, wire=False)


def test_a_supernode_that_was_started_again_is_counted_on():
    story = Story()
    for down, up, calls in ((100, 50, 3), (400, 90, 9), (10, 5, 1), (60, 30, 4)):
        add(story, event("transport", site="a", down=down, up=up, calls=calls))
    assert (story.sites["a"].transport.down, story.sites["a"].transport.up) == (460, 120)
    assert story.sites["a"].transport.calls == 13


def test_what_was_not_measured_is_none(tmp_path):
    stock = read_story(Sample(rounds=2, runtime="stock").write(tmp_path / "stock"))
    assert stock.framing("hospital-1", "up") is None
    assert stock.total("up", wire=True) is None
    assert stock.total("up", wire=False) > 0

    empty = Story()
    assert empty.verdict is None
    assert empty.final_place() is None
    assert (empty.own_model, empty.primary, empty.worst("global"), empty.overheads) == ("", "", None, [])
    assert empty.total("up", wire=False) is None

    bare = Story()
    add(bare, event("site.reply", site="a", round=1))
    place = bare.rounds[1].sites["a"]
    assert (place.local, place.waited, place.cases, place.loss, place.phases) == (None, None, None, None, {})
    add(bare, event("round.end", round=1, sites=["a"], missing=["b"]))
    assert (bare.rounds[1].seconds, bare.rounds[1].overhead, bare.rounds[1].loss) == (None, None, None)
    assert bare.rounds[1].missing["b"].message == "No reason was recorded."


def test_a_count_older_than_the_last_message_gives_no_framing():
    story = Story()
    add(story, event("bytes", site="a", round=1, direction="up", kinds={"model": 1000}, total=1000))
    add(story, event("transport", site="a", down=10, up=400, calls=3))
    assert story.framing("a", "up") is None
    assert story.framing("a", "down") is None


def test_one_site_without_a_count_leaves_the_sum_on_the_wire_open():
    story = Story()
    for alias in "ab":
        add(story, event("bytes", site=alias, round=1, direction="up", kinds={"model": 1000}, total=1000))
    add(story, event("transport", site="a", down=10, up=1400, calls=3))
    assert story.total("up", wire=True) is None
    assert story.total("up", wire=False) == 2000


def test_a_run_that_fails_says_why(tmp_path):
    absent = {(2, alias): ("transport", f"{alias}: gone.") for alias in ("hospital-1", "hospital-3")}
    story = read_story(
        Sample(rounds=4, absent=absent, verdict="failed", stop_after=2).write(tmp_path / "run")
    )
    assert not story.verdict.ok
    assert story.verdict.failure.code == "quorum"
    assert len(story.rounds[2].missing) == 2
    assert [item.number for item in story.completed] == [1]
    assert story.final_place() == ("validation", 0)  # the result of round 1 was evaluated by one site alone
    assert len(story.finals("global")) == 3


def test_the_command_s_verdict_counts_before_the_server_s():
    story = Story()
    add(story, event("trial.start", sites=["a"]))
    add(story, event("run.end", verdict="ok", seconds=3.0, rounds=2))
    assert story.verdict.ok
    assert not story.ended  # the command still stops its processes
    add(story, event("trial.end", verdict="failed", seconds=4.0, code="process", message="superlink ended."))
    assert story.verdict.failure.code == "process"
    assert story.ended


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_run_cut_anywhere_is_told_as_far_as_it_went(lines, whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    full = read_story(whole)
    for name in lines:
        content = (whole / name).read_bytes()
        (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content)), label=name)])
    story = RunReader(folder)
    story.poll()
    cut = story.story
    assert cut.unreadable == 0  # a half line waits for its rest, it is no error
    for number, item in cut.rounds.items():
        for key in ("seconds", "slowest", "overhead", "loss"):
            assert getattr(item, key) in (None, getattr(full.rounds[number], key))
        for alias, place in item.sites.items():
            known = full.rounds[number].sites[alias]
            assert all(
                getattr(place, key) in (None, getattr(known, key)) for key in ("local", "loss", "cases")
            )
            assert all(place.moved(way) in (None, known.moved(way)) for way in ("up", "down"))
    for alias, site in cut.sites.items():
        assert site.figures.items() <= full.sites[alias].figures.items()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), gone=st.sets(st.sampled_from(sorted(EVENTS)), max_size=12))
def test_no_number_is_invented(lines, tmp_path_factory, seed, gone):
    """Whatever lines are lost, each number of the story stands in a line that is left."""
    pick = random.Random(seed)
    kept = {
        name: [line for line in content if parsed(line)["event"] not in gone and pick.random() < 0.7]
        for name, content in lines.items()
    }
    reader = RunReader(written(tmp_path_factory.mktemp("some"), kept))
    reader.poll()
    story = reader.story
    for number, item in story.rounds.items():
        ends = of(kept, "round.end", round=number)
        for key in ("seconds", "slowest", "overhead", "loss"):
            assert getattr(item, key) in [e.get(key) for e in ends] + ([] if ends else [None])
        for alias, place in item.sites.items():
            replies = of(kept, "site.reply", round=number, site=alias)
            assert place.local in [e.get("local") for e in replies] + ([] if replies else [None])
            for way in ("up", "down"):
                sent = of(kept, "bytes", round=number, site=alias, direction=way)
                assert place.moved(way) == (sum(e["total"] for e in sent) if sent else None)
    for alias, site in story.sites.items():
        told = of(kept, "metric", site=alias)
        assert len(site.figures) <= len(told)
        assert all(item.values in [e["values"] for e in told] for item in site.figures.values())
        assert (site.transport is None) == (not of(kept, "transport", site=alias))
    assert (story.verdict is None) == (not of(kept, "run.end") and not of(kept, "trial.end"))


def test_lines_that_are_no_events_cost_themselves_alone(tmp_path):
    good = json.dumps(event("site.asked", site="a", round=1))
    bad = [
        "{",
        "[1, 2]",
        '"x"',
        '{"event": 3, "v": 1}',
        json.dumps(event("site.asked") | {"v": 99}),
        "\udce4" * 3,
    ]
    path = tmp_path / "events.jsonl"
    path.write_bytes("\n".join([*bad, "", good, ""]).encode("utf-8", "surrogateescape"))
    story = read_story(tmp_path)
    assert story.unreadable == len(bad)
    assert story.rounds[1].sites["a"].asked


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), names=st.lists(st.sampled_from([*EVENTS, "no.such.event"]), min_size=1, max_size=25))
def test_a_field_of_any_type_breaks_neither_story_nor_live_view(data, names):
    story = Story()
    for name in names:
        _, fields = EVENTS.get(name, ("", {}))
        some = st.fixed_dictionaries(
            {}, optional=dict.fromkeys([*fields, "site"], st.sampled_from(["a", "b", 1, 2]) | ODD)
        )
        strange = cleaned({"v": 1, "t": START, "event": name, **data.draw(some)})
        add(story, strange)
        line_of(strange, story)
    panel(story, START + 5)
    for table in (participation, round_times, absences, repetitions, interruptions, witnesses):
        columns = len(table(story).head)
        assert all(len(row) == columns for row in table(story).rows)
    missed(story)
    assert story.events == len(names)


def test_a_round_that_cannot_be_is_left_out():
    story = Story()
    add(story, event("round.start", round=2, sites=["a"]))
    for number in (-1, 3, 10**9):
        add(
            story,
            event("metric", site="a", round=number, split="validation", model="global", values={"dice": 1.0}),
        )
    assert not story.sites["a"].figures


def test_text_is_cleaned_of_what_steers_a_terminal():
    assert cleaned("a\x1b[2Jb\u202ec\x07\n") == "a [2Jb c  "
    assert cleaned({"k\x1b": ["\x00", 3, None]}) == {"k ": [" ", 3, None]}


def test_tail_gives_each_whole_line_once(tmp_path):
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.poll() == []
    line = json.dumps(event("round.start", round=1, sites=["ä"]), ensure_ascii=False).encode() + b"\n"
    cut = line.index("ä".encode()) + 1  # in the middle of a letter
    with path.open("ab", buffering=0) as file:
        file.write(line[:cut])
        assert tail.poll() == []
        file.write(line[cut:] + line[:5])
        assert [e["sites"] for e in tail.poll()] == [["ä"]]
        assert tail.poll() == []
        file.write(line[5:] + line)
        assert len(tail.poll()) == 2
    assert tail.unreadable == 0


def test_events_of_the_real_log_are_read(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", "server", run="r1")
    log.emit("round.start", round=1, sites=["a"], closing=False)
    log.emit(
        "round.end", round=1, seconds=float("nan"), sites=["a"], missing=[], cases={"a": 3}, closing=False
    )
    log.close()
    story = read_story(tmp_path)
    assert story.rounds[1].contributed == ["a"]
    assert story.rounds[1].cases == {"a": 3}
    assert story.rounds[1].seconds is None


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run") as caught:
        read_story(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_the_events_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m ops.events_doc"
    assert all(f"### `{name}`" in render() for name in EVENTS)
