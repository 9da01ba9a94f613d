"""Compression of what travels: the change of a model up, the model down, whatever the method.

`WireConfig` says which. Compressed are the float32 parameters of payloads like the model, of kind MODEL or UPDATE. Buffers
(a variance must not become negative), tensors of other dtypes and all other payloads travel as they are.

Up (site to server), per tensor, with W the model that the server sent, R what the site received of it (R = W unless the
way down is lossy) and w the site's model after training:

    A = (w - R) + E        E: what earlier rounds left out (error feedback)
    T, E = squeezed(A)     common/squeeze.py: STC, CER, a half precision; E is kept in the site's own state
    server: w = W + T

Sparse ternary compression (STC): Sattler, Wiedemann, Müller, Samek: Robust and Communication-Efficient Federated
Learning from Non-IID Data, arXiv 1903.02891, algorithm 2, up. A payload of kind UPDATE is itself the change; a model that
the site was sent under no such name has none, and travels as it is.

Down (server to site): R = C(W) in float16 or bfloat16, or by STC against the model the sites hold (common/downlink.py). The
server counts every change from W, not from R: what the way down rounds off or leaves out does not enter the global model,
and an update smaller than a step of the half precision is not lost. A model of which a method sends only some values (not
`like_model`) counts as it comes, from R.

A hospital's bound on its update (`privacy.clip_norm`) holds for T, which is what leaves: A is scaled to the bound
before it is squeezed, and what the scaling took away is dropped, not kept in E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from common.codecs import CODECS, container
from common.config import WireConfig
from common.errors import PayloadError
from common.frames import shown
from common.payload import Kind, Payload, Payloads, PayloadSpec, State, Template, Tensors
from common.squeeze import BYTES, HALVES, Change, bounded, gamma_at, rounded
from common.wire import RAW, Coded
from common.work import Groups, RoundContext

Reached = Callable[[Payload], Iterable[tuple[str, Tensor]]]
"""Gives R, tensor by tensor, of a payload W that was sent."""


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

    def takes_down(self, spec: PayloadSpec) -> bool:
        """Return whether a payload is compressed on its way down: by STC models alone, an update is nothing to hold."""
        kinds = (Kind.MODEL,) if self.config.downlink_codec.startswith("stc") else (Kind.MODEL, Kind.UPDATE)
        return self.lossy_down and bool(self.like) and spec.like_model and spec.kind in kinds

    def down(self, payloads: Payloads, specs: Iterable[PayloadSpec]) -> Payloads:
        """Return what the server sends in half precision, as it travels (STC down: `common.downlink.Downlink`).

        Raises:
            PayloadError: Values beyond the range of the half precision.
        """
        if not self.lossy_down:
            return payloads
        sent = dict(payloads)
        for spec in specs:
            payload = payloads.get(spec.name)
            if payload is not None and self.takes_down(spec):
                chosen = {name: payload.tensors[name] for name in self.like}
                sent[spec.name] = coded(payload, self.config.downlink_codec, chosen, payload.tensors)
        return sent

    def rounded_down(self, payload: Payload) -> Iterable[tuple[str, Tensor]]:
        """Yield R of a payload W that was sent in half precision, tensor by tensor (`Reached`)."""
        half = HALVES[self.config.downlink_codec]
        return ((name, rounded(payload.tensors[name], half)) for name in self.like)

    def up(
        self,
        payloads: Payloads,
        specs: Iterable[PayloadSpec],
        received: Payloads,
        kept: State,
        ctx: RoundContext,
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
            ctx: The round; γ depends on it.
            most: Largest L2 norm of what leaves; 0 has no bound.

        Raises:
            PayloadError: Values that the codec cannot hold.
        """
        if not self.lossy_up:
            return payloads, kept
        sent = dict(payloads)
        gamma = gamma_at(self.config, ctx.round, ctx.rounds)
        for spec in specs:
            payload = payloads.get(spec.name)
            if payload is None or not self._takes_up(spec, received):
                continue
            base = received[spec.name].tensors if spec.kind is Kind.MODEL else {}
            change = self._change(payload, base, kept.part(spec.name))
            change = bounded(change, base, most, self.config, gamma)
            kept = kept.having(spec.name, change.left)
            whole = {name: base[name] + value if base else value for name, value in change.coded.items()}
            whole |= change.plain
            ordered = {name: whole[name] for name in payload.tensors}
            sent[spec.name] = coded(payload, BYTES[self.config.uplink_codec], change.coded, ordered)
        return sent, kept

    def taken(
        self,
        payloads: Payloads,
        specs: Iterable[PayloadSpec],
        sent: Payloads,
        *,
        who: str,
        reached: Reached | None = None,
    ) -> Payloads:
        """Return a site's answer as the method knows it.

        Args:
            payloads: What came, decoded for this call: the tensors may be used up.
            specs: The method's uplink.
            sent: W: what the server's method sent this site, before it was compressed.
            who: Alias of the site.
            reached: Gives R of a payload of `sent`; None where the way down is raw.

        Raises:
            PayloadError: Another codec than the run's, or bytes that are not of it.
        """
        promised = {spec.name: spec for spec in specs}
        taken = dict(payloads)
        for name, payload in payloads.items():
            spec = promised.get(name)
            based = spec is not None and self._takes_up(spec, sent)
            expected = BYTES.get(self.config.uplink_codec, RAW) if based else RAW
            got = payload.codec if isinstance(payload, Coded) else RAW
            if got != expected:
                raise PayloadError(
                    f"{who}: payload '{shown(name)}' is coded as '{shown(got)}', the run's configuration asks for "
                    f"'{expected}'. Let both ends run the same version.", site=who,
                )  # fmt: skip
            base = sent[name].tensors if based and spec is not None and spec.kind is Kind.MODEL else {}
            if isinstance(payload, Coded):
                taken[name] = self._decoded(payload, base, who)
            elif base and reached is not None and self.fits(payload.tensors):
                taken[name] = _moved(payload, base, reached(sent[name]))
        return taken

    def fits(self, tensors: Tensors) -> bool:
        """Return whether all tensors that are compressed are there, in shape and dtype."""
        return all(
            name in tensors and tensors[name].shape == like.shape and tensors[name].dtype == like.dtype
            for name, like in self.like.items()
        )

    def _takes_up(self, spec: PayloadSpec, received: Payloads) -> bool:
        """Return whether a site's payload is compressed, or counts from what it was sent: a model only if one was."""
        if not (self.like and spec.like_model and spec.from_received):
            return False
        if spec.kind is Kind.UPDATE:
            return True
        base = received.get(spec.name)
        return (
            spec.kind is Kind.MODEL
            and base is not None
            and base.kind is Kind.MODEL
            and self.fits(base.tensors)
        )

    def _change(self, payload: Payload, base: Tensors, left: Tensors) -> Change:
        change: Tensors = {}
        for name in self.like:
            value = payload.tensors[name]
            change[name] = value - base[name] if base else value.clone()
            if name in left:
                change[name].add_(left[name])
        plain = {name: value for name, value in payload.tensors.items() if name not in change}
        return Change(change, plain, {})

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


