"""Command lines: Flower's own parsers take them, nothing listens outside loopback, no two share a home."""

import os
import sys
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from flwr.server.app import _parse_args_run_superlink
from flwr.supercore.cli.flower_superexec import _parse_args as parse_superexec
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, ProcessError
from ops import flower_commands as commands
from ops.pki import TrialPki
from ops.ports import release_ports

PKI = TrialPki(
    Path("/pki"),
    Path("/pki/ca.crt"),
    Path("/pki/server.crt"),
    Path("/pki/server.key"),
    Path("/pki/secret"),
    {"oak": Path("/pki/oak/key")},
    {"oak": Path("/pki/oak/key.pub")},
    {"oak": Path("/pki/oak/secret")},
)
ADDRESSES = commands.Addresses("127.0.0.1:1001", "127.0.0.1:1002", "127.0.0.1:1003")
NODE = {"site": "oak", "worker": "/run/a b/oak.sock"}


def supernode(runtime, **options):
    return commands.supernode(
        "oak",
        PKI,
        Path("logs"),
        fleet="superlink:1001",
        clientappio="127.0.0.1:1004",
        node_config=NODE,
        runtime=runtime,
        **options,
    )


def relay(runtime, **options):
    return commands.relay_launcher(
        "oak", PKI, Path("logs"), clientappio="127.0.0.1:1004", runtime=runtime, **options
    )


def test_superlink(tmp_path):
    process = commands.superlink(ADDRESSES, PKI, tmp_path)
    options = _parse_args_run_superlink().parse_args(process.argv[1:])
    assert (options.fleet_api_address, options.control_api_address) == ("127.0.0.1:1001", "127.0.0.1:1002")
    assert options.serverappio_api_address == "127.0.0.1:1003"
    assert options.enable_supernode_auth
    assert not options.insecure
    assert (options.isolation, options.superexec_auth_secret_file) == ("process", "/pki/secret")
    assert (options.ssl_ca_certfile, options.ssl_certfile) == ("/pki/ca.crt", "/pki/server.crt")
    assert options.runtime_dependency_install is False
    assert options.database == ":flwr-in-memory:"
    with_file = commands.superlink(ADDRESSES, PKI, tmp_path, database=tmp_path / "state.db")
    assert _parse_args_run_superlink().parse_args(with_file.argv[1:]).database == str(tmp_path / "state.db")


@pytest.mark.parametrize("runtime", ["fast", "stock"])
def test_supernode(runtime):
    process = supernode(runtime, events=Path("/run/events.jsonl") if runtime == "fast" else None)
    arguments = process.argv[1:] if runtime == "stock" else process.argv[4:]
    options, rest = _parse_args_run_supernode().parse_known_args(arguments)
    assert rest == (
        [] if runtime == "stock" else ["--wardround-site", "oak", "--wardround-events", "/run/events.jsonl"]
    )
    assert (options.superlink, options.root_certificates) == ("superlink:1001", "/pki/ca.crt")
    assert (options.isolation, options.superexec_auth_secret_file) == ("process", "/pki/oak/secret")
    assert options.auth_supernode_private_key == "/pki/oak/key"
    assert options.clientappio_api_address == "127.0.0.1:1004"
    assert not options.insecure
    assert parse_config_args([options.node_config]) == NODE
    assert (process.name, process.site) == ("supernode-oak", "oak")


def test_launchers():
    for process, plugin, address in (
        (
            commands.server_superexec(ADDRESSES, PKI, Path("logs"), env={"A": "b"}),
            "serverapp",
            "127.0.0.1:1003",
        ),
        (relay("stock"), "clientapp", "127.0.0.1:1004"),
    ):
        options = parse_superexec().parse_args(process.argv[1:])
        assert (options.plugin_type, options.appio_api_address) == (plugin, address)
        assert options.superexec_auth_secret_file.endswith("secret")
    assert commands.server_superexec(ADDRESSES, PKI, Path("logs"), env={"A": "b"}).env["A"] == "b"
    fast = relay("fast")
    assert fast.argv[:4] == [sys.executable, "-P", "-m", "client.forkexec"]
    assert "client.relay:app" in fast.argv


def test_every_process_has_its_own_home_and_our_programs_first():
    made = [commands.superlink(ADDRESSES, PKI, Path("logs")), supernode("fast"), relay("fast")]
    made.append(commands.server_superexec(ADDRESSES, PKI, Path("logs")))
    assert len({process.env["FLWR_HOME"] for process in made}) == len({process.log for process in made}) == 4
    for process in made:
        assert Path(process.env["FLWR_HOME"]).is_absolute()
        assert process.env["FLWR_TELEMETRY_ENABLED"] == "0"
        assert process.env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_reserved_addresses():
    try:
        made = commands.loopback_addresses()
        assert len({made.fleet, made.control, made.serverappio}) == 3
        assert all(
            address.startswith("127.0.0.1:") for address in (made.fleet, made.control, made.serverappio)
        )
    finally:
        release_ports()


@settings(max_examples=25)
@given(st.dictionaries(st.from_regex(r"\A[a-z][a-z0-9_-]{0,8}\Z"), st.text().filter(str.isprintable)))
def test_node_config_comes_back_or_is_refused(values):
    try:
        text = commands.node_config_text(values)
    except ConfigError:
        assert any("'" in value for value in values.values())
    else:
        assert parse_config_args([text]) == values


@pytest.mark.parametrize("values", [{"a b": "c"}, {"": "c"}, {"a": "x\ny"}, {"a": "it's"}, {"a": "\x07"}])
def test_node_config_that_cannot_be_written(values):
    with pytest.raises(ConfigError):
        commands.node_config_text(values)


def test_flower_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ProcessError, match="'flower-superlink' is not installed") as caught:
        commands.superlink(ADDRESSES, PKI, tmp_path)
    assert str(tmp_path) not in str(caught.value)
