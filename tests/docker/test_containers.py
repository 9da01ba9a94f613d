"""What the containers' programs do before and around Flower; no engine needed."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from rich.console import Console

from common.errors import ConfigError, CredentialError, ProcessError
from ops.containers import dashboards, places, prepare, serverapp, site_net, superlink
from ops.containers import health as checks
from ops.pki import make_trial_pki
from ops.processes import Process
from tests.bench.environment import tiny_data

ALIASES = ["hospital-1", "hospital-2", "hospital-3"]


def variables(**values):
    return places.Variables({f"WARDROUND_{name}": value for name, value in values.items()})


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    assert prepare.share_keys(folder, ALIASES)
    return folder


@pytest.mark.parametrize("name", ["../x", "a/b", "-x", ".x", "a b", "ä", "x;y"])
def test_a_run_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(ConfigError, match="WARDROUND_RUN"):
        variables(RUN=name).run()


def test_variables_have_defaults_where_they_are_unset_or_empty():
    assert variables(RUN=" ").run() == "trial"
    assert variables(ROUNDS="").number("ROUNDS") is None
    assert variables(ROUNDS="12").number("ROUNDS") == 12
    for text in ("-1", "1.5", "many", "²"):
        with pytest.raises(ConfigError, match="WARDROUND_ROUNDS"):
            variables(ROUNDS=text).number("ROUNDS")


def test_each_party_gets_its_own_keys_and_nobody_the_authoritys(shared):
    files = {str(path.relative_to(shared)) for path in shared.rglob("*") if path.is_file()}
    sites = {f"{alias}/{name}" for alias in ALIASES for name in ("ca.crt", "key", "secret")}
    public = {f"trial/sites/{alias}.pub" for alias in ALIASES}
    link = {f"superlink/{name}" for name in ("ca.crt", "server.crt", "server.key", "secret")}
    assert files == sites | public | link | {"serverapp/ca.crt", "serverapp/secret", "trial/ca.crt"}
    assert all((shared / name).stat().st_mode & 0o777 == 0o600 for name in files)
    secrets = [(shared / alias / "secret").read_bytes() for alias in (*ALIASES, "superlink")]
    assert len(set(secrets)) == len(secrets)


def test_keys_in_order_stay_and_others_are_all_made_anew(tmp_path):
    prepare.share_keys(tmp_path, ALIASES)
    before = (tmp_path / "hospital-2" / "key").read_bytes()
    assert not prepare.share_keys(tmp_path, ALIASES)
    assert (tmp_path / "hospital-2" / "key").read_bytes() == before
    (tmp_path / "hospital-1" / "key").write_bytes(before)  # not the half that the coordinator registers
    assert prepare.share_keys(tmp_path, ALIASES)
    assert (tmp_path / "hospital-2" / "key").read_bytes() != before
    (tmp_path / "serverapp" / "ca.crt").unlink()
    assert prepare.share_keys(tmp_path, ALIASES)


def test_the_superlink_binds_each_port_to_its_network(shared, tmp_path):
    process = superlink.command(variables(), "10.9.8.7", shared / "superlink", tmp_path)
    argv = list(process.argv)
    assert argv[argv.index("--fleet-api-address") + 1] == "0.0.0.0:9092"
    assert argv[argv.index("--control-api-address") + 1] == "10.9.8.7:9093"
    assert argv[argv.index("--serverappio-api-address") + 1] == "10.9.8.7:9091"
    assert argv[argv.index("--appio-ssl-certfile") + 1] == str(shared / "superlink" / "server.crt")
    assert "--enable-supernode-auth" in argv
    assert "--insecure" not in argv
    memory = list(
        superlink.command(variables(TRANSPORT="memory"), "10.9.8.7", shared / "superlink", tmp_path).argv
    )
    assert memory[memory.index("--database") + 1] == ":flwr-in-memory:"
    with pytest.raises(ConfigError, match="WARDROUND_TRANSPORT"):
        superlink.command(variables(TRANSPORT="disk"), "10.9.8.7", shared / "superlink", tmp_path)


def test_the_superlink_refuses_a_certificate_for_other_names(tmp_path):
    pki = make_trial_pki(tmp_path / "pki", [], names=["elsewhere"])
    for name, path in (
        ("server.crt", pki.server_cert),
        ("server.key", pki.server_key),
        ("secret", pki.server_secret),
    ):
        (tmp_path / name).write_bytes(path.read_bytes())
    (tmp_path / "ca.crt").write_bytes(pki.ca.read_bytes())
    with pytest.raises(CredentialError, match="superlink"):
        superlink.command(variables(), "10.9.8.7", tmp_path, tmp_path)


def test_new_keys_get_a_new_database_and_the_old_one_goes(tmp_path):
    (tmp_path / "ca.crt").write_bytes(b"one")
    first = superlink.database(tmp_path, tmp_path / "ca.crt")
    first.write_bytes(b"")
    Path(f"{first}-wal").write_bytes(b"")
    assert superlink.database(tmp_path, tmp_path / "ca.crt") == first
    assert first.exists()
    (tmp_path / "ca.crt").write_bytes(b"two")
    assert superlink.database(tmp_path, tmp_path / "ca.crt") != first
    assert [path.name for path in tmp_path.iterdir()] == ["ca.crt"]


def test_a_name_that_stands_for_no_address_is_said():
    with pytest.raises(ProcessError, match="does not resolve"):
        superlink.own_address("no-such-name.invalid", seconds=0.0)
    assert superlink.own_address("127.0.0.1") == "127.0.0.1"


def test_the_serverapp_calls_by_tls_and_gets_the_run_by_name(shared, tmp_path):
    process = serverapp.command(variables(RUN="second"), shared / "serverapp", tmp_path)
    argv = list(process.argv)
    assert argv[argv.index("--root-certificates") + 1] == str(shared / "serverapp" / "ca.crt")
    assert "--insecure" not in argv
    assert (process.env["WARDROUND_RUN_DIR"], process.env["WARDROUND_RUN_ID"]) == (
        str(tmp_path / "second"),
        "second",
    )
    with pytest.raises(CredentialError, match="ServerApp"):
        serverapp.command(variables(), tmp_path, tmp_path)


def test_a_site_calls_the_coordinator_with_its_own_key(shared, tmp_path):
    relay, node = site_net.commands(
        variables(SITE="hospital-2"), shared / "hospital-2", tmp_path, tmp_path / "no-kit"
    )
    argv = list(node.argv)
    assert argv[argv.index("--superlink") + 1] == "superlink:9092"
    assert argv[argv.index("--auth-supernode-private-key") + 1] == str(shared / "hospital-2" / "key")
    assert (
        argv[argv.index("--clientappio-api-address") + 1]
        == list(relay.argv)[list(relay.argv).index("--clientappio-address") + 1]
    )
    with pytest.raises(ConfigError, match="WARDROUND_SITE"):
        site_net.commands(variables(), shared / "hospital-2", tmp_path, tmp_path / "no-kit")
    with pytest.raises(CredentialError):
        site_net.commands(variables(SITE="hospital-2"), tmp_path, tmp_path, tmp_path / "no-kit")


def test_when_one_of_the_pair_ends_the_other_is_ended_and_the_code_is_never_0(tmp_path, capfd):
    sleeper = Process("relay", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    for code, expected in ((0, 9), (10, 10)):
        ender = Process("node", [sys.executable, "-c", f"raise SystemExit({code})"], tmp_path / "log")
        pair = site_net.Pair([sleeper, ender])
        started = time.monotonic()
        assert pair.run() == expected
        assert time.monotonic() - started < 10
        assert all(process.poll() is not None for process in pair._running.values())
    assert "'node' ended" in capfd.readouterr().out


def test_a_pair_without_a_sign_of_life_is_ended_and_one_with_it_is_not(tmp_path, capfd):
    argv = [sys.executable, "-c", "import time; time.sleep(1.5)"]
    signs = iter(["", "", "silent", "silent", "silent", "silent"])
    pair = site_net.Pair([Process("node", argv, tmp_path / "log")], lambda: next(signs), patience=0.2)
    started = time.monotonic()
    assert pair.run() == 9
    assert time.monotonic() - started < 1.5
    assert "silent; all" in capfd.readouterr().out
    again = site_net.Pair([Process("node", argv, tmp_path / "log")], lambda: "", patience=0.2)
    assert again.run() == 9
    assert "'node' ended with code 0" in capfd.readouterr().out


def test_a_supernode_that_flower_gave_up_ends_although_its_threads_and_the_interpreter_do_not():
    code = (
        "import threading, time, sys, types, client.supernode as node\n"
        "import atexit; atexit.register(time.sleep, 60)\n"
        "cli = types.ModuleType('flwr.supernode.cli')\n"
        "def flower_supernode():\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    raise KeyboardInterrupt\n"
        "cli.flower_supernode = flower_supernode\n"
        "sys.modules['flwr.supernode.cli'] = cli\n"
        "node.flower_fast = types.SimpleNamespace(apply=lambda role: [], add_fleet_interceptors=lambda *_: [])\n"
        "node.main([])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert result.returncode == 130
    assert "interrupted" in result.stderr


def test_a_pair_that_is_told_to_stop_ends_with_0():
    code = (
        "import sys\nfrom pathlib import Path\nfrom ops.containers.site_net import Pair\nfrom ops.processes import Process\n"
        "argv = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "print('up', flush=True)\n"
        "sys.exit(Pair([Process(n, argv, Path('x')) for n in 'ab']).run())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    process.stdout.close()


def transport(t, down):
    return {"event": "transport", "t": t, "down": down, "up": 1}


def test_a_site_is_healthy_while_bytes_come_from_the_coordinator(tmp_path):
    assert "not been connected" in checks.site_net(tmp_path)
    file = tmp_path / "events-oak-net.jsonl"
    lines = [transport(100.0, 0), transport(110.0, 500), transport(120.0, 900), transport(130.0, 900)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    assert checks.site_net(tmp_path, now=lambda: 125.0, since=lambda: 90.0) == ""
    assert checks.site_net(tmp_path, now=lambda: 120.0 + checks.QUIET_SECONDS, since=lambda: 90.0) == ""
    assert "was heard 61 s ago" in checks.site_net(
        tmp_path, now=lambda: 121.0 + checks.QUIET_SECONDS, since=lambda: 90.0
    )
    file.write_text(json.dumps(transport(100.0, 0)) + "\n")
    assert "has not answered" in checks.site_net(tmp_path)


def test_what_a_container_heard_before_it_was_started_again_does_not_count(tmp_path):
    lines = [json.dumps(transport(t, down)) for t, down in ((100.0, 10), (110.0, 20))]
    (tmp_path / "events-oak-net.jsonl").write_text("\n".join(lines) + "\n")
    assert checks.site_net(tmp_path, now=lambda: 115.0, since=lambda: 90.0) == ""
    assert "has not answered" in checks.site_net(tmp_path, now=lambda: 115.0, since=lambda: 112.0)
    assert 0 < checks.begun() < time.time()


def test_events_of_an_earlier_alias_in_the_volume_do_not_count(tmp_path):
    old, new = (tmp_path / f"events-{alias}-net.jsonl" for alias in ("elm", "oak"))
    old.write_text(json.dumps(transport(10.0, 10)) + "\n")
    new.write_text("".join(json.dumps(transport(t, down)) + "\n" for t, down in ((100.0, 10), (110.0, 20))))
    os.utime(old, (10.0, 10.0))
    assert checks.site_net(tmp_path, now=lambda: 115.0, since=lambda: 0.0) == ""


def test_a_new_supernode_counts_from_the_beginning():
    assert checks.last_heard([transport(1.0, 900), transport(2.0, 0), transport(3.0, 10)]) == 3.0
    assert checks.last_heard([transport(1.0, 900), transport(2.0, 900)]) == 1.0
    assert checks.last_heard([{"event": "warning"}, transport(1.0, 0)]) is None


def test_the_workers_health_is_that_of_its_service(tmp_path):
    path = tmp_path / "w.sock"
    assert "not opened" in checks.worker(path)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        service.set("", health_pb2.HealthCheckResponse.SERVING)
        assert checks.worker(path) == ""
        service.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert "does not serve" in checks.worker(path)
    finally:
        server.stop(0)


@pytest.fixture
def port(shared):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shared / "superlink" / "server.crt", shared / "superlink" / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    context.wrap_socket(connection, server_side=True).close()
                except OSError:
                    continue

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def test_a_tls_port_is_healthy_under_the_right_name_and_authority_only(shared, port, tmp_path):
    assert checks.tls("localhost", port, shared / "superlink" / "ca.crt") == ""
    assert "SSLCertVerificationError" in checks.tls(
        "localhost", port, make_trial_pki(tmp_path / "other", []).ca
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()[1]
    assert "ConnectionRefusedError" in checks.tls("localhost", closed, shared / "superlink" / "ca.crt")
    assert checks.main(["nonsense"]) == 2


def test_the_dashboards_variables_are_checked_before_it_starts(tmp_path):
    assert dashboards.port(variables()) == 8080
    assert dashboards.port(variables(DASHBOARD_PORT="9000")) == 9000
    assert dashboards.silent_after(variables()) is None
    assert dashboards.silent_after(variables(DASHBOARD_SILENT_MINUTES="30")) == 1800.0
    for name, text in (("PORT", "0x1"), ("PORT", "70000"), ("PORT", "0"), ("SILENT_MINUTES", "0")):
        with pytest.raises(ConfigError, match=f"WARDROUND_DASHBOARD_{name}"):
            dashboards.run(variables(**{f"DASHBOARD_{name}": text}), tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        dashboards.run(variables(), tmp_path / "none")


def test_the_dashboard_is_healthy_while_it_answers_and_reads_its_folder(tmp_path):
    from ops.dashboard import Names, Server, Site
    from ops.dashboard_runs import Board

    runs = tmp_path / "runs"
    runs.mkdir()
    with Server("127.0.0.1", 0, Site(Board(runs, least=0.0)), Names([dashboards.NAME])) as server:
        number = server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        assert checks.dashboard(number) == ""
        runs.rmdir()
        assert "runs folder cannot be read" in checks.dashboard(number)
        server.shutdown()
    assert "ConnectionRefusedError" in checks.dashboard(number)
    with socket.create_server(("127.0.0.1", 0)) as other:  # something else on its port

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n[]")

        threading.Thread(target=answer, daemon=True).start()
        assert "the dashboard says" in checks.dashboard(other.getsockname()[1])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Volumes with tiny data, prepared once."""
    base = tmp_path_factory.mktemp("prepare")
    tiny_data(base / "data")
    for name in ("keys", "sites", "runs"):
        (base / name).mkdir()
    volumes = prepare.Volumes(base / "data", base / "keys", base / "sites", base / "runs")
    wanted = {"ROUNDS": "2", "SETTINGS": "width=4 levels=2 patch=16,16,16", "METHOD": "ditto"}
    plan = prepare.prepare(volumes, variables(**wanted), Console(quiet=True))
    return volumes, wanted, plan