def coded(payload: Payload, codec: str, values: Tensors, whole: Tensors) -> Coded:
    """Return a payload of which some tensors travel as a codec's bytes.

    Args:
        payload: Its name, kind and notes.
        codec: Name of a codec of `common.codecs`.
        values: What the codec takes.
        whole: All tensors as the receiver will have them; those not in `values` travel as they are.

    Raises:
        PayloadError: Values that the codec cannot hold.
    """
    try:
        data = CODECS[codec].encode(values)
    except PayloadError as error:
        raise PayloadError(f"Payload '{payload.name}' cannot be compressed. {error}") from error
    return Coded(payload.name, payload.kind, whole, payload.meta, codec, data, frozenset(values))


def decoded_half(payload: Coded) -> Payload:
    """Return at the site what came down in half precision.

    Raises:
        PayloadError: Bytes that are not of the codec, or a tensor that came twice.
    """
    # Two bytes a value: no more values than bytes, so a few bytes cannot ask for much memory.
    return joined(payload, lambda: container.decode(payload.codec, payload.data, limit=len(payload.data)))


def joined(payload: Coded, decode: Callable[[], Tensors]) -> Payload:
    """Return at the site what came down coded, with the values that its bytes stand for.

    Raises:
        PayloadError: As `decode`, naming the payload, or a tensor that came twice.
    """
    name = shown(payload.name)
    try:
        values = decode()
    except PayloadError as error:
        raise PayloadError(f"coordinator: payload '{name}': {error}") from error
    if twice := values.keys() & payload.tensors.keys():
        raise PayloadError(
            f"coordinator: payload '{name}' has tensor '{shown(min(twice))}' coded and as it is."
        )
    return Payload(payload.name, payload.kind, payload.tensors | values, payload.meta)


def _moved(payload: Payload, base: Tensors, reached: Iterable[tuple[str, Tensor]]) -> Payload:
    """Turn a model that was trained from R into one trained from W."""
    for name, tensor in reached:
        payload.tensors[name].sub_(tensor).add_(base[name])
    return payload
