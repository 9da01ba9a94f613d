"""FedBN, and any other choice of layers that stay at the hospital: FedAvg over the rest.

Reference: Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch Normalization,
ICLR 2021, Algorithm 1: all layers but batch normalisation are averaged, normalisation stays local.

    w^l ← Σ_k (n_k / n) w_k^l     for every layer l that is not in a kept group;   w_k^l stays otherwise   (Algorithm 1)

`keep` names the parameter groups that stay (docs/models.md): ("norm", "buffers") is FedBN; ("buffers",) keeps only the running
statistics; ("head",) shares the extractor alone, as Arivazhagan et al. 2019 (FedPer) do.

What is kept never travels, in either direction: payloads hold the other tensors only, and both ends check that.

Deviations from the paper: any normalisation layer counts, not batch normalisation alone; the average is weighted by case
counts. Before its first round a site holds the run's seeded initial values in the kept layers.
"""

from __future__ import annotations

from pydantic import Field

from common.method import (
    PERSONAL,
    Groups,
    Method,
    MethodParams,
    RoundContext,
    ServerHalf,
    SiteHalf,
    SiteResult,
    SiteWork,
)
from common.payload import Kind, Payload, Payloads, State, Template, Tensors


class FedBNParams(MethodParams):
    """Parameters of FedBN."""

    keep: tuple[str, ...] = Field(
        default=("norm", "buffers"), description="parameter groups that stay at the site; none is FedAvg"
    )


def kept(keep: tuple[str, ...], groups: Groups) -> set[str]:
    """Return the state-dict keys that stay at the site.

    Raises:
        ConfigError: A group the network does not have, with the nearest known one.
    """
    return {name for group in keep for name in groups[group]}


class FedBNServer(ServerHalf):
    """Server half: FedAvg over what travels."""

    def travelling(self, model: Template, groups: Groups) -> Template:
        """Return the tensors outside the kept groups."""
        local = kept(self.params.keep, groups)
        return {name: tensor for name, tensor in model.items() if name not in local}

    def init(self, model: Tensors, groups: Groups, ctx: RoundContext) -> State:
        """Keep the shared part only."""
        return State().having("model", self.travelling(model, groups))


class FedBNSite(SiteHalf):
    """Site half: the received layers around its own."""

    def init(self, work: SiteWork) -> State:
        """Start from the seeded network's values in the kept layers."""
        local = kept(self.params.keep, work.groups)
        return State().having(
            "local", {name: tensor for name, tensor in work.weights().items() if name in local}
        )

    def start(self, received: Payloads, state: State) -> Tensors:
        """Return the received layers and the site's own."""
        return {**received["model"].tensors, **state.part("local")}

    def models(self, received: Payloads, state: State) -> dict[str, Tensors]:
        """Return the hospital's own model."""
        return {PERSONAL: self.start(received, state)}

    def train(self, work: SiteWork, received: Payloads, state: State) -> SiteResult:
        """Train the whole network; send the shared layers, keep the others."""
        work.load(self.start(received, state))
        stats = work.fit()
        weights = work.weights()
        local = {name: weights.pop(name) for name in state.part("local")}
        return SiteResult(
            [Payload("model", Kind.MODEL, weights)], state.having("local", local), work.cases, stats
        )


FEDBN = Method(
    name="fedbn",
    title="FedAvg with chosen layers kept at the hospital",
    params=FedBNParams,
    server=FedBNServer,
    site=FedBNSite,
    neutral={"keep": ()},
    equals="fedavg",
    personal=True,
)
