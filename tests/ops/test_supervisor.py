"""Supervision: what ends or falls silent is started again, with waits, up to a limit; real processes, a clock of ours."""

import signal
import time

import pytest

from common.errors import VERDICT, ProcessError
from ops.processes import session_members
from ops.supervisor import HOPELESS_LIMIT, LIMIT, LONGEST_WAIT, LOOK_SECONDS, WELL_SECONDS, wait_before
from tests.ops.supervised import DEAF, SLEEP, World, running

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path, monkeypatch)
    try:
        yield made
    finally:
        made.group.stop_all(seconds=1.0)
        made.log.close()
    pids = {event["pid"] for event in made.events("process.start")}
    assert not [pid for pid in pids if running(pid)]
    assert not session_members(pids)


def test_the_first_restart_comes_at_once_and_the_waits_double_up_to_a_limit():
    waits = [wait_before(attempt) for attempt in range(10)]
    assert waits == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    assert wait_before(1000) == LONGEST_WAIT


def test_an_exit_with_code_0_is_a_fault_and_is_followed_by_a_start(world):
    calls = []
    process = world.take("pass", site="oak", on_restart=lambda: calls.append(process.pid))
    first = process.pid
    world.ended(process)
    world.supervisor.poll()
    assert process.pid == first  # planned, not started yet
    world.supervisor.poll()
    assert process.pid != first
    assert calls == [process.pid]
    told = [
        {
            key: event.get(key)
            for key in ("event", "name", "site", "code", "expected", "attempt", "why", "seconds")
        }
        for event in world.events("process.exit", "process.restart")
    ]
    fixed = {"name": "one", "site": "oak"}
    assert told == [
        fixed | {"event": "process.exit", "code": 0, "expected": False, "attempt": None, "why": None, "seconds": None},
        fixed | {"event": "process.restart", "code": None, "expected": None, "attempt": 1, "why": "exited", "seconds": 0},
    ]  # fmt: skip
    assert [event["event"] for event in world.events("process.start", "process.exit", "process.restart")] == [
        "process.start", "process.exit", "process.restart", "process.start",
    ]  # fmt: skip
    assert not world.given_up


def test_a_process_that_runs_is_left_alone(world):
    process = world.take(SLEEP)
    first = process.pid
    for _ in range(5):
        world.wait(1000)
    assert process.pid == first
    assert not world.restarts()


def test_restarts_in_a_row_wait_longer_and_longer(world):
    process = world.take(SLEEP)
    for attempt, wait in enumerate((0.0, 0.5, 1.0, 2.0), 1):
        before = process.pid
        world.end(process)
        assert process.exit_code() == -signal.SIGKILL
        if wait:
            planned = world.supervisor.charges["one"].due
            assert planned == pytest.approx(world.clock() + wait, abs=wait / 4)
            world.ahead += planned - world.clock() - 0.1
            world.supervisor.poll()
            assert process.pid == before, "it was started before its time"
        world.wait(0.1)
        assert process.pid != before
        assert world.restarts()[-1] == (attempt, "exited", wait)
    codes = [(event["code"], event["expected"]) for event in world.events("process.exit")]
    assert codes == [(-9, False)] * 4  # told once each


@pytest.mark.parametrize(("seconds", "attempt"), [(WELL_SECONDS + 1, 1), (WELL_SECONDS - 30, 4)])
def test_one_that_ran_well_starts_the_count_over_and_one_that_did_not_goes_on(world, seconds, attempt):
    process = world.take(SLEEP)
    for _ in range(3):
        world.end(process)
        world.wait(LONGEST_WAIT)
    world.wait(seconds)
    world.end(process)
    world.wait(LONGEST_WAIT)
    assert [number for number, *_ in world.restarts()] == [1, 2, 3, attempt]


def test_what_cannot_be_kept_alive_is_given_up_once_by_name_code_and_log(world):
    code = "import sys\nfor i in range(40): print('line', i)\nsys.exit(3)"
    process = world.take(code, "supernode-oak", site="oak")
    world.until_given_up(process)
    [(charge, error)] = world.given_up
    assert isinstance(error, ProcessError)
    assert charge is world.supervisor.charges["supernode-oak"]
    assert "'supernode-oak' ended with code 3 (data)" in str(error)
    assert f"started again {LIMIT} times in a row" in str(error)
    assert error.detail.splitlines() == [f"line {i}" for i in range(25, 40)]
    assert error.site == "oak"
    assert "line " not in str(error)
    assert str(world.folder) not in str(error)
    assert [number for number, *_ in world.restarts()] == list(range(1, LIMIT + 1))
    assert [wait for *_, wait in world.restarts()] == [wait_before(n) for n in range(1, LIMIT + 1)]
    pid = process.pid
    for _ in range(3):
        world.wait(1000)
    assert len(world.given_up) == 1
    assert process.pid == pid
    assert len(world.events("process.start")) == len(world.events("process.exit")) == LIMIT + 1


