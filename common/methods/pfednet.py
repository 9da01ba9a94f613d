"""pFedNet: a shared component for all, personal components that similar hospitals draw together.

Reference: Zhao, Liu, Liu, He: Medical Federated Model with Mixture of Personalized and Sharing Components (pFedNet). With
M and N choosing the shared and the personal parameters, x^(n) = M x + N z^(n), and edges E between similar sites:

    min_{x, Z} (1/N) Σ_n f_n(M x + N z^(n); D_n) + λ Σ_{(i,j) ∈ E} ‖z^(i) − z^(j)‖_p,   p ∈ {1, 2, ∞}               (1)

    x_{t+1} = Σ_n (n_n / n) x_n                              averaged local steps                     (Algorithm 5, line 5)
    Z_{t+1} = argmin_Z 1/(2η) ‖Z − A‖²_F + λ ‖Z Q‖_{1,p}     A: the sites' own steps; Q: incidence of E   (3), Algorithm 4

λ = 0 leaves every site's part its own, a large λ makes those of connected sites one (Fig. 2). The network E comes from sketches:
each site sends one, once, and is joined with the k sites whose sketches are nearest (III-A), or E is given.

A round of site n: take x and z^(n), train both on its own data, send them. The coordinator averages x, solves (3) for
Z, and sends each site its own z^(n) back: the personal parts are known to the coordinator, unlike those of FedPer.

Errors of the printed text that are not copied (common/numerics/{fusion,proximal,total_variation}.py have the right forms):

* (8) is the proximal operator only for p = 2; p = 1 and ∞ have their own.
* (4), CER's threshold, is 1/ρ (here γ/ρ) and not ρ. CER is a codec here, for any method: `wire.uplink_codec=cer`.
* The logistic loss of VI-B is printed with the opposite sign.

Deviations from the paper:

* A is what local training ended at, not one gradient step; with E local epochs that is a step along their sum. η and λ then
  act as one number, ηλ: the distance that an edge may take off. `scale=relative` (default) gives λ as the share of the
  value that makes connected sites one, anew in each round, so that it means the same for every model and learning rate.
* One local pass steps x and z together; `alternate` takes one after the other, as the paper's loops I and J do, at twice the
  cost. Algorithm 5's communication after every inner step is not offered.
* x is weighted by cases, as FedAvg's (the paper: 1/N). (3) weighs the sites alike, as printed.
* The published code's network loses edges that only the higher-numbered site sees; here either direction counts.
* (3) is solved over the sites that answered. One that misses a round keeps its z and pulls at nobody; one that comes later
  begins at the mean of Z.
* Buffers (running statistics) are averaged with x.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from common.data_sketch import Form, check_sketch, data_sketch
from common.errors import ConfigError, PayloadError, TrainingError, nearest
from common.method import (
    PERSONAL,
    ROBUST,
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
from common.numerics.fusion import Fusion
from common.numerics.fusion_blocks import Ends, fuse_blocks
from common.numerics.graphs import Graph, Metric, complete_graph, graph_of, nearest_neighbours
from common.numerics.proximal import Norm
from common.payload import Kind, Payload, Payloads, PayloadSpec, Reduce, State, Tensors
from common.shelf import Shelf

AUTO = "auto"
NAMES = "pfednet.names"
WANTED = "pfednet.sketch"
MOST_TOLD = 200  # edges told in a round's figures
SKETCHING = "sketch"  # the phase in which a site makes its sketch
MODEL = PayloadSpec("model", Kind.MODEL)
SKETCH = PayloadSpec("sketch", Kind.DATA_SKETCH, Reduce.NONE, like_model=False, optional=True)


class PFedNetParams(MethodParams):
    """Parameters of pFedNet."""

    personal: tuple[str, ...] = Field(
        default=(AUTO,),
        description="N, parameter groups or patterns that are personal; auto: decoder and head of a U-shaped net, else "
        "the head (of a linear model everything); none is FedAvg",
    )
    lam: float = Field(
        default=0.2, ge=0, description="λ of (1); 0 leaves each site's part alone; relative: 1 makes them one"
    )
    scale: Literal["relative", "absolute"] = Field(
        default="relative",
        description="λ as a share of the value that makes connected sites one, or as printed",
    )
    p: Norm = Field(default=2, description="norm of the differences: 1, 2 or inf")
    eta: float = Field(default=1.0, gt=0, description="η of (3); with an absolute λ only ηλ counts")
    groups: Literal["all", "tensor"] = Field(
        default="all", description="norm over all personal parameters, as printed, or tensor by tensor"
    )
    network: Literal["knn", "complete", "given"] = Field(
        default="knn", description="E: nearest neighbours by sketches, every pair, or `edges`"
    )
    k: int = Field(default=3, ge=1, description="nearest neighbours of a site")
    sketch: Form = Field(
        default="labels", description="what the neighbours are found by: labels, features, image or gradient"
    )
    metric: Metric = Field(default="l1", description="distance of sketches: l1, l2 or cosine")
    sketch_size: int = Field(default=256, ge=8, le=4096, description="values of a gradient's sketch")
    edges: tuple[str, ...] = Field(default=(), description="pairs of aliases, alpha:beta, for network=given")
    alternate: bool = Field(
        default=False, description="train x first, then z, in an epoch set each, in place of both together"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.network == "given") != bool(self.edges):
            raise ValueError("network 'given' needs edges (alpha:beta), and the other networks take none")
        for edge in self.edges:
            ends = edge.split(":")
            if len(ends) != 2 or not all(ends) or ends[0] == ends[1]:
                raise ValueError(f"an edge is two different aliases, alpha:beta, got '{edge[:80]}'")
        if self.scale == "relative" and self.lam > 1:
            raise ValueError(
                f"a relative lam is a share, 0 to 1, got {self.lam:g}; scale 'absolute' takes more"
            )
        return self

    @property
    def fuses(self) -> bool:
        """Whether personal parts are drawn together at all."""
        return bool(self.personal) and self.lam > 0

    @property
    def sketches(self) -> bool:
        """Whether sites send a sketch."""
        return self.fuses and self.network == "knn"


def personal_names(personal: tuple[str, ...], model: Tensors, groups: Groups) -> list[str]:
    """Return the personal parameters, in the network's order.

    Raises:
        ConfigError: A group or pattern that the network does not have.
    """
    if not personal:
        return []
    if AUTO in personal:
        usual = ("decoder", "head") if groups.names.get("decoder") else ("head",)
        personal = (*usual, *(entry for entry in personal if entry != AUTO))
    parameters = set(groups["all"])
    return groups.select(personal, [name for name in model if name in parameters], what="pfednet.personal")


class PFedNetServer(ServerHalf):
    """Server half: FedAvg of x, the fusion step of Z."""

    uplink: tuple[PayloadSpec, ...] = (MODEL, SKETCH)

    def __init__(self, params: PFedNetParams) -> None:
        super().__init__(params)
        self.uplink = (MODEL, replace(SKETCH, form=params.sketch)) if params.sketches else (MODEL,)

    def init(self, model: Tensors, groups: Groups, ctx: RoundContext) -> State:
        """Return the model, x and the mean of Z, and the names of the personal parameters.

        Raises:
            ConfigError: Unknown groups, an edge to a site that takes no part, or pictures of tables.
        """
        if self.params.sketches and self.params.sketch == "image" and all(v.ndim < 4 for v in model.values()):
            raise ConfigError(
                "pfednet.sketch 'image' is for pictures and volumes; a table has none. Use labels, features or gradient."
            )
        for edge in self.params.edges:
            for end in edge.split(":"):
                if self.sites and end not in self.sites:
                    raise ConfigError(
                        f"pfednet.edges: no site '{end[:64]}' takes part. {nearest(end, self.sites)}"
                    )
        names = personal_names(self.params.personal, model, groups)
        return State(values={NAMES: json.dumps(names)}).having("model", model)

    def stream(self, site: str) -> str:
        """Return the site: each receives a model of its own, unless nothing is personal."""
        return site if self.params.personal else ""

    def send(self, state: State, site: str, ctx: RoundContext) -> list[Payload]:
        """Return x and the site's z; before the site's first round the mean of all."""
        own = {
            name: state.tensors[key] for name in _names(state) if (key := f"z/{site}/{name}") in state.tensors
        }
        model = Payload("model", Kind.MODEL, {**state.part("model"), **own})
        if self._wanted(state, site, ctx):
            model.meta[WANTED] = True
        return [model]

    def begin(self, state: State, ctx: RoundContext) -> Accumulator:
        """Open the round."""
        return Accumulator(extra={"names": _names(state), "shelf": Shelf("personal parts"), "sketches": {}})

    def check(self, reply: Reply, state: State, ctx: RoundContext) -> None:
        """Refuse a sketch out of its place or form."""
        sketch, wanted = reply.payloads.get("sketch"), self._wanted(state, reply.site, ctx)
        if (sketch is not None) != wanted:
            raise PayloadError(
                f"{reply.site}: round {ctx.round} {'needs the' if wanted else 'takes no'} sketch of the site, the answer has "
                f"{'none' if wanted else 'one'}. Let both ends run the same version.", site=reply.site,
            )  # fmt: skip
        if sketch is not None:
            values = check_sketch(sketch.tensors, self.params.sketch, self.params.sketch_size, who=reply.site)
            if self.params.metric == "cosine" and not bool(values.any()):
                raise PayloadError(
                    f"{reply.site}: its sketch is all zeros, which has no angle to the others'. Use pfednet.metric l1 or l2.",
                    site=reply.site,
                )

    def fold(self, acc: Accumulator, reply: Reply) -> Accumulator:
        """Take in one reply: its x into the mean, its z to the shelf."""
        values = reply.payloads["model"].tensors
        names = acc.extra["names"]
        if names:
            acc.extra["shelf"].put({name: values[name] for name in names}, who=reply.site)
        if "sketch" in reply.payloads:
            acc.extra["sketches"][reply.site] = reply.payloads["sketch"].tensors[self.params.sketch]
        personal = set(names)
        shared = {name: value for name, value in values.items() if name not in personal}
        return super().fold(
            acc, Reply(reply.site, reply.cases, {"model": Payload("model", Kind.MODEL, shared)})
        )

    def finish(self, state: State, acc: Accumulator, ctx: RoundContext) -> State:
        """Close the round: the mean of x, then (3) for Z."""
        state = super().finish(state, acc, ctx)
        if acc.extra["sketches"]:
            state = state.having("sketch", state.part("sketch") | acc.extra["sketches"])
        if acc.extra["names"]:
            state = self._fused(state, acc)
        acc.extra["shelf"].close()
        return state

    def update(self, state: State, reduced: dict[str, Tensors], ctx: RoundContext) -> State:
        """Return the state with the mean of x."""
        old, mean = state.part("model"), reduced.get("model", {})
        return state.having(
            "model",
            {key: cast_like(mean[key], value) if key in mean else value for key, value in old.items()},
        )

    def graph(self, state: State, sites: list[str]) -> Graph:
        """Return the network of some sites, in their order; a site whose sketch fits no other's has no edge."""
        if not self.params.fuses:
            return graph_of(len(sites), [])
        if self.params.network == "complete":
            return complete_graph(len(sites))
        place = {site: number for number, site in enumerate(sites)}
        if self.params.network == "given":
            pairs = [edge.split(":") for edge in self.params.edges]
            there = {tuple(sorted((place[i], place[j]))) for i, j in pairs if i in place and j in place}
            return graph_of(len(sites), [(i, j) for i, j in there])
        held = {site: sketch for site, sketch in state.part("sketch").items() if site in place}
        sizes = Counter(len(sketch) for sketch in held.values())
        usual = max(sizes, key=lambda size: (sizes[size], -size), default=0)
        chosen = [site for site in sites if site in held and len(held[site]) == usual]
        if len(chosen) < 2:
            return graph_of(len(sites), [])
        rows = torch.stack([held[site] for site in chosen])
        found = nearest_neighbours(rows, self.params.k, self.params.metric)
        return graph_of(len(sites), [(place[chosen[i]], place[chosen[j]]) for i, j in found.edges])

    def _fused(self, state: State, acc: Accumulator) -> State:
        """Return the state after (3) over the sites that answered: their new z, and the mean of all sites' in the model."""
        params: PFedNetParams = self.params
        names, shelf, sites = acc.extra["names"], acc.extra["shelf"], list(acc.sites)
        graph = self.graph(state, sites)
        solver = Fusion(graph, eta=params.eta, p=params.p, tolerance=1e-6)
        ends = Ends()
        parts, model = state.part("z"), state.part("model")
        known = sorted({key.partition("/")[0] for key in parts} | set(sites))
        for name, Z in fuse_blocks(
            solver, names, shelf.stack, params.lam if graph.edges else 0.0,
            relative=params.scale == "relative", by_tensor=params.groups == "tensor", ends=ends,
        ):  # fmt: skip
            for site, value in zip(sites, Z, strict=True):
                parts[f"{site}/{name}"] = cast_like(value, model[name]).clone()
            stack = torch.stack([parts[f"{site}/{name}"] for site in known])
            how = self.reduction(MODEL)
            mean = self._robust(how, stack) if how in ROBUST else stack.to(torch.float64).mean(dim=0)
            model[name] = cast_like(mean, model[name])
        few = len(graph.edges) <= MOST_TOLD
        acc.extra["told"] = {
            "kind": "similarity-network",
            "edges": [[sites[i], sites[j]] for i, j in graph.edges] if few else len(graph.edges),
            "lam": ends.lam,
            "distance_before": ends.distance[0],
            "distance_after": ends.distance[1],
            "iterations": ends.iterations,
            "converged": ends.converged,
        }
        return state.having("model", model).having("z", parts)

    def figures(self, state: State, acc: Accumulator, ctx: RoundContext) -> dict[str, Any]:
        """Return the network, the λ used, and how far apart neighbours were before and after (3)."""
        return dict(acc.extra.get("told", {})) if self.params.fuses else {}

    def _wanted(self, state: State, site: str, ctx: RoundContext) -> bool:
        """Tell whether a site is to send its sketch: until one has arrived."""
        return self.params.sketches and ctx.round <= ctx.rounds and f"sketch/{site}" not in state.tensors


