"""The launcher of relays: forks one for every message, from a process that has imported everything already.

    python -m client.forkexec --clientappio-address 127.0.0.1:9094 --superexec-auth-secret-file FILE

Flower's own launcher starts a new Python for every message, about one CPU second each; a fork costs a tenth.
Three kinds of processes, because a process with gRPC threads must not fork:

- the launcher imports, never opens a channel, has one thread; it forks the others and waits for them
- the poller, its first child, asks the SuperNode for tasks, claims one at a time, passes its token through a pipe
- a relay, one per token, is Flower's `run_clientapp` with the app that this hospital installed; the
  coordinator's bundle is neither unpacked nor imported

A relay that dies hard (killed, out of memory) never gets its token used again for work; a fresh fork
answers in its place that it is gone, so the coordinator hears it at once and not after Flower's minute of
missed heartbeats. When the launcher dies, however, the kernel takes the others along. It ends with 0 when
told to (SIGTERM, SIGINT), else with an error's code, for a supervisor to restart it.
"""

from __future__ import annotations

import os

# Before numpy comes: the threads it would start would be there at the fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import gc
import importlib
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

import grpc
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_from_proto
from flwr.proto.appio_pb2 import ClaimTaskRequest, PullAppMessagesRequest, PullPendingTasksRequest
from flwr.proto.clientappio_pb2_grpc import ClientAppIoStub
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.constant import TaskType
from flwr.supercore.grpc import create_channel
from flwr.supercore.interceptors import (
    AppIoTokenClientInterceptor,
    RuntimeVersionClientInterceptor,
    SuperExecAuthClientInterceptor,
)
from flwr.supercore.interceptors.superexec_auth_interceptor import CLIENTAPPIO_SUPEREXEC_METHODS
from flwr.supercore.utils import disable_process_dumping
from flwr.supernode.runtime import run_clientapp as runtime

from client import forking
from common import flower_fast
from common.errors import ConfigError, CredentialError, ProcessError, WardroundError

POLL_SECONDS = 0.1
LONGEST_POLL_SECONDS = 1.0
REPORT_SECONDS = 5
FLOWER_EXITS = (0, 1)
"""How Flower's ClientApp process ends when it has answered, well or not."""


@dataclass(frozen=True)
class Task:
    """A claimed task as the poller tells the launcher: run id and the token for exactly one relay."""

    run_id: int
    token: str

    def line(self) -> bytes:
        """Return it as one line."""
        return f"{self.run_id} {self.token}\n".encode()

    @classmethod
    def parse(cls, line: bytes) -> Task:
        """Return the task of a line."""
        run_id, token = line.split()
        return cls(int(run_id), token.decode())


