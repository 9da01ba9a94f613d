"""Compression of what travels: the change of a model up, the model in half precision down, whatever the method.

`WireConfig` says which. Compressed are the float32 parameters of payloads like the model, of kind MODEL or UPDATE. Buffers
(a variance must not become negative), tensors of other dtypes and all other payloads travel as they are.

Up (site to server), per tensor, with W the model that the server sent, R what the site received of it (R = W unless the
way down is lossy) and w the site's model after training:

    A = (w - R) + E        E: what earlier rounds left out (STC only; error feedback)
    T = C(A)               C: STC, float16 or bfloat16
    E = A - T              kept in the site's own state (STC only)
    server: w = W + T

Sparse ternary compression (STC): Sattler, Wiedemann, Müller, Samek: Robust and Communication-Efficient Federated
Learning from Non-IID Data, arXiv 1903.02891, algorithm 2, up. A payload of kind UPDATE is itself the change; a model that
the site was sent under no such name has none, and travels as it is.

Down (server to site): R = C(W), float16 or bfloat16. The server counts every change from W, not from R: rounding on the way
down does not enter the global model, and an update smaller than a step of the half precision is not lost. A model of which
a method sends only some values (not `like_model`) counts as it comes, from R.

A hospital's bound on its update (`privacy.clip_norm`) holds for T, which is what leaves: A is scaled to the bound
before C, and what the scaling took away is dropped, not kept in E.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.codecs import CODECS, container
from common.codecs.ternary import compress as ternary
from common.config import WireConfig
from common.errors import PayloadError
from common.frames import shown
from common.guard import l2_norm, update_norm
from common.payload import Kind, Payload, Payloads, PayloadSpec, State, Template, Tensors
from common.wire import RAW, Coded
from common.work import Groups

STC = {"stc": "ternary", "stc-golomb": "ternary-golomb"}  # our name of it -> the codec of its bytes
HALVES = {"float16": torch.float16, "bf16": torch.bfloat16}
TRIES = 20


@dataclass(frozen=True)
class _Change:
    """One payload's change, in the two parts that travel differently.

    Attributes:
        coded: A, or T: tensors that the codec takes.
        plain: The payload's other tensors, as they are.
        left: E, after coding.
    """

    coded: Tensors
    plain: Tensors
    left: Tensors


class Compression:
    """A run's compression, at either end.

    Args:
        config: What the run says.
        template: The tensors that travel ("meta" tensors will do).
        groups: The network's parameter groups.
    """

    def __init__(self, config: WireConfig, template: Template, groups: Groups) -> None:
        buffers = set(groups["buffers"])
        self.config = config
        self.template = template
        self.like = {
            name: tensor
            for name, tensor in template.items()
            if tensor.dtype is torch.float32 and name not in buffers
        }

    @property
    def lossy_up(self) -> bool:
        """True if what sites send is compressed."""
        return self.config.uplink_codec != RAW

    @property
    def lossy_down(self) -> bool:
        """True if what sites are sent is compressed."""
        return self.config.downlink_codec != RAW

    def down(self, payloads: Payloads, specs: Iterable[PayloadSpec]) -> Payloads:
        """Return what the server sends, as it travels.

        Raises:
            PayloadError: Values beyond the range of the half precision.
        """
        if not self.lossy_down:
            return payloads
        sent = dict(payloads)
        for spec in specs:
            payload = payloads.get(spec.name)
            if payload is not None and self._takes(spec):
                chosen = {name: payload.tensors[name] for name in self.like}
                sent[spec.name] = _coded(payload, self.config.downlink_codec, chosen, payload.tensors)
        return sent

    def up(
        self,
        payloads: Payloads,
        specs: Iterable[PayloadSpec],
        received: Payloads,
        kept: State,
        *,
        most: float = 0.0,
    ) -> tuple[Payloads, State]:
        """Return what a site sends, as it travels, and what it keeps for the next round.

        The payloads that come back hold the tensors as the receiver will have them (up to the rounding of W + T).

        Args:
            payloads: What the method sends, checked against its specs.
            specs: The method's uplink.
            received: What the site was sent.
            kept: E, by payload.
            most: Largest L2 norm of what leaves; 0 has no bound.

        Raises:
            PayloadError: Values that the codec cannot hold.
        """
        if not self.lossy_up:
            return payloads, kept
        sent = dict(payloads)
        for spec in specs:
            payload = payloads.get(spec.name)
            if payload is None or not self._takes(spec, received):
                continue
            base = received[spec.name].tensors if spec.kind is Kind.MODEL else {}
            change = self._bounded(self._change(payload, base, kept.part(spec.name)), base, most)
            kept = kept.having(spec.name, change.left)
            whole = {name: base[name] + value if base else value for name, value in change.coded.items()}
            whole |= change.plain
            ordered = {name: whole[name] for name in payload.tensors}
            sent[spec.name] = _coded(payload, self._bytes_codec(), change.coded, ordered)
        return sent, kept

    def taken(
        self, payloads: Payloads, specs: Iterable[PayloadSpec], sent: Payloads, *, who: str
    ) -> Payloads:
        """Return a site's answer as the method knows it.

        Args:
            payloads: What came, decoded for this call: the tensors may be used up.
            specs: The method's uplink.
            sent: W: what the server's method sent this site, before it was compressed.
            who: Alias of the site.

        Raises:
            PayloadError: Another codec than the run's, or bytes that are not of it.
        """
        promised = {spec.name: spec for spec in specs}
        taken = dict(payloads)
        for name, payload in payloads.items():
            spec = promised.get(name)
            takes = spec is not None and self._takes(spec, sent)
            expected = self._bytes_codec() if takes else RAW
            got = payload.codec if isinstance(payload, Coded) else RAW
            if got != expected:
                raise PayloadError(
                    f"{who}: payload '{shown(name)}' is coded as '{shown(got)}', the run's configuration asks for "
                    f"'{expected}'. Let both ends run the same version.", site=who,
                )  # fmt: skip
            base = sent[name].tensors if takes and spec is not None and spec.kind is Kind.MODEL else {}
            if isinstance(payload, Coded):
                taken[name] = self._decoded(payload, base, who)
            elif base and self.lossy_down:
                taken[name] = self._moved(payload, base)
        return taken

    def _takes(self, spec: PayloadSpec, received: Payloads | None = None) -> bool:
        """Return whether a payload is compressed; up, a model only if one was sent under its name."""
        if not self.like or not spec.like_model or spec.kind not in (Kind.MODEL, Kind.UPDATE):
            return False
        if received is not None and not spec.from_received:
            return False
        if received is None or spec.kind is Kind.UPDATE:
            return True
        base = received.get(spec.name)
        return base is not None and base.kind is Kind.MODEL and self._fits(base.tensors)

    def _fits(self, tensors: Tensors) -> bool:
        return all(
            name in tensors and tensors[name].shape == like.shape and tensors[name].dtype == like.dtype
            for name, like in self.like.items()
        )

    def _bytes_codec(self) -> str:
        return STC.get(self.config.uplink_codec, self.config.uplink_codec)

    def _change(self, payload: Payload, base: Tensors, left: Tensors) -> _Change:
        change: Tensors = {}
        for name in self.like:
            value = payload.tensors[name]
            change[name] = value - base[name] if base else value.clone()
            if name in left:
                change[name].add_(left[name])
        plain = {name: value for name, value in payload.tensors.items() if name not in change}
        return _Change(change, plain, {})

    def _bounded(self, change: _Change, base: Tensors, most: float) -> _Change:
        """Compress a change so that what leaves has at most an L2 norm; rounding in the codec counts."""
        if not most:
            return self._squeezed(change)
        norm = _norm(change, base)
        share = most / norm if norm > most else 1.0
        for number in range(TRIES):
            found = self._squeezed(change if share == 1.0 else _scaled(change, base, share))
            norm = _norm(found, base)
            if norm <= most:
                return found
            share *= min(most / norm, 1.0 - 2.0 ** (number - 26))
        return self._squeezed(_scaled(change, base, 0.0))

    def _squeezed(self, change: _Change) -> _Change:
        codec = self.config.uplink_codec
        sent: Tensors = {}
        left: Tensors = {}
        for name, value in change.coded.items():
            if codec in STC:
                try:
                    sent[name], left[name] = ternary(value, self.config.uplink_p)
                except ValueError as error:
                    raise PayloadError(f"Tensor '{name}' cannot be compressed. {error}") from error
            else:
                sent[name] = rounded(value, HALVES[codec])
                if not torch.isfinite(sent[name]).all():
                    raise PayloadError(
                        f"Tensor '{name}' cannot be compressed: its change is beyond the range of {codec}. Look for "
                        "training that diverged; if such changes are meant, set wire.uplink_codec to bf16 or raw."
                    )
        return _Change(sent, change.plain, left)

    def _decoded(self, payload: Coded, base: Tensors, who: str) -> Payload:
        try:
            values = CODECS[payload.codec].decode(payload.data, self.like)
        except PayloadError as error:
            raise PayloadError(f"{who}: payload '{shown(payload.name)}': {error}", site=who) from error
        if twice := values.keys() & payload.tensors.keys():
            raise PayloadError(
                f"{who}: payload '{shown(payload.name)}' has tensor '{shown(min(twice))}' coded and as it is.", site=who
            )  # fmt: skip
        for name, value in base.items():
            if name in values:
                values[name].add_(value)
        whole = payload.tensors | values
        order = [name for name in self.template if name in whole]
        return Payload(
            payload.name, payload.kind, {name: whole[name] for name in order} | whole, payload.meta
        )

    def _moved(self, payload: Payload, base: Tensors) -> Payload:
        """Turn a model that was trained from R into one trained from W; another shape is left to the checks."""
        if self._fits(payload.tensors):
            half = HALVES[self.config.downlink_codec]
            for name in self.like:
                payload.tensors[name].sub_(rounded(base[name], half)).add_(base[name])
        return payload


def received(payloads: Payloads) -> Payloads:
    """Return what came down as the site works with it.

    Raises:
        PayloadError: A codec that does not come down, or bytes that are not of it.
    """
    return {
        name: _whole(payload) if isinstance(payload, Coded) else payload for name, payload in payloads.items()
    }


def rounded(tensor: Tensor, half: torch.dtype) -> Tensor:
    """Return float32 values as they are after a way in half precision."""
    return tensor.to(half).to(torch.float32)


def scaled(tensor: Tensor, base: Tensor | None, share: float) -> Tensor:
    """Return base + share (tensor - base) in the tensor's dtype; tensors that are no floating point stay.

    Args:
        tensor: Any shape.
        base: Of the same shape; zeros where None.
        share: Factor.
    """
    if not tensor.is_floating_point():
        return tensor
    start = base.to(torch.float64) if base is not None else torch.zeros((), dtype=torch.float64)
    return (start + (tensor.to(torch.float64) - start) * share).to(tensor.dtype)


def _scaled(change: _Change, base: Mapping[str, Tensor], share: float) -> _Change:
    return _Change(
        {name: scaled(value, None, share) for name, value in change.coded.items()},
        {name: scaled(value, base.get(name), share) for name, value in change.plain.items()},
        {},
    )


def _norm(change: _Change, base: Tensors) -> float:
    return math.hypot(l2_norm(change.coded), update_norm(change.plain, base or None))


def _coded(payload: Payload, codec: str, values: Tensors, whole: Tensors) -> Coded:
    try:
        data = CODECS[codec].encode(values)
    except PayloadError as error:
        raise PayloadError(f"Payload '{payload.name}' cannot be compressed. {error}") from error
    return Coded(payload.name, payload.kind, whole, payload.meta, codec, data, frozenset(values))


def _whole(payload: Coded) -> Payload:
    name = shown(payload.name)
    if payload.codec not in HALVES:
        raise PayloadError(
            f"coordinator: payload '{name}' is coded as '{payload.codec}', which does not come down."
        )
    # Two bytes a value: no more values than bytes, so a few bytes cannot ask for much memory.
    try:
        values = container.decode(payload.codec, payload.data, limit=len(payload.data))
    except PayloadError as error:
        raise PayloadError(f"coordinator: payload '{name}': {error}") from error
    if twice := values.keys() & payload.tensors.keys():
        raise PayloadError(
            f"coordinator: payload '{name}' has tensor '{shown(min(twice))}' coded and as it is."
        )
    return Payload(payload.name, payload.kind, payload.tensors | values, payload.meta)
