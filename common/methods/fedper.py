"""FedPer: a shared base under personal layers. Both are trained together at the hospital; only the base is averaged.

Reference: Arivazhagan, Aggarwal, Singh, Choudhary: Federated Learning with Personalization Layers, arXiv 1912.00818, 2019.

    (W_B, W_P)_k ← E local epochs of SGD on F_k(W_B, W_P), from the received W_B and the hospital's own W_P   (client)
    W_B ← Σ_k (n_k / n) W_B,k                                                                                 (server)

`personal` names the layers of W_P: parameter groups (docs/models.md) or patterns of state-dict keys. The code is FedBN's,
which keeps groups in the same way; what is kept never travels, in either direction.

Batch normalisation: the paper sets none of it apart, so a normalisation layer belongs to the part that it lies in. The
base's scales, shifts and running statistics are averaged; those of a personal layer stay. personal=("head", "buffers")
keeps all running statistics, ("head", "norm", "buffers") is FedPer over FedBN.

Deviations from the paper: any optimiser of the run may do the local work. W_P starts from the run's seeded values at
every hospital, not from values of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from pydantic import Field

from common.errors import ConfigError
from common.method import Groups, Method, MethodParams, SiteWork
from common.methods.fedbn import FedBNServer, FedBNSite
from common.payload import State, Template


class FedPerParams(MethodParams):
    """Parameters of FedPer."""

    personal: tuple[str, ...] = Field(
        default=("head",),
        description="W_P: parameter groups, or patterns of keys with * and ?, that stay at the site; none is FedAvg",
    )


def personal_keys(personal: Iterable[str], names: Iterable[str], groups: Groups) -> set[str]:
    """Return the state-dict keys that stay at the site.

    Running statistics go with their layer: they stay where all parameters of the layer do.

    Args:
        personal: Groups, or patterns of keys.
        names: The network's state-dict keys.
        groups: Its parameter groups.

    Raises:
        ConfigError: An entry that is no group and matches no key, or no parameter is left to share.
    """
    names, chosen = list(names), set[str]()
    for entry in personal:
        # no key is called like a group, and an entry that is neither is refused by `groups`
        chosen |= {name for name in names if fnmatchcase(name, entry)} or set(groups[entry])
    if chosen.issuperset(groups["all"]):
        raise ConfigError(
            f"personal {list(personal)} keeps all parameters of this network at the site and leaves no base to share "
            "(logistic regression is all head). Keep less of it, choose another network such as 'mlp', or run local-only."
        )
    shared = {_layer(name) for name in groups["all"] if name not in chosen}
    own = {_layer(name) for name in chosen} - shared
    return chosen | {name for name in groups["buffers"] if _layer(name) in own}


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


class FedPerServer(FedBNServer):
    """Server half: FedAvg over the base."""

    def travelling(self, model: Template, groups: Groups) -> Template:
        """Return the base's tensors."""
        local = personal_keys(self.params.personal, model, groups)
        return {name: tensor for name, tensor in model.items() if name not in local}


class FedPerSite(FedBNSite):
    """Site half: the received base under the site's own layers, trained together."""

    def init(self, work: SiteWork) -> State:
        """Start from the seeded network's values in the personal layers."""
        weights = work.weights()
        local = personal_keys(self.params.personal, weights, work.groups)
        return State().having("local", {name: weights[name] for name in weights if name in local})


FEDPER = Method(
    name="fedper",
    title="a shared base under personal layers, trained together",
    params=FedPerParams,
    server=FedPerServer,
    site=FedPerSite,
    neutral={"personal": ()},
    equals="fedavg",
    personal=True,
)
