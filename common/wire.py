"""Envelopes to parts and back: what a message means, in typed bytes, checked where it arrives.

Down, a site gets the round's context, the run's configuration and the method's payloads; up, it answers with payloads,
metrics (numerators and denominators apart), seconds by phase, or a failure. The schema version is compared first: a
message of another version is refused with both values.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch
from google.protobuf.message import DecodeError

import common
from common.codecs import CODECS
from common.errors import MismatchError, PayloadError
from common.frames import Parts, shown
from common.payload import Kind, Payload, Payloads, Scalar
from common.proto import wardround_pb2 as pb

WIRE_SCHEMA = 1
MAX_DIMS = 64
MAX_VALUES = 1 << 59  # beyond it torch overflows where it counts strides, even of a tensor without values
HELLO, ROUND, CLOSING, PING = pb.HELLO, pb.ROUND, pb.CLOSING, pb.PING

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip

RAW = "raw"
Sums = dict[str, tuple[float, float]]


@dataclass
class Coded(Payload):
    """A payload of which some tensors travel as a codec's bytes (common/compress.py makes and reads them).

    Attributes:
        tensors: At the sender all, as the receiver will have them; at the receiver those that travelled as they are.
        codec: Name of a codec.
        data: Its bytes. What they mean is told by who knows the template: a few bytes may stand for many values.
        names: Those of `tensors` that `data` holds.
    """

    codec: str = ""
    data: bytes = b""
    names: frozenset[str] = frozenset()


@dataclass
class MetricSet:
    """Figures of one model on one split: sums to be divided last."""

    round: int
    split: str
    model: str
    cases: int
    sums: Sums
    primary: str


@dataclass
class Envelope:
    """One message in either direction."""

    run: str
    round: int
    phase: pb.Phase
    site: str
    rounds: int = 0
    payloads: Payloads = field(default_factory=dict)
    config: str = ""
    metrics: list[MetricSet] = field(default_factory=list)
    summary: str = ""
    cases: int = 0
    loss: float = float("nan")
    seconds: dict[str, float] = field(default_factory=dict)
    failure: tuple[str, str] | None = None
    device: str = ""
    software: str = common.__version__
    versions: dict[str, str] = field(default_factory=dict)
    ledger: str = ""


def encode(envelope: Envelope) -> Parts:
    """Return the parts of an envelope. Same envelope, same bytes."""
    header = pb.Header(
        schema=WIRE_SCHEMA, software=envelope.software, run=envelope.run, round=envelope.round, phase=envelope.phase,
        site=envelope.site, cases=envelope.cases, loss=envelope.loss, device=envelope.device, rounds=envelope.rounds,
        ledger=envelope.ledger, versions=dict(sorted(envelope.versions.items())),
    )  # fmt: skip
    for phase, seconds in sorted(envelope.seconds.items()):
        header.seconds[phase] = seconds
    if envelope.failure is not None:
        header.failure.code, header.failure.message = envelope.failure
    blobs: Parts = {}
    for name in sorted(envelope.payloads):
        head, blob = encode_payload(envelope.payloads[name])
        header.payloads.append(head)
        blobs[f"p.{name}"] = blob
    parts: Parts = {"head": header.SerializeToString(deterministic=True)}
    if envelope.config:
        parts["config"] = envelope.config.encode()
    if envelope.metrics:
        parts["metrics"] = _metrics_to_proto(envelope.metrics).SerializeToString(deterministic=True)
    if envelope.summary:
        parts["summary"] = envelope.summary.encode()
    return parts | blobs


def read_header(parts: Parts) -> pb.Header:
    """Parse and version-check a message's header.

    Raises:
        PayloadError: No header, or bytes that are none.
        MismatchError: Another schema version.
    """
    if "head" not in parts:
        raise PayloadError("The message has no header; is the other end wardround?")
    try:
        header = pb.Header.FromString(parts["head"])
    except DecodeError as error:
        raise PayloadError("The message's header cannot be parsed.") from error
    if header.schema != WIRE_SCHEMA:
        raise MismatchError(
            f"Wire schema {header.schema} (software {shown(header.software) or 'unknown'}) met schema {WIRE_SCHEMA} "
            f"(software {common.__version__}): install the same version at both ends."
        )
    return header


def decode(parts: Parts) -> Envelope:
    """Return the envelope of a message's parts.

    Raises:
        PayloadError: Anything malformed, missing, altered or left over.
        MismatchError: Another schema version.
    """
    header = read_header(parts)
    expected = {"head", "config", "metrics", "summary"} | {f"p.{head.name}" for head in header.payloads}
    if surplus := parts.keys() - expected:
        names = [shown(name) for name in sorted(surplus)[:3]]
        raise PayloadError(f"The message has parts that its header does not name: {names}.")
    payloads: Payloads = {}
    for head in header.payloads:
        if head.name in payloads:
            raise PayloadError(f"Payload '{shown(head.name)}' is named twice.")
        payloads[head.name] = decode_payload(head, parts.get(f"p.{head.name}"))
    return Envelope(
        run=header.run, round=header.round, phase=header.phase, site=header.site, rounds=header.rounds,
        payloads=payloads, config=_text(parts, "config"), metrics=_metrics_from_proto(parts.get("metrics", b"")),
        summary=_text(parts, "summary"), cases=header.cases, loss=header.loss, seconds=dict(header.seconds),
        failure=(header.failure.code, header.failure.message) if header.HasField("failure") else None,
        device=header.device, software=header.software, versions=dict(header.versions), ledger=header.ledger,
    )  # fmt: skip


def encode_payload(payload: Payload) -> tuple[pb.PayloadHead, bytes]:
    """Return a payload's head and its bytes (tensors in their given order, raw little-endian values; then a codec's bytes).

    Raises:
        PayloadError: A dtype that cannot travel.
    """
    coded = payload if isinstance(payload, Coded) else Coded(payload.name, payload.kind, codec=RAW)
    head = pb.PayloadHead(name=payload.name, kind=str(payload.kind), codec=coded.codec)
    chunks: list[memoryview] = []
    offset = 0
    for name, tensor in payload.tensors.items():
        if name in coded.names:
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise PayloadError(f"Payload '{payload.name}' tensor '{name}' is {dtype}, which cannot travel.")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        head.tensors.append(
            pb.TensorHead(name=name, dtype=dtype, shape=list(tensor.shape), offset=offset, nbytes=data.nbytes)
        )
        chunks.append(data)
        offset += data.nbytes
    blob = b"".join([*chunks, coded.data])
    head.nbytes = len(blob)
    head.sha256 = hashlib.sha256(blob).digest()
    for key, value in sorted(payload.meta.items()):
        try:
            _set_scalar(head.meta[key], value)
        except (TypeError, ValueError) as error:
            raise PayloadError(
                f"Payload '{payload.name}' note '{key}' is no text, 64-bit integer, number or flag."
            ) from error
    return head, blob


def decode_payload(head: pb.PayloadHead, blob: bytes | None) -> Payload:
    """Return the payload of a head and its bytes; the tensors own their memory. A codec's bytes stay as they are.

    Raises:
        PayloadError: Missing or altered bytes, unknown kind, codec or dtype, sizes that do not add up.
    """
    name = shown(head.name)
    if blob is None:
        raise PayloadError(f"Payload '{name}' is named in the header but its bytes are missing.")
    if len(blob) != head.nbytes:
        raise PayloadError(f"Payload '{name}' has {len(blob)} bytes, its header says {head.nbytes}.")
    if hashlib.sha256(blob).digest() != head.sha256:
        raise PayloadError(
            f"Payload '{name}' does not have the checksum of its header: it was altered on the way."
        )
    if head.codec != RAW and head.codec not in CODECS:
        known = ", ".join([RAW, *sorted(CODECS)])
        raise PayloadError(f"Payload '{name}' has the unknown codec '{shown(head.codec)}'; known: {known}.")
    try:
        kind = Kind(head.kind)
    except ValueError as error:
        raise PayloadError(f"Payload '{name}' is of the unknown kind '{shown(head.kind)}'.") from error
    tensors: dict[str, torch.Tensor] = {}
    end = 0
    for item in head.tensors:
        tensors[item.name] = _tensor(item, blob, end, name)
        end += item.nbytes
    if len(tensors) != len(head.tensors) or (end != len(blob) and head.codec == RAW):
        raise PayloadError(f"Payload '{name}': its tensors do not fill its {len(blob)} bytes exactly.")
    meta = {key: _get_scalar(value) for key, value in head.meta.items()}
    if head.codec == RAW:
        return Payload(head.name, kind, tensors, meta)
    return Coded(head.name, kind, tensors, meta, head.codec, blob[end:])


def _tensor(item: pb.TensorHead, blob: bytes, offset: int, payload: str) -> torch.Tensor:
    name = shown(item.name)
    dtype = DTYPES.get(item.dtype)
    if dtype is None:
        raise PayloadError(
            f"Payload '{payload}' tensor '{name}' has the unknown dtype '{shown(item.dtype)}'."
        )
    if len(item.shape) > MAX_DIMS or math.prod(max(size, 1) for size in item.shape) > MAX_VALUES:
        raise PayloadError(f"Payload '{payload}' tensor '{name}' has a shape beyond all measure.")
    count = math.prod(item.shape)
    if item.offset != offset or item.nbytes != count * dtype.itemsize or offset + item.nbytes > len(blob):
        raise PayloadError(
            f"Payload '{payload}' tensor '{name}': shape {tuple(item.shape)} does not fit {item.nbytes} bytes."
        )
    if count == 0:
        return torch.empty(tuple(item.shape), dtype=dtype)
    data = bytearray(
        memoryview(blob)[offset : offset + item.nbytes]
    )  # a copy of its own: aligned and writable
    if dtype is torch.bool and any(value > 1 for value in data):
        raise PayloadError(f"Payload '{payload}' tensor '{name}' has bytes that are no booleans.")
    return torch.frombuffer(data, dtype=dtype).reshape(tuple(item.shape))


def _set_scalar(target: pb.Scalar, value: Scalar) -> None:
    if isinstance(value, bool):
        target.flag = value
    elif isinstance(value, int):
        target.integer = value
    elif isinstance(value, float):
        target.number = value
    else:
        target.text = value


def _get_scalar(value: pb.Scalar) -> Scalar:
    field_name = value.WhichOneof("value")
    if field_name is None:
        raise PayloadError("A payload's note has no value.")
    result: Scalar = getattr(value, field_name)
    return result


def _text(parts: Parts, name: str) -> str:
    try:
        return parts.get(name, b"").decode()
    except UnicodeDecodeError as error:
        raise PayloadError(f"Part '{name}' is not text.") from error


def _metrics_to_proto(sets: list[MetricSet]) -> pb.Metrics:
    message = pb.Metrics()
    for item in sets:
        entry = message.sets.add(
            round=item.round, split=item.split, model=item.model, cases=item.cases, primary=item.primary
        )
        for name, (numerator, denominator) in item.sums.items():
            entry.sums[name].numerator = numerator
            entry.sums[name].denominator = denominator
    return message


def _metrics_from_proto(data: bytes) -> list[MetricSet]:
    try:
        message = pb.Metrics.FromString(data)
    except DecodeError as error:
        raise PayloadError("The message's metrics cannot be parsed.") from error
    return [
        MetricSet(
            entry.round, entry.split, entry.model, entry.cases,
            {name: (entry.sums[name].numerator, entry.sums[name].denominator) for name in sorted(entry.sums)}, entry.primary,
        )
        for entry in message.sets
    ]  # fmt: skip


def bytes_by_kind(parts: Parts) -> dict[str, int]:
    """Return the bytes of a message by kind: payload kinds, and header, config, metrics, summary."""
    kinds = {f"p.{head.name}": head.kind for head in read_header(parts).payloads}
    counts: dict[str, int] = {}
    for name, data in parts.items():
        kind = kinds.get(name, "header" if name == "head" else name)
        counts[kind] = counts.get(kind, 0) + len(data)
    return counts
