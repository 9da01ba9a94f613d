"""The border of a hospital: everything that comes in or goes out passes here, is judged, and is written down.

In: a message is decoded and checked, held against the site's limits, and its payloads are noted as received or refused.
Out: an answer is held against the method's promise, the coordinator's guards and the hospital's policy; figures the
policy keeps in are taken out; every part is noted in the ledger and on the disk before the answer is handed on. The
answer carries the ledger's head, so that the coordinator is a witness of what the hospital's record said then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from client import policy
from client.ledger import Ledger, Record
from client.ledger_lines import Phase
from client.site_config import SiteConfig
from common.compress import Compression
from common.config import GuardConfig
from common.downlink import received as as_received
from common.errors import (
    BaseLostError,
    LedgerError,
    PayloadError,
    PolicyError,
    StorageError,
    WardroundError,
    safe_sentence,
)
from common.frames import Parts
from common.guard import check_size, l2_norm, update_norm
from common.payload import Kind, Payload, Payloads, PayloadSpec, State, Template, check_payloads
from common.proto.wardround_pb2 import Header
from common.squeeze import scaled
from common.wire import CLOSING, HELLO, ROUND, Coded, Envelope, decode, encode, read_header
from common.work import RoundContext

PHASES: dict[int, Phase] = {HELLO: "hello", ROUND: "round", CLOSING: "closing"}
MB = 1_000_000
CLIP_TRIES = 20


class Border:
    """One hospital's border.

    Args:
        config: The hospital's own configuration.

    Raises:
        LedgerError: The ledger is changed, cut short, or held by another worker.
        StorageError: The volume cannot be written.
    """

    def __init__(self, config: SiteConfig) -> None:
        self.alias = config.alias
        self.policy = config.policy
        self.privacy = config.privacy
        self.ledger = Ledger(config.home / "ledger.jsonl", site=config.alias)

    def close(self) -> None:
        """Let another worker have the ledger."""
        self.ledger.close()

    def receive(self, parts: Parts, kept: Callable[[Envelope], State] = lambda envelope: State()) -> Envelope:
        """Decode a message and note what came; one that cannot be used is noted as refused.

        Args:
            parts: The message.
            kept: Reads what compression left of the rounds before; called only if a payload needs it.

        Raises:
            PayloadError, MismatchError: Malformed, altered, or of another version.
            PolicyError: More bytes than the site takes in a round.
            BaseLostError: A change of a model that the site does not hold.
        """
        try:
            envelope = decode(parts)
            envelope.payloads = as_received(envelope.payloads, lambda: kept(envelope))
        except BaseLostError as error:  # the message is sound, it is the site that lacks something
            self._note(envelope, "in", parts, refused=error)
            raise
        except WardroundError as error:
            self._note_refused(parts, error)
            raise
        try:
            self._limit(envelope.run, envelope.round, "in", parts)
        except PolicyError as error:
            self._note(envelope, "in", parts, refused=error)
            raise
        self._note(envelope, "in", parts)
        return envelope

    def accept(
        self, payloads: Payloads, specs: Iterable[PayloadSpec], template: Template, guard: GuardConfig
    ) -> None:
        """Check what came down before anything is done with it.

        Raises:
            PayloadError: Not what the method promised, not finite, or beyond all measure.
        """
        check_payloads(payloads, specs, template, who="coordinator")
        check_size(payloads, guard, who="coordinator")

    def compress(
        self,
        payloads: Payloads,
        received: Payloads,
        specs: Iterable[PayloadSpec],
        compression: Compression,
        kept: State,
        ctx: RoundContext,
    ) -> tuple[Payloads, State]:
        """Return an answer's payloads as the run compresses them, and what is left out of them for the next round.

        What is compressed is bounded by the hospital's `clip_norm` here; what is not, when it is released. Payloads that
        cannot be used stay as they are: `release` refuses and notes them.

        Args:
            payloads: What the method would send.
            received: What the site was sent.
            specs: What the method promised to send.
            compression: The run's.
            kept: What the last round left.
            ctx: The round.

        Raises:
            PayloadError: Values that the run's codec cannot hold.
        """
        if not compression.lossy_up:
            return payloads, kept
        try:
            check_payloads(payloads, specs, compression.template, who=self.alias)
        except PayloadError:
            return payloads, kept
        return compression.up(payloads, specs, received, kept, ctx, most=self.privacy.clip_norm)

    def release(
        self,
        answer: Envelope,
        received: Payloads,
        specs: Iterable[PayloadSpec],
        template: Template,
        guard: GuardConfig,
    ) -> Parts:
        """Judge an answer, note its parts, and return what leaves.

        Args:
            answer: What the site would say.
            received: What it was sent (updates are measured against it).
            specs: What the method promised to send.
            template: The tensors that travel.
            guard: The run's bounds.

        Raises:
            PayloadError: Not what the method promised; nothing leaves.
            PolicyError: The policy keeps it in; nothing leaves.
            StorageError, LedgerError: It cannot be noted; nothing leaves.
        """
        parts = encode(answer)
        try:
            promised = specs if answer.phase == ROUND else ()
            check_payloads(answer.payloads, promised, template, who=self.alias)
            check_size(answer.payloads, guard, who=self.alias)
            if answer.phase == ROUND:
                policy.release(self.policy, self.alias, answer.payloads.values(), answer.cases)
            answer, changed = self._private(answer, received)
            parts = encode(answer) if changed else parts
            self._limit(answer.run, answer.round, "out", parts)
        except WardroundError as error:
            self._note(answer, "out", parts, refused=error)
            raise
        head = self._note(answer, "out", parts)
        header = read_header(parts)
        header.ledger = head
        return {**parts, "head": header.SerializeToString(deterministic=True)}

    def failed(self, run: str, round_: int, phase: int, parts: Parts) -> None:
        """Note an answer that says only why there is none. Where even that cannot be written, the answer leaves still:

        it holds a code and a sentence from this software, and the coordinator must not be left to guess.
        """
        header = read_header(parts)
        reason = f"{header.failure.code}: {header.failure.message}"
        record = Record("failure", "failure", len(parts["head"]), _sha256(parts["head"]), reason=reason)
        try:
            self.ledger.append(run, round_, PHASES.get(phase, "hello"), "out", [record])
        except (StorageError, LedgerError):
            return

    def _private(self, answer: Envelope, received: Payloads) -> tuple[Envelope, bool]:
        """Apply the hospital's privacy settings; returns the answer and whether it was changed."""
        privacy = self.privacy
        metrics = [
            item for item in answer.metrics if privacy.metrics and item.cases >= privacy.metrics_min_cases
        ]
        payloads = answer.payloads
        if privacy.clip_norm:
            payloads = {
                name: payload
                if isinstance(payload, Coded)  # was bounded before it was compressed
                else clipped(payload, received.get(name), privacy.clip_norm, who=self.alias)
                for name, payload in payloads.items()
            }
        same = metrics == answer.metrics and payloads is answer.payloads
        return replace(answer, metrics=metrics, payloads=payloads), not same

    def _limit(self, run: str, round_: int, direction: str, parts: Parts) -> None:
        most = self.policy.max_out_mb if direction == "out" else self.policy.max_in_mb
        if not most:
            return
        size = sum(len(data) for data in parts.values())
        before = self.ledger.bytes_in(run, round_, "out" if direction == "out" else "in")
        if before + size > most * MB:
            word = "leave" if direction == "out" else "come in"
            raise PolicyError(
                f"{self.alias}: {(before + size) / MB:.2f} MB would {word} in round {round_}, the site's policy allows {most:g} MB.",
                site=self.alias,
            )

    def _note(
        self, envelope: Envelope, direction: str, parts: Parts, refused: WardroundError | None = None
    ) -> str:
        phase = PHASES.get(envelope.phase, "hello")
        records = [
            *_payload_records(read_header(parts), envelope),
            *_part_records(parts),
            _figures(envelope, parts),
        ]
        if refused is not None:
            reason = ": ".join(safe_sentence(refused))
            records = [replace(record, decision="refused", reason=reason) for record in records]
        elif direction == "in":
            records = [replace(record, decision="received") for record in records]
        return self.ledger.append(
            envelope.run, envelope.round, phase, "out" if direction == "out" else "in", records
        )

    def _note_refused(self, parts: Parts, error: WardroundError) -> None:
        digest = hashlib.sha256()
        for data in parts.values():
            digest.update(data)
        reason = ": ".join(safe_sentence(error))
        size = sum(len(data) for data in parts.values())
        record = Record("message", "message", size, digest.hexdigest(), decision="refused", reason=reason)
        self.ledger.append("", 0, "hello", "in", [record])


