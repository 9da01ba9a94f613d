"""The model's way down by sparse ternary compression: both ends hold R, the model as the sites have it.

    coordinator, round t    T_t = STC(W_t - R_{t-1});  R_t = R_{t-1} + T_t
    site                    R_t = R_{t-1} + T_t

Sattler et al. (arXiv 1903.02891, algorithm 2, down) keep A = W - R, what the sites have not been told, and add each
round's update to it: the same recursion. Nothing is lost; what STC leaves out of T_t stays in W - R. All is per tensor.

R begins as W, sent whole. T_t goes to a site that has answered in the round of the R before; a site that has not (it is new,
sat out a round, its answer was lost) is sent R_t whole. R_t is made once a round, whoever is asked, so a site that was
sent it whole and one that added T_t have the same bits. T_t names the R it is for by round and SHA-256: a site that does
not hold that one answers with `BaseLostError`, and is sent R_t whole.

The coordinator holds one R for all sites, or one for each answer of the method's `ServerHalf.stream`, and which round's R
each site holds; both are in its checkpoint. A site keeps R in its own state, beside what its answers left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.codecs import CODECS
from common.codecs.ternary import compress as ternary
from common.compress import Compression, Reached, coded, decoded_half, joined
from common.errors import BaseLostError, PayloadError
from common.frames import shown
from common.payload import Payload, Payloads, PayloadSpec, Scalar, State, Tensors
from common.squeeze import BYTES, HALVES
from common.wire import Coded

BASE_ROUND, BASE_SHA256 = "stc-base-round", "stc-base-sha256"  # notes of a payload that is a change of R
SPACE = "@"  # before a payload's name in the site's state: R; E of the way up has the bare name
NOTE = "downlink"  # in the coordinator's state: which streams there are, and who holds what


@dataclass
class _Stream:
    """One R at the coordinator.

    Attributes:
        number: t.
        R: R_t.
        sha256: Of R_t.
        base: Round of the R before; 0 where R_t is the first.
        base_sha256: Of the R before.
        data: T_t as bytes; empty where R_t is the first, or T_t is not known any more.
        model: W_t while the round lasts.
    """

    number: int
    R: Tensors
    sha256: str
    base: int = 0
    base_sha256: str = ""
    data: bytes = b""
    model: Tensors | None = None


class Downlink:
    """The coordinator's end of the way down, whatever the run's `downlink_codec`.

    Args:
        compression: The run's.
    """

    def __init__(self, compression: Compression) -> None:
        self.compression = compression
        self.config = compression.config
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._holds: dict[str, dict[str, int]] = {}
        self._sent: dict[str, dict[str, int]] = {}

    @property
    def holding(self) -> bool:
        """True if both ends hold R."""
        return self.config.downlink_codec.startswith("stc")

    def sending(
        self, payloads: Payloads, specs: Iterable[PayloadSpec], number: int, site: str, stream: str
    ) -> Payloads:
        """Return what a site is sent in a round, as it travels.

        Args:
            payloads: W: what the method sends it.
            specs: The method's downlink.
            number: The round; rounds + 1 in the closing evaluation.
            site: Its alias.
            stream: What `ServerHalf.stream` says of it.

        Raises:
            PayloadError: Values that the codec cannot hold, or a model that is not the one of the stream.
        """
        if not self.holding:
            return self.compression.down(payloads, specs)
        found = dict(payloads)
        self._sent[site] = {}
        for spec in specs:
            payload = payloads.get(spec.name)
            if payload is None or not self.compression.takes_down(spec):
                continue
            held = self._current(payload, number, site, stream)
            self._sent[site][spec.name] = number
            whole = {name: held.R.get(name, tensor) for name, tensor in payload.tensors.items()}
            if held.data and self._holds.get(site, {}).get(spec.name) == held.base:
                notes: dict[str, Scalar] = {BASE_ROUND: held.base, BASE_SHA256: held.base_sha256}
                found[spec.name] = Coded(
                    payload.name, payload.kind, whole, {**payload.meta, **notes}, self._codec(), held.data,
                    frozenset(held.R),
                )  # fmt: skip
            else:
                found[spec.name] = replace(payload, tensors=whole)
        return found

    def reached(self, number: int, site: str, stream: str) -> Reached | None:
        """Return what tells R of a payload W that a site was sent in a round; None where R is W."""
        if self.holding:
            return lambda payload: self._current(payload, number, site, stream).R.items()
        return self.compression.rounded_down if self.compression.lossy_down else None

    def arrived(self, number: int, site: str) -> None:
        """Note that a site has answered in a round, and so has what it was sent in its state."""
        sent = self._sent.get(site, {})
        now = {name: round_ for name, round_ in sent.items() if round_ == number}
        if now:
            self._holds.setdefault(site, {}).update(now)

    def lost(self, site: str) -> None:
        """Note that a site does not hold what it should: it is sent whole models from now on."""
        self._holds.pop(site, None)

    def over(self) -> None:
        """Let go of a round's models; R stays."""
        for held in self._streams.values():
            held.model = None

    def state(self) -> State:
        """Return what a checkpoint must hold, after a round: every R, and who holds it. Empty where nothing is held."""
        if not self._streams:
            return State()
        state = State()
        streams = []
        for place, ((name, stream), held) in enumerate(sorted(self._streams.items())):
            state.tensors.update({f"{place}/{key}": tensor for key, tensor in held.R.items()})
            streams.append([name, stream, held.number, held.sha256])
        note = {"streams": streams, "holds": self._holds}
        state.values[NOTE] = json.dumps(note, sort_keys=True, separators=(",", ":"))
        return state

    def restore(self, state: State) -> None:
        """Continue from what `state` returned; from an empty one as at the beginning.

        Raises:
            PayloadError: It is no such state.
        """
        self._streams, self._holds, self._sent = {}, {}, {}
        if NOTE not in state.values:
            return
        try:
            note = json.loads(str(state.values[NOTE]))
            for place, (name, stream, number, sha256) in enumerate(note["streams"]):
                self._streams[str(name), str(stream)] = _Stream(
                    int(number), state.part(str(place)), str(sha256)
                )
            self._holds = _holds(note["holds"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PayloadError(
                "The checkpoint's note on the models that the sites hold cannot be read. Restore the run folder from a "
                "backup, or start a new run.", detail=str(error),
            ) from error  # fmt: skip

    def _codec(self) -> str:
        return BYTES[self.config.downlink_codec]

    def _current(self, payload: Payload, number: int, site: str, stream: str) -> _Stream:
        """Return the stream of a payload, brought to a round; W must be the same for all sites of it."""
        key = (payload.name, stream)
        model = {name: payload.tensors[name] for name in self.compression.like}
        held = self._streams.get(key)
        if held is None or held.number > number:  # a round before the one of R: nothing is known of that time
            R = {name: tensor.clone() for name, tensor in model.items()}
            held = self._streams[key] = _Stream(number, R, digest(R))
        elif held.number < number:
            self._step(payload, held, model, number)
        elif held.model is not None and not _same(held.model, model):
            raise PayloadError(
                f"Round {number}: the method sends {site} another '{payload.name}' than the sites before it. Let its "
                "server half's `stream` return the site, or set wire.downlink_codec to raw.", site=site,
            )  # fmt: skip
        held.model = model
        return held

    def _step(self, payload: Payload, held: _Stream, model: Tensors, number: int) -> None:
        change: Tensors = {}
        for name, tensor in model.items():
            try:
                change[name] = ternary(tensor - held.R[name], self.config.downlink_p)[0]
            except ValueError as error:
                raise PayloadError(
                    f"Payload '{payload.name}' cannot be compressed: tensor '{name}'. {error}"
                ) from error
        data = coded(payload, self._codec(), change, {}).data
        for name, tensor in change.items():  # nothing can fail any more
            held.R[name] = held.R[name] + tensor
        held.base, held.base_sha256, held.data = held.number, held.sha256, data
        held.number, held.sha256 = number, digest(held.R)


def received(payloads: Payloads, kept: Callable[[], State] = State) -> Payloads:
    """Return what came down as the site works with it.

    Args:
        payloads: As they travelled.
        kept: Reads what the site kept of the rounds before (`keep`); called only if it is needed.

    Raises:
        PayloadError: A codec that does not come down, or bytes that are not of it.
        BaseLostError: A change of a model that the site does not hold.
    """
    found = dict(payloads)
    for name, payload in payloads.items():
        if not isinstance(payload, Coded):
            continue
        if payload.codec in HALVES:
            found[name] = decoded_half(payload)
        elif payload.codec in (BYTES["stc"], BYTES["stc-golomb"]):
            found[name] = _changed(payload, kept())
        else:
            raise PayloadError(
                f"coordinator: payload '{shown(name)}' is coded as '{payload.codec}', which does not come down."
            )
    return found


def keep(
    compression: Compression, kept: State, payloads: Payloads, specs: Iterable[PayloadSpec], number: int
) -> State:
    """Return what a site keeps for the next round, with R of this one where the way down is by STC.

    Args:
        compression: The run's.
        kept: What it kept so far.
        payloads: What the site received, as it works with it: R.
        specs: The method's downlink.
        number: The round.
    """
    if not compression.config.downlink_codec.startswith("stc"):
        return kept
    for spec in specs:
        payload = payloads.get(spec.name)
        if payload is not None and compression.takes_down(spec):
            R = {name: payload.tensors[name] for name in compression.like}
            kept = kept.having(SPACE + spec.name, R)
            kept.values[SPACE + spec.name] = number
    return kept


def digest(tensors: Tensors) -> str:
    """Return the SHA-256 of float32 tensors: in the order of their names, name, a zero byte, little-endian values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + b"\0")
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _changed(payload: Coded, kept: State) -> Payload:
    """Return R_t from T_t. What the site holds is the template: a few bytes cannot ask for more than that."""
    name = shown(payload.name)
    R, round_ = kept.part(SPACE + payload.name), kept.values.get(SPACE + payload.name)
    base, sha256 = payload.meta.get(BASE_ROUND), payload.meta.get(BASE_SHA256)
    if not R or round_ != base or digest(R) != sha256:
        has = f"holds that of round {round_}" if R else "holds none"
        which = f"round {base}" if isinstance(base, int) else "no round"
        raise BaseLostError(
            f"Payload '{name}' is a change of the model of {which}, and the site {has}"
            f"{' with other values' if R and round_ == base else ''}; it needs the whole model."
        )
    whole = joined(payload, lambda: _sum(R, CODECS[payload.codec].decode(payload.data, R)))
    meta = {key: value for key, value in payload.meta.items() if key not in (BASE_ROUND, BASE_SHA256)}
    return replace(whole, meta=meta)


def _sum(R: Tensors, change: Tensors) -> Tensors:
    for name, tensor in R.items():
        change[name].add_(tensor)  # IEEE addition commutes: the coordinator's bits
    return change


def _same(left: Tensors, right: Tensors) -> bool:
    return all(left[name] is right[name] or torch.equal(left[name], right[name]) for name in left)


def _holds(note: Any) -> dict[str, dict[str, int]]:
    return {
        str(site): {str(name): int(round_) for name, round_ in rounds.items()}
        for site, rounds in note.items()
    }
