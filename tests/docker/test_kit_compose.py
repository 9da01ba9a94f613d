"""The compose files in a kit against the repository's compose.yaml: one truth, no engine needed."""

import re

import pytest
import yaml

import common
from ops.kit import COMPOSE, COMPOSE_GPU
from ops.kit_compose import IMAGES, compose_arguments, compose_files, image_names, project_name
from ops.kit_request import keys_folder
from ops.pki_issue import new_authority
from ops.provision import _about
from ops.provision_project import Project
from tests.docker.stack import ROOT
from tests.ops.provisioned import config

OURS = yaml.safe_load((ROOT / "compose.yaml").read_text())
SITE = {name: service for name, service in OURS["services"].items() if service.get("profiles") == ["site"]}
FOLDERS = {
    "/kit": ("${WARDROUND_KIT:-.}", "${WARDROUND_KIT:-./kit}"),
    "/keys": ("${WARDROUND_KEYS:-../oak-keys}", "${WARDROUND_KEYS:-./kit-keys}"),
    "/etc/wardround/site.toml": (
        "${WARDROUND_SITE_TOML:-../site.toml}",
        "${WARDROUND_SITE_TOML:-./site.toml}",
    ),
    "/data": ("${WARDROUND_DATA:-../data}", "${WARDROUND_DATA:-./data}"),
}  # target -> (in the kit, in the repository): other defaults, the same variable


def about(keys="site", alias="oak"):
    settings = config((alias,), keys=keys)
    project = Project(name=settings.name, names=settings.coordinator.names, port=9092, authority="0" * 64)
    return _about(project, alias, settings, new_authority("a", 10))


def parsed(name=COMPOSE, **arguments):
    return yaml.safe_load(compose_files(about(**arguments))[name])


def without(service, *keys):
    return {key: value for key, value in service.items() if key not in keys}


def test_services_are_those_of_the_profile():
    assert parsed()["services"].keys() == SITE.keys() == set(IMAGES)


@pytest.mark.parametrize("name", IMAGES)
def test_a_service_is_the_repositorys_but_for_what_a_hospital_has_otherwise(name):
    kit = parsed()["services"][name]
    assert kit.pop("pull_policy") == "never"  # a missing name is never looked up in a public registry
    digest = {"site-net": ("kit", "KIT"), "worker": ("site-toml", "SITE_TOML")}[name]
    assert kit.pop("labels") == {f"wardround.{digest[0]}": f"${{WARDROUND_{digest[1]}_SHA256:-}}"}
    environment = kit.pop("environment")
    if name == "site-net":
        assert environment == {
            "grpc_proxy": "${WARDROUND_PROXY:-}",
            "no_grpc_proxy": "127.0.0.1,localhost",
        }
        assert "environment" not in SITE[name]
    else:
        assert environment == SITE[name]["environment"]
    assert (
        kit.pop("image")
        == f"${{WARDROUND_IMAGES:-wardround}}/{name}:${{WARDROUND_VERSION:-{common.__version__}}}"
    )
    assert SITE[name]["image"] == f"wardround/{name}:${{WARDROUND_VERSION:-{common.__version__}}}"
    assert not SITE[name]["depends_on"]
    for mount in kit["volumes"]:
        if isinstance(mount, dict):
            own, theirs = FOLDERS[mount["target"]]
            assert mount["source"] == own
            mount["source"] = theirs
    assert kit == without(SITE[name], "image", "build", "profiles", "depends_on", "environment")


def test_networks_and_volumes_are_the_repositorys():
    kit = parsed()
    assert kit["networks"] == {"outside": OURS["networks"]["outside"]}
    assert kit["volumes"] == {name: OURS["volumes"][name] for name in ("home", "net", "socket")}
    mounted = {
        mount.partition(":")[0]
        for service in kit["services"].values()
        for mount in service["volumes"]
        if isinstance(mount, str)
    }
    assert mounted == kit["volumes"].keys()


def test_gpu_overlay_reserves_what_the_repositorys_does():
    overlay = yaml.safe_load((ROOT / "docker" / "compose.gpu.yaml").read_text())["services"]["worker-1"]
    kit = parsed(COMPOSE_GPU)["services"]
    assert kit.keys() == {"worker"}
    (device,) = kit["worker"]["deploy"]["resources"]["reservations"]["devices"]
    (theirs,) = overlay["deploy"]["resources"]["reservations"]["devices"]
    assert device.pop("device_ids") == ["${WARDROUND_GPU:-0}"]
    assert device == without(theirs, "device_ids")


def test_a_kit_with_its_key_mounts_its_own_folder():
    (mount,) = [
        mount
        for mount in parsed(keys="central")["services"]["site-net"]["volumes"]
        if isinstance(mount, dict) and mount["target"] == "/keys"
    ]
    assert mount["source"] == "${WARDROUND_KEYS:-./private}"


def test_default_of_the_keys_is_where_the_request_puts_them(tmp_path):
    kit = tmp_path / "oak"
    default = re.search(r"WARDROUND_KEYS:-([^}]*)}", compose_files(about())[COMPOSE].decode())[1]
    assert (kit / default).resolve() == keys_folder(kit).resolve()


def test_nothing_is_left_to_be_filled_in_and_nothing_secret_is_in_it():
    for content in compose_files(about()).values():
        assert b"@" not in content
        assert not re.search(rb"(?i)password|PRIVATE", content)


def test_two_sites_have_two_projects():
    assert parsed(alias="oak")["name"] == project_name("oak") == "wardround-oak"
    assert parsed(alias="elm_2")["name"] == "wardround-elm_2"


def test_images_are_named_as_compose_will_resolve_them():
    kit = about()
    version = common.__version__
    assert image_names(kit, {})["worker"] == f"wardround/worker:{version}"
    assert (
        image_names(kit, {"WARDROUND_IMAGES": "", "WARDROUND_VERSION": ""})["worker"]
        == f"wardround/worker:{version}"
    )
    chosen = {"WARDROUND_IMAGES": "reg.example.org/fl", "WARDROUND_VERSION": "9.9"}
    assert image_names(kit, chosen) == {name: f"reg.example.org/fl/{name}:9.9" for name in IMAGES}


def test_arguments_of_compose(tmp_path):
    plain = compose_arguments(tmp_path, "p")
    assert plain == ["compose", "--project-name", "p", "-f", str(tmp_path / COMPOSE)]
    assert compose_arguments(tmp_path, "p", gpu=True) == [*plain, "-f", str(tmp_path / COMPOSE_GPU)]
