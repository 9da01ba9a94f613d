"""The relay: the Flower ClientApp of a hospital. It carries parts between SuperNode and worker and looks at nothing.

Flower starts a process for every message, so nothing lives here: no torch, no MONAI, no data. The worker is reached
over a Unix socket whose place the hospital gave its SuperNode (`--node-config 'site="hospital-1" worker="/run/w.sock"'`).
Whatever goes wrong comes back as a failure with a code and a safe sentence; no exception text crosses the border.
"""

from __future__ import annotations

import os
import resource
import socket as sockets
import sys
import time

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import common
from common.errors import PayloadError, WorkerError, safe_sentence
from common.flower import from_record, to_record
from common.frames import Parts, from_frames, to_frames
from common.proto import wardround_pb2 as pb
from common.proto.wardround_pb2_grpc import WorkerStub

app = ClientApp()

CONNECT_SECONDS = 20.0  # a worker that is being restarted gets this long to come back
LOOK_SECONDS = 0.05
WIRE_SCHEMA = 1
CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def call_worker(
    socket: str, parts: Parts, *, timeout: float, site: str, connect: float = CONNECT_SECONDS
) -> Parts:
    """Send a message to the worker and return its answer.

    Args:
        socket: Path of the worker's Unix socket.
        parts: The message.
        timeout: Seconds the work may take.
        site: Alias, told to the worker (a simulation's worker holds many sites) and named in errors.
        connect: Seconds the worker may take to appear.

    Raises:
        WorkerError: No worker there, it went away, or the time was over.
        PayloadError: The answer broke off.
    """
    wait_for_worker(socket, connect, site)
    with grpc.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS) as channel:
        try:
            return from_frames(
                WorkerStub(channel).Handle(
                    to_frames(parts), timeout=timeout, metadata=(("wardround-site", site),)
                )
            )
        except grpc.RpcError as error:
            status = error.code().name if isinstance(error, grpc.Call) else "UNKNOWN"
            hint = {
                "UNAVAILABLE": "it ended during the call; look at the worker's log at the site, it may be restarted",
                "DEADLINE_EXCEEDED": "the work took longer than the round's deadline",
            }.get(status, "look at the worker's log at the site")
            raise WorkerError(
                f"{site}: the call to the worker broke ({status}): {hint}.", site=site
            ) from error


def wait_for_worker(socket: str, seconds: float, site: str) -> None:
    """Wait until somebody listens; gRPC's own way looks every 0.2 s only, and ever less often for one that is not there.

    Raises:
        WorkerError: Nobody does, or the relay may not connect.
    """
    limit = time.monotonic() + seconds
    while True:
        with sockets.socket(sockets.AF_UNIX) as probe:
            try:
                probe.connect(socket)
            except PermissionError as error:
                raise WorkerError(
                    f"{site}: the relay may not open the worker's socket. Run both as the same user.",
                    site=site,
                ) from error
            except OSError as error:
                if time.monotonic() >= limit:
                    raise WorkerError(
                        f"{site}: no worker answers on its socket after {seconds:.0f} s. Start the site's worker, then retry.",
                        site=site,
                    ) from error
            else:
                return
        time.sleep(LOOK_SECONDS)


def failure_parts(error: BaseException, site: str) -> Parts:
    """Return the parts of an answer that says only: this site could not, and why, safely."""
    code, message = safe_sentence(error)
    header = pb.Header(schema=WIRE_SCHEMA, software=common.__version__, site=site)
    header.failure.code, header.failure.message = code, message
    return {"head": header.SerializeToString(deterministic=True)}


def usage() -> dict[str, float]:
    """Return this process's CPU seconds and peak memory in MB (a forked relay counts from its fork)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}


def site_of(context: Context) -> tuple[str, str]:
    """Return (alias, socket) from the node's config; a simulation gives them through partition and environment.

    Raises:
        WorkerError: The SuperNode was started without them.
    """
    config = context.node_config
    socket = str(config.get("worker", "") or os.environ.get("WARDROUND_WORKER", ""))
    alias = str(config.get("site", ""))
    if not alias and "partition-id" in config:
        alias = f"partition:{config['partition-id']}"
    if not socket or not alias:
        raise WorkerError(
            'This SuperNode does not say which site it is. Start it with --node-config \'site="ALIAS" worker="SOCKET"\'.'
        )
    return alias, socket


def relay(message: Message, context: Context) -> Message:
    """Carry one message to the worker and its answer back."""
    site = "unknown-site"
    try:
        site, socket = site_of(context)
        parts = from_record(message.content)
        # The whole of it, not what is left by the clock: the coordinator's and the site's may differ by hours.
        answer = call_worker(socket, parts, timeout=max(message.metadata.ttl, 1.0), site=site)
        if "head" not in answer:
            raise PayloadError(f"{site}: the worker's answer has no header.", site=site)
    except (
        Exception
    ) as error:  # everything: Flower would send the raw text of an exception to the coordinator
        print(f"relay: {type(error).__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201 the site's own log
        answer = failure_parts(error, site)
    return Message(to_record(answer, usage()), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """First exchange."""
    return relay(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round."""
    return relay(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The closing evaluation."""
    return relay(message, context)
