"""The trial in containers, for real: images built, three hospitals, faults, and what must not be possible."""

import json
import time

import pytest

import common
from tests.docker.stack import ROOT, SITES

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]
IMAGES = {"worker": "worker-1", "server": "superlink", "site-net": "site-net-1"}
ROUNDS = 60
PORTS = """
import socket
def tries(host, port):
    try:
        socket.create_connection((host, port), timeout=3).close()
        return 'open'
    except OSError as error:
        return type(error).__name__
"""


def tags(stack):
    document = json.loads(stack.compose("config", "--format", "json").stdout)
    return {name: document["services"][service]["image"] for name, service in IMAGES.items()}


def record(name, **figures):
    folder = ROOT / "build" / "docker"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")


def rounds(stack, run):
    """The whole training rounds so far; the closing evaluation is counted as one more and left out here."""
    events = stack.events(run)
    closing = {event["round"] for event in events if event["event"] == "round.start" and event["closing"]}
    return [e["round"] for e in events if e["event"] == "round.end" and e["round"] not in closing]


def goes_on(stack, run, before):
    """Wait until two more rounds are whole (the first may have been done before the fault), with the trial still on."""
    assert stack.state("trial")["Status"] == "running", stack.logs("trial")
    stack.wait_for(lambda: len(set(rounds(stack, run))) >= before + 2)


def check_ledgers(stack, run):
    """Every hospital's ledger is whole and noted the run; the coordinator's volume has none."""
    for number, alias in enumerate(SITES, 1):
        assert "whole" in stack.in_volume(f"home-{number}", "wardround", "ledger", "verify", "/v")
        shown = stack.in_volume(
            f"home-{number}", "wardround", "ledger", "show", "/v", "--run", run, "--direction", "out"
        )
        assert "model" in shown, alias
    assert "ledger" not in stack.in_volume("runs", "find", "/v")


@pytest.fixture(scope="module")
def first(stack):
    """One command, two rounds of FedAvg: what it said, how it ended, how long the first round was in coming."""
    started = time.time()
    result = stack.compose("run", "--rm", "-T", "trial", check=False, timeout=900, WARDROUND_RUN="first")
    return result, started


@pytest.fixture(scope="module")
def running(stack, first):
    """A personalised method under way, long enough to be disturbed."""
    variables = {"WARDROUND_RUN": "second", "WARDROUND_METHOD": "ditto", "WARDROUND_ROUNDS": str(ROUNDS)}
    stack.env.update(variables)
    stack.compose("up", "--detach")
    stack.wait_for(lambda: rounds(stack, "second"))
    return stack


def test_images_are_small_named_and_without_what_they_do_not_need(stack):
    sizes = {}
    for name, tag in tags(stack).items():
        image = stack.engine.api.images.get(tag).attrs
        config = image["Config"]
        assert config["User"] == "10001:10001"
        assert config["Labels"]["org.opencontainers.image.version"] == common.__version__
        assert config["Labels"]["org.opencontainers.image.title"] == f"wardround {name}"
        assert not [line for line in config["Env"] if "/run/secrets" in line or "wheels" in line]
        sizes[name] = image["Size"]
    record("images", bytes=sizes)
    assert sizes["site-net"] < sizes["server"] < sizes["worker"]
    code = "import importlib.util as u; print([m for m in ('torch', 'monai', 'nibabel', 'pip') if u.find_spec(m)])"
    for name, expected in (("site-net", []), ("server", ["torch", "monai"])):
        run = ("run", "--rm", "--network", "none", tags(stack)[name], "python", "-c", code)
        assert stack.engine.docker(*run).stdout.strip() == str(expected)


def test_compose_files_are_clean(stack):
    assert stack.compose("config", "--quiet").stderr == ""
    files = ("compose", "-f", "compose.yaml", "-f", "docker/compose.gpu.yaml", "config", "--quiet")
    assert stack.engine.docker(*files).stderr == ""


def test_one_command_runs_a_trial_and_ends_with_its_verdict(stack, first):
    result, started = first
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    events = stack.events("first")
    ends = [event for event in events if event["event"] == "run.end"]
    assert [end["verdict"] for end in ends] == ["ok"]
    assert rounds(stack, "first") == [1, 2]
    begun = next(event["t"] for event in events if event["event"] == "round.start")
    record("trial", seconds_to_first_round=round(begun - started, 1))
    files = stack.in_volume("runs", "find", "/v/first").splitlines()
    assert {"/v/first/report.html", "/v/first/models/global.safetensors"} <= set(files)
    check_ledgers(stack, "first")