class PFedNetSite(SiteHalf):
    """Site half: trains what it received, and tells what its data is like.

    The sketch is made once, before the first round, from the run's first weights, and kept: whatever the coordinator asks
    for later, it gets this one.
    """

    def init(self, work: SiteWork) -> State:
        """Return the site's sketch, where the run has sketches."""
        params: PFedNetParams = self.params
        if not params.sketches:
            return State()
        work.progress(SKETCHING)
        names = personal_names(params.personal, work.weights(), work.groups)
        try:
            sketch = data_sketch(params.sketch, work, size=params.sketch_size, names=names)
        except ValueError as error:
            raise TrainingError(
                f"{work.ctx.site}: its sketch '{params.sketch}' cannot be made; the site's log says why. Look at its data "
                "with `wardround site check`, or use another pfednet.sketch.", detail=str(error), site=work.ctx.site,
            ) from error  # fmt: skip
        return State().having("sketch", {params.sketch: sketch})

    def models(self, received: Payloads, state: State) -> dict[str, Tensors]:
        """Return the site's own model."""
        return {PERSONAL: received["model"].tensors}

    def train(self, work: SiteWork, received: Payloads, state: State) -> SiteResult:
        """Train x and z, send both, and the sketch where asked."""
        params: PFedNetParams = self.params
        weights = self.start(received, state)
        work.load(weights)
        names = personal_names(params.personal, weights, work.groups) if params.alternate else []
        if 0 < len(names) < len(weights):
            personal = set(names)
            stats = work.fit(trainable=[name for name in weights if name not in personal])
            work.fit(stream="personal", trainable=names)
        else:
            stats = work.fit()
        payloads = [Payload("model", Kind.MODEL, work.weights())]
        if params.sketches and received["model"].meta.get(WANTED, False):
            payloads.append(Payload("sketch", Kind.DATA_SKETCH, state.part("sketch")))
        return SiteResult(payloads, state, work.cases, stats)


def _names(state: State) -> list[str]:
    return list(json.loads(str(state.values[NAMES])))


PFEDNET = Method(
    name="pfednet",
    title="shared and personal components, the personal ones fused between similar hospitals",
    params=PFedNetParams,
    server=PFedNetServer,
    site=PFedNetSite,
    neutral={"personal": ()},
    equals="fedavg",
    personal=True,
)
