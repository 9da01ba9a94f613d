"""Ditto: a personal model beside FedAvg's, pulled towards the received global one.

Reference: Li, Hu, Beirami, Smith: Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021.

    min_{v_k} h_k(v_k; w*) = F_k(v_k) + (λ/2) ‖v_k − w*‖²                                      (eq. Ditto)
    v_k ← v_k − η (∇F_k(v_k) + λ (v_k − w_t))                                                  (Algorithm 1, line 7)

Only the global branch travels; v_k never leaves the hospital.

Deviations from the paper: any optimiser of the run may do the personal steps (with plain SGD the line above is exact);
the number of personal epochs is a parameter. As in Algorithm 1 the anchor is the model received this round, before
the global branch's own local steps.
"""

from __future__ import annotations

from pydantic import Field

from common.method import GLOBAL, PERSONAL, Method, MethodParams, ServerHalf, SiteHalf, SiteResult, SiteWork
from common.methods.fedprox import squared_distance
from common.payload import Payloads, State, Tensors


class DittoParams(MethodParams):
    """Parameters of Ditto."""

    lam: float = Field(
        default=0.1, ge=0, description="λ, weight of the pull of v to the received model; 0 is local training"
    )
    personal_epochs: int = Field(
        default=0, ge=0, description="epochs of the personal branch; 0 takes the run's local epochs"
    )


class DittoSite(SiteHalf):
    """Site half: FedAvg's branch, and the personal branch in the site's state."""

    def own(self, received: Payloads, state: State) -> Tensors:
        """Return v_k; before the first round it is the received model."""
        return state.part("personal") or received["model"].tensors

    def models(self, received: Payloads, state: State) -> dict[str, Tensors]:
        """Return the received global model and v_k."""
        return {GLOBAL: received["model"].tensors, PERSONAL: self.own(received, state)}

    def train(self, work: SiteWork, received: Payloads, state: State) -> SiteResult:
        """Train v_k against the received model, then the global branch as FedAvg does."""
        work.load(self.own(received, state))
        anchor = work.on_device(received["model"].tensors)
        lam = self.params.lam
        work.progress("personal")
        work.fit(
            stream="personal",
            epochs=self.params.personal_epochs or None,
            loss_term=(lambda model: 0.5 * lam * squared_distance(model, anchor)) if lam else None,
        )
        state = state.having("personal", work.weights())
        work.progress("train")
        return super().train(work, received, state)


DITTO = Method(
    name="ditto",
    title="a personal model beside FedAvg's, pulled towards it",
    params=DittoParams,
    server=ServerHalf,
    site=DittoSite,
    neutral={"lam": 0.0},
    equals="local-only",
    personal=True,
)
