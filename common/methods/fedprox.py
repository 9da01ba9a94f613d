"""FedProx: FedAvg with a proximal pull to the round's model.

Reference: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys 2020.

    min_w h_k(w; w_t) = F_k(w) + (μ/2) ‖w − w_t‖²                                              (eq. 2)

Deviations from the paper: sites do the run's number of epochs, not a site's own number of steps (γ-inexactness is not
measured). The norm runs over parameters; buffers are not pulled.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from common.method import LossTerm, Method, MethodParams, ServerHalf, SiteHalf, SiteWork
from common.payload import Payloads, State, Tensors


class FedProxParams(MethodParams):
    """Parameters of FedProx."""

    mu: float = Field(
        default=0.01, ge=0, description="μ of eq. 2, weight of the pull to the round's model; 0 is FedAvg"
    )


def squared_distance(model: nn.Module, anchor: Tensors) -> Tensor:
    """Return ‖w − anchor‖² over the trainable parameters, as a scalar on the model's device."""
    terms = [
        (value - anchor[name]).square().sum()
        for name, value in model.named_parameters()
        if value.requires_grad
    ]
    return sum(terms[1:], start=terms[0])


class FedProxSite(SiteHalf):
    """Site half: eq. 2."""

    def loss_term(self, work: SiteWork, received: Payloads, state: State) -> LossTerm | None:
        """Return (μ/2)‖w − w_t‖², or None for μ = 0."""
        if self.params.mu == 0:
            return None
        anchor = work.on_device(received["model"].tensors)
        return lambda model: 0.5 * self.params.mu * squared_distance(model, anchor)


FEDPROX = Method(
    name="fedprox",
    title="FedAvg with a proximal pull to the round's model",
    params=FedProxParams,
    server=ServerHalf,
    site=FedProxSite,
    neutral={"mu": 0.0},
    equals="fedavg",
)
