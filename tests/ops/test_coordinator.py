"""The coordinator's side: whatever becomes of the ServerApp, the run goes on or has a verdict."""

import pytest

from common.errors import ProcessError
from ops import coordinator as module
from ops.coordinator import GONE_SECONDS, LIMIT, SUBMITTED_SECONDS
from ops.supervisor import wait_before
from tests.ops.coordinated import World

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


@pytest.fixture
def filed(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch, transport="file")


# ---- the start -------------------------------------------------------------------------------------------------------


def test_the_start_waits_for_the_link_registers_every_key_and_submits_the_run(tmp_path, monkeypatch):
    env = {"superlink": {"SHIFT": "a"}, "serverapp": {"SHIFT": "b"}}
    world = World(tmp_path, monkeypatch, env=env).start()
    assert world.did == [
        "start superlink", "ready superlink", "register oak key-1", "register elm key-2", "start serverapp", "run 1",
    ]  # fmt: skip
    assert world.link.env == {"FLWR": "1", "SHIFT": "a"}
    assert world.environment == {
        "WARDROUND_RUN_DIR": str(world.out), "WARDROUND_RUN_ID": "run-1", "WARDROUND_RUNTIME": "fast", "SHIFT": "b",
    }  # fmt: skip
    assert world.database is None
    assert not world.restarts()
    world.coordinator.close()
    assert world.did[-1] == "closed"


def test_messages_in_a_file_begin_without_those_of_an_earlier_attempt(filed):
    for name in ("superlink.db", "superlink.db-wal", "superlink.db-shm", "config.json"):
        (filed.out / name).write_text("old")
    filed.start()
    assert filed.database == filed.out / "superlink.db"
    assert {path.name for path in filed.out.iterdir()} == {"config.json", "events.jsonl", "nodes.json"}


def test_a_link_that_never_answers_is_named_with_its_log(world):
    world.answers = False
    with pytest.raises(ProcessError, match="'superlink' did not become ready") as caught:
        world.start()
    assert caught.value.detail == "last line of superlink"
    assert world.idled[-1] - world.idled[0] >= module.START_SECONDS - 1  # the rest was kept going meanwhile
    assert "run 1" not in world.did


def test_nothing_is_mended_while_all_is_well(world):
    world.begun()
    for _ in range(500):
        assert world.tend(1.0) is None
    assert not world.did
    assert not world.restarts()


# ---- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [False, True])
def test_a_good_end_is_returned(world, gone):
    world.begun()
    world.end(verdict="ok", rounds=3)
    world.app = not gone
    end = world.tend()
    assert (end["event"], end["verdict"], end["rounds"]) == ("run.end", "ok", 3)
    assert not world.did


@pytest.mark.parametrize("code", ["quorum", "config", "mismatch", "payload", "storage", "data"])
def test_a_verdict_of_the_run_itself_is_returned_at_once(world, code):
    world.begun()
    world.end(verdict="failed", code=code, message="Round 2: 1 of 2 sites.")
    end = world.tend(0.0)
    assert (end["verdict"], end["code"]) == ("failed", code)
    assert not world.did


@pytest.mark.parametrize("code", ["internal", "worker", "cancelled", "transport"])
def test_a_verdict_that_a_broken_process_may_have_caused_gets_another_try(world, code):
    world.begun()
    world.end(verdict="failed", code=code)
    assert world.tend() is None
    assert not world.did  # the ServerApp is not gone yet
    world.app = False
    assert world.tend(GONE_SECONDS / 2) is None
    assert not world.did
    assert world.tend(GONE_SECONDS) is None
    assert world.did == ["end run 1", "run 2"]
    assert world.restarts() == [("ServerApp", 1, "failed", 0)]
    world.app = True
    assert world.tend() is None  # the first one's verdict is over
    world.end(verdict="ok")
    assert world.tend()["verdict"] == "ok"


def test_a_verdict_that_comes_again_and_again_stands_in_the_end(world):
    world.begun()
    ends, tries = None, 0
    while ends is None:
        tries += 1
        assert tries <= LIMIT
        world.app = True
        world.tend()
        world.end(verdict="failed", code="internal", message=f"try {tries}")
        world.app = False
        ends = world.tend() or world.tend(GONE_SECONDS + 0.1)
    assert tries == LIMIT
    assert ends["message"] == f"try {LIMIT}"
    assert world.did == [word for n in range(1, LIMIT) for word in (f"end run {n}", f"run {n + 1}")]
    assert [attempt for _, attempt, *_ in world.restarts()] == list(range(1, LIMIT))


def test_what_earlier_attempts_said_is_not_taken_for_this_ones_end(world):
    world.end(
        run=1, verdict="failed", code="quorum", message="long ago"
    )  # by another link, under the same number
    world.end(run=1, verdict="ok")
    world.begun()
    assert world.tend() is None
    world.end(verdict="failed", code="quorum", message="now")
    assert world.tend()["message"] == "now"


