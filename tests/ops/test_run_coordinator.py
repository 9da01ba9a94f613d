"""A running SuperLink is told who is admitted: by the coordinator that tends it, by Control, by the operator's commands."""

import json
import shutil

import grpc
import pytest
from flwr.proto import control_pb2 as pb
from typer.testing import CliRunner

from common.errors import ConfigError, ProcessError
from ops import control
from ops.control import NodeInfo
from ops.site_cli import site_app
from tests.ops import test_control
from tests.ops.coordinated import FakeControl, World
from tests.ops.provisioned import project

pki = test_control.pki


class Forgetting(test_control.FakeSuperLink):
    """Forgets a node as Flower 1.32.1 does; one that was never connected makes it stumble after that."""

    stays = False

    def UnregisterNode(self, request, context):
        self._enter(request, context)
        node = next(node for node in self.nodes if node.node_id == request.node_id)
        never, node.status = node.status == "registered", node.status if self.stays else "unregistered"
        if never:
            context.abort(grpc.StatusCode.UNKNOWN, "Exception calling application: '<' not supported")
        return pb.UnregisterNodeResponse()


@pytest.fixture
def link(pki, monkeypatch):
    monkeypatch.setattr(test_control, "FakeSuperLink", Forgetting)
    yield from test_control.link.__wrapped__(pki)


@pytest.fixture
def client(link, pki):
    with control.ControlClient(link.address, pki.ca) as client:
        yield client


def test_a_node_is_forgotten_once(client, link, pki):
    oak = client.register(pki.site_public["oak"])
    elm = client.register(pki.site_public["elm"])
    link.nodes[0].status = "online"
    assert client.unregister(oak)
    assert [node.node_id for node in client.nodes()] == [elm]
    assert not client.unregister(oak)
    assert not client.unregister(12345)


def test_a_node_that_was_never_connected_is_forgotten_too(client, link, pki):
    node = client.register(pki.site_public["oak"])
    assert client.unregister(node)
    assert not client.nodes()


def test_a_superlink_that_goes_on_knowing_a_node_is_an_error(client, link, pki):
    link.stays = True
    node = client.register(pki.site_public["oak"])
    with pytest.raises(ProcessError, match="Cannot unregister a site's key"):
        client.unregister(node)


# ---- the coordinator of a run ----------------------------------------------------------------------------------------


class KnowingControl(FakeControl):
    """A SuperLink that gives numbers, and forgets."""

    def __init__(self, world):
        super().__init__(world)
        self.keys, self.given = {}, 0

    def register(self, key, *, site):
        super().register(key, site=site)
        if key not in self.keys:  # a number is never given twice
            self.given += 1
            self.keys[key] = self.given
        return self.keys[key]

    def nodes(self):
        self._call("nodes")
        return [NodeInfo(node, "online", key) for key, node in self.keys.items()]

    def unregister(self, node):
        self._call(f"forget {node}")
        self.keys = {key: number for key, number in self.keys.items() if number != node}
        return True


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("ops.coordinator.load_public_pem", lambda path, site: path)  # keys are words here
    world = World(tmp_path, monkeypatch)
    world.coordinator.control = KnowingControl(world)
    return world.begun()


def written(world):
    return json.loads((world.out / "nodes.json").read_text())


def test_the_serverapp_is_told_which_node_is_which_site(world):
    assert written(world) == {"1": "oak", "2": "elm"}


def test_new_keys_are_registered_and_others_forgotten_while_the_run_goes_on(world):
    assert world.coordinator.readmit({"oak": "key-1", "ash": "key-3"})
    assert world.did == ["nodes", "forget 2", "register oak key-1", "register ash key-3"]
    assert written(world) == {"1": "oak", "3": "ash"}


def test_a_key_that_is_not_taken_does_not_hold_up_a_revocation(world):
    world.broken.add("register ash key-3")
    with pytest.raises(ProcessError):
        world.coordinator.readmit({"oak": "key-1", "ash": "key-3"})
    assert "forget 2" in world.did
    assert written(world) == {"1": "oak"}