@pytest.mark.parametrize(("code", "word"), [(2, "config"), (10, "credential"), (14, "ledger")])
def test_a_code_that_the_same_start_will_give_again_is_given_up_sooner(world, code, word):
    process = world.take(f"import sys; sys.exit({code})")
    world.until_given_up(process)
    assert HOPELESS_LIMIT < LIMIT
    assert [number for number, *_ in world.restarts()] == list(range(1, HOPELESS_LIMIT + 1))
    assert f"ended with code {code} ({word})" in str(world.given_up[0][1])
    assert f"started again {HOPELESS_LIMIT} times" in str(world.given_up[0][1])


def test_what_it_said_on_its_end_is_quoted_and_nothing_else_of_its_log(world):
    code = f"import sys; print('wardround: first'); print('{VERDICT}Bad key.'); print('/data/secret'); sys.exit(10)"
    world.until_given_up(world.take(code))
    [(_, error)] = world.given_up
    assert str(error).endswith("without lasting. It said: Bad key.")
    assert "/data/secret" in error.detail


def test_a_signal_is_named_in_words(world):
    process = world.take(SLEEP)
    for _ in range(LIMIT):
        world.end(process)
        world.wait(LONGEST_WAIT)
    assert not world.given_up
    world.end(process)
    assert "ended by signal SIGKILL (perhaps out of memory)" in str(world.given_up[0][1])


def test_an_error_raised_on_giving_up_ends_the_look(world):
    def refuse(charge, error):
        raise error

    world.supervisor._on_give_up = refuse
    process = world.take("import sys; sys.exit(2)")
    with pytest.raises(ProcessError, match="'one' ended with code 2"):
        world.until_given_up(process)
    world.wait(1000)  # and only once
    assert world.supervisor.charges["one"].given_up


def test_one_that_is_given_up_does_not_keep_the_others_from_being_mended(world):
    bad = world.take("import sys; sys.exit(2)", "bad")
    good = world.take(SLEEP, "good")
    world.until_given_up(bad)
    first = good.pid
    world.end(good)
    world.wait(LONGEST_WAIT)
    assert good.pid != first
    assert good.exit_code() is None
    assert len(world.given_up) == 1


# ---- signs of life ---------------------------------------------------------------------------------------------------


def test_one_without_a_sign_of_life_for_its_patience_is_ended_and_started_again(world):
    process = world.take(SLEEP, sign=lambda: False, patience=30.0)
    first = process.pid
    world.wait(25)
    assert process.pid == first
    world.wait(10)  # seen to be silent
    world.supervisor.poll()
    assert process.pid != first
    assert not running(first)
    assert process.exit_code() is None
    assert world.restarts() == [(1, "silent", 0)]
    [ended] = world.events("process.exit")
    assert ended["expected"] is True
    world.wait(25)  # its patience began anew
    world.wait(2)
    assert len(world.restarts()) == 1


def test_one_whose_sign_comes_back_in_time_is_left_alone(world):
    alive = [True]
    process = world.take(SLEEP, sign=lambda: alive[0], patience=30.0)
    first = process.pid
    for _ in range(4):
        alive[0] = False
        world.wait(25)
        alive[0] = True
        world.wait(LOOK_SECONDS + 1)
    assert process.pid == first
    assert not world.restarts()


def test_signs_of_life_are_asked_for_every_few_seconds_only(world):
    asked = []
    world.take(SLEEP, sign=lambda: asked.append(1) or True)
    world.ahead += LOOK_SECONDS
    for _ in range(50):
        world.supervisor.poll()
    assert len(asked) == 1
    world.wait(LOOK_SECONDS)
    assert len(asked) == 2


def test_a_silent_one_that_does_not_listen_is_killed(world):
    process = world.take(DEAF, sign=lambda: False, patience=10.0)
    limit = time.monotonic() + 20
    while "up" not in process.tail():
        assert time.monotonic() < limit
        time.sleep(0.01)
    first = process.pid
    world.wait(11)
    world.supervisor.poll()
    assert not running(first)
    assert process.pid != first


