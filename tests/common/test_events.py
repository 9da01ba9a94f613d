"""Events: a closed table, whole lines, plain JSON."""

import io
import json
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import WardroundError
from common.events import EVENT_SCHEMA, EVENTS, EventLog, read_events

BASE = {"v", "t", "process", "event", "run", "site"}


@pytest.fixture
def log(tmp_path):
    made = EventLog(tmp_path / "deep" / "events.jsonl", "server", run="r1")
    made.path = tmp_path / "deep" / "events.jsonl"
    yield made
    made.close()


def test_every_line_says_who_when_and_which_version(log):
    log.emit("site.failed", site="alpha", round=2, code="data", message="alpha: no.")
    (line,) = read_events(log.path)
    assert line.pop("t") > 1.7e9
    assert line == {
        "v": EVENT_SCHEMA, "process": "server", "event": "site.failed", "run": "r1", "site": "alpha",
        "round": 2, "code": "data", "message": "alpha: no.",
    }  # fmt: skip


def test_a_sites_own_log_names_the_site_unless_the_event_does(tmp_path):
    log = EventLog(tmp_path / "e.jsonl", "worker", site="alpha")
    log.emit("phase", phase="train")
    log.emit("phase", phase="train", site="beta")
    first, second = read_events(tmp_path / "e.jsonl")
    assert (first["site"], second["site"]) == ("alpha", "beta")
    assert "run" not in first


def test_an_event_or_field_outside_the_table_is_refused_and_nothing_is_written(log):
    with pytest.raises(WardroundError, match=r"Unknown event 'site\.patient'"):
        log.emit("site.patient", name="x")
    with pytest.raises(WardroundError, match=r"'phase' has no field \['patient'\]"):
        log.emit("phase", phase="train", patient="x")
    assert list(read_events(log.path)) == []


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_of_the_table_can_be_written_with_all_its_fields(log, event):
    meaning, fields = EVENTS[event]
    log.emit(event, **dict.fromkeys(fields, "x"))
    (line,) = read_events(log.path)
    assert line.keys() - BASE == fields.keys()
    assert not BASE & fields.keys()  # no field may hide who wrote the line
    assert meaning
    assert all(fields.values())


@given(st.floats())
@settings(deadline=None, max_examples=60)
def test_numbers_are_plain_json_and_what_is_not_finite_is_null(number):
    stream = io.StringIO()
    EventLog(None, "server", stream=stream).emit(
        "round.end", loss=number, cases={"a": number}, sites=[number]
    )
    line = json.loads(stream.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    expected = round(number, 6) if math.isfinite(number) else None
    assert (line["loss"], line["cases"], line["sites"]) == (expected, {"a": expected}, [expected])


def test_fields_that_are_none_are_left_out_and_sets_have_an_order(log):
    log.emit("round.end", loss=None, sites={"beta", "alpha"}, missing=("x",))
    (line,) = read_events(log.path)
    assert "loss" not in line
    assert line["sites"] == ["alpha", "beta"]
    assert line["missing"] == ["x"]


def test_threads_and_processes_write_whole_lines(log):
    other = EventLog(
        log.path, "worker", site="alpha"
    )  # as another process would: its own handle, the same file
    text = "ä" * 400 + "\n"

    def write(target, name):
        for number in range(60):
            target.emit("warning", code=name, message=text, round=number)

    threads = [
        threading.Thread(target=write, args=(target, f"t{n}")) for n in range(4) for target in (log, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = list(read_events(log.path))
    assert len(lines) == 8 * 60
    assert all(line["message"] == text for line in lines)
    for name in {line["code"] for line in lines}:
        for process in ("server", "worker"):
            rounds = [line["round"] for line in lines if (line["code"], line["process"]) == (name, process)]
            assert rounds == list(range(60))


def test_a_last_line_that_is_not_whole_is_left_out(log):
    log.emit("phase", phase="train")
    with log.path.open("a") as file:
        file.write('{"v":1,"event":"pha')
    assert [line["event"] for line in read_events(log.path)] == ["phase"]


def test_a_log_is_continued_and_only_its_group_may_read_it(log):
    log.emit("phase", phase="load")
    log.close()
    log.emit("phase", phase="lost")  # after the end: no error, no line
    again = EventLog(log.path, "server")
    again.emit("phase", phase="train")
    assert [line["phase"] for line in read_events(log.path)] == ["load", "train"]
    assert log.path.stat().st_mode & 0o007 == 0


def test_a_stream_gets_the_same_line_as_the_file(tmp_path):
    stream = io.StringIO()
    EventLog(tmp_path / "e.jsonl", "relay", stream=stream).emit("phase", phase="train")
    assert (tmp_path / "e.jsonl").read_text() == stream.getvalue()


def test_half_a_line_left_by_a_crash_spoils_neither_the_next_event_nor_the_reading(tmp_path):
    path = tmp_path / "events.jsonl"
    first = EventLog(path, "server")
    first.emit("round.start", round=1, sites=["alpha"])
    first.close()
    with path.open("ab") as file:
        file.write(b'{"v":1,"event":"round.e')
    second = EventLog(path, "server")
    second.emit("round.start", round=2, sites=["alpha"])
    second.close()
    assert [event["round"] for event in read_events(path)] == [1, 2]
