"""The coordinator as a container: what its variables mean, and a health check that asks the Fleet port."""

import json
import shutil
import socket
import ssl
import threading

import pytest
from rich.console import Console

from common.errors import ConfigError
from common.federation import Federation, write_federation
from ops import run as run_module
from ops.approve import revoke
from ops.containers import coordinator, places
from ops.plan import make_run_plan
from tests.ops.provisioned import project
from tests.ops.test_run import DATA


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return project(tmp_path_factory.mktemp("t") / "liver", keys="central").folder


@pytest.fixture
def made(template, tmp_path):
    return shutil.copytree(template, tmp_path / "liver")


@pytest.fixture
def described(tmp_path):
    return write_federation(tmp_path / "described", Federation("tables", settings={"data": DATA}))


def variables(**values):
    return places.Variables({f"WARDROUND_{name}": value for name, value in values.items()})


@pytest.fixture
def start(made, described, tmp_path, monkeypatch):
    """Runs the container's command up to the point where something would be started."""

    def begin(options, federation, place, **named):
        start.did = ("run", options, place, named)
        plan = make_run_plan(options, federation, ["elm", "oak"], options.out)
        plan.notes.update(place.note())
        plan.write()
        return 0

    def go_on(out, **named):
        start.did = ("resume", out, named["place"])
        return 0

    monkeypatch.setattr(run_module, "run_project", begin)
    monkeypatch.setattr(run_module, "resume_project_run", go_on)

    def start(**values):
        start.console = Console(record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
        return coordinator.run(
            variables(**values), start.console, project=made, federation=described, runs=tmp_path / "runs"
        )

    return start


def test_variables_mean_what_the_commands_options_do(start, tmp_path):
    assert start(
        RUN="first", METHOD="ditto", ROUNDS="4", LOCAL_EPOCHS="2", SEED="9", SITES="oak,elm", PORT="9092",
        SETTINGS="lam=0.5 quorum=0.5", TRANSPORT="file",
    ) == 0  # fmt: skip
    verb, options, place, named = start.did
    assert (verb, options.method, options.rounds, options.local_epochs, options.seed) == (
        "run",
        "ditto",
        4,
        2,
        9,
    )
    assert (options.sites, options.settings) == ("oak,elm", ("lam=0.5", "quorum=0.5"))
    assert options.out == tmp_path / "runs" / "first"
    assert (place.listen, place.control) == ("0.0.0.0:9092", "127.0.0.1:9093")
    assert named["transport"] == "file"


def test_left_out_they_are_the_presets(start):
    start()
    _, options, _, named = start.did
    assert (options.method, options.rounds, options.sites, options.seed) == ("fedavg", None, None, 0)
    assert named["transport"] == "memory"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"PORT": "9443"}, "kits call port 9092, but port 9443 is published. Set WARDROUND_PORT=9092"),
        ({"TRANSPORT": "disk"}, "WARDROUND_TRANSPORT must be 'file' or 'memory', got 'disk'"),
        ({"RUN": "../x"}, "cannot be a folder's name"),
        ({"ROUNDS": "many"}, "WARDROUND_ROUNDS must be a whole number"),
        ({"SETTINGS": "quorum"}, "is not key=value"),
    ],
)
def test_what_cannot_be_meant_is_refused(start, values, said):
    with pytest.raises(ConfigError, match=said):
        start(**values)


def test_an_interrupted_run_goes_on_and_another_one_needs_another_name(start, tmp_path):
    start(RUN="first", ROUNDS="4")
    start(RUN="first", ROUNDS="4")
    assert start.did[:2] == ("resume", tmp_path / "runs" / "first")
    assert start.did[2].listen == "0.0.0.0:9092"
    for changed in ({"ROUNDS": "5"}, {"METHOD": "ditto", "ROUNDS": "4"}, {"SITES": "oak", "ROUNDS": "4"}):
        with pytest.raises(ConfigError, match="Run 'first' exists with another configuration"):
            start(RUN="first", **changed)


def test_a_run_with_named_sites_goes_on_after_one_of_them_was_revoked(start, made, tmp_path):
    start(RUN="first", SITES="oak,elm")
    revoke("elm", made, reason="stolen")
    start(RUN="first", SITES="oak,elm")
    assert start.did[:2] == ("resume", tmp_path / "runs" / "first")
    start(RUN="first")
    assert start.did[0] == "resume"


def test_a_run_of_another_project_is_not_continued(start, tmp_path):
    start(RUN="first")
    file = tmp_path / "runs" / "first" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"authority": "0" * 64}))
    with pytest.raises(ConfigError, match="Run 'first' is of another project"):
        start(RUN="first")


def test_an_authority_left_in_the_project_is_pointed_out(start, made):
    start(RUN="first")
    assert "authority/ca.key" in start.console.export_text()
    (made / "authority" / "ca.key").unlink()
    start(RUN="first")
    assert "ca.key" not in start.console.export_text()


def served(folder, home=None):
    """A TLS port with a project's certificate; returns the port and its socket."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    of = (home or folder) / "coordinator"
    context.load_cert_chain(of / "server.crt", of / "server.key")
    context.set_alpn_protocols(["h2"])
    plain = socket.create_server(("127.0.0.1", 0))

    def answer():
        try:
            connection, _ = plain.accept()
            context.wrap_socket(connection, server_side=True).close()
        except OSError:
            return

    threading.Thread(target=answer, daemon=True).start()
    return plain


def test_health_is_a_handshake_with_the_projects_authority(made, tmp_path, capsys, monkeypatch):
    plain = served(made)
    port = plain.getsockname()[1]
    assert coordinator.health(made, port=port) == ""
    plain.close()
    assert "does not answer as it should (ConnectionRefusedError)" in coordinator.health(made, port=port)
    stranger = served(project(tmp_path / "other").folder)
    assert "SSLCertVerificationError" in coordinator.health(made, port=stranger.getsockname()[1])
    stranger.close()
    monkeypatch.setattr(coordinator, "health", lambda: "nobody there")
    assert coordinator.main(["health"]) == 1
    assert capsys.readouterr().out == "nobody there\n"
