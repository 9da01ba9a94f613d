"""pFL-ResFIM: what is sensitive to a hospital's way of imaging stays there, parameter by parameter. A reconstruction.

Reference: Zhu, Li, Wang, Lam: pFL-ResFIM, ISBI 2026, arXiv 2603.14848. Published are the idea and its parts: a *residual
Fisher information matrix* tells how sensitive each parameter is to the difference between domains; *spectral transfer*
simulates the other clients' styles on the site's own data; only invariant parameters are aggregated. Formulas, ratios and
schedule are in no public text. This file is a reconstruction from the nearest published relatives, and each of its choices
is a parameter:

    A_k = mean |FFT(x)| / N in a low window, sent once by site k                           (FedDG, Liu et al., CVPR 2021)
    x→k = x with the amplitudes (1 − λ) A + λ A_k in the window, its own phase             (FDA, Yang and Soatto, CVPR 2020)
    F_i(D)_j = mean_n (∂ log p(y_n | x_n, θ_i) / ∂θ_j)²                                    (diagonal empirical Fisher)
    R_ij = mean_{k≠i} | F_i(D→k)_j − F_i(D)_j |, ranked among all parameters (FedDPA, Yang et al., NeurIPS 2023: by tensor)
    M_ij = 0 for the ρ parameters with the largest R_i, the sensitive ones; 1 for the invariant others
    θ̄_j = Σ_c n_c M_cj θ_cj / Σ_c n_c M_cj,      θ_ij ← M_ij θ̄_j + (1 − M_ij) θ_ij

A round of site i: assemble θ_i with the mask of its last round, train, measure R and the new mask, send the invariant values
and the mask. Under a hard mask sensitive values stay. A value that nobody shares keeps its last mean at the coordinator.

* Before round `first` there is no mask, and the round is FedAvg's; round 1 has no styles of others to measure with.
* Styles go to a site in the rounds in which masks are due, and to a site that has not measured yet: it does so in the first
  round from `first` on in which it takes part and there are styles. A missing site's style stays.
* `local` groups never travel and have no mask; by default the buffers, as batch statistics have no Fisher information.
* F is that of the cross-entropy without class weights, over a fixed seeded set of un-augmented samples, in evaluation mode.
* Tables have no spectrum: their style is each feature's mean and standard deviation; standardised columns have all the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from common import resfim
from common.errors import ConfigError, PayloadError, TrainingError
from common.guard import check_updates
from common.mask_figures import MaskFigures
from common.method import (
    PERSONAL,
    Accumulator,
    Groups,
    Method,
    MethodParams,
    Reply,
    RoundContext,
    ServerHalf,
    SiteHalf,
    SiteResult,
    SiteWork,
    cast_like,
)
from common.methods.fedbn import kept
from common.numerics import residual as residuals
from common.numerics.diagonal_fisher import Variant
from common.numerics.rng import generator
from common.numerics.spectrum import Keep
from common.payload import Kind, Payload, Payloads, PayloadSpec, Reduce, State, Template, Tensors
from common.sensitivity import Measurement, Split, check_style, check_styles, fitting_styles, measure_style

SENSITIVITY = "sensitivity"  # the phase in which a site measures
NAMES = "resfim.names"
WANTED = "resfim.style"
MOST_BANK = 0.1  # of the frequencies, in the spectra of single patches
MODEL = PayloadSpec("model", Kind.MODEL)
OWN = PayloadSpec("model", Kind.MODEL, from_received=False)
KEPT = PayloadSpec("model", Kind.MODEL, Reduce.NONE, like_model=False)
MASK = PayloadSpec("sensitive", Kind.SENSITIVITY_MASK, Reduce.NONE, like_model=False)
STYLE = PayloadSpec("style", Kind.STYLE_SPECTRUM, Reduce.NONE, like_model=False, optional=True)
STYLES = PayloadSpec("styles", Kind.STYLE_SPECTRUM, Reduce.NONE, like_model=False, optional=True)
UNSHARED = PayloadSpec("unshared", Kind.SENSITIVITY_MASK, Reduce.NONE, like_model=False, optional=True)


class ResFIMParams(MethodParams):
    """Parameters of pFL-ResFIM."""

    rho: float = Field(default=0.2, ge=0, le=1, description="ρ, share of the parameters that is sensitive")
    tau: float = Field(
        default=0.0, ge=0, lt=1, description="τ, threshold of normalised residuals in place of ρ; 0 off"
    )
    soft: bool = Field(
        default=False, description="share every parameter by 1 − its normalised residual, in place of a mask"
    )
    beta: float = Field(
        default=0.01, ge=0, le=0.5, description="β, cut-off of the window by sampling frequency; 0: the mean"
    )
    lam: float = Field(default=1.0, ge=0, le=1, description="λ, share of the other site's amplitude")
    keep: Keep = Field(
        default="clip", description="transferred images: clip or rescale to the source's range, or none"
    )
    style: Literal["mean", "bank"] = Field(
        default="mean", description="what a site sends of its spectra: their mean, or those of some samples"
    )
    bank: int = Field(default=8, ge=1, le=1000, description="samples in a bank")
    styles: int = Field(
        default=0, ge=0, description="styles of others, drawn anew for each measurement; 0 is all"
    )
    samples: int = Field(default=0, ge=0, description="of a Fisher information; 0: 8 to 64, about an epoch")
    variant: Variant = Field(
        default="empirical", description="Fisher information of true labels, or of labels from the model"
    )
    reference: Literal["real", "own"] = Field(
        default="real",
        description="the simulated are compared with real samples, or those in their own style",
    )
    residual: Literal["absolute", "signed", "relative"] = Field(
        default="absolute", description="change of the Fisher information; signed: only growth is sensitive"
    )
    over_sites: Literal["mean", "max"] = Field(default="mean", description="residuals over the other sites")
    normalise: Literal["tensor", "global"] = Field(
        default="global", description="residuals to 0-1 in each tensor, or by rank among all parameters"
    )
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="weight of the earlier rounds' residuals; 0 is none"
    )
    aggregate: Literal["holders", "all", "intersection"] = Field(
        default="holders", description="mean over whoever shares a value; over all; only where all share it"
    )
    first: int = Field(default=2, ge=1, description="first round with masks; FedAvg before")
    every: int = Field(default=1, ge=1, description="rounds from one measurement to the next")
    freeze_after: int = Field(default=0, ge=0, description="last round that measures; masks stay then; 0 off")
    local: tuple[str, ...] = Field(
        default=("buffers",), description="parameter groups that stay at the site in any case"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.soft and (self.tau or self.aggregate == "intersection"):
            raise ValueError("soft has no mask, so neither tau nor aggregate 'intersection' goes with it")
        if self.style == "bank" and self.beta > MOST_BANK:
            raise ValueError(
                f"a bank holds spectra of single patches; beta above {MOST_BANK} would let them be rebuilt"
            )
        if self.freeze_after and self.freeze_after < self.first:
            raise ValueError(
                f"freeze_after {self.freeze_after} is before first ({self.first}): no mask at all"
            )
        return self

    @property
    def splits(self) -> bool:
        """Whether anything beside `local` is ever kept; else this is FedAvg over the rest."""
        return self.soft or self.tau > 0 or self.rho > 0

    @property
    def measures(self) -> bool:
        """Whether masks depend on data: with ρ = 1 everything is sensitive."""
        return self.splits and (self.soft or self.tau > 0 or self.rho < 1)

    @property
    def masked(self) -> bool:
        """Whether only invariant values travel."""
        return self.splits and self.aggregate != "all"

    @property
    def most(self) -> int:
        """Spectra that a site may send; 0 for their mean."""
        return self.bank if self.style == "bank" else 0

    @property
    def measurement(self) -> Measurement:
        """How R is measured."""
        form: residuals.Form = "abs" if self.residual == "absolute" else self.residual
        return Measurement(
            self.samples, self.variant, self.reference, form, self.over_sites, self.beta, self.lam,
            self.keep,
        )  # fmt: skip

    @property
    def split(self) -> Split:
        """How R becomes a mask."""
        return Split(self.soft, "rank" if self.normalise == "global" else "tensor", self.tau, self.rho)

    def due(self, ctx: RoundContext) -> bool:
        """Tell whether masks are measured in a round."""
        last = min(self.freeze_after or ctx.rounds, ctx.rounds)
        return self.first <= ctx.round <= last and (ctx.round - self.first) % self.every == 0


def splittable(params: ResFIMParams, names: Iterable[str], groups: Groups) -> list[str]:
    """Return the parameters that may be sensitive, in the network's order.

    Raises:
        ConfigError: `local` leaves none.
    """
    there = set(names) - kept(params.local, groups)
    found = [name for name in groups["all"] if name in there]
    if params.splits and not found:
        raise ConfigError(
            f"pfl-resfim.local {list(params.local)} leaves no parameter that travels. Keep fewer groups local."
        )
    return found


class ResFIMServer(ServerHalf):
    """Server half: a mean over the sites that share a value, and the sites' styles for each other."""

    downlink = (PayloadSpec("model", Kind.MODEL, Reduce.NONE), STYLES, UNSHARED)
    uplink = (KEPT, MASK, STYLE)

    def __init__(self, params: ResFIMParams) -> None:
        super().__init__(params)
        styles = (STYLES,) if params.measures else ()
        unshared = (UNSHARED,) if params.splits and params.aggregate == "intersection" else ()
        self.downlink = (type(self).downlink[0], *styles, *unshared)
        style = (STYLE,) if params.measures else ()
        self.uplink = (*((KEPT, MASK) if params.masked else (OWN if params.splits else MODEL,)), *style)

    def travelling(self, model: Template, groups: Groups) -> Template:
        """Return the tensors outside the local groups."""
        local = kept(self.params.local, groups)
        return {name: tensor for name, tensor in model.items() if name not in local}

    def init(self, model: Tensors, groups: Groups, ctx: RoundContext) -> State:
        """Return the model that travels, and the names of the parameters that may be sensitive.

        Raises:
            ConfigError: Groups that leave nothing, or a guard that would go around masks.
        """
        if self.params.masked and (self.robust.reduce != "declared" or self.robust.outlier):
            setting = "reduce" if self.robust.reduce != "declared" else "outlier"
            raise ConfigError(
                f"guard.{setting} compares whole models, and pfl-resfim's sites send different parts of theirs. Use "
                "pfl-resfim.aggregate 'all', or guard.update_norm and guard.update_ratio."
            )
        names = splittable(self.params, model, groups)
        return State(values={NAMES: json.dumps(names)}).having("model", self.travelling(model, groups))

    def send(self, state: State, site: str, ctx: RoundContext) -> list[Payload]:
        """Return the model, and where the site is to measure a mask the other sites' styles."""
        model = Payload("model", Kind.MODEL, state.part("model"))
        payloads = [model]
        if self._wanted(state, site, ctx):
            model.meta[WANTED] = True
        styles = self._styles(state, site, ctx)
        if styles:
            payloads.append(Payload("styles", Kind.STYLE_SPECTRUM, styles))
        unshared = state.part("unshared")
        if unshared:
            payloads.append(Payload("unshared", Kind.SENSITIVITY_MASK, unshared))
        return payloads

    def begin(self, state: State, ctx: RoundContext) -> Accumulator:
        """Open the round."""
        model = state.part("model")
        extra: dict[str, Any] = {"holders": resfim.Holders(), "model": model, "styles": {}}
        if self.params.masked and not self.params.soft and ctx.round >= self.params.first:
            names = json.loads(str(state.values[NAMES]))
            extra["figures"] = MaskFigures({name: model[name].numel() for name in names})
        return Accumulator(extra=extra)

    def check(self, reply: Reply, state: State, ctx: RoundContext) -> None:
        """Refuse values that their mask does not leave, a style out of its place, and updates that are too large."""
        params: ResFIMParams = self.params
        style, who = reply.payloads.get("style"), reply.site
        wanted = self._wanted(state, who, ctx)
        if (style is not None) != wanted:
            raise PayloadError(
                f"{who}: round {ctx.round} {'needs the' if wanted else 'takes no'} style of the site, the answer has "
                f"{'none' if wanted else 'one'}. Let both ends run the same version.", site=who,
            )  # fmt: skip
        if style is not None:
            check_style(style.tensors, {}, params.most, who=who)
        if not params.masked:
            return
        names, masks = json.loads(str(state.values[NAMES])), reply.payloads["sensitive"].tensors
        base = resfim.expected_values(masks, state.part("model"), names, soft=params.soft, who=who)
        resfim.check_kept(reply.payloads["model"].tensors, base, who=who)
        sent = {"model": Payload("model", Kind.MODEL, base)}
        check_updates({"model": reply.payloads["model"]}, (MODEL,), sent, self.robust, who=who)

    def fold(self, acc: Accumulator, reply: Reply) -> Accumulator:
        """Take in one reply: add its values where it shares them, note its style."""
        style = reply.payloads.get("style")
        if style is not None:
            acc.extra["styles"][reply.site] = style.tensors
        if self.params.masked:
            values, masks = (reply.payloads[name].tensors for name in ("model", "sensitive"))
            model = acc.extra["model"]
            shares, sensitive = resfim.shares(masks, model, soft=self.params.soft, who=reply.site)
            if "figures" in acc.extra:
                acc.extra["figures"].add(reply.site, sensitive)
            for name, value in values.items():
                acc.extra["holders"].add(name, value, reply.cases, shares.get(name), model[name].shape)
        return super().fold(acc, reply)

    def finish(self, state: State, acc: Accumulator, ctx: RoundContext) -> State:
        """Close the round."""
        measured = [site for site in acc.sites if self._styles(state, site, ctx)]
        state = resfim.having_measured(super().finish(state, acc, ctx), measured)
        if self.params.masked:
            whole = self.params.aggregate == "intersection"
            least = float(acc.cases) if whole else 0.0
            model: Tensors = {}
            stays: resfim.Masks = {}
            for name, old in state.part("model").items():
                mean, stays[name] = acc.extra["holders"].mean(name, old, least)
                model[name] = cast_like(mean, old)
            state = state.having("model", model)
            state = state.having("unshared", resfim.pack_masks(stays)) if whole else state
        return self._with_styles(state, acc.extra["styles"]) if self.params.measures else state

    def figures(self, state: State, acc: Accumulator, ctx: RoundContext) -> dict[str, Any]:
        """Return how dense the round's masks are, where, and how far the sites agree; empty where none came."""
        return acc.extra["figures"].told() if "figures" in acc.extra else {}

    def _wanted(self, state: State, site: str, ctx: RoundContext) -> bool:
        """Tell whether a site is to send its style: until one has arrived."""
        held = {name.partition("/")[2] for name in state.part("style")}
        return self.params.measures and ctx.round <= ctx.rounds and site not in held

    def _styles(self, state: State, site: str, ctx: RoundContext) -> Tensors:
        """Return the styles that a site measures with: the others', where masks are due or it has none yet."""
        params: ResFIMParams = self.params
        late = params.first <= ctx.round <= ctx.rounds and site not in resfim.measured(state)
        if not params.measures or not (late or params.due(ctx)):
            return {}
        drawn = generator("styles", ctx.seed, site, ctx.round)
        return fitting_styles(state.part("style"), site, params.styles, drawn)

    def _with_styles(self, state: State, arrived: dict[str, Tensors]) -> State:
        """Keep the styles that came."""
        held = state.part("style")
        for site, tensors in arrived.items():
            held.update({f"{form}/{site}": style for form, style in tensors.items()})
        return state.having("style", held)


