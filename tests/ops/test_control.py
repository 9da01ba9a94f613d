"""The Control client against a TLS server of its own making: requests as Flower wants them, errors as we want them."""

import concurrent.futures
import io
import zipfile

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.cli.config_utils import load_and_validate
from flwr.common.config import fuse_dicts, get_fab_config
from flwr.proto import control_pb2 as pb
from flwr.proto.control_pb2_grpc import ControlServicer, add_ControlServicer_to_server
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run, RunStatus

import common
from common.errors import ConfigError, CredentialError, ProcessError
from ops import control
from ops.pki import load_public_key, make_trial_pki


class FakeSuperLink(ControlServicer):
    """Keeps what it was asked; answers what it was told."""

    def __init__(self):
        self.nodes = []
        self.requests = []
        self.runs = {}
        self.abort = None

    def _enter(self, request, context):
        self.requests.append(request)
        if self.abort:
            context.abort(*self.abort)

    def ListNodes(self, request, context):
        self._enter(request, context)
        return pb.ListNodesResponse(nodes_info=self.nodes, now="2025-01-01T00:00:00+00:00")

    def RegisterNode(self, request, context):
        self._enter(request, context)
        node = NodeInfo(node_id=2**63 + len(self.nodes), status="registered", public_key=request.public_key)
        node.registered_at = f"2025-01-01T00:00:0{len(self.nodes)}+00:00"
        self.nodes.append(node)
        return pb.RegisterNodeResponse(node_id=node.node_id)

    def StartRun(self, request, context):
        self._enter(request, context)
        return pb.StartRunResponse(run_id=2**63 + 5) if request.fab.content else pb.StartRunResponse()

    def ListRuns(self, request, context):
        self._enter(request, context)
        if request.run_id not in self.runs:
            context.abort(grpc.StatusCode.NOT_FOUND, "Run ID not found")
        return pb.ListRunsResponse(run_dict={request.run_id: self.runs[request.run_id]})

    def StopRun(self, request, context):
        self._enter(request, context)
        return pb.StopRunResponse(success=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return make_trial_pki(tmp_path_factory.mktemp("pki"), ["oak", "elm"])


@pytest.fixture
def link(pki):
    fake = FakeSuperLink()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    add_ControlServicer_to_server(fake, server)
    credentials = grpc.ssl_server_credentials([(pki.server_key.read_bytes(), pki.server_cert.read_bytes())])
    fake.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    server.start()
    yield fake
    server.stop(None).wait()


@pytest.fixture
def client(link, pki):
    with control.ControlClient(link.address, pki.ca) as made:
        yield made


def test_register_once_and_again(client, link, pki):
    oak = client.register(pki.site_public["oak"], site="oak")
    elm = client.register(pki.site_public["elm"], site="elm")
    assert client.register(pki.site_public["oak"]) == oak != elm
    pem = load_public_key(pki.site_public["oak"]).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert link.nodes[0].public_key == pem
    assert len(link.nodes) == 2


def test_nodes_in_order_of_registration(client, link, pki):
    for site in ("oak", "elm"):
        client.register(pki.site_public[site])
    link.nodes[1].status = "online"
    link.nodes.reverse()
    link.nodes.append(NodeInfo(node_id=1, status="unregistered"))
    nodes = client.nodes()
    assert [node.node_id for node in nodes] == [2**63, 2**63 + 1]
    assert [node.online for node in nodes] == [False, True]


def test_run_is_started_watched_and_stopped(client, link):
    run = client.start_run(control.bundle(), {"wardround": '{"seed": 3}'})
    assert run == 2**63 + 5
    request = link.requests[-1]
    assert request.override_config["wardround"].string == '{"seed": 3}'
    assert request.fab.content == control.bundle()
    link.runs[run] = Run(run_id=run, status=RunStatus(status="running"))
    assert client.run_status(run) == ("running", "", "")
    assert not client.run_status(run).finished
    assert client.stop_run(run)
    assert isinstance(link.requests[-1], pb.StopRunRequest)
    link.runs[run] = Run(run_id=run, status=RunStatus(status="finished", sub_status="failed", details="why"))
    status = client.run_status(run)
    assert (status.finished, status.completed, status.details) == (True, False, "why")
    assert not client.stop_run(run)
    assert not isinstance(link.requests[-1], pb.StopRunRequest)
    link.runs[run].status.sub_status = "completed"
    assert client.run_status(run).completed


def test_unknown_run_and_empty_bundle(client):
    with pytest.raises(ProcessError, match="does not know it"):
        client.run_status(1)
    with pytest.raises(ConfigError, match="refuses the app's bundle"):
        client.start_run(b"")


@pytest.mark.parametrize(
    ("code", "kind", "sentence"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, ConfigError, "refuses it"),
        (grpc.StatusCode.UNAVAILABLE, ProcessError, "does not answer"),
        (grpc.StatusCode.INTERNAL, ProcessError, "answered INTERNAL"),
    ],
)
def test_errors_are_translated_and_foreign_text_stays_in_the_detail(client, link, code, kind, sentence):
    link.abort = (code, "/srv/secret/path broke")
    with pytest.raises(kind, match=sentence) as caught:
        client.start_run(b"x")
    assert "/srv" not in str(caught.value)
    assert "/srv" in caught.value.detail


def test_other_authority_is_a_credential_error(link, tmp_path):
    other = make_trial_pki(tmp_path, [])
    with (
        control.ControlClient(link.address, other.ca) as client,
        pytest.raises(CredentialError, match="not signed by the given authority"),
    ):
        client.alive()


def test_nobody_there(pki):
    with control.ControlClient("127.0.0.1:1", pki.ca) as client:
        assert not client.alive()
        with pytest.raises(ProcessError, match="does not answer on its control port"):
            client.nodes()


def test_alive_once_it_answers(client):
    assert client.alive()


def test_authority_that_cannot_be_read(tmp_path):
    with pytest.raises(CredentialError, match="cannot be read") as caught:
        control.ControlClient("127.0.0.1:1", tmp_path / "absent.crt")
    assert str(tmp_path) not in str(caught.value)


def test_bundle_is_an_app_without_code(tmp_path):
    made = control.bundle()
    assert made == control.bundle()
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]
        (tmp_path / "pyproject.toml").write_bytes(archive.read("pyproject.toml"))
    config, warnings = load_and_validate(tmp_path / "pyproject.toml", check_module=True)
    assert config["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "server.app:app",
        "clientapp": "client.relay:app",
    }
    assert warnings == ['Recommended property "license" missing in [project]']
    assert config["project"]["version"] == common.__version__
    fuse_dicts(get_fab_config(made)["tool"]["flwr"]["app"]["config"], {"wardround": "{}"})


def test_bundle_of_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"no pyproject\.toml"):
        control.bundle_from(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(ConfigError, match="Flower refuses"):
        control.bundle_from(tmp_path)
    text = control.BUNDLE_TEXT.format(version="1.0")
    (tmp_path / "pyproject.toml").write_text(text)
    (tmp_path / "app.py").write_text("x = 1\n")
    with zipfile.ZipFile(io.BytesIO(control.bundle_from(tmp_path))) as archive:
        assert "app.py" in archive.namelist()
