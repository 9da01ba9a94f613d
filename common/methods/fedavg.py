"""FedAvg: federated averaging.

Reference: McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data, AISTATS 2017, Algorithm 1.

    w_{t+1} = Σ_k (n_k / n) w^k_{t+1},   w^k_{t+1} = E local epochs of SGD from w_t            (server line 8, ClientUpdate)

Both halves are the defaults of `common/method.py`.

Deviations from the paper: any optimiser of the run may do the local work; n_k counts cases (volumes, pictures, rows).
Floating-point buffers (running means) are averaged like parameters; integer buffers are averaged and rounded. The
average is taken in float64 and rounded once, so one site alone gives back its weights to the bit.
"""

from __future__ import annotations

from common.method import Method, MethodParams, ServerHalf, SiteHalf


class FedAvgParams(MethodParams):
    """FedAvg has no parameters of its own."""


FEDAVG = Method(
    name="fedavg",
    title="one shared model, averaged by case counts",
    params=FedAvgParams,
    server=ServerHalf,
    site=SiteHalf,
    equals="",
)
