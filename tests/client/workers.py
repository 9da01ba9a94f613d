"""The worker's real service over fake sites, and how a relay calls it."""

import time
from contextlib import contextmanager

import grpc

import common
from client.relay import call_worker
from client.worker import Service, make_server
from common.events import EventLog, read_events
from common.wire import decode

SECRET = "/mnt/pacs/Mueller_Hans/17.dcm"
PARTS = {"head": b"question", "p.model": bytes(3_000_000)}


class FakeSite:
    """A site whose work a test decides."""

    def __init__(self, alias, folder, work=None):
        self.alias, self.device = alias, "cpu"
        self.events = EventLog(folder / f"{alias}.jsonl", "worker", site=alias)
        self.read_events = lambda: list(read_events(folder / f"{alias}.jsonl"))
        self.work = work or (lambda parts, check: {"head": b"done by " + alias.encode()})
        self.calls = []
        self.failures = []

    def ping(self, parts):
        return {"head": b"pong"}

    def failed(self, parts):
        self.failures.append(parts)

    def close(self):
        pass

    def handle(self, parts, check_cancelled, *, consume=False):
        self.calls.append(parts)
        return self.work(parts, check_cancelled)


@contextmanager
def served(folder):
    """Give a function that serves sites on a socket in a folder and returns how to call them."""
    servers = []

    def start(*sites):
        service = Service({site.alias: site for site in sites})
        server, checks = make_server(service, folder / "run" / "w.sock")
        servers.append(server)
        start.service, start.server, start.checks, start.path = (
            service,
            server,
            checks,
            folder / "run" / "w.sock",
        )
        return lambda site="alpha", parts=PARTS: call_worker(
            str(start.path), parts, timeout=20, site=site, connect=10
        )

    yield start
    for server in servers:
        server.stop(0).wait()


def channel(path):
    return grpc.insecure_channel(f"unix:{path}")


def failed(parts):
    envelope = decode(parts)
    assert envelope.failure
    assert SECRET not in repr(parts)
    assert envelope.software == common.__version__
    return envelope.site, *envelope.failure


def wait_until(condition, seconds=10.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.005)