class ResFIMSite(SiteHalf):
    """Site half: received where invariant, its own where sensitive, and the measurement that tells which is which."""

    def init(self, work: SiteWork) -> State:
        """Start from the seeded network's values in the local groups."""
        local = kept(self.params.local, work.groups)
        return State().having(
            "own", {name: tensor for name, tensor in work.weights().items() if name in local}
        )

    def start(self, received: Payloads, state: State) -> Tensors:
        """Return θ_i: received where the site's last mask says invariant, its own elsewhere."""
        tensors, own = received["model"].tensors, state.part("own")
        unshared = received.get("unshared")
        weights = resfim.assembled(tensors, own, state.part("mask"))
        if unshared is None:
            return weights
        return resfim.assembled(
            weights, own, resfim.unpack_masks(unshared.tensors, tensors, who="coordinator")
        )

    def models(self, received: Payloads, state: State) -> dict[str, Tensors]:
        """Return the hospital's own model."""
        return {PERSONAL: self.start(received, state)}

    def train(self, work: SiteWork, received: Payloads, state: State) -> SiteResult:
        """Train θ_i, measure which of its parameters are sensitive, and send the others."""
        params: ResFIMParams = self.params
        work.load(self.start(received, state))
        stats = work.fit()
        weights = work.weights()
        local = kept(params.local, work.groups)
        shared = {name: tensor for name, tensor in weights.items() if name not in local}
        state = state.having(
            "own", weights if params.splits else {name: weights[name] for name in sorted(local)}
        )
        started = time.perf_counter()
        state, extra = self._sensitivity(work, received, state)
        if params.masked:
            masks = state.part("mask")
            if params.soft:
                coded = masks or resfim.whole_shares(shared, splittable(params, shared, work.groups))
            else:
                coded, shared = resfim.pack_masks(masks), resfim.kept_values(shared, masks)
            extra = [Payload("sensitive", Kind.SENSITIVITY_MASK, coded), *extra]
        payloads = [Payload("model", Kind.MODEL, shared), *extra]
        seconds = {SENSITIVITY: time.perf_counter() - started} if params.splits else {}
        return SiteResult(payloads, state, work.cases, stats, seconds)

    def pictures(
        self, work: SiteWork, received: Payloads, state: State
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a training sample as it is and in the styles that came."""
        own, others = state.part("style"), received["styles"].tensors if "styles" in received else {}
        return self.params.measurement.restyled(work, own, others) if own and others else iter(())

    def _sensitivity(self, work: SiteWork, received: Payloads, state: State) -> tuple[State, list[Payload]]:
        """Return the state with this round's mask and style, and the style as a payload where it is wanted."""
        params: ResFIMParams = self.params
        wanted = bool(received["model"].meta.get(WANTED, False))
        others = received["styles"].tensors if "styles" in received else {}
        if params.splits and not params.measures and work.ctx.round >= params.first:
            own = state.part("own")
            names = splittable(params, own, work.groups)
            return self._masked(
                state, {name: torch.ones_like(own[name], dtype=torch.bool) for name in names}
            ), []
        if not (wanted or others):
            return state, []
        work.progress(SENSITIVITY)
        try:
            if not state.part("style"):
                images = (image for image, _ in work.samples(work.visits))
                drawn = generator("style", work.ctx.seed, work.ctx.site)
                form, style = measure_style(images, beta=params.beta, bank=params.most, generator=drawn)
                state = state.having("style", {form: style})
            if others:
                state = self._measured(work, others, state)
        except ValueError as error:
            raise TrainingError(
                f"{work.ctx.site}: the parameters' sensitivity cannot be measured in round {work.ctx.round}; the site's "
                "log says why. Look for training that diverged, or a network without fixed normalisation.",
                detail=str(error), site=work.ctx.site,
            ) from error  # fmt: skip
        return state, [Payload("style", Kind.STYLE_SPECTRUM, state.part("style"))] if wanted else []

    def _measured(self, work: SiteWork, others: Tensors, state: State) -> State:
        """Return the state with the mask of the network as it is now."""
        params: ResFIMParams = self.params
        names = splittable(params, work.model.state_dict(), work.groups)
        own = state.part("style")
        check_styles(others, own, params.most)
        changes = params.measurement.residual(work, names, own, others)
        if params.smoothing:
            changes = residuals.smooth(state.part("residual") or None, changes, params.smoothing)
            state = state.having("residual", {name: value.float() for name, value in changes.items()})
        masks = params.split.masks(changes)
        return state.having("mask", masks) if params.soft else self._masked(state, masks)

    def _masked(self, state: State, masks: resfim.Masks) -> State:
        """Return the state with a mask and the shares that it makes sensitive, by layer and of all."""
        values = {name: value for name, value in state.values.items() if not name.startswith("sensitive/")}
        values |= {f"sensitive/{layer}": value for layer, value in residuals.density(masks).items()}
        values["sensitive/"] = residuals.share(masks)
        return State(state.tensors, values).having("mask", masks)


PFL_RESFIM = Method(
    name="pfl-resfim",
    title="parameters sensitive to the imaging domain kept at the hospital (reconstruction)",
    params=ResFIMParams,
    server=ResFIMServer,
    site=ResFIMSite,
    neutral={"rho": 0.0, "local": ()},
    equals="fedavg",
    personal=True,
)
