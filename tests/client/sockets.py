"""A worker as the relay sees it: a real gRPC server on a Unix socket, whose work a test decides."""

import shutil
import tempfile
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc

from common.frames import from_frames, to_frames
from common.proto.wardround_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server


class FakeWorker(WorkerServicer):
    """Answers with what `work(site, parts, context)` returns."""

    def __init__(self, work):
        self.work = work

    def Handle(self, request_iterator, context):
        site = dict(context.invocation_metadata())["wardround-site"]
        yield from to_frames(self.work(site, from_frames(request_iterator), context))


@contextmanager
def serving(path, work):
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    add_WorkerServicer_to_server(FakeWorker(work), server)
    assert server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield server
    finally:
        server.stop(0).wait()


@contextmanager
def short_folder():
    """A folder whose path leaves room for a Unix socket's name (pytest's own may not)."""
    folder = Path(tempfile.mkdtemp(prefix="wr-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
