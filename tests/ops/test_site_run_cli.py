"""`wardround site up, status, down` as a person runs them, with an engine that only answers."""

import json

import pytest
from typer.testing import CliRunner

from common.errors import CredentialError, ProcessError
from ops import site_run_cli
from ops.kit_compose import IMAGES
from ops.preflight import fail, ok
from ops.preflight_engine import Answer
from ops.site_cli import site_app
from ops.site_run import SERVICES, Status, look, start, stop
from tests.ops.preflighted import copied, installation
from tests.ops.site_engine import KEY, UP, Docker, Engine


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return installation(tmp_path_factory.mktemp("once"))[1]


@pytest.fixture
def place(once, tmp_path):
    return copied(once, tmp_path)


def run(*arguments, text=None):
    blank = dict.fromkeys(("WARDROUND_DATA", "WARDROUND_KEYS", "WARDROUND_SITE_TOML"))
    return CliRunner().invoke(
        site_app, [str(argument) for argument in arguments], env=blank | {"COLUMNS": "200"}, input=text
    )


@pytest.fixture
def docker(monkeypatch):
    """`start`, `stop` and `look` with fakes; the preflight says what the test sets."""
    fake = Docker()
    fake.engine, fake.findings = Engine(), [ok("kit", "in order.")]
    monkeypatch.setattr(
        site_run_cli, "start", lambda place, kit, project: start(place, kit, project, caller=fake)
    )
    monkeypatch.setattr(
        site_run_cli, "stop", lambda kit, project, volumes: stop(kit, project, volumes=volumes, caller=fake)
    )
    monkeypatch.setattr(site_run_cli, "look", lambda project: look(project, fake.engine))
    monkeypatch.setattr(site_run_cli, "preflight", lambda *_, **__: iter(fake.findings))
    return fake


def test_up(place, docker):
    done = run("up", place.kit)
    assert done.exit_code == 0, done.output
    for shown in (
        "ready: 1 in order",
        "healthy",
        "heard 4 s ago",
        "run run-1, round 2",
        "wardround site status",
    ):
        assert shown in done.output
    assert len(docker.calls) == 1


def test_up_starts_nothing_when_a_check_fails(place, docker):
    docker.findings = [fail("site.toml", "wrong.", "mend it", kind=CredentialError)]
    done = run("up", place.kit)
    assert done.exit_code == CredentialError.exit_code
    assert "Nothing was started." in done.output
    assert not docker.calls
    assert run("up", place.kit, "--no-check").exit_code == 0
    assert len(docker.calls) == 1


def test_an_altered_compose_file_is_never_run(place, docker):
    """Not even without the preflight."""
    text = (place.kit / "compose.yaml").read_text()
    (place.kit / "compose.yaml").write_text(text.replace("read_only: true", "privileged: true", 1))
    done = run("up", place.kit, "--no-check")
    assert isinstance(done.exception, CredentialError)
    assert "compose.yaml was altered" in str(done.exception)
    assert not docker.calls


def test_up_that_does_not_get_well_says_why(place, docker):
    docker.code = 1
    rows = [
        UP[0],
        UP[1]
        | {"State": "restarting", "Health": "", "Status": "Restarting (10) 2 seconds ago", "ExitCode": 10},
    ]
    docker.engine = Engine(rows=rows, logs=Answer(0, f"2026-01-01T12:00:01.1Z wardround: {KEY}\n"))
    done = run("up", place.kit)
    assert done.exit_code == ProcessError.exit_code
    for shown in (
        "not healthy",
        "Restarting (10)",
        "does not know this key.",
        "-> Send it the public key",
        "not well yet",
    ):
        assert shown in done.output


def test_status(place, docker):
    done = run("status", place.kit)
    assert done.exit_code == 0
    assert "oak (wardround-oak): healthy" in done.output
    document = json.loads(run("status", place.kit, "--json").output)
    assert (document["healthy"], document["site"], len(document["containers"])) == (True, "oak", 2)
    docker.engine = Engine(rows=[])
    absent = run("status", place.kit)
    assert absent.exit_code == ProcessError.exit_code
    assert absent.output.count("not started") == 2


def test_status_of_another_project(place, monkeypatch):
    asked = []
    monkeypatch.setattr(site_run_cli, "look", lambda project: asked.append(project) or Status(()))
    run("status", place.kit, "--project-name", "mine")
    run("status", place.kit)
    assert asked == ["mine", "wardround-oak"]


def test_down_keeps_what_the_hospital_owns(place, docker):
    done = run("down", place.kit)
    assert done.exit_code == 0
    assert "ledger stay" in done.output
    assert "--volumes" not in docker.calls[0][0]


def test_volumes_are_deleted_after_a_question_that_names_them(place, docker):
    refused = run("down", place.kit, "--volumes", text="\n")
    assert refused.exit_code == ProcessError.exit_code
    for shown in ("-v wardround-oak_home:/from:ro", "personal models", "ledger", "Nothing was stopped"):
        assert shown in refused.output
    assert not docker.calls
    assert run("down", place.kit, "--volumes", text="y\n").exit_code == 0
    assert run("down", place.kit, "--volumes", "--yes").exit_code == 0
    assert [call[0][-1] for call in docker.calls] == ["--volumes", "--volumes"]


def test_down_works_with_a_kit_that_is_no_longer_in_order(place, docker):
    (place.kit / "ca.crt").unlink()
    assert run("down", place.kit).exit_code == 0
    docker.code = 1
    assert isinstance(run("down", place.kit).exception, ProcessError)


def test_markup_in_a_log_stays_text(place, docker):
    docker.engine = Engine(logs=Answer(0, "2026-01-01T12:00:01.1Z wardround: [red]x[/red] [/]\n"))
    assert "[red]x[/red] [/]" in run("status", place.kit).output


def test_services_are_those_of_the_compose_file():
    assert set(SERVICES) == set(IMAGES)


@pytest.mark.parametrize("command", ["up", "status", "down"])
def test_help_teaches_by_example(command):
    assert f"wardround site {command} oak" in run(command, "--help").output
