"""What a federated method is: parameters, a server half, a site half, and nothing shared between the halves.

A method lives in one file of `common/methods/`. Its two halves meet only through payloads that went through bytes.
The halves hold their parameters and nothing else; whatever must be remembered is a `State` that goes in and comes out.

    server half                                  site half
    ───────────                                  ─────────
    init(model) -> State                         init(work) -> State
    send(state, site, ctx) -> payloads  ───────► models(received, state) -> weights to evaluate
                                                 train(work, received, state) -> SiteResult
    fold(acc, reply) -> acc             ◄─────── payloads, cases
    finish(state, acc, ctx) -> State

`fold` takes one reply at a time, in the fixed order of the sites, and may keep only sums, or tensors on a shelf outside
the memory, so memory does not grow with the number of sites and the order of arrival changes nothing. The base class
reduces each payload as its spec says, or as the run's guard says; most methods override one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from common.config import GuardConfig, RunConfig, checked
from common.errors import PayloadError
from common.numerics.robust import coordinate_median, trimmed_mean
from common.payload import Kind, Payload, Payloads, PayloadSpec, Reduce, State, Template, Tensors
from common.shelf import Shelf
from common.work import Groups, LossTerm, RoundContext, SiteResult, SiteWork

GLOBAL = "global"
PERSONAL = "personal"
ROBUST = (Reduce.MEDIAN, Reduce.TRIMMED_MEAN)


class MethodParams(BaseModel):
    """Base of a method's parameters: frozen; fields named after the paper's symbols, with range and description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass
class Reply:
    """One site's decoded and checked answer to a round."""

    site: str
    cases: int
    payloads: Payloads


