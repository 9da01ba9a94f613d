"""Local-only: every hospital trains alone from the common initial model. The floor that federation must beat.

The model travels once, down, in round 1; afterwards nothing but metrics leaves or enters.
"""

from __future__ import annotations

from common.method import (
    PERSONAL,
    Accumulator,
    Method,
    MethodParams,
    RoundContext,
    ServerHalf,
    SiteHalf,
    SiteResult,
    SiteWork,
)
from common.payload import Kind, Payload, Payloads, PayloadSpec, Reduce, State, Tensors


class LocalOnlyParams(MethodParams):
    """Local-only has no parameters."""


class LocalOnlyServer(ServerHalf):
    """Server half: hands out the initial model once and combines nothing."""

    downlink = (PayloadSpec("model", Kind.MODEL, Reduce.NONE, optional=True),)
    uplink = ()

    def send(self, state: State, site: str, ctx: RoundContext) -> list[Payload]:
        """Send the initial model in round 1 and nothing later."""
        return super().send(state, site, ctx) if ctx.round == 1 else []

    def finish(self, state: State, acc: Accumulator, ctx: RoundContext) -> State:
        """Keep the state."""
        return state

    def model(self, state: State) -> Tensors | None:
        """There is no global model."""
        return None


class LocalOnlySite(SiteHalf):
    """Site half: continues from its own weights."""

    def start(self, received: Payloads, state: State) -> Tensors:
        """Return the site's own weights; in round 1 the initial model."""
        return state.part("personal") or received["model"].tensors

    def models(self, received: Payloads, state: State) -> dict[str, Tensors]:
        """Return the site's own model."""
        return {PERSONAL: self.start(received, state)}

    def train(self, work: SiteWork, received: Payloads, state: State) -> SiteResult:
        """Train on; nothing leaves."""
        work.load(self.start(received, state))
        stats = work.fit(stream="personal")
        return SiteResult([], state.having("personal", work.weights()), work.cases, stats)


LOCAL_ONLY = Method(
    name="local-only",
    title="every hospital alone: the floor that federation must beat",
    params=LocalOnlyParams,
    server=LocalOnlyServer,
    site=LocalOnlySite,
    personal=True,
)