def test_the_end_of_a_run_that_was_given_up_is_not_the_next_ones(world):
    """A ServerApp may write its end while it is being stopped."""
    world.begun()
    world.group.processes["serverapp"].code = 1
    stop = world.group.stop

    def speaking(name, seconds):
        world.end(verdict="failed", code="quorum")
        stop(name, seconds)

    world.group.stop = speaking
    assert world.tend() is None
    world.app = True
    assert world.tend() is None
    assert world.did == ["stop serverapp", "end run 1", "start serverapp", "run 2"]


@pytest.mark.parametrize("name", ["superlink", "serverapp"])
def test_a_good_end_counts_though_a_process_of_the_coordinator_ends_with_it(world, name):
    world.begun()
    world.end(verdict="ok")
    world.group.processes[name].code = 1
    assert (world.tend() or {}).get("verdict") == "ok"
    assert not [word for word in world.did if word.startswith("run ")]


def test_a_server_app_that_hangs_after_its_verdict_does_not_hold_the_trial_up_for_ever(world):
    world.begun()
    world.end(verdict="failed", code="internal")
    for _ in range(3600):
        if world.tend(1.0) is not None or world.did:
            return
    raise AssertionError("nothing was done for an hour")


# ---- the ServerApp ---------------------------------------------------------------------------------------------------


def test_a_server_app_that_vanished_is_followed_by_a_new_run(world):
    world.begun()
    assert world.lose_app() is None
    assert world.did == ["end run 1", "run 2"]
    assert world.restarts() == [("ServerApp", 1, "lost", 0)]
    world.did.clear()
    world.tend(SUBMITTED_SECONDS / 2)  # the new one has its time to begin
    assert not world.did
    world.app = True
    world.tend()
    assert world.lose_app() is None
    assert world.did == ["end run 2", "run 3"]


def test_a_server_app_out_of_sight_for_a_moment_is_not_lost(world):
    world.begun()
    for _ in range(10):
        world.app = False
        world.tend(GONE_SECONDS / 2)
        world.app = True
        world.tend(GONE_SECONDS / 2)
    assert not world.did


def test_a_last_word_that_arrives_after_the_server_app_is_gone_counts(world):
    world.begun()
    world.app = False
    assert world.tend(GONE_SECONDS / 2) is None
    world.end(verdict="ok")
    assert world.tend(GONE_SECONDS)["verdict"] == "ok"
    assert not world.did


def test_a_run_that_never_starts_gets_a_new_launcher(world):
    world.start()
    world.did.clear()
    assert world.tend(SUBMITTED_SECONDS - 1) is None
    assert not world.did
    assert world.tend(2) is None
    assert world.did == ["stop serverapp", "end run 1", "start serverapp", "run 2"]
    assert world.restarts() == [("serverapp", 1, "silent", 0)]
    world.did.clear()
    assert world.tend(SUBMITTED_SECONDS - 1) is None  # counted anew
    assert not world.did


def test_a_launcher_that_ended_is_started_again_with_a_new_run(world):
    world.begun()
    world.group.processes["serverapp"].code = 1
    assert world.tend() is None
    assert world.did == ["stop serverapp", "end run 1", "start serverapp", "run 2"]
    assert world.restarts() == [("serverapp", 1, "exited", 0)]
    assert world.group.processes["serverapp"].code is None
    assert world.environment["WARDROUND_RUN_ID"] == "run-1"


def test_more_failures_in_a_row_than_allowed_end_the_trial(world):
    world.begun()
    for _ in range(LIMIT):
        assert world.lose_app() is None
        world.app = True
        world.tend()
    with pytest.raises(ProcessError, match=rf"ServerApp ended {LIMIT + 1} times in a row") as caught:
        world.lose_app()
    assert caught.value.detail == "last line of serverapp"
    assert str(world.out) not in str(caught.value)
    assert [restart[1] for restart in world.restarts()] == list(range(1, LIMIT + 1))
    assert [restart[3] for restart in world.restarts()] == [wait_before(n) for n in range(1, LIMIT + 1)]


def test_a_round_that_was_completed_starts_the_count_over(world):
    world.begun()
    for _ in range(3 * LIMIT):
        world.lose_app()
        world.app = True
        world.server.emit("checkpoint", round=1)
        world.tend()
    assert {restart[1] for restart in world.restarts()} == {1}
    world.lose_app()
    world.app = True
    world.tend()
    world.lose_app()
    assert [restart[1] for restart in world.restarts()][-2:] == [1, 2]


def test_faults_of_all_kinds_count_together(world):
    world.begun()
    world.lose_app()
    world.group.processes["serverapp"].code = 1
    world.tend()
    world.link.code = 1
    world.tend()
    assert world.restarts() == [
        ("ServerApp", 1, "lost", 0), ("serverapp", 2, "exited", 0.5), ("superlink", 3, "exited", 1.0),
    ]  # fmt: skip


def test_the_rest_is_kept_going_during_a_wait(world):
    world.begun()
    for _ in range(4):
        world.lose_app()
        world.app = True
        world.tend()
    world.idled.clear()
    before = world.now
    world.lose_app()
    assert world.now - before >= wait_before(5)
    assert len(world.idled) >= wait_before(5) / module.REFRESH_SECONDS / 2
