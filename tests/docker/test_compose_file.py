"""What compose.yaml and the Dockerfile promise, read from the files: no engine needed."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import common
from tests.docker.stack import ROOT, SITES

SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
TRIAL = {name: service for name, service in SERVICES.items() if service["profiles"] == ["trial"]}
SITE = {name: service for name, service in SERVICES.items() if service["profiles"] == ["site"]}
WORKERS = [name for name in TRIAL if name.startswith("worker")]
NETS = [name for name in TRIAL if name.startswith("site-net")]


def volumes(name):
    """Volume (or variable with its default) -> (place, mode)."""
    found = {}
    for text in SERVICES[name].get("volumes", ()):
        source, place, *mode = re.fullmatch(r"((?:\$\{[^}]*\})|[^:]*):([^:]*)(?::(\w+))?", text).groups()
        found[re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", source)] = (place, mode[0])
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_held_tight(name):
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {
        "privileged",
        "cap_add",
        "devices",
        "pid",
        "ipc",
        "env_file",
        "extra_hosts",
    }
    limits = service["deploy"]["resources"]["limits"]
    assert limits.keys() == {"cpus", "memory", "pids"}
    assert "ports" not in service or name in ("coordinator", "dashboards")


@pytest.mark.parametrize("name", WORKERS)
def test_workers_have_no_network_and_cannot_change_data_or_policy(name):
    assert SERVICES[name]["network_mode"] == "none"
    assert "networks" not in SERVICES[name]
    number = name.rpartition("-")[2]
    assert volumes(name)[f"data-{number}"] == ("/data", "ro")
    assert volumes(name)[f"site-{number}"] == ("/etc/wardround", "ro")


def test_data_are_mounted_in_workers_and_in_the_one_that_writes_them():
    having = {name for name in TRIAL if any(volume.startswith("data-") for volume in volumes(name))}
    assert having == {*WORKERS, "prepare"}
    assert SERVICES["prepare"]["network_mode"] == "none"


def test_no_two_hospitals_share_a_network_or_a_volume():
    assert len(NETS) == len(WORKERS) == len(SITES)
    for name in NETS:
        number = name.rpartition("-")[2]
        assert SERVICES[name]["networks"] == [f"hospital-{number}"]
        assert all(volume.endswith(f"-{number}") for volume in volumes(name))
        assert all(volume.endswith(f"-{number}") for volume in volumes(f"worker-{number}"))
        assert volumes(name)[f"socket-{number}"] == volumes(f"worker-{number}")[f"socket-{number}"]


def test_keys_go_to_their_owners_alone():
    owners = {}
    for name in TRIAL:
        for volume, (_, mode) in volumes(name).items():
            if volume.startswith("keys-") and name != "prepare":
                assert mode == "ro"
                owners.setdefault(volume, set()).add(name)
    assert owners == {
        "keys-superlink": {"superlink"},
        "keys-serverapp": {"serverapp"},
        "keys-trial": {"register", "trial"},
        **{f"keys-{number}": {f"site-net-{number}"} for number in "123"},
    }


def test_networks_lead_nowhere_and_only_the_superlink_is_in_several():
    document = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert {name for name, network in document["networks"].items() if network != {"internal": True}} == {
        "outside",
        "fleet",
        "dashboards",
    }
    assert {name for name, service in SERVICES.items() if "outside" in service.get("networks", ())} == {
        "site-net"
    }
    several = {name for name, service in SERVICES.items() if len(service.get("networks", ())) > 1}
    assert several == {"superlink"}
    inside = {name for name, service in SERVICES.items() if "control" in service.get("networks", ())}
    assert inside == {"superlink", "register", "serverapp", "trial"}
    assert SERVICES["superlink"]["networks"]["control"] == {"aliases": ["superlink-control"]}


def test_one_hospital_by_itself_is_held_as_in_the_trial():
    assert SITE.keys() == {"site-net", "worker"}
    assert SITE["worker"]["network_mode"] == "none"
    mounts = {
        name: {volume["target"]: volume for volume in service["volumes"] if isinstance(volume, dict)}
        for name, service in SITE.items()
    }
    assert mounts["site-net"].keys() == {"/kit", "/keys"}
    assert mounts["worker"].keys() == {"/etc/wardround/site.toml", "/data"}
    for volume in (volume for places in mounts.values() for volume in places.values()):
        assert volume["read_only"] is True
        assert volume["bind"] == {
            "create_host_path": False
        }  # a mistyped path is an error, not an empty folder
    shared = [
        set(filter(lambda volume: isinstance(volume, str), service["volumes"])) for service in SITE.values()
    ]
    assert shared[0] & shared[1] == {"socket:/run/wardround"}


def test_a_projects_coordinator_publishes_one_port_and_only_reads_its_project():
    service = SERVICES["coordinator"]
    assert service["profiles"] == ["coordinator"]
    assert service["image"] == SERVICES["superlink"]["image"]
    assert service["ports"] == ["${WARDROUND_PORT:-9092}:9092"]
    assert (
        service["environment"]["WARDROUND_PORT"] == "${WARDROUND_PORT:-9092}"
    )  # compared with the project's
    assert [name for name in SERVICES if "fleet" in SERVICES[name].get("networks", ())] == ["coordinator"]
    assert service["networks"] == ["fleet"]
    mounts = {volume["target"]: volume for volume in service["volumes"] if isinstance(volume, dict)}
    assert mounts.keys() == {"/project", "/federation.json"}
    for volume in mounts.values():
        assert volume["read_only"] is True
        assert volume["bind"] == {"create_host_path": False}
    assert [volume for volume in service["volumes"] if isinstance(volume, str)] == [
        "${WARDROUND_RUNS:-runs}:/runs"
    ]
    assert service["healthcheck"]["test"] == ["CMD", "python", "-m", "ops.containers.coordinator", "health"]


def test_the_dashboards_only_read_and_answer_on_this_machine_alone():
    service = SERVICES["dashboards"]
    assert service["profiles"] == service["networks"] == ["dashboards"]
    assert service["ports"] == ["127.0.0.1:${WARDROUND_DASHBOARD_PORT:-8080}:8080"]
    assert service["volumes"] == ["${WARDROUND_RUNS:-runs}:/runs:ro"]
    assert [name for name in SERVICES if "dashboards" in SERVICES[name].get("networks", ())] == ["dashboards"]


def test_the_coordinator_knows_the_variables_that_it_is_given():
    source = "".join(
        (ROOT / "ops" / "containers" / name).read_text() for name in ("coordinator.py", "wanted.py")
    )
    read = set(re.findall(r'variables\.(?:text|number)\("([A-Z_]+)"', source)) | {"RUN"}
    assert {name.removeprefix("WARDROUND_") for name in SERVICES["coordinator"]["environment"]} == read


def test_no_secret_is_in_an_environment():
    for service in SERVICES.values():
        assert not [
            name for name in service.get("environment", {}) if re.search("SECRET|KEY|TOKEN|PASS", name)
        ]


def test_long_lived_services_are_restarted_and_one_shots_are_not():
    once = {name for name, service in SERVICES.items() if service["restart"] == "no"}
    assert once == {"prepare", "register", "trial"}
    assert (
        SERVICES["coordinator"]["restart"] == "on-failure:3"
    )  # ends with its run; goes on with one that broke off
    assert {
        service["restart"] for name, service in SERVICES.items() if name not in {*once, "coordinator"}
    } == {"unless-stopped"}


def test_the_version_is_that_of_the_code():
    text = (ROOT / "compose.yaml").read_text()
    assert set(re.findall(r"WARDROUND_VERSION:-([^}]*)}", text)) == {common.__version__}
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == common.__version__


@pytest.mark.parametrize(
    ("extra", "expected", "absent"), [("", "flwr==1.32.1", "torch"), ("server", "torch", "nibabel")]
)
def test_each_image_installs_its_own_list(extra, expected, absent):
    argv = [sys.executable, "docker/requirements.py", *([extra] if extra else [])]
    wanted = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert expected in wanted
    assert absent not in wanted


def test_every_requirement_of_an_image_has_its_exact_version():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [
        project["dependencies"],
        *(project["optional-dependencies"][name] for name in ("server", "worker")),
    ]
    names = (re.split(r"[=<>\[ ]", line)[0] for group in groups for line in group)
    wanted = {name.lower() for name in names} - {"wardround"}
    assert wanted <= pinned


@pytest.mark.parametrize("overlay", ["local", "gpu"])
def test_overlays_name_services_that_exist(overlay):
    text = (ROOT / "docker" / f"compose.{overlay}.yaml").read_text()
    assert yaml.safe_load(text)["services"].keys() <= SERVICES.keys()
