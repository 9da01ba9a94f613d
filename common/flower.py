"""The one place where wardround's messages meet Flower's records. No torch here: the relay imports it.

A message's parts lie in one `ArrayRecord` as raw bytes: Flower chunks and content-addresses arrays, and does neither
with configs. Figures of the relay itself ride in a `MetricRecord`.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from common.errors import PayloadError
from common.frames import Parts

RECORD = "wardround"
RELAY = "relay"
STYPE = "raw.bytes"

QUERY, TRAIN, EVALUATE = MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE


def to_record(parts: Mapping[str, bytes], relay: Mapping[str, float] | None = None) -> RecordDict:
    """Wrap parts into a Flower record."""
    arrays = {
        name: Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data) for name, data in parts.items()
    }
    content = RecordDict({RECORD: ArrayRecord(arrays)})
    if relay:
        content[RELAY] = MetricRecord({name: float(value) for name, value in relay.items()})
    return content


def from_record(content: RecordDict) -> Parts:
    """Unwrap the parts of a Flower record.

    Raises:
        PayloadError: The record is not wardround's.
    """
    record = content.array_records.get(RECORD)
    if record is None:
        raise PayloadError(
            "A message without wardround's record arrived; does the other end run another app?"
        )
    return {name: array.data for name, array in record.items()}


def relay_figures(content: RecordDict) -> dict[str, float]:
    """Return what the relay said of itself (CPU seconds, MB), empty if nothing."""
    record = content.metric_records.get(RELAY)
    return (
        {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
        if record
        else {}
    )


def make_message(parts: Mapping[str, bytes], *, node: int, kind: str, group: str, ttl: float) -> Message:
    """Build a message to one node.

    Args:
        parts: What it carries.
        node: Flower's node id.
        kind: QUERY, TRAIN or EVALUATE.
        group: Shown in Flower's logs (the round).
        ttl: Seconds until Flower drops it.
    """
    return Message(to_record(parts), dst_node_id=node, message_type=kind, group_id=group, ttl=ttl)
