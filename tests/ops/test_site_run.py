"""Starting, looking at and stopping a site, with an engine that only answers."""

import json
import sys

import pytest

from common.errors import ProcessError
from ops.kit import verify_kit
from ops.preflight_engine import Answer
from ops.preflight_run import Installation
from ops.provision_files import sha256
from ops.site_run import (
    _HEARD,
    Container,
    call,
    containers,
    environment,
    heard,
    last_error,
    ledger,
    look,
    start,
    stop,
    taken,
)
from tests.ops.preflighted import copied, installation
from tests.ops.site_engine import KEY, UP, Docker, Engine, entry


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return installation(tmp_path_factory.mktemp("once"))[1]


@pytest.fixture
def place(once, tmp_path):
    return copied(once, tmp_path)


def test_everything_that_the_compose_file_reads_is_set(place):
    kit = verify_kit(place.kit)
    found = environment(place, kit)
    parent = place.kit.parent
    assert found == {
        "WARDROUND_KIT": str(place.kit),
        "WARDROUND_KEYS": str(parent / "oak-keys"),
        "WARDROUND_SITE_TOML": str(parent / "site.toml"),
        "WARDROUND_DATA": str(parent / "data"),
        "WARDROUND_IMAGES": "wardround",
        "WARDROUND_VERSION": kit.about.software,
        "WARDROUND_PROXY": "",
        "WARDROUND_KIT_SHA256": kit.fingerprint,
        "WARDROUND_SITE_TOML_SHA256": sha256((parent / "site.toml").read_bytes()),
    }
    text = (place.kit / "compose.yaml").read_text()
    assert all(f"${{{name}:-" in text for name in found)


def test_an_edited_configuration_starts_the_worker_anew_and_nobody_else(place):
    """A container's definition must change: compose does not look into mounted files."""
    kit = verify_kit(place.kit)
    before = environment(place, kit)
    place.config_place.write_text(place.config_place.read_text() + "# decided\n")
    after = environment(place, kit)
    assert {name for name in before if before[name] != after[name]} == {"WARDROUND_SITE_TOML_SHA256"}
    place.config_place.unlink()
    assert environment(place, kit)["WARDROUND_SITE_TOML_SHA256"] == ""


def test_what_was_chosen_reaches_the_containers(place, tmp_path):
    environ = {
        "https_proxy": "http://u:p@10.0.0.9:3128",
        "WARDROUND_IMAGES": "reg/fl",
        "WARDROUND_VERSION": "9",
    }
    chosen = Installation(place.kit, tmp_path / "k", tmp_path / "s.toml", tmp_path / "d", environ=environ)
    found = environment(chosen, verify_kit(place.kit))
    assert found["WARDROUND_PROXY"] == "http://u:p@10.0.0.9:3128"
    assert (found["WARDROUND_IMAGES"], found["WARDROUND_VERSION"]) == ("reg/fl", "9")
    assert (found["WARDROUND_KEYS"], found["WARDROUND_DATA"]) == (str(tmp_path / "k"), str(tmp_path / "d"))
    exempt = Installation(place.kit, environ=environ | {"no_proxy": "localhost"})
    assert environment(exempt, verify_kit(place.kit))["WARDROUND_PROXY"] == ""


def test_start_runs_the_kits_files_in_the_kits_folder(place):
    docker = Docker(1)
    gpu = Installation(place.kit, gpu=True, environ={})
    assert start(gpu, verify_kit(place.kit), "p", wait=60, caller=docker) == 1
    ((argv, folder, variables, seconds),) = docker.calls
    files = ["-f", str(place.kit / "compose.yaml"), "-f", str(place.kit / "compose.gpu.yaml")]
    assert argv == [
        "docker",
        "compose",
        "--project-name",
        "p",
        *files,
        "up",
        "--detach",
        "--wait",
        "--wait-timeout",
        "60",
    ]
    assert folder == place.kit
    assert variables["WARDROUND_KIT"] == str(place.kit)
    assert seconds > 60


def test_stop_needs_no_file_and_keeps_volumes_unless_told(tmp_path):
    docker = Docker()
    stop(tmp_path, "p", caller=docker)
    stop(tmp_path, "p", volumes=True, caller=docker)
    assert [argv for argv, *_ in docker.calls] == [
        ["docker", "compose", "--project-name", "p", "down"],
        ["docker", "compose", "--project-name", "p", "down", "--volumes"],
    ]


def test_call_gives_the_exit_status_and_has_patience(tmp_path):
    script = "import os, sys; sys.exit(7 if os.environ['WARDROUND_X'] == 'y' and os.getcwd() == sys.argv[1] else 1)"
    assert call([sys.executable, "-c", script, str(tmp_path)], tmp_path, {"WARDROUND_X": "y"}, 20) == 7
    with pytest.raises(ProcessError, match="no `docker` command"):
        call(["no-such-program-here"], tmp_path, {}, 5)
    with pytest.raises(ProcessError, match="did not end within 0 s"):
        call([sys.executable, "-c", "import time; time.sleep(9)"], tmp_path, {}, 0.2)


@pytest.mark.parametrize("form", ["lines", "array"])
def test_containers_in_both_forms_of_compose(form):
    text = "\n".join(json.dumps(row) for row in UP) if form == "lines" else json.dumps(UP)
    found = containers("wardround-oak", Engine(ps=Answer(0, text)))
    assert [container.service for container in found] == ["site-net", "worker"]
    assert all(container.healthy for container in found)