def test_a_complete_run_is_shown_and_not_run_again(stack, first):
    result = stack.compose("run", "--rm", "-T", "--no-deps", "trial", WARDROUND_RUN="first")
    assert "complete" in result.stdout
    assert len([event for event in stack.events("first") if event["event"] == "run.end"]) == 1


def test_a_run_of_that_name_with_another_configuration_is_refused(stack, first):
    result = stack.compose(
        "run", "--rm", "-T", "--no-deps", "prepare", check=False, WARDROUND_RUN="first", WARDROUND_ROUNDS="3"
    )
    assert result.returncode == 2
    assert "exists with another configuration" in result.stdout + result.stderr


def test_a_failed_run_ends_with_its_own_code(stack, first):
    result = stack.compose(
        "run", "--rm", "-T", "--no-deps", "prepare", check=False, WARDROUND_METHOD="nonsense"
    )
    assert result.returncode == 2


def test_a_worker_has_no_network_at_all(running):
    code = PORTS + (
        "import os\n"
        "print(sorted(os.listdir('/sys/class/net')))\n"
        "print([tries(host, port) for host, port in (('superlink', 9092), ('superlink-control', 9093), "
        "('1.1.1.1', 443), ('172.17.0.1', 80), ('site-net-1', 9094))])\n"
    )
    interfaces, attempts = running.python("worker-1", code).splitlines()
    assert [name for name in json.loads(interfaces.replace("'", '"')) if name not in ("tunl0", "sit0")] == [
        "lo"
    ]
    assert "open" not in attempts
    assert running.inspect("worker-1")["HostConfig"]["NetworkMode"] == "none"


def test_a_hospital_reaches_the_fleet_port_and_nothing_else(running):
    other = running.inspect("site-net-2")["NetworkSettings"]["Networks"]
    address = next(iter(other.values()))["IPAddress"]
    code = PORTS + (
        "print([tries('superlink', port) for port in (9092, 9093, 9091)])\n"
        "print([tries(host, port) for host, port in (('superlink-control', 9093), ('serverapp', 9091), "
        f"('site-net-2', 9094), ('{address}', 9094), ('1.1.1.1', 443))])\n"
    )
    ports, names = running.python("site-net-1", code).splitlines()
    assert ports == "['open', 'ConnectionRefusedError', 'ConnectionRefusedError']"
    assert "open" not in names


def test_control_and_serverappio_calls_on_the_fleet_port_are_unknown_there(running):
    code = (
        "import grpc\n"
        "from flwr.proto.control_pb2_grpc import Control\n"
        "from flwr.proto.serverappio_pb2_grpc import ServerAppIo\n"
        "from flwr.proto.fleet_pb2_grpc import Fleet\n"
        "ca = grpc.ssl_channel_credentials(open('/keys/ca.crt', 'rb').read())\n"
        "channel = grpc.secure_channel('superlink:9092', ca)\n"
        "for kind in (Control, ServerAppIo, Fleet):\n"
        "    methods = [name for name in vars(getattr(__import__('flwr.proto.' + kind.__name__.lower() + '_pb2_grpc', "
        "fromlist=['x']), kind.__name__ + 'Servicer')) if name[0].isupper()]\n"
        "    said = set()\n"
        "    for name in methods:\n"
        "        try: channel.unary_unary(f'/flwr.proto.{kind.__name__}/{name}')(b'', timeout=10); said.add('OK')\n"
        "        except grpc.RpcError as error: said.add(error.code().name)\n"
        "    print(kind.__name__, len(methods) > 3, *sorted(said))\n"
    )
    control, app, fleet = running.python("site-net-1", code).splitlines()
    assert control == "Control True UNIMPLEMENTED"
    assert app == "ServerAppIo True UNIMPLEMENTED"
    assert fleet == "Fleet True UNAUTHENTICATED"  # known there, and not without a key


@pytest.mark.parametrize("service", ["superlink", "serverapp", "site-net-1", "worker-1"])
def test_a_container_cannot_change_itself_or_gain_rights(running, service):
    code = (
        "import os\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())\n"
        "print(os.getuid(), int(status['CapEff'], 16), int(status['CapBnd'], 16), status['NoNewPrivs'].strip())\n"
        "for path in ('/opt/venv/x', '/etc/x', '/usr/x', '/keys/x', '/data/x', '/etc/wardround/x'):\n"
        "    try: open(path, 'w').close(); print('WROTE', path)\n"
        "    except OSError: pass\n"
    )
    said = running.python(service, code).splitlines()
    assert said[0] == "10001 0 0 1"
    assert said[1:] == []


