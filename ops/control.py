"""The coordinator's control over its SuperLink by Flower's Control API: register sites, start and watch runs.

The `flwr` command does the same calls but takes seconds for each, reads a connection from a configuration
file and prints for people. Everything of Flower's that this needs is imported here and nowhere else in
`ops`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import grpc
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.cli.build import build_fab_from_files
from flwr.cli.utils import collect_files
from flwr.common.constant import Status, SubStatus
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.control_pb2_grpc import ControlStub
from flwr.supercore.constant import NodeStatus
from flwr.supercore.fab import Fab
from flwr.supercore.grpc import create_channel
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor

import common
from common.errors import ConfigError, CredentialError, ProcessError
from ops.pki import load_public_key

CALL_SECONDS = 20.0
LINK_SECONDS = 180.0
LOOK_SECONDS = 0.25
DOUBT_SECONDS = 10.0
"""A SuperLink that is being replaced may show its old certificate for so long."""
ONLINE: str = NodeStatus.ONLINE
FINISHED: str = Status.FINISHED
COMPLETED: str = SubStatus.COMPLETED

BUNDLE_TEXT = """\
[project]
name = "wardround"
version = "{version}"
description = "Names the installed app; carries no code."

[tool.flwr.app]
publisher = "wardround"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.relay:app"

