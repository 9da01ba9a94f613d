"""Named parts of a message as a stream of frames over the Unix socket between relay and worker. No torch here."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping

from common.errors import PayloadError
from common.proto.wardround_pb2 import Frame, PartStart

Parts = dict[str, bytes]

CHUNK_BYTES = 2_000_000  # below gRPC's default message limit, large enough to keep the copy count low


def shown(text: str) -> str:
    """Return text of the other end as it may stand in a sentence: short, without control characters."""
    cut = text[:64]
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def to_frames(parts: Mapping[str, bytes | bytearray | memoryview]) -> Iterator[Frame]:
    """Yield the frames of a message, chunk by chunk."""
    for name, data in parts.items():
        yield Frame(part=PartStart(name=name, nbytes=len(data)))
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            yield Frame(chunk=bytes(view[start : start + CHUNK_BYTES]))


def from_frames(frames: Iterable[Frame], *, limit: int = 4 << 30) -> Parts:
    """Collect the parts of a message.

    Args:
        frames: What came over the socket.
        limit: Most bytes a message may have.

    Raises:
        PayloadError: A chunk before its part, a part of another size than announced, a repeated part, too many bytes.
    """
    parts: dict[str, bytes] = {}
    # A BytesIO hands its bytes over without a copy: a large part is in memory once.
    name, expected, buffer, total = "", 0, io.BytesIO(), 0

    def close() -> None:
        if name:
            if buffer.tell() != expected:
                raise PayloadError(
                    f"Part '{shown(name)}' has {buffer.tell()} bytes, {expected} were announced: the stream broke off."
                )
            parts[name] = buffer.getvalue()

    for frame in frames:
        if frame.WhichOneof("frame") == "part":
            close()
            name, expected, buffer = frame.part.name, frame.part.nbytes, io.BytesIO()
            if not name or name in parts:
                raise PayloadError(f"Part '{shown(name)}' came twice or without a name.")
            total += expected
            if total > limit:
                raise PayloadError(f"The message has more than {limit} bytes; nothing was accepted.")
        else:
            if not name:
                raise PayloadError("The stream began with bytes of no part.")
            buffer.write(frame.chunk)
            if buffer.tell() > expected:
                raise PayloadError(f"Part '{shown(name)}' is longer than the {expected} bytes announced.")
    close()
    return parts
