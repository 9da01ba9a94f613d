"""FedRep: a shared representation and personal heads, trained in turns; only the representation is averaged.

Reference: Collins, Hassani, Mokhtari, Shakkottai: Exploiting Shared Representations for Personalized Federated Learning,
ICML 2021, Algorithm 1 (φ the representation, h_i the head of site i).

    h_i ← τ epochs of SGD on f_i(h, φ_t) over h, from the site's own h_i; φ_t is frozen        (client, head)
    φ_i ← E epochs of SGD on f_i(h_i, φ) over φ, from the received φ_t; h_i is frozen          (client, representation)
    φ_{t+1} ← Σ_i (n_i / n) φ_i                                                                (server)

`personal` names the layers of h as FedPer's does, running statistics included (`fedper.py`). A round is τ + E passes over
the site's cases: with `head_epochs` + `base_epochs` = the other methods' `train.local_epochs` the budgets are equal.

Both turns see the same batches from the same order's beginning, and each has an optimiser of its own.

Deviations from the paper: the mean is weighted by case counts, as in the authors' code; any optimiser of the run may do
the local work; h_i starts from the run's seeded values. A layer with running statistics that is frozen as a whole
normalises by them and leaves them alone, so h_i is trained on what φ_t computes in use, not on statistics of its batches.
"""

from __future__ import annotations

import math

from pydantic import Field

from common.method import Method, SiteResult, SiteWork
from common.methods.fedper import FedPerParams, FedPerServer, FedPerSite
from common.payload import Kind, Payload, Payloads, State
from common.work import FitStats


class FedRepParams(FedPerParams):
    """Parameters of FedRep; `personal` is FedPer's."""

    head_epochs: int = Field(
        default=1, ge=1, le=100_000, description="τ, epochs of the personal layers, the base frozen"
    )
    base_epochs: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="E, epochs of the base, the personal layers frozen; 0 takes the run's local epochs",
    )


def together(first: FitStats, second: FitStats) -> FitStats:
    """Return what two turns did: sums, and the mean loss over the samples of both (NaN after no step)."""
    samples = first.samples + second.samples
    total = sum(part.loss * part.samples for part in (first, second) if part.samples)
    return FitStats(
        steps=first.steps + second.steps,
        samples=samples,
        loss=total / samples if samples else math.nan,
        seconds=first.seconds + second.seconds,
    )


class FedRepSite(FedPerSite):
    """Site half: the head's turn, then the representation's."""

    def train(self, work: SiteWork, received: Payloads, state: State) -> SiteResult:
        """Train the personal layers, then the base; send the base, keep the others."""
        work.load(self.start(received, state))
        own = state.part("local")
        # Parameters only: with its statistics in the list, a normalisation layer of the frozen base would go on counting.
        head = [name for name in work.groups["all"] if name in own]
        stats = None
        if head:
            work.progress("personal")
            stats = work.fit(stream="head", epochs=self.params.head_epochs, trainable=head)
            work.progress("train")
        done = work.fit(epochs=self.params.base_epochs or None, trainable=list(received["model"].tensors))
        weights = work.weights()
        local = {name: weights.pop(name) for name in own}
        return SiteResult(
            [Payload("model", Kind.MODEL, weights)],
            state.having("local", local),
            work.cases,
            done if stats is None else together(stats, done),
        )


FEDREP = Method(
    name="fedrep",
    title="a shared representation and personal heads, trained in turns",
    params=FedRepParams,
    server=FedPerServer,
    site=FedRepSite,
    neutral={"personal": ()},
    equals="fedavg",
    personal=True,
)