class Launcher:
    """Forks the poller, then a relay for every task that the poller claims.

    Args:
        address: Where the SuperNode serves its apps (HOST:PORT on loopback: the connection is not encrypted).
        secret: The secret shared with the SuperNode.
        poll: Shortest seconds between two questions for tasks; an idle launcher asks less often.
        belongs_to: A process whose end ends the launcher, 0 for none.
    """

    def __init__(self, address: str, secret: bytes, poll: float = POLL_SECONDS, belongs_to: int = 0) -> None:
        self._address = address
        self._secret = secret
        self._poll = poll
        self._belongs_to = belongs_to
        self._parent = forking.Parent()

    def run(self) -> NoReturn:
        """Serve until told to stop.

        Raises:
            SystemExit: Code 0 after SIGTERM or SIGINT.
            CredentialError: The SuperNode refuses the secret.
            ProcessError: The poller ended, or threads make forking unsafe.
        """
        forking.exit_on_stop_signals()
        gc.collect()
        gc.freeze()  # a relay's collector must not touch, and so copy, the pages it shares with the launcher
        mine, theirs = socket.socketpair()
        poller = 0
        try:
            poller = self._parent.fork(lambda: self._poll_for_tasks(theirs, mine))
            theirs.close()
            _say(f"ready: launcher {self._parent.pid}, poller {poller}, asking {self._address}")
            with mine, mine.makefile("rb") as tasks:
                while line := tasks.readline():
                    self._serve(Task.parse(line))
                    with contextlib.suppress(OSError):  # the poller is gone: the next line tells
                        mine.sendall(b".")  # now it may claim the next one
            code, _ = self._parent.wait(poller)
            raise _poller_ended(code)
        finally:
            forking.ignore_stop_signals()
            for child in list(self._parent.children):
                self._parent.kill(child)

    def _serve(self, task: Task) -> None:
        """Run one relay to its end, whatever that is."""
        started = time.monotonic()
        taken, told = os.pipe()
        relay = self._parent.fork(lambda: self._run_relay(task, told))
        os.close(told)
        try:
            code, used = self._parent.wait(relay)
            _say(
                f"task pid={relay} status={f'signal {-code}' if code < 0 else f'exit {code}'} "
                f"wall={time.monotonic() - started:.2f}s cpu={used.ru_utime + used.ru_stime:.2f}s "
                f"maxrss={used.ru_maxrss / 1024:.0f}MB"
            )
            if code not in FLOWER_EXITS:
                self._bury(task, taken)
        except (
            SystemExit
        ):  # told to stop: an end by SIGTERM would leave the SuperNode waiting for a reply for ever
            forking.ignore_stop_signals()
            self._parent.kill(relay)
            self._bury(task, taken)
            raise
        finally:
            os.close(taken)

    def _bury(self, task: Task, taken: int) -> None:
        """Answer for a dead relay, from a fork, and wait for it."""
        message = os.read(taken, 65536) if select.select([taken], [], [], 0)[0] else b""
        code, _ = self._parent.wait(self._parent.fork(lambda: self._answer_for_the_dead(task, message)))
        _say(
            "its end was reported"
            if code == 0
            else "its end could not be reported: Flower notices within a minute"
        )

    def _run_relay(self, task: Task, told: int) -> None:
        flower_fast.watch_relay_messages(lambda message: _write(told, message))
        runtime.run_clientapp(
            clientappio_api_address=self._address,
            token=task.token,
            insecure=True,
            parent_pid=None if forking.KERNEL_WATCHES else self._parent.pid,
        )

    def _answer_for_the_dead(self, task: Task, message: bytes) -> None:
        signal.alarm(REPORT_SECONDS)
        with _channel(self._address, AppIoTokenClientInterceptor(task.token)) as channel:
            stub = ClientAppIoStub(channel)
            if message:
                proto = ProtoMessage.FromString(message)
            else:  # it died before it took the message
                proto = stub.PullMessages(PullAppMessagesRequest()).messages_list[0]
            error = Error(code=ErrorCode.CLIENT_APP_CRASHED, reason="The relay ended hard.")
            reply = Message(error, reply_to=message_from_proto(proto))
            context = argparse.Namespace(node_id=proto.metadata.dst_node_id, run_id=task.run_id)
            runtime.push_message(stub, reply, context)  # type: ignore[arg-type]
            runtime.push_task_output(stub, None, SubStatus.FAILED, "The relay ended hard.")

    def _poll_for_tasks(self, pipe: socket.socket, other: socket.socket) -> None:
        """Pass claimed tasks to the launcher, one at a time; runs in the poller for ever."""
        other.close()
        disable_process_dumping(strict=False)  # it holds the secret
        signing = SuperExecAuthClientInterceptor(
            master_secret=self._secret, protected_methods=CLIENTAPPIO_SUPEREXEC_METHODS
        )
        wait_for(self._address, self._check_owner)
        with _channel(self._address, signing) as channel:
            stub = ClientAppIoStub(channel)
            busy = time.monotonic()
            while True:
                self._check_owner()
                task = _claim(stub)
                if task is not None:
                    pipe.sendall(task.line())
                    pipe.recv(1)
                    busy = time.monotonic()
                    continue
                waited = time.monotonic() - busy
                time.sleep(flower_fast.idle_seconds(waited, self._poll, LONGEST_POLL_SECONDS))

    def _check_owner(self) -> None:
        if self._belongs_to and not forking.runs(self._belongs_to):
            raise ProcessError("The process this launcher belongs to has ended.")


