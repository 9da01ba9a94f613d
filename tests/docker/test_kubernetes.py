"""What docker/kubernetes promises: rendered, held against the API's schemas and against compose.yaml. No cluster is needed."""

import functools
import json
import re

import pytest
import yaml

import common
from common import errors
from ops.containers import places
from tests.docker import kubernetes_objects as objects
from tests.docker.stack import ROOT

SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
PODS = objects.pods()
EVERY = [(name, container) for name, pod in PODS.items() for container in objects.containers(pod)]
EVERY_ID = [f"{name}-{container['name']}" for name, container in EVERY]
MAIN = {name: pod["spec"]["containers"][0] for name, pod in PODS.items()}


@pytest.fixture(scope="session")
def validate():
    """Raises where an object does not fit the API's schema; unknown fields do not."""
    import kubernetes_validate as module  # of the development requirements: without it these tests fail, they are not passed over
    from kubernetes_validate import utils

    utils.schema_contents = functools.cache(
        utils.schema_contents
    )  # it reads all definitions anew for every object

    def check(thing, version):
        try:
            module.validate(thing, version, strict=True)
        except module.ValidationError as error:
            raise AssertionError(
                f"{thing['kind']} {thing['metadata']['name']}, Kubernetes {version}: {error.message}"
            ) from error

    return check


@pytest.fixture(scope="session")
def program():
    return objects.need_kubectl()


@pytest.fixture(scope="session")
def rendered(program, tmp_path_factory):
    """Overlay -> its objects, with the example's settings."""
    copy = objects.copied(tmp_path_factory.mktemp("overlays"))
    found = {}
    for overlay in objects.OVERLAYS:
        result = objects.render(program, copy / "overlays" / overlay)
        assert not result.returncode, result.stderr
        found[overlay] = list(yaml.safe_load_all(result.stdout))
    return found


# The schemas


@pytest.mark.parametrize("version", [objects.OLDEST, objects.RECENT])
def test_every_object_fits_the_api(validate, version):
    for _, thing in objects.written():
        validate(thing, version)


def test_a_misspelt_field_would_be_found(validate):
    pod = json.loads(json.dumps(objects.one("StatefulSet", "wardround-worker")))
    pod["spec"]["template"]["spec"]["containers"][0]["securityContex"] = {}
    with pytest.raises(AssertionError, match="securityContex"):
        validate(pod, objects.RECENT)


def test_every_file_is_part_of_something():
    named = set()
    for path in objects.PLACE.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text())
        named |= {(path.parent / name).resolve() for name in document.get("resources", ())}
    for name, _ in objects.written():
        assert (objects.PLACE / name).resolve() in named or name.startswith("once/")


# Rendered


def test_rendered_objects_fit_the_api_and_stay_in_their_namespace(rendered, validate):
    for overlay, things in rendered.items():
        for thing in things:
            validate(thing, objects.RECENT)
            assert thing["metadata"]["namespace"] == f"wardround-{overlay}"
        namespace = objects.one("Namespace", f"wardround-{overlay}")
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_no_placeholder_is_left(rendered):
    for things in rendered.values():
        text = yaml.safe_dump_all(things)
        assert not re.search(r"SET-|UNSET|\.invalid|192\.0\.2\.", text)