def test_containers_that_are_not_there():
    assert containers("wardround-oak", Engine(rows=[])) == (
        Container("site-net", "absent"),
        Container("worker", "absent"),
    )
    with pytest.raises(ProcessError, match="engine does not answer") as caught:
        containers("wardround-oak", Engine(ps=Answer(1, err="Cannot connect to unix:///x")))
    assert "unix" not in str(caught.value)


def test_a_healthy_site():
    engine = Engine()
    found = look("wardround-oak", engine)
    assert found.healthy
    assert (found.heard, found.silence, found.ledger, found.said) == (4.2, "", "", ())
    assert [row.round for row in found.rounds] == [1, 2]
    assert not [line for line in engine.calls if " up" in line or " down" in line]


def test_nobody_is_asked_who_does_not_run():
    engine = Engine(rows=[UP[0] | {"State": "restarting", "Health": "", "ExitCode": 10}])
    found = look("wardround-oak", engine)
    assert not found.healthy
    assert not [line for line in engine.calls if " exec " in line]
    assert found.ledger == "the worker does not run"
    assert [line.rpartition(" ")[2] for line in engine.calls if " logs " in line] == ["worker"]


def test_rounds_refusals_and_order():
    rows = [
        entry(0, phase="hello", size=700),
        entry(1, size=2000), entry(1, "out", 900), entry(1, "out", 50, "refused", reason="policy: no clusters."),
        entry(2, size=2000), entry(2, "out", 1000), entry(2, "out", 30, phase="closing"),
    ]  # fmt: skip
    rounds, refusal = taken(rows)
    assert [(row.round, row.received, row.released, row.refused) for row in rounds] == [
        (None, 700, 0, 0), (1, 2000, 900, 1), (2, 2000, 1030, 0),
    ]  # fmt: skip
    assert refusal == ("2026-01-01T12:01:00.000Z", "policy: no clusters.")
    assert taken([]) == ((), None)


def test_an_answer_that_says_no_is_a_refusal():
    """As the worker's ledger has it where the policy knows another method only."""
    answer = entry(0, "out", phase="hello", reason="policy: oak does not take part.") | {"kind": "failure"}
    assert taken([answer, entry(1)])[1] == (answer["time"], "policy: oak does not take part.")


def test_ledgers_that_say_nothing():
    def said(answer):
        return ledger("wardround-oak", Engine(**{"exec --no-TTY worker": answer}))[2]

    assert said(Answer(14, err="error (ledger): There is no ledger here.")) == "nothing has come in yet"
    assert said(Answer(0, "")) == "nothing has come in yet"
    assert said(Answer(1, err="OCI runtime exec failed")) == "the ledger cannot be read"
    assert "not whole" in said(Answer(14, json.dumps(entry(1)), "not whole"))
    many = "\n".join(json.dumps(entry(number)) for number in range(1, 9))
    rounds, *_ = ledger("wardround-oak", Engine(**{"exec --no-TTY worker": Answer(0, many)}))
    assert [row.round for row in rounds] == [4, 5, 6, 7, 8]


def test_since_when_the_coordinator_was_heard():
    def asked(out, code=0):
        return heard("wardround-oak", Engine(**{"exec --no-TTY site-net": Answer(code, out)}))

    assert asked('{"wrong": "the coordinator was heard 75 s ago", "ago": 75}') == (
        75.0,
        "the coordinator was heard 75 s ago",
    )
    assert asked('{"wrong": "the coordinator has not answered yet", "ago": null}')[0] is None
    for broken in ("", "[]", '{"ago": 1}', "Traceback"):
        assert asked(broken, 1) == (None, "the container did not answer")


def test_the_question_in_the_container_is_the_health_checks_own(tmp_path, monkeypatch, capsys):
    """Run here, against a file as the SuperNode writes it."""
    import time

    from ops.containers import health, places

    now = time.time()
    lines = [
        {"event": "transport", "t": now - 90, "down": 10},
        {"event": "transport", "t": now - 80, "down": 20},
    ]
    (tmp_path / "events-oak-net.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(places, "NET", tmp_path)
    monkeypatch.setattr(health, "begun", lambda: now - 100)
    monkeypatch.setattr(health.site_net, "__defaults__", (tmp_path, time.time, health.begun))
    exec(compile(_HEARD, "heard", "exec"), {})
    answer = json.loads(capsys.readouterr().out)
    assert 79 < answer["ago"] < 82
    assert answer["wrong"].startswith("the coordinator was heard 8")
    monkeypatch.setattr(health, "begun", lambda: now - 60)
    monkeypatch.setattr(health.site_net, "__defaults__", (tmp_path, time.time, health.begun))
    exec(compile(_HEARD, "heard", "exec"), {})
    assert json.loads(capsys.readouterr().out) == {
        "wrong": "the coordinator has not answered yet",
        "ago": None,
    }


def test_last_error_of_our_own_in_a_log():
    log = (
        "\x1b[2K2026-01-01T12:00:00.123456789Z \x1b[92mINFO\x1b[0m: Starting\n"
        f"\x1b[2K2026-01-01T12:00:01.123456789Z wardround: {KEY}\n"
        "2026-01-01T12:00:02.123456789Z forkexec: ready\n"
    )
    assert last_error("wardround-oak", "site-net", Engine(logs=Answer(0, log))) == (
        "2026-01-01T12:00:01Z",
        KEY,
    )
    assert last_error("wardround-oak", "site-net", Engine()) is None
