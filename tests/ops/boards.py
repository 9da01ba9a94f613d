"""Run folders at a moment of their life, and a dashboard over them that is asked by real HTTP requests."""

import http.client
import json
import os
import threading
from contextlib import contextmanager

from common.events import EVENT_SCHEMA
from ops.dashboard import Names, Server, Site
from ops.dashboard_pages import Reports
from ops.dashboard_runs import Board
from tests.ops.sample_events import Sample

PLAIN = "<!doctype html>\n<html><head></head>\n<body>\n<main>\n<p>the report</p></main></body></html>"


def newest(folder):
    times = [
        json.loads(line)["t"]
        for path in folder.glob("events*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return max(times)


def settled(folder):
    """Let a sample's files be as old as its events, and return the time of the newest."""
    when = newest(folder)
    for path in folder.iterdir():
        os.utime(path, (when, when))
    return when


def written(folder, **fields):
    """Write a sample and return (folder, time of its newest event)."""
    Sample(**fields).write(folder)
    return folder, settled(folder)


def tell(folder, *events, file="events.jsonl", process="server"):
    """Append events to a run and settle it."""
    with (folder / file).open("a") as lines:
        for event in events:
            lines.write(json.dumps({"v": EVENT_SCHEMA, "process": process, **event}) + "\n")
    return settled(folder)


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


class Page:
    def __init__(self, response, body):
        self.status, self.headers, self.body = response.status, response.headers, body

    @property
    def text(self):
        return self.body.decode()


class Browser:
    """Asks a server, under the host name that it is given."""

    def __init__(self, server):
        self.port = server.server_address[1]

    def ask(self, target, method="GET", *, host=None, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, target, skip_host=True)
            for name in (
                [f"127.0.0.1:{self.port}"] if host is None else [host] if isinstance(host, str) else host
            ):
                connection.putheader("Host", name)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return Page(response, response.read())
        finally:
            connection.close()

    def rows(self):
        return {row["name"]: row for row in json.loads(self.ask("/api/runs.json").text)["runs"]}


@contextmanager
def served(folder, clock, *, names=(), render=lambda story, folder: PLAIN, **options):
    """Serve a folder on a free port; yields (browser, site)."""
    board = Board(folder, clock=clock, least=0.0, **options)
    site = Site(board, Reports(render))
    with Server("127.0.0.1", 0, site, Names(names)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield Browser(server), site
        finally:
            server.shutdown()
            thread.join(10)
