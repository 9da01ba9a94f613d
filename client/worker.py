"""The worker: the process of a hospital that has the volumes and the GPU, and no network.

    python -m client.worker site.toml [more-site.toml ...]

It listens on a Unix socket that only its own user may open, answers one piece of work at a time, and keeps decoded
volumes, network and CUDA context between messages. A call that breaks is answered with a failure and changes nothing;
a call whose relay went away is cancelled at the next step. Several site files make one process serve several sites
(simulation). Health is answered by the standard gRPC health service.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import common
from client.site import Site
from client.site_config import SiteConfig, read_site_config
from common.config import RunConfig  # noqa: F401  imported early so that the first message does not pay for it
from common.errors import VERDICT, CancelledError, ConfigError, WardroundError, WorkerError, safe_sentence
from common.events import EventLog
from common.frames import Parts, from_frames, to_frames
from common.proto import wardround_pb2 as pb
from common.proto.wardround_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from common.wire import PING, WIRE_SCHEMA, read_header

log = logging.getLogger("wardround.worker")
HANDLERS = 4  # one works, the others answer health and refuse politely
STOP_SECONDS = 5.0


class Service(WorkerServicer):
    """Answers the relay's calls, one at a time.

    Args:
        sites: The sites of this process by alias.
    """

    def __init__(self, sites: dict[str, Site]) -> None:
        self.sites = sites
        self._working = threading.Lock()
        self.stopping = threading.Event()

    def Handle(
        self, request_iterator: Iterable[pb.Frame], context: grpc.ServicerContext
    ) -> Iterator[pb.Frame]:
        """Do one message's work."""
        alias = dict(context.invocation_metadata()).get("wardround-site", "")
        gone = threading.Event()
        if not context.add_callback(gone.set):  # the relay went away before the work began
            gone.set()
        yield from to_frames(self.answer(alias, request_iterator, gone))

    def answer(self, alias: str, frames: Iterable[pb.Frame], gone: threading.Event) -> Parts:
        """Return the answer's parts; every error becomes a failure with a safe sentence."""

        def check_cancelled() -> None:
            if gone.is_set() or self.stopping.is_set():
                raise CancelledError("The work was cancelled: nobody waits for its answer any more.")

        site: Site | None = None
        try:
            parts = _received(frames)
            site = self._site(alias)
            if _is_ping(parts):
                return site.ping(parts)
            self._wait_for_turn(check_cancelled)
            try:
                return self._work(site, parts, check_cancelled)
            finally:
                self._working.release()
        except Exception as error:  # a broken call must not end the worker
            name = site.alias if site else "worker"
            detail = f" [{error.detail}]" if isinstance(error, WardroundError) and error.detail else ""
            expected = isinstance(error, WardroundError)
            log.error(
                "%s: %s%s",
                name,
                error if expected else "unexpected failure",
                detail,
                exc_info=None if expected else error,
            )
            if site:
                code, message = safe_sentence(error)
                site.events.emit("warning", code=code, message=message)
                site.events.emit("phase", phase="idle")
            return failure(error, name)

    @staticmethod
    def _work(site: Site, parts: Parts, check_cancelled: Callable[[], None]) -> Parts:
        try:
            return site.handle(parts, check_cancelled, consume=True)
        except Exception as error:
            site.failed(failure(error, site.alias))
            raise

    def _site(self, alias: str) -> Site:
        index = alias.removeprefix("partition:")
        if index != alias and index.isascii() and index.isdigit() and int(index) < len(self.sites):
            return list(self.sites.values())[int(index)]
        if alias in self.sites:
            return self.sites[alias]
        raise WorkerError(
            f"This worker serves {', '.join(self.sites)}, the SuperNode says it is '{alias[:64]}': "
            "give the SuperNode the alias of the site's own configuration."
        )

    def _wait_for_turn(self, check_cancelled: Callable[[], None]) -> None:
        while not self._working.acquire(timeout=0.2):
            check_cancelled()


def _received(frames: Iterable[pb.Frame]) -> Parts:
    try:
        return from_frames(frames)
    except grpc.RpcError as error:
        raise CancelledError("The relay went away before its message was whole.") from error