def test_settings_come_where_they_belong(rendered):
    site, coordinator = rendered["site"], rendered["coordinator"]
    pods = objects.pods(site)
    for pod in (*pods.values(), *objects.pods(coordinator).values()):
        for container in objects.containers(pod):
            assert re.fullmatch(
                rf"registry\.[a-z.]+/wardround/[a-z-]+:{re.escape(common.__version__)}", container["image"]
            )
    for pod in pods.values():
        terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert terms == {
            "nodeSelectorTerms": [
                {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-7"]}]}
            ]
        }
    assert pods["site-net"]["spec"]["hostAliases"] == [{"ip": "203.0.113.7", "hostnames": ["fl.example.org"]}]
    rule = objects.one("NetworkPolicy", "wardround-site-net", site)["spec"]["egress"]
    assert rule == [
        {"to": [{"ipBlock": {"cidr": "203.0.113.7/32"}}], "ports": [{"protocol": "TCP", "port": 9092}]}
    ]
    assert objects.one("Job", "run-liver-1", coordinator)
    (environment,) = (thing for thing in coordinator if thing["kind"] == "ConfigMap")
    assert environment["data"]["WARDROUND_METHOD"] == "fedavg"
    (container,) = objects.pods(coordinator)["coordinator"]["spec"]["containers"]
    assert container["envFrom"] == [{"configMapRef": {"name": environment["metadata"]["name"]}}]
    assert not [
        thing for thing in (*site, *coordinator) if thing["kind"] == "Secret"
    ]  # made by hand, never written to a file


@pytest.mark.parametrize(
    ("overlay", "name"), [("site", "COORDINATOR_CIDR"), ("coordinator", "WARDROUND_RUN")]
)
def test_a_missing_setting_is_named(program, overlay, name, tmp_path):
    folder = objects.copied(tmp_path) / "overlays" / overlay
    path = next(path for path in folder.glob("*.env") if name in path.read_text())
    path.write_text(re.sub(rf"(?m)^{name}=.*\n?", "", path.read_text()))
    result = objects.render(program, folder)
    assert result.returncode
    assert f"`data.{name}` is missing" in result.stderr
    path.unlink()
    result = objects.render(program, folder)
    assert result.returncode
    assert path.name in result.stderr


@pytest.mark.parametrize("overlay", objects.OVERLAYS)
def test_every_setting_is_asked_for_and_used(overlay):
    folder = objects.PLACE / "overlays" / overlay
    document = yaml.safe_load((folder / "kustomization.yaml").read_text())
    used = {rule["source"]["fieldPath"].removeprefix("data.") for rule in document["replacements"]}
    offered = set(re.findall(r"(?m)^#([A-Z_]+)=", (folder / "settings.env.example").read_text()))
    assert used - {"WARDROUND_RUN"} == offered


def test_a_run_is_said_as_under_compose():
    text = (objects.PLACE / "overlays" / "coordinator" / "run.env.example").read_text()
    offered = set(re.findall(r"(?m)^#(WARDROUND_[A-Z_]+)=", text))
    port = {variable["name"] for variable in MAIN["coordinator"]["env"]}
    assert offered | port == set(SERVICES["coordinator"]["environment"])


def test_a_gpu_changes_the_worker_and_nothing_else(program, rendered, validate, tmp_path):
    folder = objects.copied(tmp_path) / "overlays" / "site"
    path = folder / "kustomization.yaml"
    path.write_text(path.read_text().replace("# components: [../gpu]", "components: [../gpu]"))
    things = list(yaml.safe_load_all(objects.render(program, folder).stdout))
    worker = objects.pods(things)["worker"]
    assert worker["spec"]["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu") == "1"
    assert worker["spec"].pop("tolerations") == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert things == rendered["site"]
    for thing in things:
        validate(thing, objects.RECENT)


# Held as tight as under compose


@pytest.mark.parametrize("name", PODS)
def test_every_pod_is_held_tight(name):
    pod = PODS[name]["spec"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["shareProcessNamespace"] is True
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName", "hostUsers"}
    # of the kinds that the restricted Pod Security Standard lets in
    kinds = {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    assert f"{pod['terminationGracePeriodSeconds']}s" == SERVICES["worker"]["stop_grace_period"]


@pytest.mark.parametrize(("name", "container"), EVERY, ids=EVERY_ID)
def test_every_container_is_held_tight(name, container):
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    assert "livenessProbe" not in container
    for variable in container.get("env", ()):
        assert variable.keys() == {"name", "value"}
        assert not re.search("SECRET|KEY|TOKEN|PASS", variable["name"])
    assert not [source for source in container.get("envFrom", ()) if "secretRef" in source]


@pytest.mark.parametrize(("name", "container"), EVERY, ids=EVERY_ID)
def test_the_version_is_that_of_the_code(name, container):
    image = "server" if name == "coordinator" else name
    assert container["image"] == f"registry.invalid/wardround/{image}:{common.__version__}"
    assert f"wardround/{image}:{common.__version__}" == objects.default(SERVICES[name]["image"])


# The same as under compose


@pytest.mark.parametrize("name", MAIN)
def test_limits_are_those_of_compose(name):
    limits = MAIN[name]["resources"]["limits"]
    theirs = SERVICES[name]["deploy"]["resources"]["limits"]
    assert float(limits["cpu"]) == float(objects.default(theirs["cpus"]))
    assert objects.quantity(limits["memory"]) == objects.quantity(objects.default(theirs["memory"]))
    tmp = next(volume for volume in PODS[name]["spec"]["volumes"] if volume["name"] == "tmp")
    size = re.search(r"size=(\w+)", SERVICES[name]["tmpfs"][0]).group(1)
    assert tmp["emptyDir"]["medium"] == "Memory"
    assert objects.quantity(tmp["emptyDir"]["sizeLimit"]) == objects.quantity(size)


@pytest.mark.parametrize("name", MAIN)
def test_mounts_are_those_of_compose(name):
    mounts = {mount["mountPath"]: not mount.get("readOnly", False) for mount in MAIN[name]["volumeMounts"]}
    assert mounts.pop("/tmp") is True
    if name == "worker":
        assert mounts.pop("/no-network") is False
    assert mounts == objects.compose_mounts(SERVICES[name])
    # what the pods have beside it is for unpacking alone
    given = {
        mount["mountPath"]
        for container in PODS[name]["spec"].get("initContainers", ())
        for mount in container["volumeMounts"]
    }
    assert all(place.startswith("/given/") or place in mounts for place in given)


@pytest.mark.parametrize("name", MAIN)
def test_commands_are_those_of_compose_or_the_image(name):
    command = list(MAIN[name]["command"])
    if name == "worker":
        assert command[:2] == ["python", "/no-network/no_network.py"]
        command = command[2:]
    image = "server" if name == "coordinator" else name
    assert command == SERVICES[name].get("command", objects.from_dockerfile(image)["command"])


@pytest.mark.parametrize("name", MAIN)
def test_probes_are_the_health_checks(name):
    image = objects.from_dockerfile("server" if name == "coordinator" else name)
    check = SERVICES[name].get("healthcheck") or image["health"]
    test = [word for word in check["test"] if word != "CMD"]
    assert test[:2] == ["python", "-m"]
    assert MAIN[name]["readinessProbe"] == {
        "exec": {"command": test},
        "periodSeconds": int(check["interval"].removesuffix("s")),
        "timeoutSeconds": int(check["timeout"].removesuffix("s")),
        "failureThreshold": int(check["retries"]),
    }


# Who may call whom


def test_nothing_reaches_the_worker_and_it_reaches_nothing():
    assert objects.allowed("worker") == ([], [])


def test_site_net_goes_out_to_one_port_of_one_address_without_names():
    assert objects.allowed("site-net") == (
        [],
        [
            {
                "to": [{"ipBlock": {"cidr": "192.0.2.1/32"}}],
                "ports": [{"protocol": "TCP", "port": places.FLEET_PORT}],
            }
        ],
    )
    pod = PODS["site-net"]["spec"]
    assert pod["dnsPolicy"] == "None"
    assert pod["dnsConfig"] == {"nameservers": ["127.0.0.1"]}
    assert pod["hostAliases"][0]["ip"] == "192.0.2.1"


def test_the_coordinator_answers_at_one_port_and_calls_nobody():
    assert objects.allowed("coordinator") == (
        [{"ports": [{"protocol": "TCP", "port": places.FLEET_PORT}]}],
        [],
    )
    assert MAIN["coordinator"]["ports"] == [
        {"name": "fleet", "containerPort": places.FLEET_PORT, "protocol": "TCP"}
    ]
    services = [thing for _, thing in objects.written() if thing["kind"] == "Service"]
    assert [service["spec"]["selector"] for service in services] == [
        PODS["coordinator"]["metadata"]["labels"]
    ]
    assert services[0]["spec"]["ports"] == [
        {"name": "fleet", "protocol": "TCP", "port": places.FLEET_PORT, "targetPort": "fleet"}
    ]
    kinds = {thing["kind"] for _, thing in objects.written()}
    assert kinds == {
        "Namespace", "ResourceQuota", "PersistentVolumeClaim", "StatefulSet", "Job", "Service", "NetworkPolicy",
    }  # fmt: skip


def test_the_pair_shares_a_socket_a_node_and_nothing_else():
    claims = {
        name: {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in PODS[name]["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        }
        for name in ("worker", "site-net")
    }
    assert claims["worker"] & claims["site-net"] == {"wardround-socket"}
    affinity = PODS["site-net"]["spec"]["affinity"]["podAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert [term["topologyKey"] for term in affinity] == ["kubernetes.io/hostname"]
    assert objects.matches(affinity[0]["labelSelector"], PODS["worker"]["metadata"]["labels"])
    data = {
        name
        for name, pod in PODS.items()
        if [volume for volume in pod["spec"]["volumes"] if volume["name"] == "data"]
    }
    assert data == {"worker"}
    volume = next(volume for volume in PODS["worker"]["spec"]["volumes"] if volume["name"] == "data")
    assert volume["persistentVolumeClaim"]["readOnly"] is True


def test_what_must_outlive_a_deletion_is_in_no_overlay():
    removed = [thing for name, thing in objects.written() if not name.startswith("once/")]
    assert "Namespace" not in {thing["kind"] for thing in removed}
    claims = {thing["metadata"]["name"] for thing in removed if thing["kind"] == "PersistentVolumeClaim"}
    assert claims == {"wardround-socket"}
    for name, claim in (("worker", "home"), ("site-net", "net")):
        spec = objects.one("StatefulSet", f"wardround-{name}")["spec"]
        assert [template["metadata"]["name"] for template in spec["volumeClaimTemplates"]] == [claim]
        assert spec["persistentVolumeClaimRetentionPolicy"] == {
            "whenDeleted": "Retain",
            "whenScaled": "Retain",
        }
        assert spec["replicas"] == 1


# The coordinator's verdict


def test_a_run_s_own_verdict_is_final_and_what_the_cluster_did_is_not():
    spec = objects.one("Job", "run-UNSET")["spec"]
    kinds, left = set(), [errors.WardroundError]
    while left:
        kind = left.pop()
        kinds.add(kind.exit_code)
        left += kind.__subclasses__()
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"]}
    assert set(rules["FailJob"]["onExitCodes"]["values"]) == kinds - {
        errors.ProcessError.exit_code,
        errors.CancelledError.exit_code,
    }
    assert rules["FailJob"]["onExitCodes"]["containerName"] == MAIN["coordinator"]["name"]
    assert rules["Ignore"]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert spec["podReplacementPolicy"] == "Failed"
    assert PODS["coordinator"]["spec"]["restartPolicy"] == "Never"
    quota = objects.one("ResourceQuota", "wardround-one-run")
    assert quota["spec"]["hard"] == {"pods": "1"}