def clipped(payload: Payload, received: Payload | None, most: float, *, who: str = "") -> Payload:
    """Return a model or update scaled down so that what the site adds has at most an L2 norm.

    Args:
        payload: What would leave; only kinds MODEL and UPDATE are changed.
        received: What was received under the same name; a model's update is the difference to it.
        most: Largest norm.
        who: Alias of the site, for the sentence.

    Raises:
        PolicyError: A payload that holds parts of tensors has no update to be bounded.
    """
    if payload.kind not in (Kind.MODEL, Kind.UPDATE):
        return payload
    base = received.tensors if received is not None and payload.kind is Kind.MODEL else {}
    if any(name in base and base[name].shape != tensor.shape for name, tensor in payload.tensors.items()):
        raise PolicyError(
            f"{who}: payload '{payload.name}' holds parts of the model's tensors, and the site's clip_norm bounds whole "
            "ones only; nothing leaves. Run the method so that whole tensors travel (pfl-resfim: aggregate=all).",
            site=who,
        )
    norm = update_norm(payload.tensors, base or None)
    if norm <= most:
        return payload
    share = most / norm
    for number in range(CLIP_TRIES):  # rounding to the model's dtype may lift it above the bound again
        tensors = {name: scaled(tensor, base.get(name), share) for name, tensor in payload.tensors.items()}
        norm = update_norm(tensors, base or None)
        if norm <= most:
            return replace(payload, tensors=tensors)
        share *= min(most / norm, 1.0 - 2.0 ** (number - 26))
    return replace(
        payload,
        tensors={name: scaled(tensor, base.get(name), 0.0) for name, tensor in payload.tensors.items()},
    )


def _payload_records(header: Header, envelope: Envelope) -> list[Record]:
    """Return a record of each payload: bytes and hash as they travel, shapes and norm as the receiver has the tensors."""
    found = []
    for head in header.payloads:
        tensors = envelope.payloads[head.name].tensors
        found.append(
            Record(
                head.name, head.kind, head.nbytes, head.sha256.hex(), tensors=len(tensors),
                shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
                norm=l2_norm(tensors), cases=envelope.cases or None,
            )
        )  # fmt: skip
    return found


def _part_records(parts: Mapping[str, bytes]) -> list[Record]:
    return [
        Record(name, name, len(parts[name]), _sha256(parts[name]))
        for name in ("config", "metrics", "summary")
        if name in parts
    ]


def _figures(envelope: Envelope, parts: Parts) -> Record:
    """Return the record of the header: case count, loss and seconds are all it says of the hospital."""
    return Record(
        "figures", "figures", len(parts["head"]), _sha256(parts["head"]), cases=envelope.cases or None
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
