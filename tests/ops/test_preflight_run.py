"""The whole preflight against a real TLS server, and the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, CredentialError
from ops import preflight_run, site_run_cli
from ops.pki_issue import Authority
from ops.preflight import exit_code
from ops.preflight_run import Installation, cases_command, is_kit, preflight
from ops.provision import load_authority
from ops.site_cli import site_app
from tests.ops.preflighted import (
    ROOT,
    Programs,
    copied,
    free_port,
    installation,
    kit_of,
    listening,
    needs_root,
    pair,
    proxy,
    ready,
    tls,
)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return installation(tmp_path_factory.mktemp("once"))[1]


@pytest.fixture
def place(once, tmp_path):
    """In order, but for the key's owner where this is not run by root."""
    return ready(copied(once, tmp_path))


def names(findings):
    return {found.name: found for found in findings}


def served(tmp_path, **changes):
    """A server of the project's authority, and an installation that calls it."""
    port = free_port()
    made, place = installation(tmp_path, port=port, **changes)
    authority: Authority = load_authority(made.folder)
    return tls(*pair(tmp_path / "server", authority)), port, ready(place)


@needs_root
def test_everything_in_order(tmp_path):
    handle, port, place = served(tmp_path)
    text = place.config_place.read_text()
    place.config_place.write_text(text.replace('methods = ["*"]', 'methods = ["fedavg"]'))
    programs = Programs()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with listening(handle, port=port):
        found = list(preflight(place, run=programs, seconds=5))
    assert {row.mark for row in found} == {"ok", "skipped"}, found
    assert [row.name for row in found] == [
        *("kit", "key", "site.toml", "policy", "data", "engine", "images", "gpu", "machine", "disk"),
        *("name", "connection", "tls", "clock"),
    ]
    assert exit_code(found) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert not any(word in call for call in programs.calls for word in (" run ", " up", " pull", " rm"))


@needs_root
def test_everything_in_order_through_a_proxy(tmp_path):
    handle, port, place = served(tmp_path)
    seen = []
    with listening(handle, port=port), listening(proxy(seen)) as at:
        environ = {"https_proxy": f"http://127.0.0.1:{at}"}
        place = Installation(place.kit, environ=environ)
        found = names(preflight(place, run=Programs(), seconds=5))
    assert found["tls"].mark == "ok"
    assert "proxy" in found["connection"].found
    assert len(seen) == 2


def test_one_fault_does_not_hide_the_others(tmp_path):
    _, place = installation(tmp_path, port=free_port())
    place.config_place.unlink()
    programs = Programs(ServerVersion="20.10")
    programs.answers["docker image inspect"] = programs.answers["nvidia-smi"]
    found = names(preflight(place, run=programs, seconds=5))
    for name in ("site.toml", "engine", "images"):
        assert found[name].mark == "fail"
        assert found[name].remedy
    assert found["connection"].mark == "warn"
    assert {found[name].mark for name in ("policy", "tls")} == {"skipped"}


def test_broken_kit_stops_what_needs_it_and_nothing_else(place):
    (place.kit / "kit.sig").unlink()
    found = names(preflight(place, run=Programs(), seconds=1))
    assert found["kit"].mark == "fail"
    assert {found[name].mark for name in ("key", "images", "name", "connection", "tls")} == {"skipped"}
    assert found["engine"].mark == found["site.toml"].mark == "ok"


def test_proxy_that_cannot_be_used_is_a_finding(place):
    place = Installation(place.kit, environ={"https_proxy": "socks5://p:1"})
    found = names(preflight(place, run=Programs(), seconds=1))
    assert found["connection"].exit_code == ConfigError.exit_code
    assert "names no proxy" in found["connection"].found


def test_command_for_the_data_has_no_network(place):
    said = cases_command(place, kit_of(place))
    assert "--network none" in said
    assert f"{place.data_place}:/data:ro" in said


def run(*arguments, **environ):
    blank = dict.fromkeys(("WARDROUND_DATA", "WARDROUND_KEYS", "WARDROUND_SITE_TOML"))
    return CliRunner().invoke(
        site_app, [str(argument) for argument in arguments], env=blank | {"COLUMNS": "200"} | environ
    )


@pytest.fixture
def faked(monkeypatch):
    def quick(place, *, full=False):
        return preflight(place, full=full, run=Programs(), seconds=0.5)

    monkeypatch.setattr(site_run_cli, "preflight", quick)


def test_check_of_a_kit(tmp_path, faked):
    _, place = installation(tmp_path, port=free_port())
    ready(place)
    done = run("check", place.kit)
    assert done.exit_code == (0 if ROOT else CredentialError.exit_code)
    assert "warn    connection  localhost:" in done.output
    assert "-> Ask the coordinator whether a run is under way" in done.output
    assert f"(here: {place.kit})" in done.output
    assert ("ready: " if ROOT else "not ready: ") in done.output
    place.config_place.unlink()
    again = run("check", place.kit)
    assert again.exit_code == ConfigError.exit_code
    assert "not ready: " in again.output


def test_findings_as_json_hold_no_path(tmp_path, faked):
    _, place = installation(tmp_path, port=free_port())
    done = run("check", place.kit, "--json", "-")
    document = json.loads(done.output)
    assert (document["site"], document["ready"], document["exit_code"]) == ("oak", False, done.exit_code)
    assert done.exit_code != 0
    assert str(tmp_path) not in done.output
    run("check", place.kit, "--json", tmp_path / "out" / "check.json")
    assert json.loads((tmp_path / "out" / "check.json").read_text())["checks"] == document["checks"]


def test_options_of_the_other_kind_are_refused(place, faked):
    assert run("check", place.kit, "--site", "oak").exit_code == 2
    assert run("check", place.data_place, "--gpu").exit_code == 2
    assert is_kit(place.kit)
    assert not is_kit(place.data_place)
    (place.kit / "kit.json").unlink()
    assert "kit.json" in run("check", place.kit).output


def test_help_teaches_both():
    done = run("check", "--help")
    for shown in ("wardround site check oak", "wardround site check /data/liver", "--full", "dataset.json"):
        assert shown in done.output


def test_no_torch_is_needed(place):
    """A hospital's machine has the base install alone."""
    code = (
        "import sys\n"
        "for name in ('torch', 'monai', 'numpy', 'flwr'): sys.modules[name] = None\n"
        "from ops.site_cli import site_app\n"
        "from typer.testing import CliRunner\n"
        "done = CliRunner().invoke(site_app, ['check', sys.argv[1]])\n"
        "assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)\n"
        "assert 'policy' in done.output, done.output\n"
    )
    environ = {"PATH": "", "HOME": "/", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(place.kit)],
        capture_output=True, text=True, timeout=60, env=environ, cwd=Path(preflight_run.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