@pytest.mark.parametrize("service", ["superlink", "serverapp", "trial", "register", "site-net-1"])
def test_no_volume_with_data_is_mounted_but_in_workers(running, service):
    names = {
        mount.get("Name", "").removeprefix(f"{running.name}_") for mount in running.inspect(service)["Mounts"]
    }
    assert not {name for name in names if name.startswith(("data-", "home-", "site-", "federation"))}
    environment = " ".join(running.inspect(service)["Config"]["Env"])
    assert "PRIVATE" not in environment
    assert "SECRET" not in environment


def test_a_killed_worker_comes_back(running):
    before, done = running.inspect("worker-1")["RestartCount"], len(set(rounds(running, "second")))
    running.kill("worker-1")
    running.wait_for(lambda: running.inspect("worker-1")["RestartCount"] == before + 1)
    running.wait_for(lambda: running.state("worker-1")["Health"]["Status"] == "healthy")
    goes_on(running, "second", done)


def test_a_cut_network_heals(running):
    network, container = f"{running.name}_hospital-2", running.container("site-net-2")
    running.engine.api.networks.get(network).disconnect(container)
    time.sleep(3)  # what was under way has arrived
    cut = time.time()
    time.sleep(8)
    end, done = time.time(), len(set(rounds(running, "second")))
    running.engine.api.networks.get(network).connect(container)
    heard = [e for e in running.events("second") if e["event"] == "site.reply" and e["site"] == "hospital-2"]
    assert heard
    assert not [event for event in heard if cut < event["t"] < end]
    goes_on(running, "second", done)
    again = [e for e in running.events("second") if e["event"] == "site.reply" and e["site"] == "hospital-2"]
    assert len(again) > len(heard)


@pytest.mark.parametrize("service", ["site-net-3", "superlink", "serverapp"])
def test_what_the_engine_restarts_goes_on_with_its_run(running, service):
    before, done = running.inspect(service)["RestartCount"], len(set(rounds(running, "second")))
    running.kill(service)
    running.wait_for(lambda: running.inspect(service)["RestartCount"] > before)
    running.wait_for(lambda: running.state(service)["Health"]["Status"] == "healthy")
    goes_on(running, "second", done)


def test_the_conducting_command_can_be_lost_and_started_again(running):
    done = len(set(rounds(running, "second")))
    running.kill("trial")
    running.wait_for(lambda: running.state("trial")["Status"] == "exited")
    running.compose("up", "--detach", "--no-deps", "trial")
    goes_on(running, "second", done)


def test_after_all_that_the_run_ends_well(running):
    assert running.verdict() == 0, running.logs()
    assert sorted(set(rounds(running, "second"))) == list(range(1, ROUNDS + 1))
    events = running.events("second")
    last = [event for event in events if event["event"] == "run.end"][-1]
    assert (last["verdict"], last["rounds"]) == ("ok", ROUNDS)
    contributions = [event["sites"] for event in events if event["event"] == "round.end"]
    assert sorted(contributions[-1]) == list(SITES)
    check_ledgers(running, "second")
    for number, alias in enumerate(SITES, 1):
        models = running.in_volume(f"home-{number}", "find", "/v/models").splitlines()
        assert f"/v/models/personal-{alias}.safetensors" in models
    conducted = running.events("second", "events-trial.jsonl")
    record("faults", restarts=[e for e in conducted if e["event"] == "process.restart"], rounds=ROUNDS)


def test_a_superlink_that_keeps_messages_in_memory_is_told_again(running):
    running.verdict()
    running.env.update(WARDROUND_RUN="third", WARDROUND_TRANSPORT="memory", WARDROUND_METHOD="fedavg")
    running.compose("up", "--detach")
    running.wait_for(lambda: rounds(running, "third"))
    done = len(set(rounds(running, "third")))
    running.kill("superlink")
    goes_on(running, "third", done)
    conducted = running.events("third", "events-trial.jsonl")
    assert [event["why"] for event in conducted if event["event"] == "process.restart"]
    running.kill("trial")  # what was to be seen was seen