[tool.flwr.app.config]
wardround = ""
"""


@dataclass(frozen=True)
class NodeInfo:
    """A registered SuperNode.

    Attributes:
        node_id: Flower's id.
        status: "registered" (never seen), "online" or "offline".
        public_key: PEM.
    """

    node_id: int
    status: str
    public_key: bytes

    @property
    def online(self) -> bool:
        """Whether it is connected now (a killed one counts as connected until its heartbeat is missed)."""
        return self.status == ONLINE


class RunStatus(NamedTuple):
    """Where a run stands, in Flower's words."""

    status: str
    sub_status: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether it ended, however."""
        return self.status == FINISHED

    @property
    def completed(self) -> bool:
        """Whether it ended well."""
        return self.finished and self.sub_status == COMPLETED


def bundle() -> bytes:
    """Return Flower's app bundle of wardround: two names of installed modules and one config key.

    It carries no code, since a site runs what it installed. Same version, same bytes.
    """
    return _build({"pyproject.toml": BUNDLE_TEXT.format(version=common.__version__).encode()})


def bundle_from(app: Path) -> bytes:
    """Return the bundle of a Flower app in a folder.

    Raises:
        ConfigError: The folder has no app, or one that Flower refuses.
    """
    if not (app / "pyproject.toml").is_file():
        raise ConfigError("The app's folder has no pyproject.toml.", detail=str(app))
    return _build(dict(collect_files(app.resolve())))


def _build(files: Mapping[str, bytes | Path]) -> bytes:
    try:
        return build_fab_from_files(files)[0]
    except ValueError as error:
        raise ConfigError(
            "Flower refuses the app's bundle; its reason is in the detail.", detail=str(error)
        ) from error


class ControlClient:
    """Calls a SuperLink's Control API.

    Args:
        address: HOST:PORT, by a name of the server's certificate.
        ca: The authority that signed it (PEM).

    Raises:
        CredentialError: The authority's file cannot be read.
    """

    def __init__(self, address: str, ca: Path) -> None:
        try:
            authority = ca.read_bytes()
        except OSError as error:
            raise CredentialError("The authority's certificate cannot be read.", detail=str(error)) from error
        self._channel = create_channel(
            server_address=address,
            insecure=False,
            root_certificates=authority,
            interceptors=[RuntimeVersionClientInterceptor(component_name="flwr CLI")],
        )
        self._stub = ControlStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def alive(self) -> bool:
        """Return whether the SuperLink answers.

        Raises:
            CredentialError: Somebody answers with a certificate of another authority.
        """
        try:
            self.nodes()
        except ProcessError:
            return False
        return True

    def register(self, public_key: Path, *, site: str = "") -> int:
        """Allow a site's key and return the node id; the same one for a key that is allowed already.

        Args:
            public_key: The site's public key (OpenSSH line).
            site: Alias for errors.

        Raises:
            CredentialError: The key cannot be read, or Flower does not take it.
            ProcessError: The SuperLink does not answer.
        """
        pem = load_public_key(public_key, site=site).public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )
        for node in self.nodes():
            if node.public_key == pem:
                return node.node_id
        with _translated("register a site's key"):
            answer = self._stub.RegisterNode(RegisterNodeRequest(public_key=pem), timeout=CALL_SECONDS)
        return int(answer.node_id)

    def nodes(self) -> list[NodeInfo]:
        """Return the registered SuperNodes in the order of their registration.

        Raises:
            CredentialError: The server's certificate is not of this authority.
            ProcessError: The SuperLink does not answer.
        """
        with _translated("list the sites"):
            answer = self._stub.ListNodes(ListNodesRequest(), timeout=CALL_SECONDS)
        known = [node for node in answer.nodes_info if node.status != NodeStatus.UNREGISTERED]
        return [
            NodeInfo(int(node.node_id), str(node.status), bytes(node.public_key))
            for node in sorted(known, key=lambda node: str(node.registered_at))
        ]

    def unregister(self, node_id: int) -> bool:
        """Let the SuperLink forget a node: its key's next call is refused. False if it is not known (any more).

        Raises:
            ProcessError: The SuperLink does not answer, or goes on knowing it.
        """
        if not self._knows(node_id):
            return False
        try:
            with _translated("unregister a site's key"):
                self._stub.UnregisterNode(UnregisterNodeRequest(node_id=node_id), timeout=CALL_SECONDS)
        except ProcessError:
            # Flower 1.32.1 forgets a node that was never connected, and then stumbles over it: what it knows now decides.
            if self._knows(node_id):
                raise
        return True

    def _knows(self, node_id: int) -> bool:
        return any(node.node_id == node_id for node in self.nodes())

    def start_run(self, fab: bytes, overrides: Mapping[str, str | int | float | bool] | None = None) -> int:
        """Submit a run and return its id.

        Args:
            fab: From `bundle` or `bundle_from`.
            overrides: Values for the keys of the app's config.

        Raises:
            ConfigError: A key that the app's config does not have, or a bundle that the SuperLink refuses.
            ProcessError: The SuperLink does not answer.
        """
        request = StartRunRequest(
            fab=fab_to_proto(Fab("", fab, {})), override_config=user_config_to_proto(dict(overrides or {}))
        )
        with _translated("start the run"):
            answer = self._stub.StartRun(request, timeout=CALL_SECONDS)
        if not answer.HasField("run_id"):
            raise ConfigError("The SuperLink refuses the app's bundle; its log says why.")
        return int(answer.run_id)

    def run_status(self, run_id: int) -> RunStatus:
        """Return where a run stands.

        Raises:
            ProcessError: The SuperLink does not answer, or does not know the run.
        """
        with _translated("look at the run"):
            answer = self._stub.ListRuns(ListRunsRequest(run_id=run_id), timeout=CALL_SECONDS)
        run = answer.run_dict[run_id]
        return RunStatus(run.status.status, run.status.sub_status, run.status.details)

    def stop_run(self, run_id: int) -> bool:
        """Stop a run; false if it had ended already.

        Raises:
            ProcessError: The SuperLink does not answer, or does not know the run.
        """
        if self.run_status(run_id).finished:
            return False
        with _translated("stop the run"):
            return bool(self._stub.StopRun(StopRunRequest(run_id=run_id), timeout=CALL_SECONDS).success)


def register(control: ControlClient, keys: Mapping[str, Path]) -> dict[int, str]:
    """Register the sites' public keys; those that are known already stay.

    Args:
        control: The SuperLink's Control API.
        keys: Public key's file by alias.

    Returns:
        Alias by Flower's node id.

    Raises:
        CredentialError: A key cannot be read.
        ProcessError: The SuperLink does not answer.
    """
    return {control.register(key, site=alias): alias for alias, key in keys.items()}


def wait_for_link(
    control: ControlClient, pause: Callable[[float], None] = time.sleep, seconds: float = LINK_SECONDS
) -> None:
    """Wait until a SuperLink answers.

    Raises:
        CredentialError: It shows a certificate of another authority, still after ten seconds.
        ProcessError: It does not answer in time.
    """
    limit = time.monotonic() + seconds
    doubt = time.monotonic() + DOUBT_SECONDS
    while True:
        try:
            if control.alive():
                return
        except CredentialError:
            if time.monotonic() > doubt:
                raise
        if time.monotonic() > limit:
            raise ProcessError(f"The SuperLink did not answer within {seconds:.0f} s; its log says why.")
        pause(LOOK_SECONDS)


@contextmanager
def _translated(task: str) -> Iterator[None]:
    """Turn gRPC's errors into ours; a foreign text goes into the detail."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        text = str(error.details() if isinstance(error, grpc.Call) else error)
        # One that is ending accepts a connection and breaks off the handshake: that says nothing of its certificate.
        broken_off = any(words in text.lower() for words in ("handshake read failed", "socket closed"))
        if code == grpc.StatusCode.UNAVAILABLE and "handshake" in text.lower() and not broken_off:
            raise CredentialError(
                f"Cannot {task}: the SuperLink's certificate was not signed by the given authority, or "
                "is for another name.",
                detail=text,
            ) from error
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise ProcessError(
                f"Cannot {task}: the SuperLink does not answer on its control port. Is it running?",
                detail=text,
            ) from error
        if code == grpc.StatusCode.NOT_FOUND:
            raise ProcessError(f"Cannot {task}: the SuperLink does not know it.", detail=text) from error
        if code == grpc.StatusCode.FAILED_PRECONDITION:
            raise ConfigError(
                f"Cannot {task}: the SuperLink refuses it; its reason is in the detail.", detail=text
            ) from error
        raise ProcessError(f"Cannot {task}: the SuperLink answered {code.name}.", detail=text) from error
