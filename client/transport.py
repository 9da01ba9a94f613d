"""How many bytes a gRPC connection carries, counted at the end that makes the calls.

Messages and metadata are measured call by call; what HTTP/2 and TLS add is estimated from the constants below, which
were fitted to a byte-counting TCP proxy (tests/e2e/test_runtime.py repeats the comparison and allows 3 %). TCP and IP
headers are not counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import grpc

CALL_UP, CALL_DOWN = 100, 102
"""Bytes of a call beside its message and its own metadata: frames, indexed headers, TLS records, window updates."""

FRAME_BYTES, FRAME_OVERHEAD = 16_384, 31
"""A message is cut into frames and TLS records of this size, each with 9 bytes of HTTP/2 and 22 of TLS 1.3."""

ACK_BYTES, ACK_OVERHEAD = 65_536, 60
"""For so much that arrives, the receiver sends window updates and pings back."""

HANDSHAKE_UP, HANDSHAKE_DOWN = 800, 1800
"""TLS 1.3 handshake and HTTP/2 settings of a connection, with one certificate of an elliptic-curve key."""

FIELD_OVERHEAD = 3
"""A header field that is not indexed: one byte of type, two lengths."""


class TransportCounter:
    """Sums of what went up and came down; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._down = 0
        self._up = 0
        self._calls = 0

    def snapshot(self) -> tuple[int, int, int]:
        """Return (bytes down, bytes up, calls) since the start."""
        with self._lock:
            return self._down, self._up, self._calls

    def add_call(self, *, up: int, down: int, metadata: Iterable[tuple[str, str | bytes]] = ()) -> None:
        """Count a call.

        Args:
            up: Bytes of the serialized request.
            down: Bytes of the serialized response, 0 if none came.
            metadata: What the request carried beside it.
        """
        fields = sum(len(key) + len(value) + FIELD_OVERHEAD for key, value in metadata)
        with self._lock:
            self._calls += 1
            self._up += CALL_UP + fields + _framed(up) + _acknowledged(down)
            self._down += CALL_DOWN + _framed(down) + _acknowledged(up)

    def watch(self, channel: grpc.Channel) -> None:
        """Count the handshake of every connection that the channel makes."""
        channel.subscribe(self._on_change)

    def _on_change(self, state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            with self._lock:
                self._up += HANDSHAKE_UP
                self._down += HANDSHAKE_DOWN


class TransportInterceptor(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Counts every call; must be the innermost interceptor, to see all metadata.

    Args:
        counter: Gets the sums.
    """

    def __init__(self, counter: TransportCounter) -> None:
        self._counter = counter

    def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Any], details: Any, request: Any
    ) -> Any:
        """Make the call and count it when it is done."""
        call = continuation(details, request)
        up, metadata = request.ByteSize(), tuple(details.metadata or ())

        def count(done: Any) -> None:
            down = done.result().ByteSize() if done.code() == grpc.StatusCode.OK else 0
            self._counter.add_call(up=up, down=down, metadata=metadata)

        call.add_done_callback(count)
        return call


def _framed(size: int) -> int:
    return size + size // FRAME_BYTES * FRAME_OVERHEAD


def _acknowledged(size: int) -> int:
    return size // ACK_BYTES * ACK_OVERHEAD