@pytest.mark.slow  # imports MONAI and makes data
def test_preparing_twice_changes_nothing(prepared):
    volumes, wanted, plan = prepared
    before = {path: path.read_bytes() for path in volumes.data.parent.rglob("*") if path.is_file()}
    again = prepare.prepare(volumes, variables(**wanted), Console(quiet=True))
    assert again.config == plan.config
    assert {path: path.read_bytes() for path in volumes.data.parent.rglob("*") if path.is_file()} == before
    assert (plan.config.method, plan.config.rounds.rounds, list(plan.sites)) == ("ditto", 2, ALIASES)


@pytest.mark.slow  # imports MONAI and makes data
def test_a_run_is_not_changed_under_its_name(prepared):
    volumes, wanted, _ = prepared
    with pytest.raises(ConfigError, match="another configuration"):
        prepare.prepare(volumes, variables(**{**wanted, "ROUNDS": "3"}), Console(quiet=True))


@pytest.mark.slow  # imports MONAI and makes data
def test_what_a_hospital_decided_in_its_site_toml_stands(prepared):
    volumes, wanted, _ = prepared
    path = volumes.sites / "hospital-1" / "site.toml"
    assert 'data = "/data"' in path.read_text()
    path.write_text(path.read_text().replace("min_cases = 1\n", "min_cases = 7\n"))
    prepare.prepare(volumes, variables(**wanted), Console(quiet=True))
    assert "min_cases = 7" in path.read_text()


@pytest.mark.slow  # imports MONAI and makes data
def test_the_default_data_is_written_once_and_gives_way_to_a_hospitals_own(tmp_path):
    for alias in ALIASES:
        (tmp_path / alias).mkdir()
    tiny = variables(SUBJECTS="3", VOXEL_MM="8")
    prepare.write_data(tmp_path, tiny)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    prepare.write_data(tmp_path, tiny)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert (tmp_path / "federation.json").is_file()
    own = tmp_path / "hospital-2" / "dataset.json"
    own.write_text(own.read_text() + "\n")  # another folder is mounted in its place
    prepare.write_data(tmp_path, tiny)
    assert not (tmp_path / "federation.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ALIASES


def test_settings_that_a_hospitals_own_root_brought_are_left_alone(tmp_path):
    (tmp_path / "federation.json").write_text("{}")
    prepare.write_data(tmp_path, variables())
    assert (tmp_path / "federation.json").read_text() == "{}"