@dataclass
class Accumulator:
    """What a round knows of the replies folded so far.

    Attributes:
        sums: Running sums (float64) by payload and tensor name; `weights` are their weights by payload.
        kept: The sites' own tensors by payload, where the reduction needs all of them at once; used up by `finish`.
        cases: Training cases of all `sites`, which are in the order of folding.
        extra: What a method's own `begin` and `fold` keep for its `finish`.
    """

    sums: dict[str, Tensors] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    kept: dict[str, Shelf] = field(default_factory=dict)
    cases: int = 0
    sites: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class ServerHalf:
    """Server half of a method: FedAvg's, unless overridden.

    The model lies in the state's namespace "model". A subclass that adds payloads extends `downlink`/`uplink` and
    overrides `send` and `update`; one with an unusual reduction overrides `fold` and `finish`, and then asks
    `reduction` itself if the run's guard is to hold for it.

    Attributes:
        downlink, uplink: What each site receives and sends; an instance may have its own, by its parameters.
        robust: The run's guard; `reduce` and `trim` of it say how case-weighted means are replaced. Set on the
            instance (`make_halves`, the round loop); the default changes nothing.
        sites: Aliases that the run names, set like `robust`; none where the run takes whoever is there.
    """

    downlink: tuple[PayloadSpec, ...] = (PayloadSpec("model", Kind.MODEL, Reduce.NONE),)
    uplink: tuple[PayloadSpec, ...] = (PayloadSpec("model", Kind.MODEL, Reduce.WEIGHTED_MEAN),)
    robust: GuardConfig = GuardConfig()
    sites: tuple[str, ...] = ()

    def __init__(self, params: Any) -> None:
        self.params = params

    def travelling(self, model: Template, groups: Groups) -> Template:
        """Return the part of the model's tensors that payloads marked `like_model` hold: all, unless overridden.

        Both ends check what arrives against it. It may depend on parameters and groups, never on data.
        """
        return model

    def init(self, model: Tensors, groups: Groups, ctx: RoundContext) -> State:
        """Return the state before round 1.

        Args:
            model: The initial network's state dict, built from the run's seed.
            groups: Its parameter groups.
            ctx: Round 0.
        """
        return State().having("model", model)

    def send(self, state: State, site: str, ctx: RoundContext) -> list[Payload]:
        """Return what one site receives this round (also in the closing evaluation)."""
        return [Payload("model", Kind.MODEL, state.part("model"))]

    def stream(self, site: str) -> str:
        """Return which model a site is sent: sites with the same answer are sent the same; "" is everybody's."""
        return ""

    def begin(self, state: State, ctx: RoundContext) -> Accumulator:
        """Return an empty accumulator for the round."""
        return Accumulator()

    def reduction(self, spec: PayloadSpec) -> Reduce:
        """Return how a payload of the uplink is reduced: as declared, or as the guard replaces a weighted mean."""
        if spec.reduce is Reduce.WEIGHTED_MEAN and self.robust.reduce != "declared":
            return Reduce(self.robust.reduce)
        return spec.reduce

    def check(self, reply: Reply, state: State, ctx: RoundContext) -> None:
        """Refuse a reply for what only this method can see; nothing more than the common checks, unless overridden.

        Called when a reply arrives and has passed the common checks (spec, size, update norm), with the state before
        the round. `fold` may come much later and must not fail then: whatever could make it fail is refused here.

        Raises:
            PayloadError: The reply cannot be used; the site is named and left out of the round.
        """

    def fold(self, acc: Accumulator, reply: Reply) -> Accumulator:
        """Take in one reply. Replies come in the fixed order of the sites.

        Nothing of it may stay in memory but sums; what a median or trimmed mean needs goes to a shelf.

        Raises:
            PayloadError: Tensors for a median or trimmed mean that differ from the other sites' in name or shape.
            StorageError: The shelf cannot be written.
        """
        specs = {spec.name: spec for spec in self.uplink}
        for name, payload in reply.payloads.items():
            how = self.reduction(specs[name])
            if how is Reduce.NONE:
                continue
            if how in ROBUST:
                acc.kept.setdefault(name, Shelf(name)).put(payload.tensors, who=reply.site)
                continue
            weight = float(reply.cases) if how is Reduce.WEIGHTED_MEAN else 1.0
            sums = acc.sums.setdefault(name, {})
            for key, tensor in payload.tensors.items():
                term = tensor.to(torch.float64, copy=True).mul_(weight)
                sums[key] = sums[key].add_(term) if key in sums else term
            acc.weights[name] = acc.weights.get(name, 0.0) + weight
        acc.cases += reply.cases
        acc.sites.append(reply.site)
        return acc

    def finish(self, state: State, acc: Accumulator, ctx: RoundContext) -> State:
        """Close the round: reduce every payload and hand the results to `update`. The accumulator is then used up.

        Raises:
            PayloadError: No site contributed a single case.
            StorageError: The shelf of a median or trimmed mean cannot be read back.
        """
        if not acc.sites or acc.cases <= 0:
            raise PayloadError(
                f"Round {ctx.round}: no site contributed a training case; the model stays as it was."
            )
        reduced: dict[str, Tensors] = {}
        for spec in self.uplink:
            if spec.name in acc.sums:
                weighted = self.reduction(spec) is Reduce.WEIGHTED_MEAN
                divisor = acc.weights[spec.name] if weighted else 1.0
                reduced[spec.name] = {
                    key: total.div_(divisor) for key, total in acc.sums.pop(spec.name).items()
                }
            elif spec.name in acc.kept:
                shelf = acc.kept.pop(spec.name)
                reduced[spec.name] = {
                    key: self._robust(self.reduction(spec), shelf.stack(key)) for key in shelf.names()
                }
                shelf.close()
        return self.update(state, reduced, ctx)

    def _robust(self, how: Reduce, stack: Tensor) -> Tensor:
        return coordinate_median(stack) if how is Reduce.MEDIAN else trimmed_mean(stack, self.robust.trim)

    def update(self, state: State, reduced: dict[str, Tensors], ctx: RoundContext) -> State:
        """Return the next state from the reduced payloads (float64). FedAvg: the mean is the new model."""
        old = state.part("model")
        if "model" not in reduced:
            return state
        return state.having("model", {key: cast_like(reduced["model"][key], old[key]) for key in old})

    def figures(self, state: State, acc: Accumulator, ctx: RoundContext) -> dict[str, Any]:
        """Return what is worth telling of a finished round, as JSON values; the loop tells it in `method.figures`.

        Numbers, aliases and names of the model's tensors alone, and few: it is one line in every round's events.

        Args:
            state: The state after the round.
            acc: The round's, used up by `finish` but for its `extra`.
            ctx: The round's.
        """
        return {}

    def model(self, state: State) -> Tensors | None:
        """Return the global model to save, or None if the method has none."""
        return state.part("model") or None