def test_a_link_that_died_meanwhile_knows_the_new_keys_when_it_is_back(world):
    world.link.code = -9
    assert not world.coordinator.readmit({"oak": "key-1"})
    assert world.did == []
    world.coordinator.control.keys.clear()
    world.coordinator.control.given = 0
    world.tend()
    assert [what for what in world.did if what.startswith("register")] == ["register oak key-1"]
    assert written(world) == {"1": "oak"}


def test_a_link_that_lives_and_refuses_is_an_error(world):
    world.broken.add("nodes")
    with pytest.raises(ProcessError):
        world.coordinator.readmit({"oak": "key-1"})


# ---- the operator's commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return project(tmp_path_factory.mktemp("t") / "liver", keys="central").folder


@pytest.fixture
def made(template, tmp_path):
    return shutil.copytree(template, tmp_path / "liver")


class FakeClient:
    """Stands for the Control API of a SuperLink; `stubborn` nodes are not forgotten."""

    known: dict
    stubborn = ()
    away = False

    def __init__(self, address, ca):
        assert address == "127.0.0.1:9093"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def register(self, path, *, site):
        self.nodes()
        pem = control.load_public_key(path, site=site).public_bytes(
            control.Encoding.PEM, control.PublicFormat.SubjectPublicKeyInfo
        )
        return next((n for n, key in self.known.items() if key == pem), None) or self._new(pem)

    def _new(self, pem):
        self.known[len(self.known) + 1] = pem
        return len(self.known)

    def nodes(self):
        if self.away:
            raise ProcessError("Cannot list the sites: the SuperLink does not answer.")
        return [NodeInfo(node, "online", key) for node, key in self.known.items()]

    def unregister(self, node):
        if node in self.stubborn:
            raise ProcessError("Cannot unregister a site's key: the SuperLink answered UNKNOWN.")
        del self.known[node]
        return True


@pytest.fixture
def run(made, monkeypatch):
    FakeClient.known, FakeClient.stubborn, FakeClient.away = {}, (), False
    monkeypatch.setattr(control, "ControlClient", FakeClient)

    def call(*words):
        return CliRunner().invoke(site_app, [*words, "--project", str(made)], env={"COLUMNS": "250"})

    return call


def test_a_revoked_key_is_forgotten_at_once(run):
    assert "oak  registered, online" in run("register").output
    done = run("revoke", "oak", "--reason", "laptop stolen")
    assert done.exit_code == 0
    assert "has forgotten the key; its next call is refused" in done.output
    assert len(FakeClient.known) == 1
    assert "forgotten" not in run("register").output


def test_a_revocation_stands_though_no_superlink_answers(run):
    FakeClient.away = True
    done = run("revoke", "oak", "--reason", "laptop stolen")
    assert done.exit_code == 0
    assert "Site oak is revoked" in done.output
    assert "forgets the key by itself within seconds" in done.output
    assert "wardround site register --project" in done.output
    assert json.loads(run("revoke", "elm", "--reason", "left", "--json").output)["superlink"] == "silent"


def test_a_superlink_that_never_knew_the_key_is_said_so(run):
    assert "did not know the key" in run("revoke", "oak", "--reason", "left").output


def test_register_takes_away_what_is_not_admitted_and_names_what_stays(run, pki, made):
    run("register")
    FakeClient.known[7] = (
        control.load_public_key(pki.site_public["oak"])
        .public_bytes(control.Encoding.PEM, control.PublicFormat.SubjectPublicKeyInfo)
    )  # fmt: skip
    assert json.loads(run("register", "--json").output)["removed"] == [{"node": 7, "alias": ""}]
    run("register")
    FakeClient.stubborn = (2,)
    run("revoke", "oak", "--reason", "left")
    shown = run("register")
    assert shown.exit_code == 10
    assert "knows a revoked key of site oak" in shown.output
    assert "flwr supernode unregister 2 wardround" in shown.output
    assert "elm" in shown.output
    assert isinstance(run("revoke", "oak", "--reason", "left").exception, ConfigError)
