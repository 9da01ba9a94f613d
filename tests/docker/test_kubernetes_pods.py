"""What happens in the pods of docker/kubernetes, done here: secrets as a cluster mounts them, and the worker's closed network."""

import importlib.util
import json
import re
import shutil
import stat
import subprocess
import sys

import pytest

from common import errors
from ops import admission
from ops.containers import places, site_net
from ops.kit_request import make_request
from tests.docker import kubernetes_objects as objects
from tests.docker.stack import ROOT
from tests.ops import provisioned

PODS = objects.pods()
FILTER = objects.PLACE / "base" / "site" / "no_network.py"


@pytest.fixture(scope="session")
def program():
    return objects.need_kubectl()


# Secrets: what the containers that unpack them do, run here


def unpack(folders):
    """Run site-net's unpacking container with its mounts at other places."""
    *words, script = PODS["site-net"]["spec"]["initContainers"][0]["command"]
    for place, folder in folders.items():
        script = re.sub(rf"(?<![\w/]){place}(?![\w])", str(folder), script)
    return subprocess.run([*words, script], capture_output=True, text=True, timeout=20)


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "liver-2026"
    provisioned.project(folder, sites=("oak",))
    return folder


def test_kit_and_key_as_secret_and_configmap_are_taken_after_unpacking(program, project, tmp_path):
    shutil.copytree(project / "kits" / "oak", tmp_path / "oak")
    make_request(tmp_path / "oak", keys=tmp_path / "oak-keys")
    kit, keys = objects.commands("configmap")["wardround-kit"], objects.commands("secret")["wardround-keys"]
    folders = {
        "/given/kit": objects.volume(program, kit, tmp_path / "given-kit", tmp_path),
        "/given/keys": objects.volume(program, keys, tmp_path / "given-keys", tmp_path),
        "/kit": tmp_path / "kit",
        "/keys": tmp_path / "keys",
    }
    with pytest.raises(errors.CredentialError, match="kit"):  # why it is not mounted as it is
        site_net.identity(places.Variables({}), folders["/given/keys"], folders["/given/kit"])
    with pytest.raises(errors.CredentialError, match="symbolic links"):
        site_net.identity(places.Variables({}), folders["/given/keys"], tmp_path / "oak")
    for place in ("/kit", "/keys"):
        folders[place].mkdir(mode=0o777)  # as an emptyDir is
    for _ in range(2):  # the pod's sandbox was made anew: its memory volumes are as they were
        result = unpack(folders)
        assert not result.returncode, result.stderr
    alias, fleet, pki = site_net.identity(places.Variables({}), folders["/keys"], folders["/kit"])
    assert (alias, fleet) == ("oak", "fl.example.org:9092")
    assert stat.S_IMODE(pki.site_keys["oak"].stat().st_mode) == 0o600


def test_a_project_as_secret_is_taken_as_mounted_and_its_changes_are_seen(program, project, tmp_path):
    volume = next(volume for volume in PODS["coordinator"]["spec"]["volumes"] if volume["name"] == "project")
    mount = next(
        mount
        for mount in PODS["coordinator"]["spec"]["containers"][0]["volumeMounts"]
        if mount["name"] == "project"
    )
    assert "subPath" not in mount  # the kubelet does not refresh these
    words, items = objects.commands("secret")["wardround-project"], volume["secret"]["items"]
    given = objects.volume(program, words, tmp_path / "given", tmp_path, items)
    found = admission.credentials(given, tmp_path / "run")
    assert found.server_key.read_bytes() == (project / "coordinator" / "server.key").read_bytes()
    assert not [path for path in given.rglob("*") if path.name == "ca.key"]
    clock = iter(range(0, 1000, 10))
    watch = admission.Watch(given, clock=lambda: float(next(clock)))
    assert watch.changed() is None
    state = project / "project.json"
    state.write_text(state.read_text().replace("192.0.2.7", "192.0.2.8"))
    objects.volume(program, words, given, tmp_path, items)
    assert "192.0.2.8" in watch.changed().names
    assert watch.changed() is None


# Without a network, whatever the cluster does


def filtered(code, *more):
    argv = [sys.executable, str(FILTER), *more, sys.executable, "-c", code]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def test_a_worker_s_process_opens_unix_sockets_and_no_others(tmp_path):
    result = filtered(
        "import errno, os, socket, subprocess, sys\n"
        "code = 'import socket; socket.socket(socket.AF_INET)'\n"
        "found = {}\n"
        "for name in ('AF_UNIX', 'AF_INET', 'AF_INET6', 'AF_NETLINK', 'AF_PACKET', 'AF_VSOCK'):\n"
        "    try: socket.socket(getattr(socket, name), socket.SOCK_DGRAM).close(); found[name] = 'open'\n"
        "    except OSError as error: found[name] = errno.errorcode[error.errno]\n"
        "found['pair'] = socket.socketpair()[0].family.name\n"
        "found['child'] = subprocess.run([sys.executable, '-c', code], capture_output=True).returncode\n"
        "import ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.syscall(425, 1, None); found['io_uring'] = errno.errorcode[ctypes.get_errno()]\n"
        "import json; print(json.dumps(found))\n"
    )
    assert json.loads(result.stdout) == {
        "AF_UNIX": "open",
        **dict.fromkeys(("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"), "EAFNOSUPPORT"),
        "pair": "AF_UNIX",
        "child": 1,
        "io_uring": "ENOSYS",
    }


def test_the_workers_service_and_its_health_check_work_without_network(tmp_path):
    path = tmp_path / "worker.sock"
    result = filtered(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import grpc\n"
        "from concurrent import futures\n"
        "from pathlib import Path\n"
        "from grpc_health.v1 import health as service, health_pb2_grpc\n"
        "from ops.containers import health\n"
        "server = grpc.server(futures.ThreadPoolExecutor(1))\n"
        "health_pb2_grpc.add_HealthServicer_to_server(service.HealthServicer(), server)\n"
        f"assert server.add_insecure_port({f'unix:{path}'!r})\n"
        "server.start()\n"
        f"print(repr(health.worker(Path({str(path)!r}))))\n"
        "server.stop(None)\n"
    )
    assert result.stdout == "''\n", result.stderr


def test_a_filter_that_cannot_be_set_keeps_the_worker_from_starting(monkeypatch):
    spec = importlib.util.spec_from_file_location("no_network", FILTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.os, "execvp", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(module.platform, "machine", lambda: "mips")
    with pytest.raises(SystemExit, match="got mips"):
        module.main(["true"])
    monkeypatch.setattr(
        module, "close_network", lambda _: None
    )  # a sandbox that takes the filter and ignores it
    with pytest.raises(SystemExit, match=r"no effect here \(.*AF_INET"):
        module.main(["true"])
    with pytest.raises(SystemExit, match="expected a command"):
        module.main([])