class SiteHalf:
    """Site half of a method: FedAvg's, unless overridden."""

    def __init__(self, params: Any) -> None:
        self.params = params

    def init(self, work: SiteWork) -> State:
        """Return this site's state before its first round."""
        return State()

    def start(self, received: Payloads, state: State) -> Tensors:
        """Return the complete weights that local training starts from."""
        return received["model"].tensors

    def models(self, received: Payloads, state: State) -> dict[str, Tensors]:
        """Return the weights to evaluate, by name (`GLOBAL`, `PERSONAL`). The personal one is the hospital's own."""
        return {GLOBAL: received["model"].tensors}

    def loss_term(self, work: SiteWork, received: Payloads, state: State) -> LossTerm | None:
        """Return an extra term of the local objective, or None."""
        return None

    def train(self, work: SiteWork, received: Payloads, state: State) -> SiteResult:
        """Do the round's local work."""
        work.load(self.start(received, state))
        stats = work.fit(loss_term=self.loss_term(work, received, state))
        return SiteResult([Payload("model", Kind.MODEL, work.weights())], state, work.cases, stats)

    def pictures(self, work: SiteWork, received: Payloads, state: State) -> Iterator[tuple[str, Tensor]]:
        """Yield pictures for the hospital's own eyes, after a round that succeeded; nothing of them ever leaves.

        Args:
            work: What the worker offers, as `train` left it.
            received: What came in this round.
            state: The state after it.

        Yields:
            The alias of another site, and a sample (2, C, *S) before and after what this method does with it.
        """
        return iter(())


@dataclass(frozen=True)
class Method:
    """A registered method: its name, parameters and two halves.

    Attributes:
        name: What `--method` takes.
        title: One line for people.
        params: Parameter model.
        server: Class of the server half.
        site: Class of the site half.
        neutral: Parameters at which the method equals `equals` to the bit.
        equals: Name of the method it then equals ("" if the paper names none).
        personal: True if each hospital ends with a model of its own.
        version: Raised when a change makes the two halves of different versions unable to work together; compared in
            the first exchange.
    """

    name: str
    title: str
    params: type[MethodParams]
    server: type[ServerHalf]
    site: type[SiteHalf]
    neutral: Mapping[str, Any] = field(default_factory=dict)
    equals: str = ""
    personal: bool = False
    version: int = 1

    def parse(self, params: Mapping[str, Any]) -> MethodParams:
        """Check the method's parameters.

        Raises:
            ConfigError: Unknown parameter, or a value out of its range.
        """
        return checked(self.params, params, where=f"{self.name}.")


def make_halves(method: Method, config: RunConfig) -> tuple[ServerHalf, SiteHalf]:
    """Build both halves with a run's parameters and guard (each end uses one of them)."""
    params = method.parse(config.params)
    server = method.server(params)
    server.robust, server.sites = config.guard, config.sites
    return server, method.site(params)


def cast_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Bring a float64 tensor to another's dtype; integers are rounded to nearest, not cut."""
    if like.dtype.is_floating_point:
        return tensor.to(like.dtype)
    return tensor.round().to(like.dtype)