def test_one_that_ends_while_its_sign_is_still_good_counts_as_exited(world):
    process = world.take(SLEEP, sign=lambda: True, patience=30.0)
    world.end(process)
    world.wait(0)
    assert world.restarts() == [(1, "exited", 0)]


def silence(world, patience, most=3 * LIMIT):
    process = world.take(SLEEP, "worker-oak", site="oak", sign=lambda: False, patience=patience)
    for _ in range(most):
        world.wait(patience + 1)  # silent
        world.wait(LONGEST_WAIT)  # started again
        if world.given_up:
            break
    return process


def test_one_that_stays_silent_after_every_restart_is_given_up_and_ended(world):
    process = silence(world, patience=WELL_SECONDS / 3)
    assert [number for number, *_ in world.restarts()] == list(range(1, LIMIT + 1))
    [(_, error)] = world.given_up
    assert "'worker-oak' gave no sign of life" in str(error)
    assert process.collected
    assert not running(process.pid)


@pytest.mark.parametrize(
    "patience", [60.0, *(pytest.param(seconds, marks=pytest.mark.slow) for seconds in (90.0, 180.0))]
)
def test_silence_is_not_running_well_however_long_the_patience(world, patience):
    silence(world, patience)
    assert world.given_up
    assert [number for number, *_ in world.restarts()] == list(range(1, LIMIT + 1))


def test_one_that_showed_life_for_long_starts_the_count_over_when_it_falls_silent(world):
    alive = [False]
    world.take(SLEEP, sign=lambda: alive[0], patience=20.0)
    for _ in range(2):
        world.wait(21)
        world.wait(LONGEST_WAIT)
    alive[0] = True
    for _ in range(10):
        world.wait(WELL_SECONDS / 5)
    alive[0] = False
    world.wait(21)
    world.wait(LONGEST_WAIT)
    assert [number for number, *_ in world.restarts()] == [1, 2, 1]


# ---- held ------------------------------------------------------------------------------------------------------------


def test_what_is_held_is_ended_and_stays_so_until_it_is_let_go(world):
    held, other = world.take(SLEEP, "held", site="oak"), world.take(SLEEP, "other")
    first, untouched = held.pid, other.pid
    world.supervisor.hold(["held", "nobody"])
    assert not running(first)
    for _ in range(3):
        world.wait(1000)
    assert held.collected
    assert not world.restarts()
    world.supervisor.let_go(["held", "nobody"])
    assert held.exit_code() is None
    assert held.pid != first
    assert other.pid == untouched
    [event] = world.events("process.restart")
    assert (event["name"], event["site"], event["why"], event["attempt"]) == ("held", "oak", "lost", 1)
    assert [(event["name"], event["expected"]) for event in world.events("process.exit")] == [("held", True)]
    world.end(held)  # supervised as before
    world.wait(LONGEST_WAIT)
    assert held.exit_code() is None
    assert world.restarts()[-1][:2] == (1, "exited")


def test_holding_takes_back_a_restart_that_was_planned(world):
    process = world.take(SLEEP)
    world.end(process)
    world.supervisor.hold(["one"])
    pid = process.pid
    world.wait(1000)
    assert process.pid == pid
    assert not world.restarts()
    world.supervisor.let_go(["one"])
    assert process.exit_code() is None


def test_one_that_is_let_go_has_its_whole_patience_again(world):
    process = world.take(SLEEP, sign=lambda: False, patience=30.0)
    world.supervisor.hold(["one"])
    world.wait(1000)
    world.supervisor.let_go(["one"])
    pid = process.pid
    world.wait(25)
    world.wait(2)  # a restart that was planned would be due
    assert process.pid == pid


def test_one_that_was_given_up_is_not_started_by_letting_go(world):
    process = world.take("import sys; sys.exit(10)")
    world.until_given_up(process)
    count = len(world.events("process.start"))
    world.supervisor.hold(["one"])
    world.supervisor.let_go(["one"])
    world.wait(1000)
    assert len(world.events("process.start")) == count
    assert len(world.given_up) == 1


def test_being_let_go_again_and_again_with_good_hours_between_is_no_row_of_restarts(world):
    process = world.take(SLEEP)
    for _ in range(LIMIT + 1):
        world.wait(3600)
        world.supervisor.hold(["one"])
        world.supervisor.let_go(["one"])
    world.end(process)
    world.wait(LONGEST_WAIT)
    assert not world.given_up
    assert process.exit_code() is None