def _is_ping(parts: Parts) -> bool:
    try:
        return read_header(parts).phase == PING
    except WardroundError:  # the site says what is wrong with it, and notes it
        return False


def failure(error: BaseException, site: str) -> Parts:
    """Return the parts of an answer that says why there is none."""
    code, message = safe_sentence(error)
    header = pb.Header(
        schema=WIRE_SCHEMA,
        software=common.__version__,
        site=site,
        failure=pb.Failure(code=code, message=message),
    )
    return {"head": header.SerializeToString(deterministic=True)}


def claim_socket(path: Path) -> None:
    """Make the socket's folder and take away a dead worker's socket.

    Raises:
        ConfigError: Another worker answers there, the path holds something else or is too long for a Unix socket.
    """
    if len(os.fsencode(path)) > 100:
        raise ConfigError(
            "The worker's socket path is too long for a Unix socket (100 bytes). Choose a shorter one.",
            detail=str(path),
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.path.lexists(path):
            return
        if not path.is_socket():
            raise ConfigError(
                "The worker's socket path holds something that is no socket; it is left alone. Choose another path.",
                detail=str(path),
            )
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # a connection to a Unix socket is made at once or not at all
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
            except BlockingIOError:
                pass  # its queue is full: it is busy, not dead
    except OSError as error:
        raise ConfigError(
            "The worker's socket cannot be opened. Check the folder's permissions.",
            detail=f"{path}: {error}",
        ) from error
    raise ConfigError(
        "Another worker already answers on this site's socket. Stop it first.", detail=str(path)
    )


def make_server(service: Service, path: Path) -> tuple[grpc.Server, health.HealthServicer]:
    """Return a started gRPC server on the socket; only its own user may connect."""
    claim_socket(path)
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    server = grpc.server(futures.ThreadPoolExecutor(HANDLERS), options=options)
    add_WorkerServicer_to_server(service, server)
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    before = os.umask(0o177)
    try:
        if not server.add_insecure_port(f"unix:{path}"):
            raise ConfigError(
                "The worker's socket cannot be opened. Check the folder's permissions.", detail=str(path)
            )
        server.start()
    finally:
        os.umask(before)
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    return server, checks


def build_sites(configs: list[SiteConfig]) -> dict[str, Site]:
    """Make the sites of this process.

    Raises:
        ConfigError: Two sites with one alias or one home, or with different sockets.
    """
    aliases, homes = {config.alias for config in configs}, {config.home.absolute() for config in configs}
    if not len(aliases) == len(homes) == len(configs) or len({config.socket for config in configs}) != 1:
        raise ConfigError("Sites of one worker need different aliases, different homes and the same socket.")
    sites = {}
    for config in configs:
        config.home.mkdir(parents=True, exist_ok=True)
        events = EventLog(
            config.events or config.home / f"events-{config.alias}.jsonl", "worker", site=config.alias
        )
        sites[config.alias] = Site(config, events)
    return sites


def main(argv: list[str] | None = None) -> int:
    """Run the worker until it is told to stop."""
    parser = argparse.ArgumentParser(prog="wardround-worker", description=__doc__.split("\n")[0])
    parser.add_argument("site", nargs="+", type=Path, help="site.toml of the hospital")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        configs = [read_site_config(path) for path in arguments.site]
        if configs[0].compute.threads:
            torch.set_num_threads(configs[0].compute.threads)
        service = Service(build_sites(configs))
        server, checks = make_server(service, configs[0].socket)
    except WardroundError as error:
        log.error("%s%s", error, f" [{error.detail}]" if error.detail else "")
        print(f"{VERDICT}{error}", file=sys.stderr, flush=True)  # noqa: T201 what a supervisor may quote
        return error.exit_code
    log.info("worker of %s ready on %s", ", ".join(service.sites), next(iter(service.sites.values())).device)
    stop.wait()
    service.stopping.set()
    checks.enter_graceful_shutdown()
    server.stop(STOP_SECONDS).wait()
    for site in service.sites.values():
        site.close()
    configs[0].socket.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