def wait_for(address: str, check: Callable[[], None], interval: float = 0.05) -> None:
    """Wait until somebody listens; gRPC's own reconnection would double its waits up to two minutes.

    Args:
        address: HOST:PORT.
        check: Called between two attempts; ends the wait by raising.
        interval: Seconds between two attempts.
    """
    host, _, port = address.rpartition(":")
    while True:
        check()
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except OSError:
            time.sleep(interval)
        else:
            return


def load_app(reference: str) -> ClientApp:
    """Import the installed ClientApp.

    Args:
        reference: MODULE:ATTRIBUTE.

    Raises:
        ConfigError: No such module or attribute, or it is no ClientApp.
    """
    module, _, attribute = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"The relay's app '{reference}' cannot be imported: expected MODULE:ATTRIBUTE of an installed app.",
            detail=f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(found, ClientApp):
        raise ConfigError(f"'{reference}' is no Flower ClientApp.")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the launcher from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m client.forkexec", description="Start a relay for every message."
    )
    parser.add_argument(
        "--clientappio-address", required=True, help="where the SuperNode serves apps, on loopback"
    )
    parser.add_argument(
        "--superexec-auth-secret-file", required=True, type=Path, help="secret shared with the SuperNode"
    )
    parser.add_argument("--app", default="client.relay:app", help="installed ClientApp (%(default)s)")
    parser.add_argument(
        "--poll", type=float, default=POLL_SECONDS, help="shortest seconds between questions (%(default)s)"
    )
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process ends")
    options = parser.parse_args(arguments)
    try:
        _check_loopback(options.clientappio_address)
        secret = _read_secret(options.superexec_auth_secret_file)
        app = load_app(options.app)
        for warning in flower_fast.apply(role="relay"):
            _say(f"warning: {warning}")
        if warnings := flower_fast.use_installed_app(app):
            raise ConfigError(f"The coordinator's bundle cannot be kept out of the relay. {warnings[0]}")
        Launcher(options.clientappio_address, secret, options.poll, belongs_to=options.parent_pid).run()
    except WardroundError as error:
        print(f"forkexec: {error} {error.detail}".rstrip(), file=sys.stderr, flush=True)  # noqa: T201 the site's log
        sys.exit(error.exit_code)


def _claim(stub: ClientAppIoStub) -> Task | None:
    """Return a task of the SuperNode, claimed; none if it has none, or cannot be reached now.

    Raises:
        CredentialError: It refuses the secret.
    """
    try:
        for task in stub.PullPendingTasks(PullPendingTasksRequest()).tasks:
            if task.type == TaskType.CLIENT_APP:
                token = stub.ClaimTask(ClaimTaskRequest(task_id=task.task_id)).token
                if token:
                    return Task(int(task.run_id), str(token))
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise CredentialError("The SuperNode refuses the secret.") from error
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise
    return None


@contextlib.contextmanager
def _channel(address: str, interceptor: grpc.UnaryUnaryClientInterceptor) -> Iterator[grpc.Channel]:
    interceptors = [RuntimeVersionClientInterceptor(component_name="SuperExec"), interceptor]
    channel = create_channel(server_address=address, insecure=True, interceptors=interceptors)
    try:
        yield channel
    finally:
        channel.close()


def _check_loopback(address: str) -> None:
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        if ip_address(host).is_loopback:
            return
    raise ConfigError(
        "The launcher's connection to the SuperNode is not encrypted: expected a loopback address such as "
        f"127.0.0.1:9094, got '{address}'."
    )


def _read_secret(path: Path) -> bytes:
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise CredentialError("The secret's file cannot be read.", detail=str(error)) from error
    if not secret:
        raise CredentialError("The secret's file is empty.", detail=str(path))
    return secret


def _poller_ended(code: int) -> WardroundError:
    if code == CredentialError.exit_code:
        return CredentialError(
            "The SuperNode refuses this launcher: give both the same file with --superexec-auth-secret-file."
        )
    return ProcessError("The process that asks the SuperNode for tasks has ended: restart the launcher.")


def _write(pipe: int, message: bytes) -> None:
    os.write(pipe, message)  # far less than a pipe holds


def _say(text: str) -> None:
    print(f"forkexec: {text}", flush=True)  # noqa: T201 stdout is this process's log


if __name__ == "__main__":
    main()
